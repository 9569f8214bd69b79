"""Budgets of privacy: whose they are, where they stand, and whether a round fits into them."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agssd_core.accounting import Spending, epsilon
from agssd_core.errors import AccountingError, BudgetError, ConfigError, LedgerError
from client.policy import read_policy

DEFAULT_DELTA = 1e-5


@dataclass(frozen=True)
class Limit:
    """Most that may be spent on a site's patients, and who says so (``plan`` or ``site``)."""

    owner: str
    epsilon: float
    delta: float


def limits_of(site: Path, config: str) -> tuple[Limit, ...]:
    """The budgets that hold: the plan's ``privacy``, and ``privacy`` in the site's policy.yaml.

    Raises:
        LedgerError: the site's policy cannot be read; the site is careful then.
    """
    found = []
    for owner, terms in (("plan", plan_privacy(config)), ("site", _policy(site))):
        budget = _number(terms, "epsilon_budget")
        if budget is not None and (budget > 0 or owner == "site"):
            delta = _number(terms, "delta")
            found.append(Limit(owner, budget, DEFAULT_DELTA if delta is None else delta))
    return tuple(found)


def stated_delta(site: Path, config: str) -> float:
    """Delta at which a site states epsilon: its own policy's, else the plan's."""
    for terms in (_policy(site), plan_privacy(config)):
        if (delta := _number(terms, "delta")) is not None:
            return delta
    return DEFAULT_DELTA


def require_within(limit: Limit, history: Sequence[Spending], spending: Spending) -> None:
    """Refuse what would pass a limit.

    Raises:
        BudgetError: with what is spent, planned and allowed.
    """
    after = epsilon([*history, spending], delta=limit.delta)
    if after <= limit.epsilon:
        return
    spent = epsilon(history, delta=limit.delta)
    raise BudgetError(
        f"epsilon {spent:.4g} is spent on this site's patients, these {spending.steps} steps would "
        f"make it {after:.4g}, and the budget of the {limit.owner} is {limit.epsilon:g} at delta "
        f"{limit.delta:g}. More noise or fewer steps cost less: see `agssd-site ledger plan`."
    )


def countable(history: Sequence[Spending], *, delta: float) -> float:
    """Epsilon of a history, as a number that can be written down.

    Raises:
        AccountingError: it is infinite.
    """
    found = epsilon(history, delta=delta)
    if not math.isfinite(found):
        raise AccountingError(
            "this noise is too small for any epsilon to be stated. Raise privacy.noise_multiplier."
        )
    return found


def plan_privacy(config: str) -> Mapping[str, Any]:
    """What a run's configuration (JSON) says of privacy; empty when it says nothing."""
    terms = json.loads(config).get("privacy") or {}
    return terms if isinstance(terms, dict) else {}


def _policy(site: Path) -> Mapping[str, Any]:
    """What the site's owner allows; empty at a site that is not enrolled and has no file."""
    try:
        policy = read_policy(site)
    except ConfigError:
        raise _bad_policy() from None
    return {} if policy is None else policy.privacy.model_dump()


def _number(terms: Mapping[str, Any], name: str) -> float | None:
    value = terms.get(name)
    if value is None:
        return None
    try:
        number = float(value)  # YAML reads 1e-5 as text
    except (TypeError, ValueError):
        raise _bad_policy() from None
    if isinstance(value, bool) or not math.isfinite(number) or number < 0:
        raise _bad_policy()
    return number


def _bad_policy() -> LedgerError:
    return LedgerError(
        "policy.yaml of the site's folder cannot be understood, so nothing is trained under "
        "privacy. Write it as `privacy: {epsilon_budget: 8, delta: 1.0e-5}`."
    )
