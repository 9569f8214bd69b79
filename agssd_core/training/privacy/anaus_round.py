"""A private round of ANAUS at one site; as ``agssd_round`` for ultrasound.

Order as in ``agssd_step``: clip every patient's gradient, sum, noise, divide by a constant; only
then pull, LARS and the teacher.
"""

from collections.abc import Callable, Sequence

import torch

from agssd_core.config import RunConfig
from agssd_core.noise import NoiseStream
from agssd_core.training.anaus_step import AnausLearner
from agssd_core.training.privacy.anaus_losses import (
    PatientFrame,
    frame_losses,
    idle_parameters,
    patient_frame,
)
from agssd_core.training.privacy.gradients import ClippedSum
from agssd_core.training.privacy.mechanism import add_pull, set_private_gradients
from agssd_core.training.privacy.rounds import PrivateRounds, Progress, with_own_noise
from agssd_core.training.privacy.sampling import Chunk
from agssd_core.views.seeds import rng_for, torch_generator_for
from agssd_core.views.us_batch import FrameReader, UsBatch, cut_us_batch

Rates = tuple[float, float]  # learning rate, EMA momentum


class PrivateAnaus:
    """The private side of an ``AnausTrainer``.

    Args:
        config: the cohort's configuration.
        frames: the site's prepared frames with their label maps.
        learner: what trains.
        site: enrolled name; part of every seed.

    Raises:
        TrainingError: the site has too few patients for the plan, or a layer mixes them.
    """

    def __init__(
        self, config: RunConfig, frames: FrameReader, learner: AnausLearner, *, site: str
    ) -> None:
        config = with_own_noise(config, frames.infos, centred=False)
        self._config, self._frames, self._site = config, frames, site
        self._learner = learner
        for parameter in idle_parameters(learner.pair.student, config.anaus):
            parameter.requires_grad = False
        self.clipped = ClippedSum(
            learner.pair.student,
            max_grad_norm=config.privacy.max_grad_norm,
            mode=config.privacy.mode,
        )
        self.rounds = PrivateRounds(config, frames.infos, site=site, centred=False)

    def train_steps(
        self,
        steps: range,
        total_steps: int,
        *,
        rates: Callable[[int], Rates],
        progress: Progress | None = None,
    ) -> dict[str, float]:
        """Take the steps; see ``AnausTrainer.train_steps``.

        Returns:
            Metrics that may leave the site, and none besides.

        Raises:
            BudgetError: the plan costs more than its budget.
        """
        told = self.rounds.take(
            steps,
            total_steps,
            cut=self._cut,
            add=lambda chunk, batches: self.add(self._frames_of(chunk, batches)),
            finish=lambda step, stream: self.finish(rates(step), stream),
            progress=progress,
        )
        learning_rate, ema_momentum = rates(steps[-1])
        return told | {"learning_rate": learning_rate, "ema_momentum": ema_momentum}

    def add(self, frames: Sequence[PatientFrame]) -> None:
        """Take some patients of a step in."""
        pair, anaus = self._learner.pair, self._config.anaus
        self.clipped.add(
            lambda chosen: frame_losses(pair, [frames[place] for place in chosen], anaus),
            len(frames),
        )

    def finish(self, rates: Rates, stream: NoiseStream) -> None:
        """Noise the sum, also that of nobody, and move student and teacher."""
        learner = self._learner
        set_private_gradients(
            self.clipped.parameters, self.clipped.totals(), self._config.privacy, stream
        )
        add_pull(list(learner.pair.student.parameters()), learner.anchor, learner.prox_mu)
        for group in learner.optimiser.param_groups:
            group["lr"] = rates[0]
        learner.optimiser.step()
        learner.pair.update_teacher(ema_momentum=rates[1])
        self.clipped.reset()

    def _frames_of(self, chunk: Chunk, batches: list[UsBatch]) -> list[PatientFrame]:
        device = next(self._learner.pair.parameters()).device
        return [
            patient_frame(batch.to(device), self._config.anaus, self._generator(chunk, patient))
            for patient, batch in zip(chunk.patients, batches, strict=True)
        ]

    def _cut(self, chunk: Chunk) -> list[UsBatch]:
        """One frame of each patient, whose views depend on (seed, site, step, patient) alone."""
        seed, site = self._config.seed, self._site
        return [
            cut_us_batch(
                self._frames,
                self._config.anaus,
                [scan],
                lambda purpose, patient=patient: [  # type: ignore[misc]
                    rng_for(seed, site, purpose, chunk.step, patient)
                ],
            )
            for patient, scan in zip(chunk.patients, chunk.scans, strict=True)
        ]

    def _generator(self, chunk: Chunk, patient: str) -> torch.Generator:
        return torch_generator_for(self._config.seed, self._site, "regions", chunk.step, patient)
