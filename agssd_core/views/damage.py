"""Damage that core-region prediction has to see through: shuffled, re-mapped, painted over.

All of it happens in [0, 1], before normalisation, on a copy, and is drawn once a step.

Source: Zhou et al. 2019, arXiv:1908.06912 (Models Genesis), with the ANAUS code's sizes. Every
shuffled block is filled from the undamaged image, so the order of overlapping blocks is of no
consequence to where a pixel may come from: never further than one block.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agssd_core.config.anaus import OverlapConfig

REFERENCE_SIZE = 224
HOLE_EDGES = (22, 43)  # least and greatest edge of a painted box at that size, pixels
LEVELS = 256  # intervals of the intensity map
CURVE_POINTS = 512


@dataclass(frozen=True)
class Damage:
    """Parameters for N images of S x S pixels.

    Attributes:
        source: (N, S * S) int64, the pixel that each one is filled from.
        curve: (N, 257) float32 in [0, 1], intensities at 0, 1/256 ... 1; monotone.
        noise: (N, S, S) float32 in [0, 1), what holes are filled with.
        holes: (N, S, S) bool.
    """

    source: Tensor
    curve: Tensor
    noise: Tensor
    holes: Tensor


def draw_damage(
    rngs: Sequence[np.random.Generator], overlap: OverlapConfig, *, size: int
) -> Damage:
    """Draw the damage of N images.

    Args:
        rngs: one an image.
        overlap: probabilities, block edge at 224 pixels, number of boxes.
        size: S, edge of the images, pixels.
    """
    block = min(size, max(1, round(overlap.shuffle_block * size / REFERENCE_SIZE)))
    sources, curves, noises, holes = [], [], [], []
    for rng in rngs:
        hit = rng.uniform(size=2)
        shuffled, curve = _shuffled(rng, size, block), _bezier(rng)
        hole = _holes(rng, size, overlap)
        sources.append(shuffled if hit[0] < overlap.shuffle_p else np.arange(size * size))
        curves.append(curve if hit[1] < overlap.intensity_p else np.linspace(0, 1, LEVELS + 1))
        holes.append(hole)
        noises.append(rng.random((size, size), dtype=np.float32))
    return Damage(
        source=torch.from_numpy(np.stack(sources)),
        curve=torch.from_numpy(np.stack(curves)).float(),
        noise=torch.from_numpy(np.stack(noises)),
        holes=torch.from_numpy(np.stack(holes)),
    )


def apply_damage(images: Tensor, drawn: Damage) -> Tensor:
    """Damage images (N, 1, S, S) in [0, 1] on any device; they are not changed.

    Returns:
        (N, 1, S, S) in [0, 1], new memory.
    """
    device = images.device
    values = images.flatten(1).gather(1, drawn.source.to(device)).clamp_(0, 1) * LEVELS
    below = values.long().clamp_max_(LEVELS - 1)
    curve = drawn.curve.to(images)
    low, high = curve.gather(1, below), curve.gather(1, below + 1)
    mapped = torch.lerp(low, high, values - below).view_as(images)
    return torch.where(drawn.holes.to(device)[:, None], drawn.noise.to(images)[:, None], mapped)


def _shuffled(rng: np.random.Generator, size: int, block: int) -> NDArray[np.int64]:
    """(S * S,) source of every pixel: blocks of ``block`` pixels, together as large as the image.

    Where blocks overlap, the last one fills the pixel.
    """
    count = size * size // block**2
    corners = rng.integers(0, size - block + 1, size=(count, 2))
    order = rng.random((count, block * block), dtype=np.float32).argsort(axis=1)
    owner = np.full((size, size), -1, dtype=np.int64)
    for number, (row, column) in enumerate(corners.tolist()):
        owner[row : row + block, column : column + block] = number
    source = np.arange(size * size)
    covered = owner.ravel() >= 0
    mine = owner.ravel()[covered]
    rows, columns = np.divmod(source[covered], size)
    inside = (rows - corners[mine, 0]) * block + columns - corners[mine, 1]
    from_rows, from_columns = np.divmod(order[mine, inside], block)
    source[covered] = (corners[mine, 0] + from_rows) * size + corners[mine, 1] + from_columns
    return source


def _bezier(rng: np.random.Generator) -> NDArray[np.float64]:
    """(257,) monotone cubic Bezier between (0, 0) and (1, 1), falling in half of the draws."""
    x1, y1, x2, y2, direction = rng.uniform(size=5)
    t = np.linspace(0, 1, CURVE_POINTS)
    first, second, last = 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3
    curve: NDArray[np.float64] = np.interp(
        np.linspace(0, 1, LEVELS + 1),
        first * x1 + second * x2 + last,
        first * y1 + second * y2 + last,
    )
    return curve if direction < 0.5 else curve[::-1].copy()


def _holes(rng: np.random.Generator, size: int, overlap: OverlapConfig) -> NDArray[np.bool_]:
    """(S, S) boxes to be filled with noise."""
    count = overlap.inpaint_boxes
    low, high = (max(1, round(edge * size / REFERENCE_SIZE)) for edge in HOLE_EDGES)
    edges = rng.integers(low, high + 1, size=(count, 2))
    corners = (rng.uniform(size=(count, 2)) * (size - edges + 1)).astype(np.int64)
    used = rng.uniform(size=count) < overlap.inpaint_p
    holes = np.zeros((size, size), dtype=np.bool_)
    for (row, column), (height, width) in zip(corners[used], edges[used], strict=True):
        holes[row : row + height, column : column + width] = True
    return holes
