"""Label maps without any learned weights: superpixels, merged by grey level and place.

They are regions of like echo, not anatomies, and are labelled ``superpixels`` wherever they are
used.

Source:
    SLIC: Achanta et al. 2012, doi:10.1109/TPAMI.2012.120, as in scikit-image; merging as Ward
    1963, doi:10.1080/01621459.1963.10500845, over neighbours.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from skimage.segmentation import slic

from agssd_core.errors import ShapeError

FINE_PER_REGION = 5
SMOOTHING = 1.5
COMPACTNESS = 0.1
# How much a distance of one sector's width weighs against black beside white.
PLACE_WEIGHT = 0.7
MAX_REGIONS = 255


def superpixels(
    frame: NDArray[np.uint8], sector: NDArray[np.bool_], *, regions: int
) -> NDArray[np.uint8]:
    """Cut a sector into about so many regions; the same frame gives the same ones.

    Args:
        frame: grey (H, W).
        sector: (H, W), True inside.
        regions: wanted, 1 to 255; a small sector may hold fewer.

    Returns:
        uint8 (H, W): 0 outside the sector, 1, 2, ... inside without a gap.

    Raises:
        ShapeError: frame and sector differ in size, or the number is out of range.
    """
    if frame.shape != sector.shape or not 1 <= regions <= MAX_REGIONS:
        raise ShapeError(
            f"a frame of {frame.shape}, a sector of {sector.shape} and {regions} regions: the "
            f"sizes must agree and 1 to {MAX_REGIONS} regions be wanted. Check the settings."
        )
    if not sector.any():
        return np.zeros(frame.shape, dtype=np.uint8)
    smooth = _smooth(frame, sector)
    # Segments start on a grid over the whole frame, so the sector gets its share of them.
    wanted = max(1, round(FINE_PER_REGION * regions * sector.size / np.count_nonzero(sector)))
    fine = slic(
        smooth, n_segments=wanted, compactness=COMPACTNESS, channel_axis=None, start_label=1
    )
    return _merged(np.where(sector, fine, 0), smooth, regions)


def _smooth(frame: NDArray[np.uint8], sector: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Grey in [0, 1] without speckle; the black outside does not bleed in."""
    inside = ndimage.gaussian_filter(sector.astype(float), SMOOTHING)
    levels = ndimage.gaussian_filter(np.where(sector, frame / 255.0, 0.0), SMOOTHING)
    return np.where(sector, levels / np.maximum(inside, 1e-6), 0.0)


def _merged(fine: NDArray[np.int_], levels: NDArray[np.float64], regions: int) -> NDArray[np.uint8]:
    """Join neighbours, cheapest pair first, until so many regions are left."""
    numbers, compact = np.unique(fine, return_inverse=True)
    compact = compact.reshape(fine.shape) + (1 if numbers[0] != 0 else 0)
    count = int(compact.max())
    sizes = np.bincount(compact.ravel(), minlength=count + 1).astype(float)
    middle = _middles(compact, levels, sizes)
    joined = _neighbours(compact, count)
    joined[0] = joined[:, 0] = False
    owner = np.arange(count + 1)
    alive = count
    costs = _costs(middle, sizes, joined)
    while alive > regions and np.isfinite(costs).any():
        kept, gone = sorted(divmod(int(np.argmin(costs)), count + 1))
        whole = sizes[kept] + sizes[gone]
        middle[kept] = (sizes[kept] * middle[kept] + sizes[gone] * middle[gone]) / whole
        sizes[kept], sizes[gone] = whole, 0
        joined[kept] |= joined[gone]
        joined[:, kept] |= joined[:, gone]
        joined[gone] = joined[:, gone] = False
        joined[kept, kept] = False
        owner[owner == gone] = kept
        costs[gone] = costs[:, gone] = np.inf
        costs[kept] = costs[:, kept] = _costs_of(kept, middle, sizes, joined)
        alive -= 1
    labels = owner[compact]
    names = np.unique(labels[labels > 0])[:MAX_REGIONS]
    lookup = np.zeros(count + 1, dtype=np.uint8)
    lookup[names] = np.arange(1, len(names) + 1)
    return lookup[labels]


def _middles(
    compact: NDArray[np.int_], levels: NDArray[np.float64], sizes: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Mean grey and weighted place of every region, (N + 1, 3)."""
    rows, columns = np.indices(compact.shape)
    scale = PLACE_WEIGHT / max(compact.shape)
    features = (levels, rows * scale, columns * scale)
    flat, length = compact.ravel(), len(sizes)
    sums = [np.bincount(flat, weights=item.ravel(), minlength=length) for item in features]
    return np.stack(sums, axis=1) / np.maximum(sizes, 1)[:, None]


def _neighbours(compact: NDArray[np.int_], count: int) -> NDArray[np.bool_]:
    joined = np.zeros((count + 1, count + 1), dtype=bool)
    for one, other in ((compact[1:], compact[:-1]), (compact[:, 1:], compact[:, :-1])):
        joined[one.ravel(), other.ravel()] = True
    joined |= joined.T
    np.fill_diagonal(joined, val=False)
    return joined


def _costs(
    middle: NDArray[np.float64], sizes: NDArray[np.float64], joined: NDArray[np.bool_]
) -> NDArray[np.float64]:
    rows = [_costs_of(index, middle, sizes, joined) for index in range(len(sizes))]
    return np.stack(rows)


def _costs_of(
    index: int,
    middle: NDArray[np.float64],
    sizes: NDArray[np.float64],
    joined: NDArray[np.bool_],
) -> NDArray[np.float64]:
    """Ward's increase of the spread for joining one region with each neighbour; else inf."""
    squared = ((middle - middle[index]) ** 2).sum(axis=1)
    weight = sizes[index] * sizes / np.maximum(sizes[index] + sizes, 1)
    return np.where(joined[index], weight * squared, np.inf)
