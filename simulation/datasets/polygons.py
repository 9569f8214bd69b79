"""DDTI's outlines: an XML file for a case, JSON polygons in pixels for each of its images.

A ``mark`` holds the number of an image and ``svg``, a JSON list of regions with ``points`` of x and
y. Several marks may name one image, and a mark may be empty.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage import draw

from agssd_core.errors import DataError
from simulation.datasets.contours import parse_reading, text_of

# (N, 2) of x and y, pixels from the upper left corner.
Polygon = NDArray[np.float64]
MIN_POINTS = 3
# Farther out than any image that is read; a damaged number would fill the memory.
MAX_COORDINATE = 1e5
_draw: Any = draw


def read_polygons(path: Path) -> tuple[str, dict[str, list[Polygon]]]:
    """The TI-RADS grade of a case (empty if none) and the polygons of its images by number.

    Raises:
        DataError: the file is damaged, or a polygon is none.
    """
    case = parse_reading(path)
    images: dict[str, list[Polygon]] = {}
    for mark in case.iterfind(".//{*}mark"):
        regions = images.setdefault(text_of(mark, "image"), [])
        regions += _regions(text_of(mark, "svg"))
    return text_of(case, "tirads"), images


def fill_polygons(polygons: list[Polygon], shape: tuple[int, int]) -> NDArray[np.bool_]:
    """(H, W) True inside any of them; what lies outside the image is cut off."""
    inside = np.zeros(shape, dtype=bool)
    for points in polygons:
        inside[_draw.polygon(points[:, 1], points[:, 0], shape)] = True
    return inside


def _regions(text: str) -> list[Polygon]:
    if not text:
        return []
    try:
        found = [
            [(float(point["x"]), float(point["y"])) for point in region["points"]]
            for region in json.loads(text)
        ]
        polygons = [np.array(points, dtype=np.float64) for points in found if points]
    except (ValueError, TypeError, KeyError, RecursionError, OverflowError):
        raise _damaged() from None
    # A click without a drag leaves a point or a line, which outlines nothing.
    polygons = [points for points in polygons if len(points) >= MIN_POINTS]
    if any(not (np.abs(points) <= MAX_COORDINATE).all() for points in polygons):
        raise _damaged()
    return polygons


def _damaged() -> DataError:
    return DataError(
        "an outline is no list of regions with points x and y. Download it again, or leave it out."
    )
