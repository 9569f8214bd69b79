"""The collapse monitor: is there still something that teacher targets tell apart?

A falling loss is no evidence (a constant collapse has the lowest loss of all), so the monitor
looks at the targets themselves: I = H(mean q) - mean H(q), in nats, 0 for a uniform as well as
for a constant teacher. Both entropies are taken over the same window of volumes, kept as sums
per step, so a window costs steps x K numbers and no synchronisation until it is read.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from agssd_core.config import RunConfig
from agssd_core.training.distributed import ProcessGroup
from agssd_core.weights import Array

HEADS = ("cls", "patch")
TOKENS_PER_VIEW = 16
LEAST_CLS_STD = 1e-6


@dataclass(frozen=True)
class TeacherBatch:
    """What one step shows the monitor; every tensor detached.

    Attributes:
        cls_probs: (T, B, K) teacher targets of the cls head.
        patch_probs: (P, K) teacher targets of masked tokens, in order of view and volume.
        cls: (T, B, E) teacher cls tokens.
        tokens: (T, B, N, E) teacher patch tokens.
    """

    cls_probs: Tensor
    patch_probs: Tensor
    cls: Tensor
    tokens: Tensor


@dataclass(frozen=True)
class _StepSums:
    """One step's share of the window; ``*_count`` are 0-d tensors, so nothing synchronises."""

    cls_sum: Tensor
    cls_entropy: Tensor
    cls_count: Tensor
    patch_sum: Tensor
    patch_entropy: Tensor
    patch_count: Tensor
    feature_sum: Tensor
    feature_square: Tensor
    volumes: Tensor


class CollapseMonitor:
    """A window of at least ``window`` volumes over the teacher's targets and features.

    Args:
        window: volumes; the oldest step leaves once the others hold this many.
        gate_nat: least mutual information of a healthy head.
        heads: heads that train, hence are judged.
        group: processes that share a batch; all of them see the whole batch's sums and tokens.
    """

    def __init__(
        self,
        window: int,
        gate_nat: float,
        *,
        heads: tuple[str, ...] = HEADS,
        group: ProcessGroup | None = None,
    ) -> None:
        self.window, self.gate_nat, self.heads = window, gate_nat, heads
        self._group = group or ProcessGroup()
        self._steps: deque[_StepSums] = deque()
        self._volumes: deque[int] = deque()
        self._rows: Tensor | None = None
        self._initial_rank: float | None = None

    @property
    def ready(self) -> bool:
        """Whether the window is full, so that a verdict means something."""
        return sum(self._volumes) >= self.window

    def add(self, batch: TeacherBatch, *, volumes: int) -> None:
        """Take one step in; ``volumes`` is the size of the whole batch over all processes."""
        sums = _step_sums(batch)
        sums = _StepSums(*(self._group.sum(getattr(sums, item.name)) for item in fields(sums)))
        self._steps.append(sums)
        self._volumes.append(volumes)
        while sum(self._volumes) - self._volumes[0] >= self.window:
            self._steps.popleft()
            self._volumes.popleft()
        tokens = spread_tokens(batch.tokens, TOKENS_PER_VIEW)
        self._rows = self._group.gather(tokens, dim=1).flatten(0, 2)
        if self._initial_rank is None:
            self._initial_rank = effective_rank(self._rows)

    def metrics(self) -> dict[str, float]:
        """Everything the monitor knows, as finite numbers; nothing before the first step."""
        if not self._steps or self._rows is None:
            return {}
        found: dict[str, float] = {"monitor_volumes": float(sum(self._volumes))}
        for head in HEADS:
            marginal, conditional = self._entropies(head)
            found[f"information_{head}"] = marginal - conditional
            found[f"entropy_{head}"] = conditional
            found[f"entropy_{head}_marginal"] = marginal
        rank = effective_rank(self._rows)
        found["effective_rank"] = rank
        found["effective_rank_share"] = rank / max(self._initial_rank or rank, 1e-12)
        found["cls_std"] = self._cls_std()
        return found

    def collapsed(self) -> tuple[str, ...]:
        """Names of the gates that fail; empty while the window fills and when all is well.

        Gates (agssd.md T2): I > gate and H(mean q) > ln(K) / 2 for each head, effective rank of
        the teacher's tokens at least half of that of the first batch, cls std above 0.
        """
        if not self.ready:
            return ()
        found = self.metrics()
        failed = []
        for head in self.heads:
            half = 0.5 * math.log(getattr(self._steps[0], f"{head}_sum").numel())
            if not found[f"information_{head}"] > self.gate_nat:
                failed.append(f"information_{head}")
            if not found[f"entropy_{head}_marginal"] > half:
                failed.append(f"entropy_{head}_marginal")
        if not found["effective_rank_share"] >= 0.5:
            failed.append("effective_rank")
        if not found["cls_std"] > LEAST_CLS_STD:
            failed.append("cls_std")
        return tuple(failed)

    def state(self) -> dict[str, Array]:
        """The window as named arrays, for the site's state file."""
        if not self._steps or self._rows is None:
            return {}
        found: dict[str, Array] = {
            item.name: torch.stack([getattr(step, item.name) for step in self._steps]).cpu().numpy()
            for item in fields(_StepSums)
        }
        found["step_volumes"] = np.asarray(self._volumes, dtype=np.int64)
        found["rows"] = self._rows.cpu().numpy()
        found["initial_rank"] = np.asarray([self._initial_rank], dtype=np.float64)
        return found

    def load_state(self, state: Mapping[str, Array], *, device: torch.device) -> None:
        """Continue a window that ``state`` described; an empty mapping starts anew."""
        self._steps.clear()
        self._volumes.clear()
        self._rows, self._initial_rank = None, None
        if not state:
            return
        names = [item.name for item in fields(_StepSums)]
        arrays = {name: torch.from_numpy(state[name].copy()).to(device) for name in names}
        self._volumes.extend(int(count) for count in state["step_volumes"])
        for index in range(len(self._volumes)):
            self._steps.append(_StepSums(*(arrays[name][index] for name in names)))
        self._rows = torch.from_numpy(state["rows"].copy()).to(device)
        self._initial_rank = float(state["initial_rank"][0])

    def _entropies(self, head: str) -> tuple[float, float]:
        """H(mean q) and mean H(q) of one head over the window, nats."""
        total, entropy, count = (
            torch.stack([getattr(step, f"{head}_{part}").double() for step in self._steps]).sum(0)
            for part in ("sum", "entropy", "count")
        )
        marginal = _entropy(total / count.clamp(min=1))
        return float(marginal), float(entropy / count.clamp(min=1))

    def _cls_std(self) -> float:
        """Standard deviation of unit-length teacher cls tokens, mean over channels."""
        sums = torch.stack([step.feature_sum.double() for step in self._steps]).sum(0)
        squares = torch.stack([step.feature_square.double() for step in self._steps]).sum(0)
        count = torch.stack([step.cls_count.double() for step in self._steps]).sum()
        variance = squares / count - (sums / count).square()
        return float(variance.clamp(min=0).sqrt().mean())


def monitor_of(config: RunConfig, group: ProcessGroup) -> CollapseMonitor:
    """The monitor of a run, over the heads that its losses train."""
    weighed = {"cls": config.agssd.loss.cls, "patch": config.agssd.loss.patch}
    return CollapseMonitor(
        config.monitor.window,
        config.monitor.gate_nat,
        heads=tuple(head for head, weight in weighed.items() if weight > 0),
        group=group,
    )


def effective_rank(rows: Tensor) -> float:
    """Exponential of the entropy of centred, normalised singular values.

    Args:
        rows: (R, E) features.

    Returns:
        Between 1 and min(R, E); 0 when all rows are equal.

    Source:
        Roy & Vetterli 2007, "The effective rank", EUSIPCO.
    """
    centred = rows.double() - rows.double().mean(dim=0)
    values = torch.linalg.svdvals(centred)
    total = values.sum()
    if not total > 1e-12:
        return 0.0
    return float(_entropy(values / total).exp())


def spread_tokens(tokens: Tensor, per_view: int) -> Tensor:
    """The same evenly spread tokens of every view: (T, B, N, E) -> (T, B, per_view', E)."""
    stride = max(1, tokens.shape[2] // per_view)
    return tokens[:, :, ::stride].detach().float().contiguous()


def _step_sums(batch: TeacherBatch) -> _StepSums:
    cls_probs = batch.cls_probs.detach().float().flatten(0, 1)  # (T * B, K)
    views = cls_probs.shape[0]
    # Rows are ordered by view and volume, so a constant stride takes as many from each volume.
    stride = max(1, batch.patch_probs.shape[0] // (TOKENS_PER_VIEW * views))
    patch_probs = batch.patch_probs.detach()[::stride].float()
    features = torch.nn.functional.normalize(batch.cls.detach().float().flatten(0, 1), dim=-1)
    return _StepSums(
        cls_sum=cls_probs.sum(0),
        cls_entropy=_entropy(cls_probs).sum(),
        cls_count=cls_probs.new_tensor(float(views)),
        patch_sum=patch_probs.sum(0),
        patch_entropy=_entropy(patch_probs).sum(),
        patch_count=cls_probs.new_tensor(float(patch_probs.shape[0])),
        feature_sum=features.sum(0),
        feature_square=features.square().sum(0),
        volumes=cls_probs.new_tensor(float(batch.cls_probs.shape[1])),
    )


def _entropy(probs: Tensor) -> Tensor:
    """Entropy over the last axis in nats, with 0 ln 0 = 0."""
    summed: Tensor = torch.special.entr(probs).sum(-1)
    return summed
