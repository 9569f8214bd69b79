"""EAAM in the step: from clean crops to the tokens that the student does not see."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from agssd_core.config import AgssdConfig
from agssd_core.errors import TrainingError
from agssd_core.models.student_teacher import ModelState
from agssd_core.training.distributed import ProcessGroup
from agssd_core.views import masking
from agssd_core.views.batch import ViewBatch, token_grid


@dataclass(frozen=True)
class Hidden:
    """The P hidden tokens of a batch as flat indices, in order of view, volume, token.

    Attributes:
        mask: (T, B, N) bool.
        index: (P,) place in the flattened (T * B * N) tokens.
        crop: (P,) which of the T * B crops, ``view * B + volume``.
        volume: (P,) which of the B volumes.
        shared: (F,) places in the P tokens of those that may be fused.
        fusible: (T, B) bool, crops whose fused term counts.
        fuse_at: (T, B, N) bool, tokens that cross-view attention may alter.
    """

    mask: Tensor
    index: Tensor
    crop: Tensor
    volume: Tensor
    shared: Tensor
    fusible: Tensor
    fuse_at: Tensor

    @property
    def crops(self) -> int:
        """T * B."""
        return self.mask.shape[0] * self.mask.shape[1]

    def of(self, tokens: Tensor) -> Tensor:
        """The hidden ones of (T, B, N, ...) tokens: (P, ...)."""
        return tokens.flatten(0, 2)[self.index]

    def rows(self, start: int, length: int) -> tuple[Tensor, Tensor]:
        """Places in the P and in the F tokens that belong to some of the volumes."""
        mine = (self.volume >= start) & (self.volume < start + length)
        return mine.nonzero()[:, 0], mine[self.shared].nonzero()[:, 0]

    def narrow(self, start: int, length: int) -> "Hidden":
        """The hidden tokens of the volumes ``start`` to ``start + length``."""
        return flat_hidden(
            self.mask[:, start : start + length],
            self.fuse_at[:, start : start + length],
            self.fusible[:, start : start + length],
        )


@dataclass(frozen=True)
class Hiding:
    """What the step draws before it looks at any network.

    Attributes:
        hidden: this process's hidden tokens.
        edge: (T * B, 1, D, H, W) edge map.
        density: (T, B') edge density of every view of every process.
        mask_ratio, edge_share: 0-d metrics; the second is the share of each crop's strongest
            quarter of tokens that is hidden.
    """

    hidden: Hidden
    edge: Tensor
    density: Tensor
    mask_ratio: Tensor
    edge_share: Tensor


def hide_tokens(
    batch: ViewBatch,
    agssd: AgssdConfig,
    *,
    alpha: float,
    state: ModelState,
    generator: torch.Generator,
    group: ProcessGroup,
) -> Hiding:
    """Draw the masks of one step.

    The processes of a site gather their scores (a few kilobytes), draw the masks of the whole
    batch from one generator and keep their own share, so that they hide what one would.

    Args:
        batch: this process's views.
        agssd: crops, masking, cross-view attention.
        alpha: preference for edges at this step.
        state: running mean and deviation of edge density; read, not changed.
        generator: on the CPU, the same in all processes.
        group: the processes of the site.

    Raises:
        TrainingError: a clean crop is not finite; nothing was changed.
    """
    edge, scores, density = _score_views(batch, agssd)
    # Ranks, draws and flat indices need counts, so they are made on the CPU: one copy a step.
    whole = group.gather(scores, dim=1).cpu()
    density = group.gather(density, dim=1).cpu()
    _require_finite(whole, density)
    ratio = masking.mask_ratio(
        density, state.density_mean.cpu(), state.density_std.cpu(), agssd.eaam
    )
    mask = masking.draw_masks(
        whole,
        group.gather(batch.valid.byte(), dim=1).cpu().bool(),
        alpha=alpha,
        ratio=ratio,
        eaam=agssd.eaam,
        grid=token_grid(agssd),
        generator=generator,
        co=group.gather(batch.q21, dim=0).cpu(),
        equal_counts=agssd.model.masking == "drop",
    )
    keep = torch.rand(mask.shape[1], generator=generator) >= agssd.cvaa.p_drop
    mask, keep = group.share(mask, dim=1), group.share(keep, dim=0)
    enough = batch.inner.cpu().sum(dim=-1) >= agssd.cvaa.min_inner  # (T, B)
    fusible = keep & enough
    fuse_at = batch.centre_in.cpu() & fusible[..., None]
    hidden = flat_hidden(mask, fuse_at, fusible)
    return Hiding(
        hidden=_to(hidden, batch.valid.device),
        edge=edge,
        density=density,
        mask_ratio=mask.sum() / batch.valid.cpu().sum(),
        edge_share=edge_share(group.share(whole, dim=1), mask),
    )


def _score_views(batch: ViewBatch, agssd: AgssdConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Edge map (T * B, 1, D, H, W), edge scores (T, B, N) and edge densities (T, B)."""
    grid, patch = token_grid(agssd), agssd.model.patch_size
    shape = batch.valid.shape
    crops, valid = batch.globals_clean.flatten(0, 1), batch.valid.flatten(0, 1)
    voxels = None
    if not bool(valid.all()):
        voxels = masking.token_voxels(valid, grid=grid, patch_size=patch)
    edge = masking.edge_map(crops, eaam=agssd.eaam, valid=voxels)
    scores = masking.patch_scores(edge, valid, patch_size=patch, pool=agssd.eaam.pool)
    seen = masking.patch_foreground(crops, patch_size=patch)
    return edge, scores.view(shape), masking.edge_density(scores, seen).view(shape[:2])


def _require_finite(scores: Tensor, density: Tensor) -> None:
    """A NaN in a visible voxel would reach the running state without passing through any loss."""
    if not bool(torch.isfinite(scores).all() & torch.isfinite(density).all()):
        raise TrainingError(
            "a crop holds values that are not finite, so no mask can be drawn. Weights were left "
            "as they were. Look for damaged volumes, prepare the site again, then resume."
        )


def flat_hidden(mask: Tensor, fuse_at: Tensor, fusible: Tensor) -> Hidden:
    """Flatten a mask; see ``Hidden``."""
    volumes, tokens = mask.shape[1:]
    index = mask.flatten().nonzero()[:, 0]
    crop = index // tokens
    return Hidden(
        mask=mask,
        index=index,
        crop=crop,
        volume=crop % volumes,
        shared=fuse_at.flatten()[index].nonzero()[:, 0],
        fusible=fusible,
        fuse_at=fuse_at,
    )


def edge_share(scores: Tensor, mask: Tensor) -> Tensor:
    """Share of each crop's strongest quarter of tokens that is hidden, mean over crops."""
    top = max(1, scores.shape[-1] // 4)
    strongest = scores.topk(top, dim=-1).indices
    return mask.gather(-1, strongest).float().mean()


def _to(hidden: Hidden, device: torch.device) -> Hidden:
    names = ("mask", "index", "crop", "volume", "shared", "fusible", "fuse_at")
    moved = {name: getattr(hidden, name).to(device, non_blocking=True) for name in names}
    return replace(hidden, **moved)
