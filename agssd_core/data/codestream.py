"""Sizes that compressed DICOM frames claim, read before a decoder takes memory for them."""

import struct
from pathlib import Path

from pydicom.encaps import generate_frames

from agssd_core.data.frame_source import FrameCount
from agssd_core.errors import ClipError

J2K_START = b"\xff\x4f\xff\x51"
JPEG_START = b"\xff\xd8"
# Start-of-frame markers; C4, C8 and CC are tables and extensions, F7 is JPEG-LS.
FRAME_MARKERS = (frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}) | {0xF7}


def check_codestreams(path: Path, start: int, size: FrameCount) -> None:
    """Compare every frame's own size with the header's.

    Args:
        path: a DICOM file.
        start: where the value of its encapsulated Pixel Data begins.
        size: as its header says.

    Raises:
        ClipError: a frame is of another size.
    """
    with path.open("rb") as stream:
        stream.seek(start)
        for frame in generate_frames(stream, number_of_frames=size.frames):
            claimed = coded_size(frame)
            if claimed is not None and claimed != (size.rows, size.columns):
                raise ClipError(
                    "the header contradicts itself: a compressed frame is of another size. Export "
                    "the image again."
                )


def coded_size(frame: bytes) -> tuple[int, int] | None:
    """(rows, columns) that a JPEG, JPEG-LS or JPEG 2000 stream claims; None where it is silent.

    Source:
        ITU-T T.81 B.2.2, T.87 C.2.2, T.800 A.5.1.
    """
    if frame.startswith(J2K_START):
        right, lower, left, upper = struct.unpack(">4I", frame[8:24])
        return lower - upper, right - left
    place = 2 if frame.startswith(JPEG_START) else len(frame)
    while place + 9 <= len(frame) and frame[place] == 0xFF:
        marker = frame[place + 1]
        if marker in FRAME_MARKERS:
            rows, columns = struct.unpack(">HH", frame[place + 5 : place + 9])
            return (rows, columns) if rows else None
        # Fill bytes may stand before a marker.
        place += 1 if marker == 0xFF else 2 + int.from_bytes(frame[place + 2 : place + 4])
    return None
