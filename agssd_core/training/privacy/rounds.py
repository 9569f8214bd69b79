"""What every private round of a site shares: who is drawn, what it costs, what may be told."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from agssd_core.accounting import Spend, Spending, epsilon, joint_sigma, least_sigma
from agssd_core.config import PrivacyConfig, RunConfig
from agssd_core.errors import AccountingError, BudgetError, TrainingError
from agssd_core.noise import NoiseStream
from agssd_core.training.privacy.sampling import Chunk, OfPatient, PatientSampler
from agssd_core.views.loader import prefetched

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Draw:
    """A round's patients by step, and the stream of its noise."""

    chunks: list[Chunk]
    stream: NoiseStream


class PrivateRounds:
    """A site's private rounds.

    Args:
        config: the cohort's configuration.
        scans: the site's scans, each of which says whose it is.
        site: enrolled name.
        centred: whether a noised centre is paid for as well.

    Attributes:
        spend: asked before anything of a round is drawn; put a ledger's in its place.
        private: False once any round's noise could be repeated.
        rate: q. sigma: noise multiplier of gradient and centre together.

    Raises:
        TrainingError: the site has too few patients for the plan.
    """

    def __init__(
        self, config: RunConfig, scans: Sequence[OfPatient], *, site: str, centred: bool
    ) -> None:
        privacy = config.privacy
        self._seed, self._site, self._privacy = config.seed, site, privacy
        self._workers = config.training.loader_workers
        self._sampler = PatientSampler(
            scans, seed=config.seed, site=site, physical_batch=privacy.physical_batch
        )
        self.rate = sampling_rate(privacy, len(self._sampler))
        self.sigma = sigma_of(privacy, centred=centred)
        self.spend: Spend = accounted_not_enforced
        self.private = privacy.secure_noise

    def begin(self, first_step: int, steps: int, total_steps: int) -> Draw:
        """Pay for a round, then draw its patients.

        Raises:
            BudgetError: the plan costs more than ``privacy.epsilon_budget``, or the ledger says
                no.
        """
        if self.sigma == 0:
            log.warning("privacy.noise_multiplier = 0: no noise, so NOTHING here is private")
        else:
            require_budget(self._privacy, Spending(self.sigma, self.rate, total_steps))
            self.spend(self.sigma, self.rate, steps)
        stream = self._stream(first_step)
        self.private = self.private and stream.private
        span = range(first_step, first_step + steps)
        return Draw(list(self._sampler.draw(span, rate=self.rate, stream=stream)), stream)

    def take(
        self,
        steps: range,
        total_steps: int,
        *,
        cut: Callable[[Chunk], T],
        add: Callable[[Chunk, T], None],
        finish: Callable[[int, NoiseStream], None],
        progress: Progress | None = None,
    ) -> dict[str, float]:
        """Pay for a round and take its steps: gradients are added chunk by chunk, then noised.

        Args:
            steps: the global steps of the round.
            total_steps: of the run.
            cut: a chunk's views, also where nobody was drawn; runs ahead in the loader's threads.
            add: takes a chunk's clipped gradients in.
            finish: noises a step's sum and moves the weights.
            progress: told steps taken and all steps of the round.

        Returns:
            Metrics that may leave the site.

        Raises:
            BudgetError: as ``begin``.
        """
        drawn = self.begin(steps.start, len(steps), total_steps)
        chunks = drawn.chunks
        ahead = prefetched(
            lambda number: cut(chunks[number]), range(len(chunks)), workers=self._workers
        )
        for chunk, views in zip(chunks, ahead, strict=True):
            add(chunk, views)
            if chunk.last:
                finish(chunk.step, drawn.stream)
                if progress is not None:
                    progress(chunk.step - steps.start + 1, len(steps))
        return self.metrics(steps.stop)

    def metrics(self, steps_taken: int) -> dict[str, float]:
        """What may leave: numbers that follow from plan and patient count alone.

        Losses, norms, the monitor's findings and times depend on patients without noise.
        """
        if self.sigma == 0:  # epsilon is infinite
            return {"private": 0.0, "privacy_sigma": 0.0, "privacy_rate": self.rate}
        spent = epsilon([(self.sigma, self.rate, steps_taken)], delta=self._privacy.delta)
        return {
            "private": float(self.private),
            "privacy_epsilon": spent,
            "privacy_sigma": self.sigma,
            "privacy_rate": self.rate,
        }

    def _stream(self, first_step: int) -> NoiseStream:
        if self._privacy.secure_noise:
            return NoiseStream.from_system()
        log.warning("privacy.secure_noise = false: noise repeats, so NOTHING here is private")
        return NoiseStream.repeatable(self._seed, self._site, first_step)


def accounted_not_enforced(sigma_eff: float, q: float, steps: int) -> None:
    """The spend of a trainer without a ledger: says what one would have been asked."""
    log.warning(
        "privacy: %d steps at sigma_eff %.4g, q %.4g; accounted, not enforced", steps, sigma_eff, q
    )


def with_own_noise(config: RunConfig, scans: Sequence[OfPatient], *, centred: bool) -> RunConfig:
    """A plan with the site's own noise; see ``calibrated``."""
    patients = len({scan.patient for scan in scans})
    privacy = calibrated(
        config.privacy, patients=patients, steps=config.federation.total_steps, centred=centred
    )
    return config.model_copy(update={"privacy": privacy})


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
    if privacy.target_epsilon == 0:
        return privacy
    rate = sampling_rate(privacy, patients)
    try:
        sigma = least_sigma(privacy.target_epsilon, rate=rate, steps=steps, delta=privacy.delta)
    except AccountingError as error:
        raise TrainingError(str(error)) from None
    part = math.hypot(1, 1 / privacy.centre_ratio) if centred else 1.0
    # A last bit that rounding takes from the joint noise must not make the plan too dear.
    return privacy.model_copy(update={"noise_multiplier": sigma * part * (1 + 1e-9)})


def sigma_of(privacy: PrivacyConfig, *, centred: bool) -> float:
    """Noise multiplier of gradient and centre as one mechanism."""
    gradient = privacy.noise_multiplier
    both = centred and gradient > 0
    return joint_sigma(gradient, privacy.centre_ratio * gradient) if both else gradient


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


def require_budget(privacy: PrivacyConfig, planned: Spending) -> None:
    """Refuse a whole plan that this site could never carry to its end.

    Raises:
        BudgetError: it costs more than ``privacy.epsilon_budget``.
    """
    cost, budget = epsilon([planned], delta=privacy.delta), privacy.epsilon_budget
    if 0 < budget < cost:
        raise BudgetError(
            f"the plan costs epsilon {cost:.2f} at delta {privacy.delta:g}, the budget is "
            f"{budget:g}. Raise privacy.noise_multiplier, or lower federation.rounds, "
            "steps_per_round or privacy.expected_batch."
        )


def require_one_process(processes: int) -> None:
    """Refuse several processes: each would draw and noise for itself.

    Raises:
        TrainingError: there are several.
    """
    if processes > 1:
        raise TrainingError(
            f"{processes} processes share this site's batch; privacy needs one. Set "
            "training.processes = 1."
        )
