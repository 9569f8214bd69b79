"""What a site can afford: epsilon of a plan, and the noise or the rounds that a budget allows."""

from collections.abc import Sequence
from dataclasses import dataclass

from agssd_core.accounting import Spending, epsilon, least_sigma, most_steps
from agssd_core.errors import ConfigError

NEIGHBOURS = (0.7, 1.0, 1.4, 2.0)
"""Noise multipliers shown beside the planned one, as multiples of it."""


@dataclass(frozen=True)
class Terms:
    """What every answer rests on.

    Attributes:
        rate: q, the chance of a patient to be drawn into a step.
        steps: optimiser steps of a round.
        delta: of (epsilon, delta).
        history: what was spent on these patients before.
    """

    rate: float
    steps: int
    delta: float
    history: tuple[Spending, ...] = ()

    def epsilon_after(self, sigma: float, rounds: int) -> float:
        """Epsilon of the history and so many rounds."""
        planned = (sigma, self.rate, self.steps * rounds)
        return epsilon([*self.history, planned], delta=self.delta)

    def rounds_within(self, budget: float, sigma: float) -> int:
        """Most rounds within a budget."""
        steps = most_steps(
            budget, sigma=sigma, rate=self.rate, delta=self.delta, history=self.history
        )
        return steps // self.steps

    def sigma_within(self, budget: float, rounds: int) -> float:
        """Least noise with which so many rounds stay within a budget."""
        return least_sigma(
            budget,
            rate=self.rate,
            steps=self.steps * rounds,
            delta=self.delta,
            history=self.history,
        )


@dataclass(frozen=True)
class Plan:
    """An answer.

    Attributes:
        asked: ``epsilon``, ``sigma`` or ``rounds``: what was found for what was given.
        budget: the given epsilon, None when epsilon was asked for.
    """

    terms: Terms
    asked: str
    sigma: float
    rounds: int
    budget: float | None

    @property
    def epsilon(self) -> float:
        """Epsilon after all rounds."""
        return self.terms.epsilon_after(self.sigma, self.rounds)


def plan_for(
    terms: Terms, *, sigma: float | None, rounds: int | None, budget: float | None
) -> Plan:
    """Find the one of noise, rounds and epsilon that was not given.

    With all three given, epsilon is found and the budget is drawn beside it.

    Raises:
        ConfigError: fewer than two are given.
        AccountingError: no noise is enough, or a number cannot be counted.
    """
    if sigma is not None and rounds is not None:
        return Plan(terms, "epsilon", sigma, rounds, budget)
    if budget is not None and rounds is not None:
        return Plan(terms, "sigma", terms.sigma_within(budget, rounds), rounds, budget)
    if budget is not None and sigma is not None:
        return Plan(terms, "rounds", sigma, terms.rounds_within(budget, sigma), budget)
    raise ConfigError(
        "two of --sigma, --rounds and --epsilon are needed; the third is found. Add one."
    )


def sampling_rate(rate: float | None, patients: int | None, batch: float | None) -> float:
    """Q as given, or patients a step over patients of the site.

    Raises:
        ConfigError: neither or both are given, or a step would draw more than there are.
    """
    if (rate is None) == (patients is None or batch is None):
        raise ConfigError("give either --rate, or --patients with --batch.")
    if rate is None:
        rate = (batch or 0) / (patients or 1)
    if not 0 < rate <= 1:
        raise ConfigError(
            f"a step would draw {rate:g} of the patients; it must be above 0 and at most 1. "
            "Lower --batch."
        )
    return rate


def table(plan: Plan) -> tuple[tuple[str, ...], ...]:
    """Heading and rows: epsilon after a part of the rounds, for a few noise multipliers."""
    sigmas = sorted({round(plan.sigma * factor, 4) for factor in NEIGHBOURS})
    last = max(plan.rounds, 1)
    counts = sorted({max(1, round(last * part)) for part in (0.1, 0.25, 0.5, 1.0)} | {2 * last})
    head = ("rounds", *(f"sigma {sigma:.4g}" for sigma in sigmas))
    rows = (
        (str(count), *(f"{plan.terms.epsilon_after(sigma, count):.2f}" for sigma in sigmas))
        for count in counts
    )
    return (head, *rows)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a table with its columns to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    ]
