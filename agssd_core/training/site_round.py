"""A site's training: exactly S steps from given weights, reproducible bit for bit.

Every random number comes from (seed, site, global step), every schedule from the global step, so
a round does not depend on what the process did before. Plain training is one call:
``SiteTrainer(...).train_steps(0, G, G)``.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from agssd_core.config import RunConfig
from agssd_core.errors import CollapseError
from agssd_core.training.agssd_step import Learner, StepRandomness, StepResult, train_step
from agssd_core.training.build import (
    base_learning_rate,
    build_model,
    build_optimiser,
    compile_blocks,
    load_optimiser_tensors,
    optimiser_tensors,
    resolve,
)
from agssd_core.training.checkpoint import (
    SiteState,
    StateStamp,
    recover_site_state,
    save_site_state,
)
from agssd_core.training.devices import training_device
from agssd_core.training.diagnostics import RunningMeans, record_step
from agssd_core.training.distributed import current_group
from agssd_core.training.monitor import TeacherBatch, monitor_of
from agssd_core.training.privacy.accounting import Spend
from agssd_core.training.privacy.agssd_round import PrivateAgssd
from agssd_core.training.privacy.agssd_step import resolve_private
from agssd_core.training.schedules import StepSchedule, rewarm_factor, schedule_at
from agssd_core.views.batch import ViewBatch
from agssd_core.views.loader import BatchLoader
from agssd_core.views.masking import alpha_at
from agssd_core.views.reading import VolumeReader
from agssd_core.views.seeds import torch_generator_for
from agssd_core.weights import Weights

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


class SiteTrainer:
    """One site's model, optimiser and monitor.

    Args:
        config: the run's configuration; its seed draws the round-0 weights.
        volumes: the site's prepared volumes.
        site: enrolled name; part of every seed.
        sites: sites of a round, for the learning-rate rule.

    Raises:
        TrainingError: the configured device is not there, the batch cannot be shared by the
            processes that were started together, or the site is too small to train privately.
    """

    def __init__(
        self, config: RunConfig, volumes: VolumeReader, *, site: str, sites: int = 1
    ) -> None:
        torch.set_num_threads(config.threads)
        self.config, self.volumes, self.site = config, volumes, site
        self.group = current_group()
        self.device = training_device(config.training.device, self.group.rank)
        training, agssd, private = config.training, config.agssd, config.privacy.enabled
        batch_size = int(config.privacy.expected_batch) if private else training.batch_size
        self._own_batch = len(range(training.batch_size)[self._share()])
        self._learning_rate = base_learning_rate(
            training.optimiser, batch_size=batch_size, sites=sites
        )
        model = build_model(agssd, seed=config.seed, training=training).to(self.device).train()
        if training.compile:
            compile_blocks(model)
        self.learner = Learner(
            model=model,
            optimiser=build_optimiser(model, training.optimiser),
            agssd=agssd,
            training=training,
            resolved=resolve_private(agssd) if private else resolve(agssd, batch_size),
            group=self.group,
        )
        self._private = (
            PrivateAgssd(config, volumes, self.learner, site=site, device=self.device)
            if private
            else None
        )
        self.monitor = monitor_of(config, self.group)
        self._born: int | None = None
        self._keeps_teacher = config.federation.merge.teacher_rule == "local"

    def load(self, weights: Weights) -> None:
        """Start a round from merged weights; optimiser and monitor stay as they are.

        A teacher that stays at the site (rule T3) is kept when the weights bring none.

        Raises:
            WeightsError: names, shapes or dtypes do not fit the configuration.
        """
        brings_teacher = any(name.startswith("teacher/") for name in weights)
        self.learner.model.load_shared_weights(weights, include_teacher=brings_teacher)
        merge = self.config.federation.merge
        if merge.student == "fedprox":
            student = self.learner.model.student
            self.learner.anchor = [item.detach().clone() for item in student.parameters()]
            self.learner.prox_mu = merge.prox_mu

    def spend_through(self, spend: Spend) -> None:
        """Ask a ledger before every private round; without privacy nothing is ever asked."""
        if self._private is not None:
            self._private.rounds.spend = spend

    def shared_weights(self) -> Weights:
        """Copies of student, teacher and running state, as float32 arrays."""
        return self.learner.model.shared_weights()

    def train_steps(
        self, first_step: int, steps: int, total_steps: int, progress: Progress | None = None
    ) -> dict[str, float]:
        """Take the global steps ``first_step`` to ``first_step + steps``.

        Args:
            first_step: global step to begin at.
            steps: S, at least 1.
            total_steps: G of the plan, over which every schedule runs.
            progress: called with (steps done, steps) after each one.

        Returns:
            Finite metrics: means over the steps, the monitor's window, the last step's rates.
            Under privacy only what follows from the plan.

        Raises:
            TrainingError: a step was not finite, or privacy forbids the round.
            CollapseError: the targets collapsed and ``monitor.stop_on_collapse`` is on.
        """
        reset = self._born is None and first_step > 0
        if self._born is None:
            self._born = first_step
        if reset:
            log.warning("no optimiser state at step %d; warming up again", first_step)
        if self._private is not None:
            told = self._private.train_steps(
                range(first_step, first_step + steps),
                total_steps,
                schedule=lambda step: self._schedule(step, total_steps),
                progress=progress,
            )
            return told | {"optimiser_reset": float(reset)}
        loader = BatchLoader(
            self.volumes,
            self.config.agssd,
            seed=self.config.seed,
            site=self.site,
            batch_size=self._own_batch,
            workers=self.config.training.loader_workers,
            share=(self.group.rank, self.group.size),
        )
        means, started = RunningMeans(), time.perf_counter()
        for number, batch in enumerate(loader.steps(first_step, steps)):
            step = first_step + number
            schedule = self._schedule(step, total_steps)
            self._step(batch, schedule, step=step, total_steps=total_steps, means=means)
            if progress is not None:
                progress(number + 1, steps)
        metrics = self._metrics(means) | schedule.metrics()
        metrics["optimiser_reset"] = float(reset)
        metrics["seconds"] = time.perf_counter() - started
        metrics["volumes_per_s"] = steps * self.config.training.batch_size / metrics["seconds"]
        self._judge(metrics)
        return metrics

    def save_state(self, folder: Path, stamp: StateStamp) -> None:
        """Keep optimiser, monitor window and, where it is local, the teacher on disk, atomically.

        Raises:
            CheckpointError: the state could not be written; the previous one is untouched.
        """
        model, optimiser = self.learner.model, self.learner.optimiser
        arrays: Weights = {
            f"optimiser/{name}": tensor.detach().cpu().numpy()
            for name, tensor in optimiser_tensors(model, optimiser).items()
        }
        arrays |= {f"monitor/{name}": array for name, array in self.monitor.state().items()}
        if self._keeps_teacher:
            everything = model.shared_weights()
            arrays |= {n: array for n, array in everything.items() if n.startswith("teacher/")}
        numbers = {"born": -1 if self._born is None else self._born}
        if self._private is not None:
            numbers["private"] = int(self._private.rounds.private)
        save_site_state(folder, SiteState(arrays, numbers), stamp)

    def load_state(self, folder: Path, stamp: StateStamp) -> bool:
        """Continue from what ``save_state`` left under the same stamp; call ``load`` before.

        A missing, damaged or differently stamped state counts as lost: the optimiser and the
        monitor start afresh, a local teacher starts from the weights at hand, the learning rate
        warms up again over ``optimiser.rewarm_steps`` and ``optimiser_reset`` becomes 1.

        Returns:
            Whether a state was taken up.
        """
        state = recover_site_state(folder, stamp)
        arrays = {} if state is None else state.arrays
        tensors = {
            name.removeprefix("optimiser/"): torch.from_numpy(np.array(array))
            for name, array in arrays.items()
            if name.startswith("optimiser/")
        }
        load_optimiser_tensors(self.learner.model, self.learner.optimiser, tensors)
        window = {
            name.removeprefix("monitor/"): array
            for name, array in arrays.items()
            if name.startswith("monitor/")
        }
        self.monitor.load_state(window, device=self.device)
        born = -1 if state is None else state.numbers.get("born", -1)
        self._born = None if born < 0 else born
        if self._private is not None and state is not None and not state.numbers.get("private"):
            self._private.rounds.private = False
        teacher = {n: array for n, array in arrays.items() if n.startswith("teacher/")}
        if teacher and self._keeps_teacher:
            model = self.learner.model
            model.load_shared_weights(model.shared_weights() | teacher)
        return state is not None

    def _share(self) -> slice:
        return self.group.share_of_batch(self.config.training.batch_size)

    def _schedule(self, step: int, total_steps: int) -> StepSchedule:
        optimiser = self.config.training.optimiser
        return schedule_at(
            self.config.agssd,
            optimiser,
            base_learning_rate=self._learning_rate,
            step=step,
            total_steps=total_steps,
            rewarm=rewarm_factor(step, self._born or 0, optimiser.rewarm_steps),
        )

    def _step(
        self,
        batch: ViewBatch,
        schedule: StepSchedule,
        *,
        step: int,
        total_steps: int,
        means: RunningMeans,
    ) -> None:
        seed, site, rank = self.config.seed, self.site, self.group.rank
        if self.device.type == "cuda":
            batch = batch.pin_memory().to(self.device, non_blocking=True)
        result = train_step(
            self.learner,
            batch,
            schedule,
            step=step,
            alpha=alpha_at(self.config.agssd.eaam, step, total_steps),
            randomness=StepRandomness(
                masks=torch_generator_for(seed, site, "masks", step),
                depth=torch_generator_for(seed, site, "depth", step, rank),
            ),
        )
        self.monitor.add(_shown(result), volumes=self.config.training.batch_size)
        record_step(means, result, batch, self.config.agssd)

    def _metrics(self, means: RunningMeans) -> dict[str, float]:
        metrics = means.read(self.group)
        constant = metrics.pop("rec_constant", 0.0)
        if constant > 0:
            metrics["rec_ratio"] = metrics["loss_rec"] / constant
        return metrics | self.monitor.metrics()

    def _judge(self, metrics: dict[str, float]) -> None:
        failed = self.monitor.collapsed()
        metrics["collapsed"] = float(bool(failed))
        if not failed:
            return
        log.warning("collapse monitor: %s", ", ".join(failed))
        if self.config.monitor.stop_on_collapse:
            raise CollapseError(
                f"the teacher's targets have collapsed ({', '.join(failed)}; the gate is "
                f"I > {self.config.monitor.gate_nat:g} nat). Keep target.teacher_temperature at "
                "0.04 and head.input_norm on, raise the batch size, or lower the EMA momentum."
            )


def _shown(result: StepResult) -> TeacherBatch:
    targets = result.targets
    return TeacherBatch(targets.cls_probs, targets.patch_probs, targets.cls, targets.tokens)
