"""One prepared clip on disk: ``CLIP.b2nd`` with its grey frames, ``CLIP.json`` beside it."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import blosc2
import numpy as np
from numpy.typing import NDArray

from agssd_core.config.data import DataConfig
from agssd_core.config.frames import FramesConfig
from agssd_core.data.array_file import (
    CLIP,
    UNUSABLE,
    damaged,
    is_intact,
    open_array,
    pack_mask,
    packed,
    read_about,
    unpack_mask,
    write_array,
)
from agssd_core.data.records import ClipRecord
from agssd_core.errors import ShapeError

if TYPE_CHECKING:  # the clip readers load decoders, which who reads the cache does not need
    from agssd_core.data.clips import PreparedClip

FORMAT = 1
# Pixels of one compressed block; a frame of the usual size is a single one.
MAX_BLOCK = 1 << 20
Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class ClipEntry:
    """What is known of a prepared clip without reading its frames.

    Attributes:
        shape: (frames, height, width) of the cached array, uint8.
        numbers: of the source's frames that were kept, from 0.
        box: (top, left, height, width) of what was cut out, in pixels of the source.
        packed_sector: (height, width) mask of the sector; a site holds thousands of clips.
    """

    clip: str
    patient: str
    vendor: str
    shape: tuple[int, int, int]
    numbers: tuple[int, ...]
    box: Box
    packed_sector: str
    stamp: str
    fingerprint: str
    crc32: int

    def sector(self) -> NDArray[np.bool_]:
        """The part of a frame that shows tissue, (height, width).

        Raises:
            CacheError: what was stored is damaged.
        """
        try:
            return unpack_mask(self.packed_sector, self.shape[1:])
        except UNUSABLE:
            raise damaged(CLIP) from None


def frames_stamp(config: FramesConfig) -> str:
    """Digest of everything in the settings that changes a cached clip.

    ``superpixels`` changes label maps alone, whose own digest has to hold it.
    """
    settings = {"format": FORMAT, **config.model_dump(mode="json", exclude={"superpixels"})}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def write_clip(
    site_dir: Path, record: ClipRecord, prepared: "PreparedClip", *, config: DataConfig
) -> None:
    """Write one clip so that it is either complete or absent.

    Raises:
        ShapeError: frames, sector and frame numbers do not belong together.
        CacheError: the disk is full or the folder cannot be written.
    """
    frames, sector = prepared.frames, prepared.sector
    fits = frames.ndim == 3 and frames.shape[1:] == sector.shape
    if not fits or not 0 < len(frames) == len(prepared.numbers) or frames.dtype != np.uint8:
        raise ShapeError(
            f"a clip of {frames.dtype} {frames.shape} with a sector of {sector.shape} and "
            f"{len(prepared.numbers)} frame number(s) cannot be stored, only uint8 (F, H, W) with "
            "(H, W) and F. Mend the reader of this kind of clip."
        )
    about = {
        "clip": record.clip,
        "patient": record.patient,
        "vendor": record.vendor,
        "shape": frames.shape,
        "numbers": [int(number) for number in prepared.numbers],
        "box": [int(side) for side in prepared.box],
        "sector": pack_mask(np.asarray(sector, dtype=np.bool_)),
        "stamp": frames_stamp(config.frames),
        "fingerprint": record.fingerprint,
    }
    write_array(site_dir, record.clip, pack_frames(frames), about=about, content=CLIP)


def read_clip_entry(site_dir: Path, clip: str) -> ClipEntry | None:
    """The JSON of one prepared clip, or None where there is none that can be used."""
    plain = read_about(site_dir, clip)
    try:
        entry = _entry(plain) if plain is not None else None
    except UNUSABLE:
        return None
    return entry if entry is not None and entry.clip == clip else None


def open_frames(site_dir: Path, entry: ClipEntry, *, check: bool) -> Any:
    """Open a clip's file for reading frame by frame, after comparing its checksum if asked to.

    Raises:
        CacheError: the file is missing or damaged.
    """
    crc32 = entry.crc32 if check else None
    return open_array(site_dir, entry.clip, entry.shape, crc32=crc32, content=CLIP)


def frames_intact(site_dir: Path, entry: ClipEntry) -> bool:
    """Whether a clip's file still has the bytes that were written."""
    return is_intact(site_dir, entry.clip, entry.crc32)


def pack_frames(frames: NDArray[np.uint8]) -> bytes:
    """(F, H, W) compressed with one chunk for each frame.

    LZ4HC over a whole frame: a quarter smaller than LZ4 in small blocks; a frame of 512 x 512
    takes about 0.2 ms to read and is written once.
    """
    _, height, width = frames.shape
    rows = min(height, max(1, MAX_BLOCK // width))
    codec = blosc2.Codec.LZ4HC
    return packed(frames, chunks=(1, height, width), blocks=(1, rows, width), codec=codec)


def _entry(plain: dict[str, Any]) -> ClipEntry:
    frames, height, width = (int(side) for side in plain["shape"])
    top, left, tall, wide = (int(side) for side in plain["box"])
    return ClipEntry(
        clip=plain["clip"],
        patient=plain["patient"],
        vendor=plain["vendor"],
        shape=(frames, height, width),
        numbers=tuple(int(number) for number in plain["numbers"]),
        box=(top, left, tall, wide),
        packed_sector=str(plain["sector"]),
        stamp=plain["stamp"],
        fingerprint=plain["fingerprint"],
        crc32=int(plain["crc32"]),
    )
