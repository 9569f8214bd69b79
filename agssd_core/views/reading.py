"""Reading no more of a volume than its views need, and resampling it.

Source: the sampling grid is the one of ``torch.nn.functional.grid_sample``.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agssd_core.config.node import Size3
from agssd_core.views.geometry import BoolArray, ViewBox

Region = tuple[Size3, Size3]  # integer start and size, voxels


class VolumeLike(Protocol):
    """What the sampler needs to know of a cached volume; ``VolumeInfo`` has it."""

    @property
    def shape(self) -> Size3:
        """Voxels per axis."""
        ...

    @property
    def patient(self) -> str:
        """Pseudonym; every volume of one patient bears the same."""
        ...

    @property
    def modality(self) -> str:
        """``CT`` or ``MR``."""
        ...

    @property
    def foreground_start(self) -> Size3:
        """Lower corner of the body box, voxels."""
        ...

    @property
    def foreground_size(self) -> Size3:
        """Edges of the body box, voxels."""
        ...

    @property
    def foreground_integral(self) -> NDArray[np.integer]:
        """Integral image of the down-sampled foreground mask, one zero plane per axis."""
        ...

    @property
    def foreground_step(self) -> int:
        """Down-sampling of that mask."""
        ...


class VolumeReader(Protocol):
    """What views need of a site's volumes; ``data.cache.SiteVolumes`` provides it."""

    @property
    def infos(self) -> Sequence[VolumeLike]:
        """One entry a volume."""
        ...

    def __len__(self) -> int:
        """Number of volumes."""
        ...

    def read_crop(self, index: int, start: Size3, size: Size3) -> NDArray[np.float32]:
        """Voxels in [0, 1], float32, of shape ``size``."""
        ...


def cut_views(
    volumes: VolumeReader, index: int, views: Sequence[tuple[ViewBox, Size3]]
) -> list[Tensor]:
    """Cut several views (box, voxels of the result) of one volume, sharing reads.

    Two regions are read as one when their hull holds no more voxels than both together: chunks
    that both touch are then decompressed once. The values are the same either way.
    """
    shape = volumes.infos[index].shape
    reads, source = _plan_reads([view_region(box, size, shape) for box, size in views])
    blocks = [volumes.read_crop(index, start, size) for start, size in reads]
    return [
        cut_view(blocks[block], reads[block][0], box=box, out_size=size, shape=shape)
        for (box, size), block in zip(views, source, strict=True)
    ]


def view_region(box: ViewBox, out_size: Size3, shape: Size3) -> tuple[Size3, Size3]:
    """Integer start and size of the voxels that :func:`cut_view` needs for a box."""
    lines = [_axis_samples(box, axis, out_size[axis], shape[axis]) for axis in range(3)]
    d0, h0, w0 = (int(low.min()) for low, _, _ in lines)
    d1, h1, w1 = (int(high.max()) + 1 for _, high, _ in lines)
    return (d0, h0, w0), (d1 - d0, h1 - h0, w1 - w0)


def cut_view(
    region: NDArray[np.float32], origin: Size3, *, box: ViewBox, out_size: Size3, shape: Size3
) -> Tensor:
    """Resample a box trilinearly to ``out_size``.

    Equal to ``grid_sample(align_corners=False, padding_mode="border")`` on the whole volume, one
    axis at a time: a box has no rotation, so the interpolation separates.

    Args:
        region: voxels read from the volume; must hold :func:`view_region` of the box.
        origin: voxel index of the region's first voxel.
        box: the view.
        out_size: voxels of the view.
        shape: voxels of the whole volume; beyond it the edge is repeated.

    Returns:
        (D, H, W) float32, flipped as the box says.
    """
    field = torch.from_numpy(np.ascontiguousarray(region))
    for axis in range(3):
        low, high, weight = _axis_samples(box, axis, out_size[axis], shape[axis])
        below = field.index_select(axis, torch.from_numpy(low - origin[axis]))
        above = field.index_select(axis, torch.from_numpy(high - origin[axis]))
        spread = [-1 if a == axis else 1 for a in range(3)]
        field = torch.lerp(below, above, torch.from_numpy(weight).view(spread))
    return field


def valid_tokens(box: ViewBox, grid: Size3, shape: Size3) -> BoolArray:
    """Tokens of a view (N,) that are not padding: at least half of them lies in the volume.

    In a volume thinner than a token the best covered layer counts as valid, so that no view is
    without tokens.
    """
    lines = []
    for axis in range(3):
        pitch = box.size[axis] / grid[axis]
        low = box.start[axis] + np.arange(grid[axis]) * pitch
        covered = np.minimum(low + pitch, shape[axis]) - np.maximum(low, 0)
        line = covered >= min(0.5 * pitch, float(covered.max())) - 1e-9
        lines.append(line[::-1] if box.flip[axis] else line)
    d, h, w = lines
    return np.asarray(d[:, None, None] & h[:, None] & w).reshape(-1)


def _plan_reads(regions: list[Region]) -> tuple[list[Region], list[int]]:
    """Merge regions greedily; returns the reads and, for every region, which read holds it."""
    reads: list[Region] = []
    source: list[int] = []
    for region in regions:
        for place, read in enumerate(reads):
            hull = _hull(read, region)
            if _content(hull) <= _content(read) + _content(region):
                reads[place] = hull
                source.append(place)
                break
        else:
            source.append(len(reads))
            reads.append(region)
    return reads, source


def _hull(a: Region, b: Region) -> Region:
    start = np.minimum(a[0], b[0])
    size = np.maximum(np.add(*a), np.add(*b)) - start
    d, h, w = (int(value) for value in start)
    x, y, z = (int(value) for value in size)
    return (d, h, w), (x, y, z)


def _content(region: Region) -> int:
    return region[1][0] * region[1][1] * region[1][2]


def _axis_samples(
    box: ViewBox, axis: int, count: int, limit: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Voxels below and above each sample along one axis, and the weight of the one above."""
    position = box.start[axis] + (np.arange(count) + 0.5) * (box.size[axis] / count) - 0.5
    position = np.clip(position, 0, limit - 1)
    low = np.floor(position).astype(np.int64)
    high = np.minimum(low + 1, limit - 1)
    weight = (position - low).astype(np.float32)
    if box.flip[axis]:
        low, high, weight = low[::-1].copy(), high[::-1].copy(), weight[::-1].copy()
    return low, high, weight
