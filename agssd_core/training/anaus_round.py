"""An ultrasound site's training: exactly S steps from given weights, reproducible bit for bit.

As ``site_round`` for AG-SSD: random numbers come from (seed, site, global step), schedules from
the global step. One process trains; BatchNorm's running statistics stay at the site.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from agssd_core.accounting import Spend
from agssd_core.config import RunConfig
from agssd_core.errors import CollapseError
from agssd_core.training.anaus_build import (
    build_lars,
    build_pair,
    lars_tensors,
    load_lars_tensors,
    peak_learning_rate,
)
from agssd_core.training.anaus_monitor import AnatomyMonitor
from agssd_core.training.anaus_step import AnausLearner, AnausResult, train_step
from agssd_core.training.checkpoint import (
    SiteState,
    StateStamp,
    recover_site_state,
    save_site_state,
)
from agssd_core.training.devices import training_device
from agssd_core.training.diagnostics import RunningMeans
from agssd_core.training.distributed import ProcessGroup
from agssd_core.training.privacy.anaus_round import PrivateAnaus
from agssd_core.training.schedules import learning_rate, rewarm_factor
from agssd_core.views.seeds import torch_generator_for
from agssd_core.views.us_batch import FrameReader, UsBatch
from agssd_core.views.us_loader import UsLoader
from agssd_core.weights import Array, Weights

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


class AnausTrainer:
    """One ultrasound site's pair, optimiser and monitor.

    Args:
        config: the cohort's configuration; its seed draws the round-0 weights.
        frames: the site's prepared frames with their label maps.
        site: enrolled name; part of every seed.
        sites: sites of a round, for the learning-rate rule.

    Raises:
        TrainingError: the configured device is not there.
    """

    def __init__(
        self, config: RunConfig, frames: FrameReader, *, site: str, sites: int = 1
    ) -> None:
        torch.set_num_threads(config.threads)
        self.config, self.frames, self.site = config, frames, site
        self.device = training_device(config.training.device)
        pair = build_pair(config.anaus, seed=config.seed).to(self.device)
        if config.training.compile:
            pair.student.backbone.compile()
            pair.teacher.backbone.compile()
        self.learner = AnausLearner(
            pair=pair,
            optimiser=build_lars(pair, config.anaus),
            anaus=config.anaus,
            bf16=config.training.precision == "bf16",
        )
        self._private = (
            PrivateAnaus(config, frames, self.learner, site=site)
            if config.privacy.enabled
            else None
        )
        self.monitor = AnatomyMonitor(config.monitor.window, config.monitor.gate_gap)
        privacy, batch_size = config.privacy, config.anaus.batch_size
        drawn = int(privacy.expected_batch) if privacy.enabled else batch_size
        self._peak = peak_learning_rate(config.anaus, batch_size=drawn, sites=sites)
        self._born: int | None = None
        self._keeps_teacher = config.federation.merge.teacher_rule == "local"

    def load(self, weights: Weights) -> None:
        """Start a round from merged weights; optimiser, statistics and monitor stay.

        A teacher that stays at the site (rule T3) is kept when the weights bring none.

        Raises:
            WeightsError: names, shapes or dtypes do not fit the configuration.
        """
        brings_teacher = any(name.startswith("teacher/") for name in weights)
        self.learner.pair.load_shared_weights(weights, include_teacher=brings_teacher)
        merge = self.config.federation.merge
        if merge.student == "fedprox":
            student = self.learner.pair.student
            self.learner.anchor = [item.detach().clone() for item in student.parameters()]
            self.learner.prox_mu = merge.prox_mu

    def spend_through(self, spend: Spend) -> None:
        """Ask a ledger before every private round; without privacy nothing is ever asked."""
        if self._private is not None:
            self._private.rounds.spend = spend

    def shared_weights(self) -> Weights:
        """Copies of student, teacher and what of their statistics is shared, as float32."""
        return self.learner.pair.shared_weights()

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
            CollapseError: the projections collapsed and ``monitor.stop_on_collapse`` is on.
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
                rates=lambda step: self._rates(step, total_steps),
                progress=progress,
            )
            return told | {"optimiser_reset": float(reset)}
        loader = UsLoader(
            self.frames,
            self.config.anaus,
            seed=self.config.seed,
            site=self.site,
            batch_size=self.config.anaus.batch_size,
            workers=self.config.training.loader_workers,
        )
        means, started, rates = RunningMeans(), time.perf_counter(), (0.0, 0.0)
        for number, batch in enumerate(loader.steps(first_step, steps)):
            rates = self._rates(first_step + number, total_steps)
            self._step(batch, first_step + number, rates=rates, means=means)
            if progress is not None:
                progress(number + 1, steps)
        metrics = means.read(ProcessGroup()) | self.monitor.metrics()
        metrics["learning_rate"], metrics["ema_momentum"] = rates
        metrics["optimiser_reset"] = float(reset)
        metrics["seconds"] = time.perf_counter() - started
        metrics["frames_per_s"] = steps * self.config.anaus.batch_size / metrics["seconds"]
        self._judge(metrics)
        return metrics

    def save_state(self, folder: Path, stamp: StateStamp) -> None:
        """Keep momentum, statistics, monitor and, where it is local, the teacher, atomically.

        Raises:
            CheckpointError: the state could not be written; the previous one is untouched.
        """
        pair = self.learner.pair
        tensors = {
            f"optimiser/{n}": t for n, t in lars_tensors(pair, self.learner.optimiser).items()
        }
        tensors |= {f"statistics/{name}": buffer for name, buffer in pair.norm_buffers().items()}
        arrays: Weights = {name: _array(tensor) for name, tensor in tensors.items()}
        arrays |= {f"monitor/{name}": array for name, array in self.monitor.state().items()}
        if self._keeps_teacher:
            everything = pair.shared_weights()
            arrays |= {n: array for n, array in everything.items() if n.startswith("teacher/")}
        numbers = {"born": -1 if self._born is None else self._born}
        if self._private is not None:
            numbers["private"] = int(self._private.rounds.private)
        save_site_state(folder, SiteState(arrays, numbers), stamp)

    def load_state(self, folder: Path, stamp: StateStamp) -> bool:
        """Continue from what ``save_state`` left under the same stamp; call ``load`` before.

        A missing, damaged or differently stamped state counts as lost: optimiser, statistics and
        monitor start afresh, the learning rate warms up again, ``optimiser_reset`` becomes 1.

        Returns:
            Whether a state was taken up.
        """
        state = recover_site_state(folder, stamp)
        arrays = {} if state is None else state.arrays
        pair = self.learner.pair
        momentum = {n: torch.from_numpy(a.copy()) for n, a in _under(arrays, "optimiser/").items()}
        load_lars_tensors(pair, self.learner.optimiser, momentum)
        kept = _under(arrays, "statistics/")
        for name, buffer in pair.norm_buffers().items():
            if name in kept:
                buffer.copy_(torch.from_numpy(kept[name].copy()).view_as(buffer))
        self.monitor.load_state(_under(arrays, "monitor/"), device=self.device)
        born = -1 if state is None else state.numbers.get("born", -1)
        self._born = None if born < 0 else born
        if self._private is not None and state is not None and not state.numbers.get("private"):
            self._private.rounds.private = False
        teacher = {n: array for n, array in arrays.items() if n.startswith("teacher/")}
        if teacher and self._keeps_teacher:
            pair.load_shared_weights(pair.shared_weights() | teacher)
        return state is not None

    def _rates(self, step: int, total_steps: int) -> tuple[float, float]:
        """Learning rate and EMA momentum of a step."""
        optimiser = self.config.anaus.optimiser
        rate = learning_rate(
            step, total_steps, peak=self._peak, low=0.0, warmup=optimiser.warmup
        ) * rewarm_factor(step, self._born or 0, self.config.training.optimiser.rewarm_steps)
        return rate, self.config.anaus.teacher.momentum_at(step, total_steps)

    def _step(
        self, batch: UsBatch, step: int, *, rates: tuple[float, float], means: RunningMeans
    ) -> None:
        if self.device.type == "cuda":
            batch = batch.pin_memory().to(self.device, non_blocking=True)
        result = train_step(
            self.learner,
            batch,
            learning_rate=rates[0],
            ema_momentum=rates[1],
            generator=torch_generator_for(self.config.seed, self.site, "regions", step),
        )
        self.monitor.add(result.rows, frames=len(batch))
        _record(means, result, batch)

    def _judge(self, metrics: dict[str, float]) -> None:
        failed = self.monitor.collapsed()
        metrics["collapsed"] = float(bool(failed))
        if not failed:
            return
        log.warning("collapse monitor: %s", ", ".join(failed))
        if self.config.monitor.stop_on_collapse:
            raise CollapseError(
                f"the teacher's projections have collapsed ({', '.join(failed)}). Keep "
                "anaus.loss.align on, raise anaus.batch_size, or lower the learning rate."
            )


def _record(means: RunningMeans, result: AnausResult, batch: UsBatch) -> None:
    means.add("loss", result.loss)
    means.add("loss_align", result.align)
    means.add("loss_context", result.context)
    means.add("grad_norm", result.grad_norm)
    means.add("anatomies_per_view", result.anatomies)
    means.add("valid_share", result.valid)
    means.add("overlap", batch.overlap.mean())


def _under(arrays: Weights, prefix: str) -> dict[str, Array]:
    return {n.removeprefix(prefix): a for n, a in arrays.items() if n.startswith(prefix)}


def _array(tensor: torch.Tensor) -> Array:
    return np.array(tensor.detach().cpu().numpy(), copy=True, order="C")
