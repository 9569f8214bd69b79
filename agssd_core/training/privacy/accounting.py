"""What training costs: epsilon of subsampled Gaussian steps, and the seam to a site's ledger."""

import logging
import math
import warnings
from collections.abc import Sequence
from typing import Protocol

from opacus.accountants.analysis.rdp import compute_rdp, get_privacy_spent

from agssd_core.accounting import least_sigma
from agssd_core.config import PrivacyConfig
from agssd_core.errors import AccountingError, TrainingError

log = logging.getLogger(__name__)

ORDERS = (*(1 + tenth / 10 for tenth in range(1, 100)), *range(11, 64), 96, 128, 256, 512, 1024)
Spending = tuple[float, float, int]  # sigma_eff, q, steps


class Spend(Protocol):
    """Asked before anything of a round is drawn; raises to forbid it."""

    def __call__(self, sigma_eff: float, q: float, steps: int) -> None:
        """Reserve ``steps`` steps of noise ``sigma_eff`` at sampling rate ``q``."""


def accounted_not_enforced(sigma_eff: float, q: float, steps: int) -> None:
    """The simulation's spend: says what a ledger would have been asked."""
    log.warning(
        "privacy: %d steps at sigma_eff %.4g, q %.4g; accounted, not enforced", steps, sigma_eff, q
    )


def epsilon(spent: Sequence[Spending], *, delta: float) -> float:
    """Epsilon of a sequence of Poisson-sampled Gaussian mechanisms, add or remove one patient.

    Args:
        spent: (sigma_eff, q, steps) of each part; 0 for none.
        delta: of (epsilon, delta).

    Source:
        Mironov et al. 2019, arXiv:1908.10530; conversion by Balle et al. 2020, arXiv:1905.09982,
        both as Opacus computes them.
    """
    if not spent:
        return 0.0
    parts = [
        compute_rdp(q=q, noise_multiplier=sigma, steps=steps, orders=list(ORDERS))
        for sigma, q, steps in spent
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # says that a further order might do slightly better
        found, _ = get_privacy_spent(orders=list(ORDERS), rdp=sum(parts), delta=delta)
    return float(found)


def effective_sigma(gradient: float, centre: float | None) -> float:
    """One Gaussian that costs what two on the same draw of patients cost together.

    Args:
        gradient: noise multiplier of the gradient.
        centre: of the centre, each in units of its own greatest norm; None without one.

    Source:
        A vector of both, each divided by its noise, has sensitivity sqrt(1/a^2 + 1/b^2).
    """
    if centre is None or gradient == 0:
        return gradient
    return 1 / math.hypot(1 / gradient, 1 / centre)


def sampling_rate(privacy: PrivacyConfig, patients: int) -> float:
    """Rate q, the expected batch over the patients of the site, whose number is declared public.

    Raises:
        TrainingError: the site has too few patients for this plan.
    """
    if patients < privacy.expected_batch:
        raise TrainingError(
            f"privacy.expected_batch = {privacy.expected_batch:g} patients a step is more than "
            "the site has. Lower it for all sites, or train at this site without taking part."
        )
    if privacy.delta * patients >= 1:
        raise TrainingError(
            f"privacy.delta = {privacy.delta:g} is not below 1 / patients of the site, so it "
            "promises nothing. Lower it."
        )
    return privacy.expected_batch / patients


def calibrated(
    privacy: PrivacyConfig, *, patients: int, steps: int, centred: bool
) -> PrivacyConfig:
    """The settings with the site's own noise for ``target_epsilon``; as they are without one.

    Args:
        privacy: of the plan.
        patients: of the site, whose number is declared public.
        steps: of the whole plan.
        centred: whether a noised centre is paid for as well.

    Raises:
        TrainingError: the site has too few patients for this plan, or no noise is enough.
    """
    target = privacy.target_epsilon
    if target == 0:
        return privacy
    rate = sampling_rate(privacy, patients)
    try:
        sigma = least_sigma(target, rate=rate, steps=steps, delta=privacy.delta)
    except AccountingError as error:
        raise TrainingError(str(error)) from None
    # The ledger's accountant looks at other orders than this one; both must agree.
    while epsilon([(sigma, rate, steps)], delta=privacy.delta) > target:
        sigma *= 1.0005
    part = math.hypot(1, 1 / privacy.centre_ratio) if centred else 1.0
    # A last bit that rounding takes from the joint noise must not make the plan too dear.
    return privacy.model_copy(update={"noise_multiplier": sigma * part * (1 + 1e-9)})


def require_budget(privacy: PrivacyConfig, planned: Spending) -> float:
    """Epsilon of a whole plan at this site.

    Raises:
        TrainingError: it exceeds ``privacy.epsilon_budget``.
    """
    cost, budget = epsilon([planned], delta=privacy.delta), privacy.epsilon_budget
    if 0 < budget < cost:
        raise TrainingError(
            f"the plan costs epsilon {cost:.2f} at delta {privacy.delta:g}, the budget is "
            f"{budget:g}. Raise privacy.noise_multiplier, or lower federation.rounds, "
            "steps_per_round or privacy.expected_batch."
        )
    return cost
