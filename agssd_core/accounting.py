"""What private training costs: epsilon of Poisson-sampled Gaussian steps, and the ways back.

Everything is counted in Renyi divergence (RDP), because that adds over steps, rounds and runs
without another delta. One unit is one patient of one site, added or removed.
"""

import math
import warnings
from collections.abc import Sequence
from functools import lru_cache
from importlib.metadata import version
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from agssd_core.errors import AccountingError

ORDERS = (
    *(1 + tenth / 10 for tenth in range(1, 100)),
    *range(11, 65),
    *(72, 80, 96, 128, 192, 256, 384, 512),
)
"""Opacus' default orders and larger ones: without these no epsilon falls below about 0.07."""

MOST_STEPS = 10**9
_LEAST_SIGMA, _MOST_SIGMA = 0.1, 1e5
_SIGMA_PRECISION = 1e-4


class Spending(NamedTuple):
    """Steps of one kind.

    Attributes:
        sigma: noise multiplier, standard deviation in units of one patient's greatest norm.
        rate: q, the chance of a patient to be drawn into a step.
        steps: how many of them.
    """

    sigma: float
    rate: float
    steps: int


class Spend(Protocol):
    """Asked before anything of a round is drawn; raises to forbid it."""

    def __call__(self, sigma_eff: float, q: float, steps: int) -> None:
        """Reserve ``steps`` steps of noise ``sigma_eff`` at sampling rate ``q``."""


def accountant_name() -> str:
    """Who counted, for ledgers and statements."""
    return f"rdp opacus {version('opacus')}"


def epsilon(history: Sequence[tuple[float, float, int]], *, delta: float) -> float:
    """Epsilon at ``delta`` of everything in a history of (sigma, q, steps); 0 for none.

    Raises:
        AccountingError: a number has no meaning, or the noise is too small to be counted.

    Source:
        Mironov et al. 2019, arXiv:1908.10530; conversion by Balle et al. 2020, arXiv:1905.09982,
        Theorem 21; both as Opacus' ``RDPAccountant`` computes them.
    """
    _require_delta(delta)
    parts = [Spending(*item) for item in history if item[2]]
    if not parts:
        return 0.0
    return _convert(sum((_divergence(part) for part in parts), np.zeros(len(ORDERS))), delta)


def joint_sigma(*sigmas: float) -> float:
    """Noise of one Gaussian that costs what several on the same draw of patients cost together.

    Source:
        All results divided by their own noise are one vector of sensitivity sqrt(sum 1/s_i^2).
    """
    if not sigmas or any(not sigma > 0 for sigma in sigmas):
        raise AccountingError("a noise multiplier is not above 0. Use one, or leave the part out.")
    return 1 / math.sqrt(math.fsum(1 / sigma**2 for sigma in sigmas))


def most_steps(
    budget: float,
    *,
    sigma: float,
    rate: float,
    delta: float,
    history: Sequence[tuple[float, float, int]] = (),
) -> int:
    """Largest number of steps after which epsilon is still within a budget.

    Returns:
        0 when the history has spent it already; ``MOST_STEPS`` at most.
    """

    def fits(steps: int) -> bool:
        return epsilon([*history, (sigma, rate, steps)], delta=delta) <= budget

    if not fits(1):
        return 0
    low, high = 1, 2
    while high < MOST_STEPS and fits(high):
        low, high = high, high * 2
    if high >= MOST_STEPS and fits(MOST_STEPS):
        return MOST_STEPS
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def least_sigma(
    budget: float,
    *,
    rate: float,
    steps: int,
    delta: float,
    history: Sequence[tuple[float, float, int]] = (),
) -> float:
    """Smallest noise multiplier, to 1 in 10000, with which the steps stay within a budget.

    Raises:
        AccountingError: the history alone leaves no room, or no noise is enough.
    """

    def fits(sigma: float) -> bool:
        return epsilon([*history, (sigma, rate, steps)], delta=delta) <= budget

    low, high = _LEAST_SIGMA, 1.0
    while not fits(high):
        low, high = high, high * 2
        if high > _MOST_SIGMA:
            raise AccountingError(
                f"no noise keeps these steps within epsilon {budget:g} at delta {delta:g}. Raise "
                "the budget or delta, or take fewer steps."
            )
    while high / low > 1 + _SIGMA_PRECISION:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _divergence(part: Spending) -> NDArray[np.float64]:
    """RDP of these steps at every order."""
    plain = all(math.isfinite(number) for number in part)
    if not (plain and part.sigma > 0 and 0 < part.rate <= 1 and part.steps > 0):
        raise AccountingError(
            f"noise {part.sigma:g}, rate {part.rate:g} and {part.steps} steps cannot be counted: "
            "noise and steps must be above 0, the rate above 0 and at most 1."
        )
    return np.asarray(part.steps * np.asarray(_of_one_step(part.sigma, part.rate)))


@lru_cache(maxsize=512)
def _of_one_step(sigma: float, rate: float) -> tuple[float, ...]:
    # Imported here: Opacus brings torch, and most verbs of a ledger need neither.
    from opacus.accountants.analysis.rdp import compute_rdp

    try:
        found = compute_rdp(q=rate, noise_multiplier=sigma, steps=1, orders=list(ORDERS))
    except (ValueError, OverflowError, ZeroDivisionError):
        raise AccountingError(
            f"noise {sigma:g} at rate {rate:g} is too small to be counted. Raise the noise "
            "multiplier to 0.3 or more."
        ) from None
    # What Opacus cannot compute at an order is no bound there.
    return tuple(float(value) if value >= 0 else math.inf for value in found)


def _convert(divergence: NDArray[np.float64], delta: float) -> float:
    from opacus.accountants.analysis.rdp import get_privacy_spent

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # says that a further order might do slightly better
        found, _ = get_privacy_spent(orders=list(ORDERS), rdp=divergence, delta=delta)
    return max(float(found), 0.0) if math.isfinite(found) else math.inf


def _require_delta(delta: float) -> None:
    if not 0 < delta < 1:
        raise AccountingError(
            f"delta {delta:g} is not between 0 and 1. Use less than 1 / patients of the site."
        )
