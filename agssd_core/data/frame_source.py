"""What every reader of ultrasound frames offers, its limits, and how colour becomes grey."""

import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from agssd_core.data.quiet import quiet_readers
from agssd_core.errors import ClipError, DataError

Pixels = NDArray[np.uint8]

MAX_FRAME_SIDE = 8192
MAX_FRAME_PIXELS = 1 << 25
MAX_CLIP_FRAMES = 10_000
MAX_SECONDS = 600
# Saturation, (max - min) / max, from which a pixel is an overlay's rather than a tinted echo's.
SATURATED, FULLY_SATURATED = 0.4, 0.7
LEAST_CHROMA = 24
TINTED_SHARE = 0.5


class Box(NamedTuple):
    """A rectangle of pixels."""

    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class FrameCount:
    """Size of a clip as its header states it; ``frames`` is 0 where the header is silent."""

    frames: int
    rows: int
    columns: int


class FrameSource(Protocol):
    """A file that gives its frames one after another, as often as it is asked."""

    @property
    def region(self) -> Box | None:
        """Where the header says that the echoes are."""

    def frames(self, wanted: Collection[int] | None = None) -> Iterator[tuple[int, Pixels]]:
        """Numbers and pixels, (H, W) grey or (H, W, 3) RGB; all frames or the wanted ones."""


class readable_clip:  # noqa: N801 - reads as a statement
    """Silence the decoders and turn whatever they raise on a hostile file into one ClipError."""

    def __init__(self) -> None:
        self._quiet = quiet_readers()

    def __enter__(self) -> None:
        self._quiet.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        self._quiet.__exit__(None, None, None)
        if kind is None or issubclass(kind, DataError) or not issubclass(kind, Exception):
            return
        if issubclass(kind, MemoryError):
            raise ClipError("the clip does not fit into memory. Free some, then go on.") from None
        if isinstance(error, PermissionError | FileNotFoundError | InterruptedError):
            return  # the file system's fault, not the file's
        raise ClipError(
            f"the image reader gave up ({kind.__name__}): the file is damaged, cut short, empty or "
            "of an encoding that is not supported. Export it again, or leave it out."
        ) from None


def check_size(rows: int, columns: int, frames: int = 1) -> None:
    """Refuse what a header claims before memory is taken for it.

    Raises:
        ClipError: with the limit that was exceeded.
    """
    if min(rows, columns, frames) < 1:
        raise ClipError("the file holds no frame. Export it again, or leave it out.")
    if max(rows, columns) > MAX_FRAME_SIDE or rows * columns > MAX_FRAME_PIXELS:
        raise too_large()
    if frames > MAX_CLIP_FRAMES:
        raise ClipError(
            f"the clip has more than {MAX_CLIP_FRAMES} frames. Cut it into shorter clips."
        )


def too_large() -> ClipError:
    """What is said of a frame that would fill the memory."""
    return ClipError(
        f"the header claims frames of more than {MAX_FRAME_SIDE} rows or columns or "
        f"{MAX_FRAME_PIXELS} pixels. Check the file, or leave it out."
    )


class Patience:
    """Ends a decoder that gives frames without end."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def check(self, number: int, frame: NDArray[Any]) -> None:
        """Look at a frame that was just decoded.

        Raises:
            ClipError: there are too many frames, they took too long, or they are too large.
        """
        check_size(frame.shape[0], frame.shape[1], number + 1)
        if time.monotonic() - self._start > MAX_SECONDS:
            raise ClipError(
                f"decoding took longer than {MAX_SECONDS} s. Cut the clip into shorter ones, or "
                "store it in another format."
            )


def overlays(frame: Pixels) -> NDArray[np.bool_]:
    """(H, W) pixels of strong colour: Doppler, markers, colour bars."""
    if frame.ndim == 2:
        return np.zeros(frame.shape, dtype=bool)
    high, low = _extremes(frame)
    chroma = high - low
    return np.asarray((chroma > LEAST_CHROMA * 2) & (chroma > SATURATED * high))


def is_tinted(frame: Pixels) -> bool:
    """Whether the echoes themselves are shown in one colour: most of what varies is saturated."""
    if frame.ndim == 2:
        return False
    green = frame[..., 1].astype(np.int16)
    varied = np.abs(np.diff(green, axis=1, append=green[:, -1:])) > 2
    lit = varied & (_extremes(frame)[0] > 2 * LEAST_CHROMA)
    return bool(lit.any() and overlays(frame)[lit].mean() > TINTED_SHARE)


def grey_frame(frame: Pixels, *, tinted: bool = False) -> Pixels:
    """One grey frame, uint8.

    Nearly grey pixels become their luminance. Strongly saturated ones are overlays, and keep only
    the grey that lies under the colour, min(R, G, B): flow becomes as dark as blood is in B-mode,
    and coloured marks vanish where they stand on black. A display that is tinted as a whole keeps
    the brightest channel.

    Args:
        frame: (H, W), returned as it is, or (H, W, 3) RGB.
        tinted: the echoes themselves are coloured.

    Source:
        Luminance after ITU-R BT.601.
    """
    if frame.ndim == 2:
        return frame
    high, low = _extremes(frame)
    if tinted:
        return high
    red, green, blue = (frame[..., band].astype(np.uint32) for band in range(3))
    grey = ((299 * red + 587 * green + 114 * blue + 500) // 1000).astype(np.uint8)
    chroma = high - low
    marked = chroma > LEAST_CHROMA
    if not marked.any():
        return grey
    strong = chroma[marked].astype(np.float32)
    share = (strong / high[marked] - SATURATED) / (FULLY_SATURATED - SATURATED)
    weight = np.clip(share, 0, 1) * np.clip(strong / LEAST_CHROMA - 1, 0, 1)
    mixed = grey[marked] * (1 - weight) + low[marked] * weight
    grey[marked] = np.rint(mixed).astype(np.uint8)
    return np.asarray(grey)


def _extremes(frame: Pixels) -> tuple[Pixels, Pixels]:
    """Highest and lowest of the three channels; a reduction over the last axis is slow."""
    red, green, blue = (np.ascontiguousarray(frame[..., band]) for band in range(3))
    high = np.maximum(np.maximum(red, green), blue)
    return high, np.minimum(np.minimum(red, green), blue)


def eight_bits(values: NDArray[Any], bits: int) -> Pixels:
    """Bring unsigned values of so many bits to 8; larger ones are cut."""
    top = (1 << bits) - 1
    clipped = np.clip(values, 0, top)
    if bits == 8:
        return np.asarray(clipped, dtype=np.uint8)
    return np.asarray(np.rint(clipped.astype(np.float32) * (255 / top)), dtype=np.uint8)


def bits_used(values: NDArray[Any]) -> int:
    """Bits that hold these values, 8 to 16: many writers store 12 bits and claim 16."""
    return min(16, max(8, int(values.max(initial=0)).bit_length()))
