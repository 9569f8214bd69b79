"""A private round of AG-SSD at one site."""

from collections.abc import Callable

import torch

from agssd_core.config import RunConfig
from agssd_core.training.agssd_step import Learner
from agssd_core.training.privacy.agssd_step import PrivateStep, StepSettings, has_centre
from agssd_core.training.privacy.rounds import (
    PrivateRounds,
    Progress,
    require_one_process,
    with_own_noise,
)
from agssd_core.training.privacy.sampling import Chunk
from agssd_core.training.schedules import StepSchedule
from agssd_core.views.batch import ViewBatch
from agssd_core.views.masking import alpha_at
from agssd_core.views.patient_batch import make_patient_batch
from agssd_core.views.reading import VolumeReader
from agssd_core.views.seeds import torch_generator_for


class PrivateAgssd:
    """The private side of a ``SiteTrainer``.

    Args:
        config: the run's configuration.
        volumes: the site's prepared volumes.
        learner: what trains, resolved by ``resolve_private``.
        site: enrolled name; part of every seed.
        device: the model's.

    Raises:
        TrainingError: the site has too few patients for the plan, or several processes share it.
    """

    def __init__(
        self,
        config: RunConfig,
        volumes: VolumeReader,
        learner: Learner,
        *,
        site: str,
        device: torch.device,
    ) -> None:
        require_one_process(learner.group.size)
        config = with_own_noise(config, volumes.infos, centred=has_centre(learner))
        self._config, self._volumes, self._site, self._device = config, volumes, site, device
        self._step = PrivateStep(learner, config.privacy)
        self.rounds = PrivateRounds(
            config, volumes.infos, site=site, centred=self._step.centre is not None
        )

    def train_steps(
        self,
        steps: range,
        total_steps: int,
        *,
        schedule: Callable[[int], StepSchedule],
        progress: Progress | None = None,
    ) -> dict[str, float]:
        """Take the steps; see ``SiteTrainer.train_steps``.

        Returns:
            Metrics that may leave the site, and none besides.

        Raises:
            BudgetError: the plan costs more than its budget.
        """

        def settings(step: int) -> StepSettings:
            alpha = alpha_at(self._config.agssd.eaam, step, total_steps)
            return StepSettings(schedule(step), step, alpha)

        def add(chunk: Chunk, batch: ViewBatch | None) -> None:
            if batch is not None:
                on_device = batch.to(self._device)
                self._step.add(on_device, settings(chunk.step), self._generators(chunk))

        told = self.rounds.take(
            steps,
            total_steps,
            cut=self._cut,
            add=add,
            finish=lambda step, stream: self._step.finish(settings(step), stream),
            progress=progress,
        )
        return told | schedule(steps[-1]).metrics()

    def _cut(self, chunk: Chunk) -> ViewBatch | None:
        if not chunk.patients:
            return None
        return make_patient_batch(
            self._volumes,
            self._config.agssd,
            seed=self._config.seed,
            site=self._site,
            step=chunk.step,
            chosen=list(zip(chunk.patients, chunk.scans, strict=True)),
        )

    def _generators(self, chunk: Chunk) -> list[torch.Generator]:
        seed, site = self._config.seed, self._site
        return [
            torch_generator_for(seed, site, "masks", chunk.step, patient)
            for patient in chunk.patients
        ]
