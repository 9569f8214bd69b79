"""Boxes, their affines, and where a token of one view lies in another.

Coordinates are continuous voxels of the cached volume: voxel ``i`` covers [i, i + 1). A view's
own frame is [-1, 1] on each axis, in the order (depth, height, width).

Source: after Yu & Dai 2026, doi 10.1109/TMI.2026.3680920 (abstract); the record is ours.
"""

from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from agssd_core.config.node import Size3
from agssd_core.errors import ShapeError

Float3 = tuple[float, float, float]
Bool3 = tuple[bool, bool, bool]
FloatArray = NDArray[np.float64]
BoolArray = NDArray[np.bool_]

# Identical boxes put the outermost tokens exactly on the edge of ``inner``; rounding of the
# affines must not throw them out.
EDGE_TOLERANCE = 1e-6


@dataclass(frozen=True)
class ViewBox:
    """One view before resampling.

    Attributes:
        start: lower corner, continuous voxels.
        size: edges, continuous voxels.
        flip: axes along which the view runs backwards.
    """

    start: Float3
    size: Float3
    flip: Bool3 = (False, False, False)

    @property
    def stop(self) -> Float3:
        """Upper corner, continuous voxels."""
        d, h, w = (s + e for s, e in zip(self.start, self.size, strict=True))
        return d, h, w

    @property
    def volume(self) -> float:
        """Content in cubic voxels."""
        return self.size[0] * self.size[1] * self.size[2]


def box_affine(box: ViewBox) -> FloatArray:
    """The (4, 4) map from a view's frame [-1, 1]^3 to voxels of the volume."""
    affine = np.eye(4)
    for axis in range(3):
        half = box.size[axis] / 2
        affine[axis, axis] = -half if box.flip[axis] else half
        affine[axis, 3] = box.start[axis] + half
    return affine


def affine_box(affine: FloatArray) -> ViewBox:
    """The box that :func:`box_affine` was given, for drawing a view on its volume."""
    half = np.diagonal(affine)[:3]
    low = affine[:3, 3] - np.abs(half)
    return ViewBox(_float3(low), _float3(2 * np.abs(half)), _bool3(half < 0))


def overlap_region(box_a: ViewBox, box_b: ViewBox) -> ViewBox | None:
    """What two boxes share (without flips), or ``None`` when they share nothing."""
    start = np.maximum(box_a.start, box_b.start)
    size = np.minimum(box_a.stop, box_b.stop) - start
    if (size <= 0).any():
        return None
    return ViewBox(_float3(start), _float3(size))


def overlap_fraction(box_a: ViewBox, box_b: ViewBox) -> float:
    """Shared content over the content of the smaller box, 0 to 1 (not the IoU)."""
    shared = overlap_region(box_a, box_b)
    return 0.0 if shared is None else shared.volume / min(box_a.volume, box_b.volume)


def containment(part: ViewBox, whole: ViewBox | None) -> float:
    """Share of ``part`` that lies within ``whole``, 0 to 1."""
    shared = None if whole is None else overlap_region(part, whole)
    return 0.0 if shared is None else shared.volume / part.volume


def token_centres(grid: Size3) -> FloatArray:
    """Centres of a view's tokens in its own frame: (N, 3), last axis of the grid fastest."""
    lines = [(np.arange(count) + 0.5) / count * 2 - 1 for count in grid]
    return np.stack(np.meshgrid(*lines, indexing="ij"), axis=-1).reshape(-1, 3)


def token_map(affine_from: FloatArray, affine_to: FloatArray, grid: Size3) -> FloatArray:
    """Where the tokens of one view lie in the frame of another: (N, 3), ``inv(A2) A1 P``."""
    link = np.linalg.inv(affine_to) @ affine_from
    return np.asarray(token_centres(grid) @ link[:3, :3].T + link[:3, 3])


def centre_in(coords: FloatArray) -> BoolArray:
    """Token centres (N, 3) that lie inside the other view: (N,). Enough for attention."""
    return np.asarray((np.abs(coords) <= 1 + EDGE_TOLERANCE).all(axis=-1))


def inner(coords: FloatArray, grid: Size3) -> BoolArray:
    """Token centres (N, 3) within the hull of the other view's token centres: (N,).

    Only these may be interpolated: nearer the border :func:`sample_tokens` clamps.
    """
    limit = 1 - 1 / np.asarray(grid, dtype=np.float64)
    return np.asarray((np.abs(coords) <= limit + EDGE_TOLERANCE).all(axis=-1))


def key_tokens(affine: FloatArray, shared: ViewBox | None, grid: Size3) -> BoolArray:
    """Tokens of a view whose centre lies in the shared region dilated by one token: (N,)."""
    if shared is None:
        return np.zeros(int(np.prod(grid)), dtype=np.bool_)
    centres = token_centres(grid) @ affine[:3, :3].T + affine[:3, 3]
    pitch = 2 * np.abs(np.diagonal(affine)[:3]) / np.asarray(grid) + EDGE_TOLERANCE
    above = centres >= np.asarray(shared.start) - pitch
    below = centres <= np.asarray(shared.stop) + pitch
    return np.asarray((above & below).all(axis=-1))


def sample_tokens(tokens: Tensor, coords: Tensor, grid: Size3) -> Tensor:
    """Interpolate a view's tokens trilinearly at points of its frame.

    Args:
        tokens: (B, N, C) tokens of the view, N = product of ``grid``.
        coords: (B, P, 3) points in the view's [-1, 1] frame, order (depth, height, width).
        grid: token grid of the view.

    Returns:
        (B, P, C) in the dtype of ``tokens``; exact only at ``inner`` points.

    Raises:
        ShapeError: the tokens do not fill the grid.
    """
    batch, count, width = tokens.shape
    if count != grid[0] * grid[1] * grid[2] or coords.shape[0] != batch:
        raise ShapeError(
            f"tokens {tuple(tokens.shape)} and points {tuple(coords.shape)} do not fit a token "
            f"grid of {grid}. Pass (B, N, C) tokens and (B, P, 3) points of one batch."
        )
    field = tokens.float().transpose(1, 2).reshape(batch, width, *grid)
    points = coords.to(field).flip(-1)[:, None, None]
    sampled = F.grid_sample(field, points, align_corners=False, padding_mode="border")
    return sampled[:, :, 0, 0].transpose(1, 2).to(tokens.dtype)


def _float3(values: FloatArray) -> Float3:
    d, h, w = (float(value) for value in values)
    return d, h, w


def _bool3(values: BoolArray) -> Bool3:
    d, h, w = (bool(value) for value in values)
    return d, h, w
