"""Choose frames of a clip: near-duplicates go, the rest is spread evenly."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]

THUMBNAIL_SIDE = 96
# A thumbnail that varies less, in grey levels, shows nothing.
BLANK_LEVELS = 1.0


def thumbnail(grey: Pixels) -> Pixels:
    """Block means of a frame (H, W), the longer side THUMBNAIL_SIDE at most."""
    rows, columns = grey.shape
    scale = min(1.0, THUMBNAIL_SIDE / max(rows, columns))
    size = (max(1, round(columns * scale)), max(1, round(rows * scale)))
    return np.asarray(Image.fromarray(grey).resize(size, Image.Resampling.BOX))


def thin(thumbnails: Sequence[Pixels], *, similarity: float, max_frames: int) -> list[int]:
    """Positions of the frames to keep, ascending.

    A frame is dropped when it shows nothing or correlates more than ``similarity`` with the last
    kept one; of what is left at most ``max_frames`` stay, evenly spread. One frame always stays.

    Args:
        thumbnails: of every frame in its order, the sector's pixels only, any equal shape.
        similarity: Pearson's correlation, in [0, 1].
        max_frames: at least 1.
    """
    kept: list[int] = []
    last: NDArray[np.float32] | None = None
    for position, pixels in enumerate(thumbnails):
        values = pixels.astype(np.float32).ravel()
        values -= values.mean()
        length = float(np.linalg.norm(values))
        if length < BLANK_LEVELS * values.size**0.5:
            continue
        values /= length
        if last is None or float(values @ last) <= similarity:
            kept.append(position)
            last = values
    if not kept:
        kept = [len(thumbnails) // 2]
    if len(kept) > max_frames:
        spread = np.linspace(0, len(kept) - 1, max_frames).round().astype(int)
        kept = [kept[place] for place in spread]
    return kept
