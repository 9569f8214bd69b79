"""Shrink frames by area averaging, without letting anything from outside the sector in."""

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Mask = NDArray[np.bool_]
Reals = NDArray[np.float64]


class AreaShrink:
    """Blanks frames outside a sector and shrinks them to one size.

    Attributes:
        sector: (H, W) the sector after shrinking: pixels of which more than half lies inside.
    """

    def __init__(self, sector: Mask, max_side: int) -> None:
        rows, columns = sector.shape
        scale = min(1.0, max_side / max(rows, columns))
        self._inside = sector
        self._size = (max(1, round(rows * scale)), max(1, round(columns * scale)))
        self._cover: Reals = area_means(sector.astype(np.float64), self._size)
        self.sector: Mask = self._cover > 0.5

    def __call__(self, frame: Pixels) -> Pixels:
        """(h, w) uint8 of the source to (H, W) uint8, 0 outside the sector."""
        inside = np.where(self._inside, frame, 0)
        if self._size == inside.shape:
            return inside.astype(np.uint8)
        sums = area_means(inside.astype(np.float64), self._size)
        # At the edge the mean is over the part that lies inside.
        means = sums / np.where(self.sector, self._cover, 1)
        return np.where(self.sector, np.rint(means), 0).astype(np.uint8)


def area_means(values: Reals, size: tuple[int, int]) -> Reals:
    """Mean of every pixel of the smaller grid over the area that it covers, parts included."""
    return _means_along_rows(_means_along_rows(values, size[0]).T, size[1]).T


def _means_along_rows(values: Reals, count: int) -> Reals:
    rows = values.shape[0]
    sums = np.zeros((rows + 1, values.shape[1]))
    np.cumsum(values, axis=0, out=sums[1:])
    edges = np.linspace(0, rows, count + 1)
    below = np.minimum(edges.astype(int), rows - 1)
    part = (edges - below)[:, None]
    at_edges = sums[below] * (1 - part) + sums[below + 1] * part
    return np.asarray(np.diff(at_edges, axis=0) * (count / rows))
