"""Read ultrasound from video files with PyAV (the libraries of FFmpeg)."""

from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

from agssd_core.data.frame_source import Box, FrameCount, Patience, Pixels, check_size
from agssd_core.errors import ClipError

START_BYTES = 512
# A clip with fewer frames than this share of what its header claims was cut short.
WHOLE_SHARE = 0.9


class VideoFrames:
    """The frames of a video's first picture track; region unknown."""

    region: Box | None = None

    def __init__(self, path: Path) -> None:
        self._path = path

    def frames(self, wanted: Collection[int] | None = None) -> Iterator[tuple[int, Pixels]]:
        """Frames in the order shown; those that the decoder calls damaged are left out."""
        patience = Patience()
        last = max(wanted) if wanted else None
        number = -1
        with _video(self._path) as (container, stream):
            for frame in container.decode(stream):
                number += 1
                if wanted is not None and number not in wanted:
                    continue
                if frame.is_corrupt:
                    continue
                pixels = np.asarray(frame.to_ndarray(format="rgb24"), dtype=np.uint8)
                patience.check(number, pixels)
                yield number, pixels
                if number == last:
                    return
            if stream.frames and number + 1 < WHOLE_SHARE * stream.frames:
                raise ClipError(
                    f"the video is cut short: {number + 1} of {stream.frames} frames are there. "
                    "Copy or export it again."
                )


def video_size(path: Path) -> FrameCount:
    """Read a video's header; its frames are counted, not decoded, where it does not say them.

    Raises:
        ClipError: the file is no video that is read, holds no frame, or claims too much.
    """
    with _video(path) as (container, stream):
        frames = int(stream.frames)
        if not frames:
            frames = sum(1 for packet in container.demux(stream) if packet.size)
        check_size(stream.height, stream.width, frames)
        return FrameCount(frames, stream.height, stream.width)


def video_format(start: bytes) -> str | None:
    """FFmpeg's name of the container that begins so; None for what is no video.

    FFmpeg is told the format, for its own guess would follow play lists to other files.
    """
    if start[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return "mov,mp4,m4a,3gp,3g2,mj2"
    if start[:4] == b"RIFF" and start[8:12] == b"AVI ":
        return "avi"
    if start[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska"
    if start[:4] == b"\0\0\1\xba":
        return "mpeg"
    if start[:4] == b"\0\0\1\xb3":
        return "mpegvideo"
    if start[:1] == b"\x47" and start[188:189] == b"\x47" and start[376:377] == b"\x47":
        return "mpegts"
    return None


@contextmanager
def _video(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    with path.open("rb") as file:
        found = video_format(file.read(START_BYTES))
        if found is None:
            raise ClipError(
                "the file is empty or no video that is read (mp4, mov, avi, mkv, mpeg), whatever "
                "its name says. Export it again, or leave it out."
            )
        file.seek(0)
        container: Any = av.open(file, format=found, options={"protocol_whitelist": ""})
        with closing(container):
            if not container.streams.video:
                raise ClipError("the video holds no pictures. Leave the file out.")
            stream = container.streams.video[0]
            check_size(stream.height, stream.width)
            stream.codec_context.thread_count = 1
            yield container, stream
