"""ANAUS's collapse monitor: do the teacher's projections still tell anatomies apart?

A falling loss is no evidence, so the monitor looks at the projections: their effective rank,
their spread on the unit sphere, and by how much two views of one anatomy lie closer together
than different anatomies of a frame.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from agssd_core.training.anaus_step import ScaleRows
from agssd_core.training.monitor import effective_rank
from agssd_core.weights import Array

LEAST_SPREAD = 0.05
# Healthy training gives up some of random projections' directions (docs/real-ultrasound.md); a
# ruinous learning rate leaves far less than a quarter of them.
LEAST_RANK_SHARE = 0.25


@dataclass(frozen=True)
class _StepSums:
    """One step's share of the window, float64 on the device, so nothing synchronises.

    Attributes:
        same, other: (2,) sum of cosines and their count, over all scales.
        total, square: (S, C) sums over unit rows of each scale. count: (S, 1) rows.
    """

    same: Tensor
    other: Tensor
    total: Tensor
    square: Tensor
    count: Tensor


class AnatomyMonitor:
    """A window of at least ``window`` frames over the teacher's projections of all scales.

    Args:
        window: frames; the oldest step leaves once the others hold this many.
        gate_gap: least lead of the same-anatomy cosine of a healthy model.
    """

    def __init__(self, window: int, gate_gap: float) -> None:
        self.window, self.gate_gap = window, gate_gap
        self._steps: deque[_StepSums] = deque()
        self._frames: deque[int] = deque()
        self._rows: Tensor | None = None
        self._initial_rank: float | None = None

    @property
    def ready(self) -> bool:
        """Whether the window is full, so that a verdict means something."""
        return sum(self._frames) >= self.window

    @torch.no_grad()
    def add(self, scales: tuple[ScaleRows, ...], *, frames: int) -> None:
        """Take one step in; the rank is that of the finest scale's rows."""
        self._steps.append(_summed(scales))
        self._frames.append(frames)
        while sum(self._frames) - self._frames[0] >= self.window:
            self._steps.popleft()
            self._frames.popleft()
        self._rows = _unit(scales[-1].projections).flatten(0, 2)
        if self._initial_rank is None:
            self._initial_rank = effective_rank(self._rows)

    def metrics(self) -> dict[str, float]:
        """Everything the monitor knows, as finite numbers; nothing before the first step."""
        if not self._steps or self._rows is None:
            return {}
        same, other = self._mean("same"), self._mean("other")
        rank = effective_rank(self._rows)
        return {
            "monitor_frames": float(sum(self._frames)),
            "effective_rank": rank,
            "effective_rank_share": rank / max(self._initial_rank or rank, 1e-12),
            "same_anatomy_cosine": same,
            "other_anatomy_cosine": other,
            "anatomy_gap": same - other,
            "projection_std": self._spread(),
        }

    def collapsed(self) -> tuple[str, ...]:
        """Names of the gates that fail; empty while the window fills and when all is well."""
        if not self.ready:
            return ()
        found = self.metrics()
        failed = []
        # Frames with one anatomy each have no other to compare with.
        if self._count("other") > 0 and not found["anatomy_gap"] > self.gate_gap:
            failed.append("anatomy_gap")
        if not found["projection_std"] > LEAST_SPREAD:
            failed.append("projection_std")
        if not found["effective_rank_share"] >= LEAST_RANK_SHARE:
            failed.append("effective_rank")
        return tuple(failed)

    def state(self) -> dict[str, Array]:
        """The window as named arrays, for the site's state file."""
        if not self._steps or self._rows is None:
            return {}
        found: dict[str, Array] = {
            item.name: torch.stack([getattr(step, item.name) for step in self._steps]).cpu().numpy()
            for item in fields(_StepSums)
        }
        found["step_frames"] = np.asarray(self._frames, dtype=np.int64)
        found["rows"] = self._rows.cpu().numpy()
        found["initial_rank"] = np.asarray([self._initial_rank], dtype=np.float64)
        return found

    def load_state(self, state: Mapping[str, Array], *, device: torch.device) -> None:
        """Continue a window that ``state`` described; an empty mapping starts anew."""
        self._steps.clear()
        self._frames.clear()
        self._rows, self._initial_rank = None, None
        if not state:
            return
        names = [item.name for item in fields(_StepSums)]
        arrays = {name: torch.from_numpy(state[name].copy()).to(device) for name in names}
        self._frames.extend(int(count) for count in state["step_frames"])
        for index in range(len(self._frames)):
            self._steps.append(_StepSums(*(arrays[name][index] for name in names)))
        self._rows = torch.from_numpy(state["rows"].copy()).to(device)
        self._initial_rank = float(state["initial_rank"][0])

    def _mean(self, name: str) -> float:
        total, count = self._sum(name).tolist()
        return float(total / count) if count else 0.0

    def _count(self, name: str) -> float:
        return float(self._sum(name)[1])

    def _sum(self, name: str) -> Tensor:
        return torch.stack([getattr(step, name) for step in self._steps]).sum(dim=0)

    def _spread(self) -> float:
        """Root of the total variance of unit rows, least over scales: 0 when all are equal."""
        count = self._sum("count").clamp(min=1)
        mean = self._sum("total") / count
        variance = self._sum("square") / count - mean.square()
        return math.sqrt(max(0.0, float(variance.sum(dim=1).min())))


def _unit(projections: Tensor) -> Tensor:
    return functional.normalize(projections.detach().float(), dim=-1)


def _summed(scales: tuple[ScaleRows, ...]) -> _StepSums:
    units = [_unit(each.projections) for each in scales]
    cosines = [_cosines(rows, each.ids) for rows, each in zip(units, scales, strict=True)]
    weights = [(each.ids > 0).flatten().double()[:, None] for each in scales]
    flat = [rows.flatten(0, 2).double() for rows in units]
    pairs = list(zip(flat, weights, strict=True))
    return _StepSums(
        same=torch.stack([same for same, _ in cosines]).sum(dim=0),
        other=torch.stack([other for _, other in cosines]).sum(dim=0),
        total=torch.stack([(rows * weight).sum(dim=0) for rows, weight in pairs]),
        square=torch.stack([(rows.square() * weight).sum(dim=0) for rows, weight in pairs]),
        count=torch.stack([weight.sum().reshape(1) for weight in weights]),
    )


def _cosines(rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and count over pairs (view 1, view 2) of a frame: of one anatomy, of different ones."""
    real = ids > 0
    cosine = (rows[0] @ rows[1].transpose(1, 2)).double()  # (B, K, K)
    both = real[0][:, :, None] & real[1][:, None]
    alike = ids[0][:, :, None] == ids[1][:, None]
    return _sum_and_count(cosine, both & alike), _sum_and_count(cosine, both & ~alike)


def _sum_and_count(cosine: Tensor, chosen: Tensor) -> Tensor:
    mask = chosen.to(cosine.dtype)
    return torch.stack([(cosine * mask).sum(), mask.sum()])
