"""Whether the site's privacy budget is enough for a run that trains privately."""

from collections.abc import Iterator
from pathlib import Path

from agssd_core.accounting import Spending, epsilon, most_steps
from agssd_core.config import Cohort, RunConfig, dump_config
from agssd_core.data.catalogue import open_catalogue
from agssd_core.errors import AgssdError
from client.budget import Limit, limits_of, stated_delta
from client.ledger import Ledger, LedgerPlace, population_of
from client.ledger_chain import RESERVED, Chain
from client.preflight_row import Row, fail, ok, warn

NAME = "privacy budget"


def privacy_rows(site: Path, config: RunConfig, *, run: str = "") -> Iterator[Row]:
    """A line for a run that trains privately, none for others.

    Args:
        site: with its ledger.
        config: of the run.
        run: its id, when the site has begun it; rounds that it has paid for are not planned again.
    """
    if not config.privacy.enabled or config.privacy.noise_multiplier == 0:  # asks no ledger
        return
    try:
        chain = _chain(site)
        planned = _planned(site, config, chain, run)
        text = dump_config(config)
        limits, delta = limits_of(site, text), stated_delta(site, text)
        yield _row(chain, planned, limits, delta)
    except AgssdError as error:
        fact, _, remedy = str(error).partition(". ")
        yield fail(NAME, fact.rstrip("."), remedy)


def _row(chain: Chain, planned: list[Spending], limits: tuple[Limit, ...], delta: float) -> Row:
    history = chain.history()
    for limit in limits:
        if epsilon([*history, *planned], delta=limit.delta) > limit.epsilon:
            return _too_dear(history, planned, limit)
    spent, after = (epsilon(each, delta=delta) for each in (history, [*history, *planned]))
    steps = sum(part.steps for part in planned)
    said = (
        f"epsilon {spent:.3f} is spent, {steps} planned step(s) would make it {after:.3f} at delta "
        f"{delta:g}"
    )
    if not limits:
        return warn(NAME, f"{said}; no budget is set", "Write one into policy.yaml.")
    least = min(limits, key=lambda limit: limit.epsilon)
    return ok(NAME, f"{said}; the budget of the {least.owner} is {least.epsilon:g}")


def _too_dear(history: tuple[Spending, ...], planned: list[Spending], limit: Limit) -> Row:
    spent = epsilon(history, delta=limit.delta)
    after = epsilon([*history, *planned], delta=limit.delta)
    steps = sum(part.steps for part in planned)
    found = (
        f"epsilon {spent:.3f} is spent, {steps} planned step(s) would make it {after:.3f}, the "
        f"budget of the {limit.owner} is {limit.epsilon:g} at delta {limit.delta:g}"
    )
    if len(planned) == 1:
        part = planned[0]
        affords = most_steps(
            limit.epsilon, sigma=part.sigma, rate=part.rate, delta=limit.delta, history=history
        )
        found += f"; it affords {affords} step(s)"
    whose = "privacy.epsilon_budget in policy.yaml" if limit.owner == "site" else "the plan's"
    return fail(
        NAME,
        found,
        f"Raise {whose}, or ask the coordinator for more noise or fewer rounds; "
        "`agssd-site ledger plan SITE` says what they cost.",
    )


def _planned(site: Path, config: RunConfig, chain: Chain, run: str) -> list[Spending]:
    """What the rest of the run would add, for each cohort that the site has scans for."""
    # Imported here: it brings torch, which the other checks do not need.
    from agssd_core.training.privacy.rounds import calibrated, sampling_rate, sigma_of

    catalogue = open_catalogue(site)
    paid = {entry.round for entry in chain.entries if entry.state == RESERVED and entry.run == run}
    found = []
    for cohort in [name for name in config.cohorts if name in catalogue.cohorts]:
        own = config.for_cohort(cohort)
        rounds = own.federation.rounds - len(paid)
        patients, centred = len(catalogue.patients_of(cohort)), _centred(own, cohort)
        privacy = calibrated(
            own.privacy, patients=patients, steps=own.federation.total_steps, centred=centred
        )
        rate, sigma = sampling_rate(privacy, patients), sigma_of(privacy, centred=centred)
        found.append(Spending(sigma, rate, max(rounds, 0) * own.federation.steps_per_round))
    return found


def _centred(config: RunConfig, cohort: Cohort) -> bool:
    """Whether a noised centre is paid for beside the gradient."""
    return cohort == "ct-mr" and config.agssd.loss.cls > 0


def _chain(site: Path) -> Chain:
    return Ledger(LedgerPlace.of_site(site), site="", population=population_of(site)).read()
