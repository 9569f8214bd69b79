"""One prepared volume on disk: ``VOLUME.b2nd`` with the voxels, ``VOLUME.json`` beside it."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from numpy.typing import NDArray

from agssd_core.config.data import DataConfig
from agssd_core.data.array_file import (
    UNUSABLE,
    VOLUME,
    cache_folder,
    is_intact,
    open_array,
    pack_mask,
    packed,
    read_about,
    unpack_mask,
    write_array,
)
from agssd_core.data.preprocess import FOREGROUND_STEP, Prepared
from agssd_core.data.records import VolumeRecord
from agssd_core.data.volume import Affine

__all__ = [
    "CacheEntry",
    "VolumeInfo",
    "cache_folder",
    "data_stamp",
    "integral_of",
    "open_voxels",
    "read_entry",
    "voxels_intact",
    "write_entry",
]

FORMAT = 2
# Voxels; small blocks waste little at a crop's rim, longer rows copy quicker.
MAX_BLOCK = (16, 16, 32)
Size3 = tuple[int, int, int]


@dataclass(frozen=True)
class VolumeInfo:
    """What is known of a prepared volume without reading its voxels.

    Attributes:
        affine: (4, 4) voxel index of the cached array -> RAS millimetres.
        foreground_start, foreground_size: the body's box with its margin, within the volume.
        foreground_integral: (d + 1, h + 1, w + 1) int64; entry (i, j, k) counts the body's cells
            before (i, j, k) on the grid coarser by ``foreground_step``.
    """

    volume: str
    patient: str
    modality: str
    vendor: str
    shape: Size3
    spacing_mm: tuple[float, float, float]
    affine: Affine
    foreground_start: Size3
    foreground_size: Size3
    foreground_integral: NDArray[np.int64]
    foreground_step: int = FOREGROUND_STEP


@dataclass(frozen=True)
class CacheEntry:
    """The content of one JSON file."""

    info: VolumeInfo
    stamp: str
    fingerprint: str
    size: int
    crc32: int


def data_stamp(config: DataConfig) -> str:
    """Digest of everything in the settings that changes a cached volume."""
    settings = {
        "format": FORMAT,
        "spacing_mm": list(config.spacing_mm),
        "ct_window_hu": list(config.ct_window_hu),
        "mr_percentiles": list(config.mr_percentiles),
        "foreground_margin": config.foreground_margin,
        "chunk": config.chunk,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def write_entry(
    site_dir: Path, record: VolumeRecord, prepared: Prepared, *, config: DataConfig
) -> None:
    """Write one volume so that it is either complete or absent.

    Raises:
        CacheError: the disk is full or the folder cannot be written.
    """
    about = {
        "volume": record.volume,
        "patient": record.patient,
        "modality": record.modality,
        "vendor": record.vendor,
        "shape": prepared.array.shape,
        "spacing_mm": prepared.spacing_mm,
        "affine": prepared.affine.tolist(),
        "foreground_start": prepared.foreground_start,
        "foreground_size": prepared.foreground_size,
        "mask_shape": prepared.mask.shape,
        "mask": pack_mask(prepared.mask),
        "stamp": data_stamp(config),
        "fingerprint": record.fingerprint,
    }
    values = _compress(prepared.array, config.chunk)
    write_array(site_dir, record.volume, values, about=about, content=VOLUME)


def read_entry(site_dir: Path, volume: str) -> CacheEntry | None:
    """The JSON of one prepared volume, or None where there is none that can be used."""
    plain = read_about(site_dir, volume)
    try:
        entry = _entry(plain) if plain is not None else None
    except UNUSABLE:
        return None
    return entry if entry is not None and entry.info.volume == volume else None


def open_voxels(site_dir: Path, entry: CacheEntry) -> Any:
    """Check a volume's file against its checksum and open it for reading by crop.

    Raises:
        CacheError: the file is missing or damaged.
    """
    info = entry.info
    return open_array(site_dir, info.volume, info.shape, crc32=entry.crc32, content=VOLUME)


def voxels_intact(site_dir: Path, entry: CacheEntry) -> bool:
    """Whether a volume's file still has the bytes that were written."""
    return is_intact(site_dir, entry.info.volume, entry.crc32)


def integral_of(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Sums over all boxes from the origin, padded by one zero plane per axis."""
    padded = np.pad(mask.astype(np.int64), [(1, 0)] * 3)
    return padded.cumsum(axis=0).cumsum(axis=1).cumsum(axis=2)


def _compress(array: NDArray[np.uint16], chunk: int) -> bytes:
    """LZ4: its chunks are read several times a step."""
    chunks = tuple(min(chunk, side) for side in array.shape)
    blocks = tuple(min(pair) for pair in zip(MAX_BLOCK, chunks, strict=True))
    return packed(array, chunks=chunks, blocks=blocks, codec=blosc2.Codec.LZ4)


def _entry(plain: dict[str, Any]) -> CacheEntry:
    mask = unpack_mask(plain["mask"], tuple(plain["mask_shape"]))
    info = VolumeInfo(
        volume=plain["volume"],
        patient=plain["patient"],
        modality=plain["modality"],
        vendor=plain["vendor"],
        shape=tuple(plain["shape"]),
        spacing_mm=tuple(plain["spacing_mm"]),
        affine=np.asarray(plain["affine"], dtype=np.float64).reshape(4, 4),
        foreground_start=tuple(plain["foreground_start"]),
        foreground_size=tuple(plain["foreground_size"]),
        foreground_integral=integral_of(mask),
    )
    return CacheEntry(
        info, plain["stamp"], plain["fingerprint"], int(plain["size"]), int(plain["crc32"])
    )
