"""One prepared volume on disk: ``VOLUME.b2nd`` with the voxels, ``VOLUME.json`` beside it.

The JSON is written last and holds the length and checksum of the voxels' file, so a killed
process leaves either a complete pair or nothing that is taken for one.
"""

import base64
import binascii
import hashlib
import json
import os
import zlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
from numpy.typing import NDArray

from agssd_core.config.data import DataConfig
from agssd_core.data.catalogue import VolumeRecord
from agssd_core.data.preprocess import FOREGROUND_STEP, Prepared
from agssd_core.data.volume import Affine
from agssd_core.errors import CacheError
from agssd_core.weights import sync_folder, write_text

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


def cache_folder(site_dir: Path) -> Path:
    """Where a site keeps its prepared volumes."""
    return site_dir / "cache"


def write_entry(
    site_dir: Path, record: VolumeRecord, prepared: Prepared, *, config: DataConfig
) -> None:
    """Write one volume so that it is either complete or absent.

    Raises:
        CacheError: the disk is full or the folder cannot be written.
    """
    folder = cache_folder(site_dir)
    target = folder / f"{record.volume}.b2nd"
    content = _compress(prepared.array, config.chunk)
    plain = {
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
        "mask": _pack(prepared.mask),
        "stamp": data_stamp(config),
        "fingerprint": record.fingerprint,
        "size": len(content),
        "crc32": zlib.crc32(content),
    }
    temporary = folder / f".{record.volume}.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        target.with_suffix(".json").unlink(missing_ok=True)
        temporary.replace(target)
        sync_folder(folder)
        write_text(target.with_suffix(".json"), json.dumps(plain))
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise CacheError(
            f"a prepared volume could not be written ({type(error).__name__}). Free disk space or "
            "mend the folder's permissions, then run `agssd-site prepare SITE` again."
        ) from None


def read_entry(site_dir: Path, volume: str) -> CacheEntry | None:
    """The JSON of one prepared volume, or None where there is none that can be used."""
    path = cache_folder(site_dir) / f"{volume}.json"
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        entry = _entry(plain)
        size = path.with_suffix(".b2nd").stat().st_size
    except (OSError, ValueError, KeyError, TypeError, binascii.Error, zlib.error):
        return None
    return entry if size == entry.size and entry.info.volume == volume else None


def open_voxels(site_dir: Path, entry: CacheEntry) -> Any:
    """Check a volume's file against its checksum and open it for reading by crop.

    Raises:
        CacheError: the file is missing or damaged.
    """
    path = cache_folder(site_dir) / f"{entry.info.volume}.b2nd"
    if not voxels_intact(site_dir, entry):
        raise damaged()
    try:
        single = blosc2.DParams(nthreads=1)
        voxels = blosc2.open(str(path), mode="r", mmap_mode="r", dparams=single)
    except (OSError, RuntimeError, ValueError):
        raise damaged() from None
    if tuple(voxels.shape) != entry.info.shape:
        raise damaged()
    return voxels


def voxels_intact(site_dir: Path, entry: CacheEntry) -> bool:
    """Whether a volume's file still has the bytes that were written."""
    path = cache_folder(site_dir) / f"{entry.info.volume}.b2nd"
    total = 0
    try:
        with path.open("rb") as stream:
            while block := stream.read(1 << 22):
                total = zlib.crc32(block, total)
    except OSError:
        return False
    return total == entry.crc32


def damaged() -> CacheError:
    """The error for voxels that are not what was written."""
    return CacheError(
        "a prepared volume is missing or damaged: its checksum differs from the one written with "
        "it. Make it again with `agssd-site prepare SITE --verify`."
    )


def integral_of(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Sums over all boxes from the origin, padded by one zero plane per axis."""
    padded = np.pad(mask.astype(np.int64), [(1, 0)] * 3)
    return padded.cumsum(axis=0).cumsum(axis=1).cumsum(axis=2)


def _compress(array: NDArray[np.uint16], chunk: int) -> bytes:
    """LZ4 without a filter.

    Resampled voxels fill their 16 bits, so shuffling their bytes saves 2-4 % of the file and costs
    a third more time at every read.
    """
    chunks = tuple(min(chunk, side) for side in array.shape)
    packed = blosc2.asarray(
        array,
        chunks=chunks,
        blocks=tuple(min(pair) for pair in zip(MAX_BLOCK, chunks, strict=True)),
        cparams=blosc2.CParams(
            codec=blosc2.Codec.LZ4, clevel=5, filters=[blosc2.Filter.NOFILTER], nthreads=1
        ),
        dparams=blosc2.DParams(nthreads=1),
    )
    return bytes(packed.to_cframe())


def _pack(mask: NDArray[np.bool_]) -> str:
    return base64.b64encode(zlib.compress(np.packbits(mask).tobytes())).decode("ascii")


def _unpack(text: str, shape: Size3) -> NDArray[np.bool_]:
    bits = np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=np.uint8)
    count = shape[0] * shape[1] * shape[2]
    return np.unpackbits(bits, count=count).reshape(shape).astype(np.bool_)


def _entry(plain: dict[str, Any]) -> CacheEntry:
    mask = _unpack(plain["mask"], tuple(plain["mask_shape"]))
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
