"""CVAC: which boxes to cut from a volume.

Two global boxes share at least ``cvac.rho[0]`` of the smaller one by construction, without
rejection; local boxes lie in what both share.

Source: after Yu & Dai 2026, doi 10.1109/TMI.2026.3680920 (abstract); the sampler is ours.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from agssd_core.config import CvacConfig
from agssd_core.config.node import Size3
from agssd_core.views.geometry import FloatArray, ViewBox, overlap_region
from agssd_core.views.reading import VolumeLike

Drawn = TypeVar("Drawn")

# A crop may be stretched to twice its native size before padding becomes the lesser evil.
LARGEST_STRETCH = 2.0


@dataclass(frozen=True)
class ViewBoxes:
    """All boxes of one volume: two global ones and the local ones."""

    globals_: tuple[ViewBox, ViewBox]
    locals_: tuple[ViewBox, ...]


@dataclass(frozen=True)
class _Extent:
    """Where boxes may lie: lower corner and edges, (3,) continuous voxels."""

    start: FloatArray
    size: FloatArray


def draw_boxes(info: VolumeLike, cvac: CvacConfig, rng: np.random.Generator) -> ViewBoxes:
    """Draw the views of one volume.

    Boxes stay within the body box. Where that is shorter than half a crop the box grows beyond
    it, first into the volume and then into padding, which ``valid_tokens`` tells apart.
    """
    extent = _usable_extent(info, cvac.global_size)
    if not cvac.enabled:
        pair = (_lone_box(info, cvac, extent, rng), _lone_box(info, cvac, extent, rng))
        local_room: _Extent | None = None
    else:
        pair = _best_pair(info, cvac, extent, rng)
        shared = overlap_region(*pair)
        local_room = None if shared is None else _extent_of(shared)
    locals_ = tuple(_local_box(extent, local_room, cvac, rng) for _ in range(cvac.n_local))
    return ViewBoxes(pair, locals_)


def foreground_share(info: VolumeLike, box: ViewBox) -> float:
    """Share of foreground in a box, 0 to 1, from the down-sampled integral image."""
    table = info.foreground_integral
    cells = np.asarray(table.shape) - 1
    low = np.floor(np.asarray(box.start) / info.foreground_step).astype(int)
    high = np.ceil(np.asarray(box.stop) / info.foreground_step).astype(int)
    count = int(np.prod(np.maximum(high - low, 1)))
    (d0, h0, w0), (d1, h1, w1) = np.clip(low, 0, cells), np.clip(high, 0, cells)
    upper = table[d1, h1, w1] - table[d0, h1, w1] - table[d1, h0, w1] - table[d1, h1, w0]
    total = upper + table[d0, h0, w1] + table[d0, h1, w0] + table[d1, h0, w0] - table[d0, h0, w0]
    return float(total) / count


def _usable_extent(info: VolumeLike, crop: Size3) -> _Extent:
    start = np.asarray(info.foreground_start, dtype=np.float64)
    size = np.asarray(info.foreground_size, dtype=np.float64)
    shape = np.asarray(info.shape, dtype=np.float64)
    wanted = np.maximum(size, np.asarray(crop) / LARGEST_STRETCH)
    grown = start - (wanted - size) / 2
    # Real voxels beside the body box are better than padding.
    room = np.maximum(shape - wanted, 0)
    inside = np.where(wanted <= shape, np.clip(grown, 0, room), (shape - wanted) / 2)
    return _Extent(inside, wanted)


def _extent_of(box: ViewBox) -> _Extent:
    return _Extent(np.asarray(box.start), np.asarray(box.size))


def _richest(
    draw: Callable[[], Drawn], share: Callable[[Drawn], float], *, wanted: float, candidates: int
) -> Drawn:
    """The first candidate that holds the wanted share of foreground, else the best of all."""
    best = draw()
    best_share = share(best)
    for _ in range(candidates - 1):
        if best_share >= wanted:
            break
        other = draw()
        other_share = share(other)
        if other_share > best_share:
            best, best_share = other, other_share
    return best


def _best_pair(
    info: VolumeLike, cvac: CvacConfig, extent: _Extent, rng: np.random.Generator
) -> tuple[ViewBox, ViewBox]:
    def share(pair: tuple[ViewBox, ViewBox]) -> float:
        shared = overlap_region(*pair)
        return 0.0 if shared is None else foreground_share(info, shared)

    return _richest(
        lambda: _overlapping_pair(extent, cvac, rng),
        share,
        wanted=cvac.foreground,
        candidates=cvac.candidates,
    )


def _overlapping_pair(
    extent: _Extent, cvac: CvacConfig, rng: np.random.Generator
) -> tuple[ViewBox, ViewBox]:
    first = _edges(cvac.global_size, extent, cvac, rng)
    second = _edges(cvac.global_size, extent, cvac, rng)
    smaller = np.minimum(first, second)
    rho = rng.uniform(*cvac.rho)
    target = min(1.0, rho * min(first.prod(), second.prod()) / smaller.prod())
    shared = smaller * target ** rng.dirichlet(np.ones(3))
    # The union must fit. Widening the shared part can only raise the overlap.
    shared = np.minimum(np.maximum(shared, first + second - extent.size), smaller)
    union = first + second - shared
    corner = _anywhere(extent, union, rng)
    first_leads = rng.uniform(size=3) < 0.5
    start_1 = np.where(first_leads, corner, corner + second - shared)
    start_2 = np.where(first_leads, corner + first - shared, corner)
    return _box(start_1, first, cvac, rng), _box(start_2, second, cvac, rng)


def _lone_box(
    info: VolumeLike, cvac: CvacConfig, extent: _Extent, rng: np.random.Generator
) -> ViewBox:
    """A box drawn without regard to any other, as plain multi-crop does."""

    def draw() -> ViewBox:
        edges = _edges(cvac.global_size, extent, cvac, rng)
        return _box(_anywhere(extent, edges, rng), edges, cvac, rng)

    return _richest(
        draw,
        lambda box: foreground_share(info, box),
        wanted=cvac.foreground,
        candidates=cvac.candidates,
    )


def _anywhere(extent: _Extent, edges: FloatArray, rng: np.random.Generator) -> FloatArray:
    return extent.start + rng.uniform(size=3) * np.maximum(extent.size - edges, 0)


def _local_box(
    extent: _Extent, shared: _Extent | None, cvac: CvacConfig, rng: np.random.Generator
) -> ViewBox:
    edges = _edges(cvac.local_size, extent, cvac, rng)
    if shared is None:
        return _box(_anywhere(extent, edges, rng), edges, cvac, rng)
    inside = np.minimum(shared.size / edges, 1.0)
    if inside.prod() < cvac.containment:
        # Only small bodies come here: shrink the axes that stick out until the share is right.
        power = np.log(cvac.containment) / np.log(inside.prod())
        edges = np.where(inside < 1, shared.size / inside**power, edges)
    slack = shared.size - edges
    start = shared.start + np.where(slack >= 0, rng.uniform(size=3) * slack, slack / 2)
    start = np.clip(start, extent.start, extent.start + extent.size - edges)
    return _box(start, edges, cvac, rng)


def _edges(crop: Size3, extent: _Extent, cvac: CvacConfig, rng: np.random.Generator) -> FloatArray:
    low, high = np.log(cvac.scale)
    scale = float(np.exp(rng.uniform(low, high)))
    return np.minimum(np.asarray(crop, dtype=np.float64) * scale, extent.size)


def _box(
    start: FloatArray, size: FloatArray, cvac: CvacConfig, rng: np.random.Generator
) -> ViewBox:
    may = {"none": (False,) * 3, "lr": (True, False, False), "all": (True,) * 3}[cvac.flip]
    drawn = rng.uniform(size=3) < cvac.flip_probability
    flip = tuple(bool(allowed and hit) for allowed, hit in zip(may, drawn, strict=True))
    d, h, w = (float(value) for value in start)
    x, y, z = (float(value) for value in size)
    return ViewBox((d, h, w), (x, y, z), (flip[0], flip[1], flip[2]))
