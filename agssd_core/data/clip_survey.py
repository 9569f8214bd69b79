"""First pass over a clip: samples spread over it, small pictures of every frame, the sector."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from agssd_core.data.frame_source import Box, FrameSource, Pixels, is_tinted, overlays
from agssd_core.data.sector import find_sector
from agssd_core.data.thinning import thumbnail
from agssd_core.errors import ClipError

Mask = NDArray[np.bool_]

MAX_SAMPLES, SAMPLE_BYTES = 16, 1 << 28
# A label map has a few values, an ultrasound image many.
LEAST_LEVELS = 16
INSIDE = 250


class Survey:
    """What is known of a clip after one reading.

    Attributes:
        numbers: of the frames that can be decoded, ascending.
        tinted: whether the echoes themselves are coloured, see ``grey_frame``.
        sector: (H, W) True inside, in the source's pixels.
    """

    def __init__(self, source: FrameSource) -> None:
        self._source = source
        self.numbers: list[int] = []
        self._thumbnails: list[Pixels] = []
        self._samples: dict[int, Pixels] = {}
        self._read()
        samples = list(self._samples.values())
        self.tinted = sum(is_tinted(frame) for frame in samples) > len(samples) / 2
        self.sector = _sector(samples, source.region, tinted=self.tinted)

    def sector_thumbnails(self) -> list[Pixels]:
        """The sector's pixels of every frame's thumbnail, (P,) each."""
        share = thumbnail(np.where(self.sector, 255, 0).astype(np.uint8))
        inside = share >= min(INSIDE, int(share.max()))
        return [small[inside] for small in self._thumbnails]

    def frames(self, numbers: Sequence[int]) -> Iterator[Pixels]:
        """Decode some frames again, or take them from the samples."""
        if all(number in self._samples for number in numbers):
            yield from (self._samples[number] for number in numbers)
            return
        for _, frame in self._source.frames(frozenset(numbers)):
            yield frame

    def _read(self) -> None:
        stride, limit, shape = 1, MAX_SAMPLES, None
        for number, frame in self._source.frames():
            if shape is None:
                shape, limit = frame.shape, max(2, min(limit, SAMPLE_BYTES // frame.nbytes))
            if frame.shape != shape:
                raise ClipError("the frames change size or colour within the clip. Cut it there.")
            place = len(self.numbers)
            self.numbers.append(number)
            self._thumbnails.append(thumbnail(_luminance(frame)))
            if place % stride == 0:
                self._samples[number] = frame
            if len(self._samples) > limit:
                stride *= 2
                self._samples = dict(list(self._samples.items())[::2])
        if not self.numbers:
            raise ClipError("the clip holds no frame that can be decoded. Export it again.")


def _sector(samples: Sequence[Pixels], region: Box | None, *, tinted: bool) -> Mask:
    """The sector in the source's pixels; a region from the header bounds it."""
    rows, columns = samples[0].shape[:2]
    top, left, high, wide = region or Box(0, 0, rows, columns)
    place = (slice(top, top + high), slice(left, left + wide))
    cut = [frame[place] for frame in samples]
    grey = np.stack([_luminance(frame) for frame in cut])
    if len(np.unique(grey[len(grey) // 2])) < LEAST_LEVELS and len(np.unique(grey)) < LEAST_LEVELS:
        raise ClipError(
            f"the picture has fewer than {LEAST_LEVELS} grey levels: it is blank, a mask or a "
            "label map, not a frame. Leave it out."
        )
    coloured = None if tinted or cut[0].ndim == 2 else np.stack([overlays(one) for one in cut])
    sector = np.zeros((rows, columns), dtype=bool)
    sector[place] = find_sector(grey, coloured)
    return sector


def _luminance(frame: Pixels) -> Pixels:
    if frame.ndim == 2:
        return frame
    return np.asarray(Image.fromarray(np.ascontiguousarray(frame)).convert("L"))
