"""What a probe finds without an encoder: where things lie, and how bright they are.

Both have the grids of the encoder that they are compared with. An encoder that does not beat them
has shown nothing but position or brightness.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from agssd_core.config import RunConfig
from agssd_core.evaluation.cells import Cells, cell_means, frame_cells, volume_cells
from agssd_core.evaluation.labelled import LabelledArrays

Reals = NDArray[np.float32]
FREQUENCIES = (1, 2, 4)
LEVELS = 16
_QUANTILES = (5, 25, 50, 75, 95)


class PositionControl:
    """Where a cell lies in the image and in the body's box; of a scan its size alone.

    Args:
        config: of the encoder to compare with.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config

    def pooled(self, arrays: LabelledArrays) -> Reals:
        """(2 * axes + 1,): sides, and sides of the body's box, voxels; the body's share."""
        low, high = _box(arrays.inside)
        share = [float(arrays.inside.mean())]
        return np.asarray([*arrays.image.shape, *(high - low), *share], dtype=np.float32)

    def maps(self, arrays: LabelledArrays) -> Reals:
        """Sines and cosines of each coordinate, the coordinates, and the body's share of a cell."""
        cells = cells_of(arrays.image.shape, self._config)
        low, high = _box(arrays.inside)
        layers: list[NDArray[np.floating]] = [cell_means(arrays.inside, cells)]
        for axis, (side, count) in enumerate(zip(arrays.image.shape, cells, strict=True)):
            middle = (np.arange(count) + 0.5) / count
            within = (middle * side - low[axis]) / (high[axis] - low[axis])
            for place in (middle, within):
                waves = [f(np.pi * k * place) for k in FREQUENCIES for f in (np.sin, np.cos)]
                layers += [_along(values, axis, cells) for values in (place, *waves)]
        return np.stack(layers).astype(np.float32)


class IntensityControl:
    """Distribution of grey values, in each cell or in the whole body.

    Args:
        config: of the encoder to compare with.
    """

    def __init__(self, config: RunConfig) -> None:
        self._config = config

    def pooled(self, arrays: LabelledArrays) -> Reals:
        """Shares of 16 grey levels in the body, then mean, deviation and five percentiles."""
        values = arrays.image[arrays.inside] if arrays.inside.any() else arrays.image.ravel()
        shares = np.bincount(_level(values), minlength=LEVELS) / values.size
        moments = [values.mean(), values.std(), *np.percentile(values, _QUANTILES)]
        return np.concatenate([shares, moments]).astype(np.float32)

    def maps(self, arrays: LabelledArrays) -> Reals:
        """Mean, deviation and the shares of 16 grey levels in each cell."""
        cells = cells_of(arrays.image.shape, self._config)
        mean = cell_means(arrays.image, cells)
        spread = np.sqrt(np.maximum(cell_means(arrays.image**2, cells) - mean**2, 0))
        levels = _level(arrays.image)
        shares = [cell_means(levels == level, cells) for level in range(LEVELS)]
        return np.stack([mean, spread, *shares]).astype(np.float32)


def cells_of(shape: Sequence[int], config: RunConfig) -> Cells:
    """The grid of an encoder's maps over an image of this shape."""
    if len(shape) == 3:
        return volume_cells(shape, config.agssd.model.patch_size)
    return frame_cells(shape, config.anaus.augment.size)


def _box(inside: NDArray[np.bool_]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lower and upper corner of the body, voxels; the whole image where there is none."""
    if not inside.any():
        return np.zeros(inside.ndim), np.asarray(inside.shape, dtype=np.float64)
    places = np.argwhere(inside)
    return places.min(axis=0).astype(np.float64), places.max(axis=0) + 1.0


def _along(values: NDArray[np.floating], axis: int, cells: Cells) -> NDArray[np.floating]:
    shape = [1] * len(cells)
    shape[axis] = -1
    return np.broadcast_to(values.reshape(shape), cells)


def _level(values: NDArray[np.float32]) -> NDArray[np.intp]:
    return np.minimum((values * LEVELS).astype(np.intp), LEVELS - 1)
