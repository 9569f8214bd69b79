"""Read ultrasound from image files: PNG, JPEG, BMP, TIFF and GIF, still or animated."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from agssd_core.data.frame_source import (
    Box,
    FrameCount,
    Patience,
    Pixels,
    bits_used,
    check_size,
    eight_bits,
    too_large,
)
from agssd_core.errors import ClipError

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "GIF")
SIGNATURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"BM", b"II*\0", b"MM\0*", b"GIF8")
ROTATED = frozenset({5, 6, 7, 8})
EXIF_ORIENTATION = 0x0112


class ImageFrames:
    """The frames of an image file; region unknown."""

    region: Box | None = None

    def __init__(self, path: Path) -> None:
        self._path = path
        self._bits = 0

    def frames(self, wanted: Collection[int] | None = None) -> Iterator[tuple[int, Pixels]]:
        """Frames in their order; only the first frame of a JPEG (others are previews)."""
        patience = Patience()
        with _open(self._path) as image:
            for number in range(_count(image)):
                image.seek(number)
                check_size(image.height, image.width)
                # A later frame of a GIF builds on the earlier ones, so none is left out.
                if wanted is None or number in wanted:
                    frame = self._pixels(image)
                    patience.check(number, frame)
                    yield number, frame

    def _pixels(self, image: Image.Image) -> Pixels:
        turned = ImageOps.exif_transpose(image)
        if turned.mode in ("L", "RGB"):
            return np.array(turned)
        if turned.mode.startswith("I"):
            values = np.array(turned)
            if values.min(initial=0) < 0:
                raise _unusable("negative values")
            self._bits = self._bits or bits_used(values)
            return eight_bits(values, self._bits)
        if turned.mode == "F":
            raise _unusable("floating point values")
        if turned.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in turned.info:
            clear = turned.convert("RGBA")
            # What is transparent is black, whatever colour it hides.
            turned = Image.alpha_composite(Image.new("RGBA", clear.size, (0, 0, 0, 255)), clear)
        return np.array(turned.convert("L" if turned.mode == "1" else "RGB"))


def image_size(path: Path) -> FrameCount:
    """Read an image's header.

    Raises:
        ClipError: the file is no image that is read, or claims too much.
    """
    with _open(path) as image:
        frames = _count(image)
        rows, columns = image.height, image.width
        if image.getexif().get(EXIF_ORIENTATION) in ROTATED:
            rows, columns = columns, rows
        return FrameCount(frames, rows, columns)


def _open(path: Path) -> Any:
    with path.open("rb") as stream:
        start = stream.read(8)
    if not start.startswith(SIGNATURES):
        raise ClipError(
            "the file is empty or no PNG, JPEG, BMP, TIFF or GIF, whatever its name says. Export "
            "it again, or leave it out."
        )
    try:
        image = Image.open(path, formats=FORMATS)
    except Image.DecompressionBombError:
        raise too_large() from None
    try:
        check_size(image.height, image.width)
    except ClipError:
        image.close()
        raise
    return image


def _count(image: Image.Image) -> int:
    frames = 1 if image.format in ("JPEG", "MPO") else int(getattr(image, "n_frames", 1))
    check_size(image.height, image.width, frames)
    return frames


def _unusable(what: str) -> ClipError:
    return ClipError(
        f"the image holds {what}, only whole grey values and colours are read. Save it as PNG "
        "with 8 or 16 bits."
    )
