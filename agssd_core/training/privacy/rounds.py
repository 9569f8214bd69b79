"""What every private round of a site shares: who is drawn, what it costs, what may be told."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from agssd_core.config import PrivacyConfig, RunConfig
from agssd_core.errors import TrainingError
from agssd_core.training.privacy.accounting import (
    Spend,
    accounted_not_enforced,
    calibrated,
    effective_sigma,
    epsilon,
    require_budget,
    sampling_rate,
)
from agssd_core.training.privacy.noise import NoiseStream
from agssd_core.training.privacy.sampling import Chunk, OfPatient, PatientSampler

log = logging.getLogger(__name__)


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
        self._sampler = PatientSampler(
            scans, seed=config.seed, site=site, physical_batch=privacy.physical_batch
        )
        self.rate = sampling_rate(privacy, len(self._sampler))
        self.sigma = joint_sigma(privacy, centred=centred)
        self.spend: Spend = accounted_not_enforced
        self.private = privacy.secure_noise

    def begin(self, first_step: int, steps: int, total_steps: int) -> Draw:
        """Pay for a round, then draw its patients.

        Raises:
            TrainingError: the plan costs more than ``privacy.epsilon_budget``.
        """
        if self.sigma == 0:
            log.warning("privacy.noise_multiplier = 0: no noise, so NOTHING here is private")
        else:
            require_budget(self._privacy, (self.sigma, self.rate, total_steps))
            self.spend(self.sigma, self.rate, steps)
        stream = self._stream(first_step)
        self.private = self.private and stream.private
        span = range(first_step, first_step + steps)
        return Draw(list(self._sampler.draw(span, rate=self.rate, stream=stream)), stream)

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


def with_own_noise(config: RunConfig, scans: Sequence[OfPatient], *, centred: bool) -> RunConfig:
    """A plan with the site's own noise; see ``accounting.calibrated``."""
    patients = len({scan.patient for scan in scans})
    privacy = calibrated(
        config.privacy, patients=patients, steps=config.federation.total_steps, centred=centred
    )
    return config.model_copy(update={"privacy": privacy})


def joint_sigma(privacy: PrivacyConfig, *, centred: bool) -> float:
    """Noise multiplier of gradient and centre as one mechanism."""
    gradient = privacy.noise_multiplier
    return effective_sigma(gradient, privacy.centre_ratio * gradient if centred else None)


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
