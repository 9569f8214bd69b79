"""How a site trains: batch, precision, optimiser, monitor, tracking."""

from typing import Literal, Self

from pydantic import model_validator

from agssd_core.config.node import Node, Range2, ordered, require, within


class OptimiserConfig(Node):
    """AdamW with warm-up and cosine, over the run's global step.

    ``learning_rate`` None follows 5e-4 * B_eff / 256, B_eff being volumes x global views over
    all sites of a round.
    """

    learning_rate: float | None = None
    min_learning_rate: float = 1e-6
    warmup: float = 0.1
    betas: Range2 = (0.9, 0.95)
    weight_decay: float = 0.04
    weight_decay_end: float = 0.4
    max_grad_norm: float = 3.0
    rewarm_steps: int = 10

    @model_validator(mode="after")
    def _check(self) -> Self:
        rate = self.learning_rate
        require(
            [
                within("optimiser.learning_rate", rate, 1e-9, 1) if rate is not None else "",
                within("optimiser.min_learning_rate", self.min_learning_rate, 0, 1),
                within("optimiser.warmup", self.warmup, 0, 1),
                ordered("optimiser.betas", self.betas, 0, 0.99999),
                within("optimiser.weight_decay", self.weight_decay, 0, 10),
                within("optimiser.weight_decay_end", self.weight_decay_end, 0, 10),
                within("optimiser.max_grad_norm", self.max_grad_norm, 1e-6, 1e6),
                within("optimiser.rewarm_steps", self.rewarm_steps, 0, 100000),
            ]
        )
        return self


class TrainingConfig(Node):
    """One site's loop.

    Attributes:
        batch_size: volumes per optimiser step of the whole site; its processes share them.
        accumulate: micro-batches that the batch, or a process's share of it, is cut into.
        precision: ``bf16`` runs encoders under autocast; heads and losses stay float32.
        activation_checkpointing: recompute blocks in the backward pass.
        device: ``auto`` takes CUDA where there is one.
        processes: 0 is one for each visible GPU that the batch divides by; otherwise that many,
            each on a GPU of its own, or all on the CPU. Their number changes rounding only.
        loader_workers: threads of each process that cut crops ahead of the step; never changes
            a bit.
    """

    batch_size: int = 8
    accumulate: int = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    activation_checkpointing: bool = False
    compile: bool = False
    device: Literal["auto", "cpu", "cuda"] = "auto"
    processes: int = 0
    loader_workers: int = 1
    optimiser: OptimiserConfig = OptimiserConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        found = [
            within("training.batch_size", self.batch_size, 1, 4096),
            within("training.accumulate", self.accumulate, 1, 4096),
            within("training.processes", self.processes, 0, 64),
            within("training.loader_workers", self.loader_workers, 0, 64),
        ]
        if self.accumulate >= 1 and self.batch_size % self.accumulate:
            found.append(
                f"training.batch_size = {self.batch_size} is not a multiple of "
                f"training.accumulate = {self.accumulate}. Use a divisor of the batch size."
            )
        if not any(found) and self.processes and not self.shared_by(self.processes):
            found.append(
                f"training.batch_size = {self.batch_size} cannot be shared by training.processes "
                f"= {self.processes} in {self.accumulate} part(s) each. Use a batch size that is "
                "a multiple of processes * accumulate."
            )
        require(found)
        return self

    def shared_by(self, processes: int) -> bool:
        """Whether so many processes get equal shares of the batch, in equal micro-batches."""
        return self.batch_size % (processes * self.accumulate) == 0


class MonitorConfig(Node):
    """The collapse monitor.

    AG-SSD: I = H(mean q) - mean H(q) over a window of volumes, in nats. ANAUS: rank, spread and
    cosines of the teacher's projections of anatomies over a window of frames.

    Attributes:
        window: volumes or frames that the monitor judges; it says nothing before they are full.
        gate_nat: least I of every trained head (AG-SSD).
        gate_gap: least lead of the cosine between two views of one anatomy over that between
            different anatomies of a frame (ANAUS).
        stop_on_collapse: a site whose targets have collapsed at the end of a round keeps its
            update and declines with the reason ``collapsed``; the others' round goes on without
            it, and the next order finds it at its last good round, from the merged weights.
            Otherwise the update is sent and only its metric ``collapsed`` is 1. It is no part
            of the stamp of a site's state, so a resumed run may turn it on and keeps optimisers.
    """

    window: int = 256
    gate_nat: float = 0.1
    gate_gap: float = 0.02
    stop_on_collapse: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        require(
            [
                within("monitor.window", self.window, 16, 65536),
                within("monitor.gate_nat", self.gate_nat, 0, 10),
                within("monitor.gate_gap", self.gate_gap, 0, 2),
            ]
        )
        return self


class TrackingConfig(Node):
    """Optional copies of metrics.jsonl: TensorBoard event files, an MLflow file store."""

    tensorboard: bool = False
    mlflow: bool = False
