"""Label maps and masks in files: PNG or NumPy, one whole number a pixel."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from agssd_core.data.frame_source import MAX_CLIP_FRAMES, check_size, readable_clip
from agssd_core.errors import ClipError

LabelMap = NDArray[np.uint8]

MAX_LABEL = 255
SUFFIXES = (".png", ".npy")


def read_label_image(path: Path) -> LabelMap:
    """Read label maps.

    Labels up to 255 keep their numbers; larger ones are renumbered in ascending order.

    Returns:
        (F, H, W) uint8, 0 is no anatomy; a PNG has one frame.

    Raises:
        ClipError: the file is neither, is coloured or damaged, or has more than 255 labels.
    """
    with readable_clip():
        values = _png(path) if path.suffix.lower() == ".png" else _npy(path)
    found = np.unique(values)
    labels = found[found != 0]
    if len(labels) > MAX_LABEL or (len(labels) and labels[0] < 0):
        raise ClipError(
            f"the label map has {len(labels)} labels{' and negative ones' * bool(labels[0] < 0)}; "
            f"at most {MAX_LABEL} above 0 are told apart. Merge labels, or save one whole number "
            "for each anatomy (a smoothed or JPEG-compressed map has hundreds)."
        )
    if len(labels) and labels[-1] > MAX_LABEL:
        renumbered = np.where(values == 0, 0, np.searchsorted(labels, values) + 1)
        return np.asarray(renumbered, dtype=np.uint8)
    return np.asarray(values, dtype=np.uint8)


def _png(path: Path) -> NDArray[Any]:
    with Image.open(path, formats=("PNG",)) as image:
        check_size(image.height, image.width)
        if image.mode in ("1", "L", "P", "I", "I;16", "I;16B"):
            return np.array(image).astype(np.int64)[None]
        values = np.array(image.convert("RGB"))
    if (values != values[..., :1]).any():
        raise ClipError(
            "the label map is a colour picture, and colours are no labels. Save one whole number "
            "a pixel: a grey or palette PNG, or .npy."
        )
    return values[None, ..., 0].astype(np.int64)


def _npy(path: Path) -> NDArray[Any]:
    values = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(values, np.ndarray) or values.ndim not in (2, 3):
        raise ClipError(
            "the label array is not (H, W) or (frames, H, W). Save one whole number a pixel."
        )
    if values.dtype.kind not in "biu":
        raise ClipError(
            f"the label array holds {values.dtype}, only whole numbers are labels. Save uint8."
        )
    stack = values if values.ndim == 3 else values[None]
    check_size(stack.shape[1], stack.shape[2], min(len(stack), MAX_CLIP_FRAMES + 1))
    return np.asarray(stack, dtype=np.int64)
