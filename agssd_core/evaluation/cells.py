"""Coarse grids that cover an image exactly, and means over their cells.

An axis of ``side`` voxels in ``count`` cells: cell i covers [i * side / count, (i + 1) * side /
count). Linear upsampling with ``align_corners=False`` is the way back.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

Reals = NDArray[np.float32]
Cells = tuple[int, ...]


def overlap_weights(side: int, count: int, tokens: NDArray[np.float64]) -> NDArray[np.float64]:
    """(count, T): voxels that each of T intervals shares with each of ``count`` cells.

    Args:
        side: of the image, voxels.
        count: cells.
        tokens: (T, 2) start and stop of each interval, voxels.
    """
    edges = np.linspace(0, side, count + 1)
    low = np.maximum(edges[:-1, None], tokens[None, :, 0])
    high = np.minimum(edges[1:, None], tokens[None, :, 1])
    return np.asarray(np.maximum(high - low, 0.0))


def cell_means(image: NDArray[np.generic], cells: Cells) -> Reals:
    """Mean of the image over each cell, with parts of voxels; shape ``cells``."""
    result = np.asarray(image, dtype=np.float32)
    for axis, (side, count) in enumerate(zip(image.shape, cells, strict=True)):
        voxels = np.stack([np.arange(side), np.arange(1, side + 1)], axis=1).astype(np.float64)
        rows = overlap_weights(side, count, voxels) * (count / side)
        result = np.moveaxis(np.tensordot(rows.astype(np.float32), result, (1, axis)), 0, axis)
    return np.asarray(result, dtype=np.float32)


def upsampled(values: Reals, shape: Sequence[int]) -> Reals:
    """(C, *cells) to (C, *shape), trilinear or bilinear."""
    mode = "trilinear" if len(shape) == 3 else "bilinear"
    tensor = torch.from_numpy(np.ascontiguousarray(values))[None]
    grown = functional.interpolate(tensor, tuple(shape), mode=mode, align_corners=False)
    return np.asarray(grown[0].numpy())


def volume_cells(shape: Sequence[int], patch_size: int) -> Cells:
    """Cells of a volume: about one a patch."""
    return tuple(-(-side // patch_size) for side in shape)


def frame_size(shape: Sequence[int], size: int) -> tuple[int, int]:
    """What a frame is resized to: its longer side about ``size``, both multiples of 32."""
    scale = size / max(shape)
    high, wide = (max(32, round(side * scale / 32) * 32) for side in shape)
    return high, wide


def frame_cells(shape: Sequence[int], size: int) -> Cells:
    """Cells of a frame: those of the finest map of a ResNet."""
    return tuple(side // 4 for side in frame_size(shape, size))
