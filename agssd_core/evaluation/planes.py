"""Which plane of two views to show, and where the other view lies on it.

Every picture of a crop pair shows one plane across the body (constant last axis) through the
middle of what the views share, so that both views show the same anatomy.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from agssd_core.config.node import Size3
from agssd_core.views.geometry import ViewBox, affine_box, overlap_region

FloatArray = NDArray[np.float64]
_THROUGH = 2


@dataclass(frozen=True)
class Rectangle:
    """A rectangle on a plane, (depth, height), in continuous voxels of what is drawn."""

    start: tuple[float, float]
    size: tuple[float, float]


@dataclass(frozen=True)
class PairPlane:
    """One plane through two views of a volume.

    Attributes:
        position: along the last axis of the volume, continuous voxels.
        slices: index of the plane in each view, voxels of the view.
        boxes: the two views on the volume's plane.
        shared: their overlap on the volume's plane, None when they share nothing.
        shared_in_view: the same overlap on each view's own plane.
        flipped: which views run against the volume along depth or height.
    """

    position: float
    slices: tuple[int, int]
    boxes: tuple[Rectangle, Rectangle]
    shared: Rectangle | None
    shared_in_view: tuple[Rectangle, Rectangle] | None
    flipped: tuple[bool, bool]


def pair_plane(affines: FloatArray, size: Size3) -> PairPlane:
    """Choose the plane for two views.

    Args:
        affines: (2, 4, 4) from each view's [-1, 1]^3 to voxels of the volume.
        size: voxels of a view after resampling.
    """
    first, second = (affine_box(affine) for affine in affines)
    shared = overlap_region(first, second)
    middle = shared or first
    position = middle.start[_THROUGH] + middle.size[_THROUGH] / 2
    in_view = None
    if shared is not None:
        in_view = (box_in_view(shared, affines[0], size), box_in_view(shared, affines[1], size))
    return PairPlane(
        position=position,
        slices=(_slice(position, affines[0], size), _slice(position, affines[1], size)),
        boxes=(_flat(first), _flat(second)),
        shared=None if shared is None else _flat(shared),
        shared_in_view=in_view,
        flipped=(any(first.flip), any(second.flip)),
    )


def box_in_view(box: ViewBox, affine: FloatArray, size: Size3) -> Rectangle:
    """A box of the volume as a rectangle on a view's plane, flips undone by the affine."""
    corners = np.stack([box.start, box.stop])
    frame = (corners - affine[:3, 3]) / np.diagonal(affine)[:3]
    voxels = np.sort((frame + 1) / 2 * np.asarray(size), axis=0)
    low, extent = voxels[0], voxels[1] - voxels[0]
    return Rectangle((float(low[0]), float(low[1])), (float(extent[0]), float(extent[1])))


def box_on_plane(affine: FloatArray, position: float) -> Rectangle | None:
    """The outline of a view on the volume's plane, None when the plane does not cut it."""
    box = affine_box(affine)
    inside = box.start[_THROUGH] <= position <= box.stop[_THROUGH]
    return _flat(box) if inside else None


def _slice(position: float, affine: FloatArray, size: Size3) -> int:
    """The slice of a view whose voxels hold a position of the volume's last axis."""
    frame = (position - affine[_THROUGH, 3]) / affine[_THROUGH, _THROUGH]
    return int(np.clip(np.floor((frame + 1) / 2 * size[_THROUGH]), 0, size[_THROUGH] - 1))


def _flat(box: ViewBox) -> Rectangle:
    return Rectangle((box.start[0], box.start[1]), (box.size[0], box.size[1]))
