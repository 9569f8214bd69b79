"""What is logged of a step beyond its losses; nothing here synchronises with the device."""

import torch
from torch import Tensor
from torch.nn import functional as F

from agssd_core.config import AgssdConfig
from agssd_core.losses.rows import row_means
from agssd_core.training.agssd_step import StepResult
from agssd_core.training.distributed import ProcessGroup
from agssd_core.training.hiding import Hidden
from agssd_core.training.student_pass import rec_target
from agssd_core.training.teacher_pass import Targets
from agssd_core.views.batch import ViewBatch, token_grid
from agssd_core.views.geometry import sample_tokens

# The median of a crop is estimated from at most this many of its voxels.
MEDIAN_VOXELS = 32768


class RunningMeans:
    """Weighted means of 0-d tensors, kept on their device until they are read."""

    def __init__(self) -> None:
        self._pairs: dict[str, Tensor] = {}  # sum and weight of each name, float64

    def add(self, name: str, value: Tensor, weight: Tensor | float = 1.0) -> None:
        """Take a value in; a weight of 0 leaves the mean as it is."""
        value = value.detach().double()
        taken = torch.stack([value, torch.ones_like(value)]) * weight
        self._pairs[name] = self._pairs[name] + taken if name in self._pairs else taken

    def read(self, group: ProcessGroup) -> dict[str, float]:
        """The means over all processes; names that never had any weight are left out.

        The one place where these numbers are waited for.
        """
        names = sorted(self._pairs)
        if not names:
            return {}
        device = next(iter(self._pairs.values())).device
        pairs = group.sum(torch.stack([self._pairs[name].to(device) for name in names]))
        return {
            name: total / weight
            for name, (total, weight) in zip(names, pairs.tolist(), strict=True)
            if weight > 0
        }


@torch.no_grad()
def record_step(
    means: RunningMeans, result: StepResult, batch: ViewBatch, agssd: AgssdConfig
) -> None:
    """Add a step's losses, geometry and diagnostics to the running means."""
    for name, value in result.terms.items():
        means.add(name, value)
    means.add("grad_norm", result.grad_norm)
    means.add("overlap", batch.overlap.mean())
    means.add("mask_ratio", result.hiding.mask_ratio)
    means.add("edge_share", result.hiding.edge_share)
    means.add("inner_mean", batch.inner.float().mean())
    if agssd.loss.rec > 0 and agssd.loss.edge_weight == 0:
        constant = constant_l1(rec_target(batch, result.hiding.hidden, agssd), result.hiding.hidden)
        # The ratio of means is formed when they are read.
        means.add("rec_constant", constant)
    for name, (value, weight) in drifts(result.targets, batch, agssd).items():
        means.add(name, value, weight)


def constant_l1(target: Tensor, hidden: Hidden) -> Tensor:
    """Masked L1 of the best constant of each crop, the median of its hidden voxels.

    Args:
        target: (P, p^3) hidden voxels.
        hidden: which crop each token belongs to.

    Returns:
        0-d, mean over crops. Equals ``losses.reconstruction.best_constant_l1`` up to the voxels
        left out of large crops, without a loop over crops and without waiting for the device.
    """
    tokens = hidden.mask.shape[-1]
    stride = max(1, -(-tokens * target.shape[1] // MEDIAN_VOXELS))
    sample = target.float()[:, ::stride]
    cube = sample.new_full((hidden.crops * tokens, sample.shape[1]), torch.nan)
    cube[hidden.index] = sample
    median = cube.view(hidden.crops, -1).nanmedian(dim=1).values
    error = (sample - median[hidden.crop, None]).abs().mean(dim=1)
    return row_means(error, hidden.crop, rows=hidden.crops).mean()


def drifts(
    targets: Targets, batch: ViewBatch, agssd: AgssdConfig
) -> dict[str, tuple[Tensor, Tensor]]:
    """1 - mean cosine between a teacher token and the other view's at the same place.

    ``drift`` of plain tokens, ``drift_fused`` after cross-view attention, each with its weight:
    the number of volumes with at least ``cvaa.min_inner`` inner tokens. "Reduces drift" may be
    claimed from these two only (agssd.md, section 5).
    """
    inner, grid = batch.inner[0], token_grid(agssd)
    enough = inner.sum(dim=1) >= agssd.cvaa.min_inner
    kinds = {"drift": targets.tokens.float()}
    if targets.fused is not None:
        kinds["drift_fused"] = targets.fused.float()
    found = {}
    for name, tokens in kinds.items():
        sampled = sample_tokens(tokens[1], batch.q12, grid)
        cosine = F.cosine_similarity(tokens[0], sampled, dim=-1)
        per_volume = (cosine * inner).sum(dim=1) / inner.sum(dim=1).clamp_min(1)
        count = enough.sum().double()
        mean = 1 - (per_volume * enough).sum() / count.clamp_min(1)
        found[name] = (mean, count)
    return found
