"""Which anatomy owns each cell of a feature map, at every scale, and the ones that are drawn.

Source: the ANAUS paper's mask pooling after Henaff et al. 2021, arXiv:2103.10957 (DetCon). Only
ids that a frame holds are counted, one pyramid serves all scales, and id 0 (no anatomy) competes
for cells but is never drawn.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from agssd_core.errors import ShapeError

NO_ID = -1
Sampling = Literal["coverage", "uniform"]


@dataclass(frozen=True)
class RegionScale:
    """One scale of a pyramid.

    Attributes:
        owner: (N, S, S) long, the row of ``ids`` that fills most of the cell; a tie goes to the
            lowest id.
        ids: (N, R) long ascending, ``NO_ID`` where a frame holds fewer than R.
        cells: (N, R) float32, how many cells each row owns; 0 for an anatomy too small here.
    """

    owner: Tensor
    ids: Tensor
    cells: Tensor


@dataclass(frozen=True)
class SampledRegions:
    """K draws with replacement for each of N frames.

    Attributes:
        rows: (N, K) long, which row of ``RegionScale.ids``; 0 where nothing could be drawn.
        ids: (N, K) long, 0 where the frame holds no anatomy at this scale.
    """

    rows: Tensor
    ids: Tensor


def present_ids(labels: Tensor) -> Tensor:
    """The ids that each frame holds, on the CPU, where label maps are loaded.

    Args:
        labels: (N, H, W) uint8.

    Returns:
        (N, R) long, ascending; R is that of the richest frame, the rest is ``NO_ID``.
    """
    found = [torch.unique(frame).long() for frame in labels]
    most = max((len(ids) for ids in found), default=0)
    padded = torch.full((len(found), most), NO_ID, dtype=torch.long)
    for row, ids in zip(padded, found, strict=True):
        row[: len(ids)] = ids
    return padded


def region_pyramid(labels: Tensor, ids: Tensor, scales: Sequence[int]) -> tuple[RegionScale, ...]:
    """Give every cell of every scale to the id with most of its pixels.

    Args:
        labels: (N, H, H) uint8 anatomy map, 0 for none.
        ids: (N, R) from ``present_ids`` of the same maps.
        scales: cells a side; all divide the finest one, which divides H.

    Raises:
        ShapeError: a map is not square, or a scale does not divide evenly.
    """
    side, finest = labels.shape[-1], max(scales, default=0)
    if labels.dim() != 3 or labels.shape[1] != side or len(ids) != len(labels):
        raise ShapeError(
            f"label maps of shape {tuple(labels.shape)} with ids of {tuple(ids.shape)} are no "
            "(N, H, H) maps with (N, R) ids. Take the ids from the same square maps."
        )
    if not scales or side % finest or any(finest % scale for scale in scales):
        raise ShapeError(
            f"scales {tuple(scales)} do not divide each other and a map of {side} pixels. Use "
            "side / 4, / 8, / 16 and / 32."
        )
    # Whole counts stay exact in float32, so sums of sums are those of one large block.
    held = (labels.unsqueeze(1) == ids[:, :, None, None]).to(torch.float32)
    counts = _block_sums(held, side // finest)
    return tuple(_scale(_block_sums(counts, finest // scale), ids) for scale in scales)


def sample_regions(
    scale: RegionScale, count: int, *, sampling: Sampling, generator: torch.Generator
) -> SampledRegions:
    """Draw anatomies of each frame with replacement.

    Args:
        scale: which anatomies exist and how many cells they own.
        count: K, draws a frame.
        sampling: ``coverage`` by owned cells (the paper), ``uniform`` over the existing ones
            (the released code).
        generator: on the CPU, so that every device draws the same.
    """
    real = (scale.ids > 0) & (scale.cells > 0)
    weight = scale.cells if sampling == "coverage" else torch.ones_like(scale.cells)
    weight = torch.where(real, weight, torch.zeros_like(weight)).double()
    drawn = torch.rand(len(scale.ids), count, generator=generator, dtype=torch.float64)
    upto = weight.cumsum(dim=1)
    # Strictly below the total, so the row found always has a weight of its own.
    point = drawn.to(upto.device, non_blocking=True) * upto[:, -1:]
    rows = torch.searchsorted(upto, point, right=True).clamp_max(scale.ids.shape[1] - 1)
    some = real.any(dim=1, keepdim=True)
    rows = torch.where(some, rows, torch.zeros_like(rows))
    return SampledRegions(rows, torch.where(some, scale.ids.gather(1, rows), 0))


def pooling_weights(scale: RegionScale, dtype: torch.dtype = torch.float32) -> Tensor:
    """(N, R, S * S) weights of the mean over each row's cells; a row without cells is all 0."""
    rows = torch.arange(scale.ids.shape[1], device=scale.owner.device)
    owned = scale.owner.flatten(1).unsqueeze(1) == rows[None, :, None]
    return owned.to(dtype) / scale.cells.clamp_min(1).to(dtype).unsqueeze(2)


def _block_sums(counts: Tensor, block: int) -> Tensor:
    if block == 1:
        return counts
    return functional.avg_pool2d(counts, block, divisor_override=1)


def _scale(counts: Tensor, ids: Tensor) -> RegionScale:
    owner = counts.argmax(dim=1)
    rows = torch.arange(ids.shape[1], device=counts.device)
    cells = (owner.flatten(1).unsqueeze(1) == rows[None, :, None]).sum(dim=2)
    return RegionScale(owner, ids, cells.to(torch.float32))
