"""The label maps of a prepared clip: ``CLIP.SOURCE.b2nd`` and ``CLIP.SOURCE.json`` beside it.

They carry the stamp and fingerprint of the clip that they were drawn on, so those of a clip that
was prepared again count as missing. A clip may have maps of several sources. Who writes them
holds ``catalogue.site_lock``, because preparing removes half-written files.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from agssd_core.config.data import DataConfig
from agssd_core.data.array_file import (
    LABELS,
    UNUSABLE,
    damaged,
    is_intact,
    open_array,
    read_about,
    read_part,
    write_array,
)
from agssd_core.data.catalogue import open_catalogue
from agssd_core.data.clip_cache import ClipEntry, frames_stamp, pack_frames, read_clip_entry
from agssd_core.errors import CacheError, ShapeError

LabelSource = Literal["lpsam", "disk", "superpixels"]
# In the order of preference.
LABEL_SOURCES: tuple[LabelSource, ...] = get_args(LabelSource)
MAX_LABEL = 255


@dataclass(frozen=True)
class ClipLabels:
    """Anatomies of every frame of one clip.

    Attributes:
        clip: its pseudonym.
        maps: uint8 (F, H, W), the size of the prepared clip; 0 is no anatomy.
        confidence: for each frame, label -> how sure the source is; labels may be left out.
        source: who drew the maps.
        digest: of the weights and settings that they depend on; they are drawn again when it
            changes.
    """

    clip: str
    maps: NDArray[np.uint8]
    confidence: tuple[Mapping[int, float], ...]
    source: LabelSource
    digest: str


@dataclass(frozen=True)
class LabelEntry:
    """What is known of a clip's label maps without reading them; a site holds thousands."""

    clip: str
    source: LabelSource
    digest: str
    shape: tuple[int, int, int]
    stamp: str
    fingerprint: str
    crc32: int

    @property
    def stem(self) -> str:
        """Name of its two files."""
        return _stem(self.clip, self.source)

    def belongs_to(self, clip: ClipEntry) -> bool:
        """Whether the maps were drawn on the clip as it is now."""
        drawn_on = (self.clip, self.stamp, self.fingerprint, self.shape)
        return drawn_on == (clip.clip, clip.stamp, clip.fingerprint, clip.shape)


def write_labels(site_dir: Path, labels: ClipLabels, *, config: DataConfig) -> int:
    """Write the label maps of one clip so that they are either complete or absent.

    Returns:
        How many pixels had a label outside the sector; they are stored as 0.

    Raises:
        CacheError: the clip is not prepared with these settings, or the disk is full.
        ShapeError: the maps are not uint8, not of the clip's size or of no known source, or a
            confidence names no label or is no number.
    """
    clip = read_clip_entry(site_dir, labels.clip)
    if clip is None or clip.stamp != frames_stamp(config.frames):
        raise CacheError(
            "the clip of these label maps is not prepared with the settings of this run. Run "
            "`agssd-site prepare SITE` with the same configuration."
        )
    _check_maps(labels, clip)
    outside = (labels.maps > 0) & ~clip.sector()
    about = {
        "clip": clip.clip,
        "source": labels.source,
        "digest": labels.digest,
        "shape": clip.shape,
        "confidence": [
            {str(label): float(value) for label, value in frame.items()}
            for frame in labels.confidence
        ],
        "stamp": clip.stamp,
        "fingerprint": clip.fingerprint,
    }
    values = pack_frames(np.where(outside, np.uint8(0), labels.maps))
    stem = _stem(clip.clip, labels.source)
    write_array(site_dir, stem, values, about=about, content=LABELS)
    return int(np.count_nonzero(outside))


def read_labels_entry(site_dir: Path, clip: ClipEntry, source: LabelSource) -> LabelEntry | None:
    """The JSON of a clip's label maps; None where there are none for the clip as it is now."""
    plain = read_about(site_dir, _stem(clip.clip, source))
    try:
        entry = _entry(plain) if plain is not None else None
    except UNUSABLE:
        return None
    fits = entry is not None and entry.source == source and entry.belongs_to(clip)
    return entry if fits else None


def read_labels(site_dir: Path, entry: LabelEntry) -> ClipLabels:
    """All label maps of one clip.

    Raises:
        CacheError: their file is missing or damaged.
    """
    opened = open_labels(site_dir, entry, check=True)
    maps = np.asarray(read_part(opened, slice(None), content=LABELS), dtype=np.uint8)
    confidence = read_confidence(site_dir, entry)
    return ClipLabels(entry.clip, maps, confidence, entry.source, entry.digest)


def read_confidence(site_dir: Path, entry: LabelEntry) -> tuple[dict[int, float], ...]:
    """For each frame, label -> how sure the source is.

    Raises:
        CacheError: their file is missing or damaged.
    """
    plain = read_about(site_dir, entry.stem) or {}
    try:
        frames = [
            {int(label): float(value) for label, value in frame.items()}
            for frame in plain["confidence"]
        ]
    except UNUSABLE:
        raise damaged(LABELS) from None
    return tuple(frames)


def open_labels(site_dir: Path, entry: LabelEntry, *, check: bool) -> Any:
    """Open label maps for reading frame by frame, after comparing their checksum if asked to.

    Raises:
        CacheError: the file is missing or damaged.
    """
    crc32 = entry.crc32 if check else None
    return open_array(site_dir, entry.stem, entry.shape, crc32=crc32, content=LABELS)


def missing_labels(
    site_dir: Path, config: DataConfig, *, source: LabelSource, digest: str
) -> tuple[str, ...]:
    """Prepared clips that have no label maps of this source, digest and checksum, sorted.

    Clips that are not prepared with these settings are not among them.

    Raises:
        CatalogueError: the folder holds no catalogue.
    """
    stamp = frames_stamp(config.frames)
    missing = []
    for record in open_catalogue(site_dir).clips:
        clip = read_clip_entry(site_dir, record.clip)
        if clip is None or (clip.stamp, clip.fingerprint) != (stamp, record.fingerprint):
            continue
        entry = read_labels_entry(site_dir, clip, source)
        done = entry is not None and entry.digest == digest
        if entry is None or not done or not is_intact(site_dir, entry.stem, entry.crc32):
            missing.append(record.clip)
    return tuple(missing)


def _check_maps(labels: ClipLabels, clip: ClipEntry) -> None:
    if labels.source not in LABEL_SOURCES:
        raise ShapeError(
            f"label maps come from {', '.join(LABEL_SOURCES)}, and from nothing else. Name one."
        )
    maps = labels.maps
    if maps.dtype != np.uint8 or maps.shape != clip.shape:
        raise ShapeError(
            f"label maps of {maps.dtype} {maps.shape} do not fit a clip of {clip.shape}, which "
            f"needs one uint8 map a frame with labels up to {MAX_LABEL}. Draw them on the "
            "prepared frames."
        )
    if len(labels.confidence) != clip.shape[0]:
        raise ShapeError(
            f"{len(labels.confidence)} confidences were given for {clip.shape[0]} frame(s). Give "
            "one mapping a frame; it may be empty."
        )
    for frame in labels.confidence:
        for label, value in frame.items():
            if not 1 <= label <= MAX_LABEL or not math.isfinite(value):
                raise ShapeError(
                    f"a confidence names label {label} with {value}; labels go from 1 to "
                    f"{MAX_LABEL} and a confidence is a finite number. Leave out what is not known."
                )


def _stem(clip: str, source: LabelSource) -> str:
    return f"{clip}.{source}"


def _entry(plain: dict[str, Any]) -> LabelEntry:
    frames, height, width = (int(side) for side in plain["shape"])
    if plain["source"] not in LABEL_SOURCES:
        raise ValueError(plain["source"])
    return LabelEntry(
        clip=plain["clip"],
        source=plain["source"],
        digest=str(plain["digest"]),
        shape=(frames, height, width),
        stamp=plain["stamp"],
        fingerprint=plain["fingerprint"],
        crc32=int(plain["crc32"]),
    )
