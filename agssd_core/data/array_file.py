"""An array on disk: ``STEM.b2nd`` with its values, ``STEM.json`` beside it.

The JSON is written last and holds the length and checksum of the values' file, so a killed
process leaves either a complete pair or nothing that is taken for one.
"""

import base64
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

from agssd_core.errors import CacheError
from agssd_core.weights import sync_folder, write_text

UNUSABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, zlib.error)


@dataclass(frozen=True)
class Content:
    """What an array is called in errors, and the commands that make it and mend it."""

    name: str
    make: str
    mend: str


VOLUME = Content(
    "a prepared volume", "`agssd-site prepare SITE`", "`agssd-site prepare SITE --verify`"
)
CLIP = Content("a prepared clip", VOLUME.make, VOLUME.mend)
LABELS = Content(
    "a clip's label maps", "`agssd-site delineate SITE`", "`agssd-site delineate SITE`"
)


def cache_folder(site_dir: Path) -> Path:
    """Where a site keeps its prepared scans."""
    return site_dir / "cache"


def write_array(
    site_dir: Path, stem: str, values: bytes, *, about: dict[str, Any], content: Content
) -> None:
    """Write one array so that it is either complete or absent.

    Args:
        site_dir: the site's folder.
        stem: name of the pair of files.
        values: of the array, as ``packed`` gives them.
        about: goes into the JSON, with the length and checksum of ``values``.
        content: what it is.

    Raises:
        CacheError: the disk is full or the folder cannot be written.
    """
    folder = cache_folder(site_dir)
    target, description = folder / f"{stem}.b2nd", folder / f"{stem}.json"
    plain = {**about, "size": len(values), "crc32": zlib.crc32(values)}
    temporary = folder / f".{stem}.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with temporary.open("wb") as stream:
            stream.write(values)
            stream.flush()
            os.fsync(stream.fileno())
        description.unlink(missing_ok=True)
        temporary.replace(target)
        sync_folder(folder)
        write_text(description, json.dumps(plain))
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise CacheError(
            f"{content.name} could not be written ({type(error).__name__}). Free disk space or "
            f"mend the folder's permissions, then run {content.make} again."
        ) from None


def read_about(site_dir: Path, stem: str) -> dict[str, Any] | None:
    """The JSON of one array; None where it is missing or its values have another length."""
    path = cache_folder(site_dir) / f"{stem}.json"
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))
        size = path.with_name(f"{stem}.b2nd").stat().st_size
        return dict(plain) if size == plain["size"] else None
    except UNUSABLE:
        return None


def open_array(
    site_dir: Path, stem: str, shape: tuple[int, ...], *, crc32: int | None, content: Content
) -> Any:
    """Open an array for reading in parts.

    Args:
        site_dir: the site's folder.
        stem: name of the pair of files.
        shape: that it must have.
        crc32: compared with that of the whole file; None where that was done before.
        content: what it is.

    Raises:
        CacheError: the file is missing or damaged.
    """
    if crc32 is not None and not is_intact(site_dir, stem, crc32):
        raise damaged(content)
    path = cache_folder(site_dir) / f"{stem}.b2nd"
    try:
        single = blosc2.DParams(nthreads=1)
        values = blosc2.open(str(path), mode="r", mmap_mode="r", dparams=single)
    except (OSError, RuntimeError, ValueError):
        raise damaged(content) from None
    if tuple(values.shape) != shape:
        raise damaged(content)
    return values


def read_part(values: Any, part: Any, *, content: Content) -> NDArray[Any]:
    """A part of an opened array, decompressing only the chunks that it touches.

    blosc2 has one context for each open file and guards it itself: get_slice_numpy holds a lock
    of its own, and the interpreter's, for as long as it decompresses.

    Raises:
        CacheError: the file is damaged.
    """
    try:
        return np.asarray(values[part])
    except (OSError, RuntimeError, ValueError):
        raise damaged(content) from None


def is_intact(site_dir: Path, stem: str, crc32: int) -> bool:
    """Whether an array's file still has the bytes that were written."""
    total = 0
    try:
        with (cache_folder(site_dir) / f"{stem}.b2nd").open("rb") as stream:
            while block := stream.read(1 << 22):
                total = zlib.crc32(block, total)
    except OSError:
        return False
    return total == crc32


def damaged(content: Content) -> CacheError:
    """The error for values that are not what was written."""
    return CacheError(
        f"{content.name} is missing or damaged: its checksum differs from the one written with "
        f"it. Make it again with {content.mend}."
    )


def packed(
    array: NDArray[Any], *, chunks: tuple[int, ...], blocks: tuple[int, ...], codec: blosc2.Codec
) -> bytes:
    """An array compressed in chunks, without a filter.

    Speckle and resampled voxels fill their bits, so shuffling bytes saves little of the file and
    costs time at every read.
    """
    compressed = blosc2.asarray(
        np.ascontiguousarray(array),
        chunks=chunks,
        blocks=blocks,
        cparams=blosc2.CParams(codec=codec, clevel=5, filters=[blosc2.Filter.NOFILTER], nthreads=1),
        dparams=blosc2.DParams(nthreads=1),
    )
    return bytes(compressed.to_cframe())


def pack_mask(mask: NDArray[np.bool_]) -> str:
    """A mask as text."""
    return base64.b64encode(zlib.compress(np.packbits(mask).tobytes())).decode("ascii")


def unpack_mask(text: str, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """Undo ``pack_mask``."""
    bits = np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=np.uint8)
    return np.unpackbits(bits, count=int(np.prod(shape))).reshape(shape).astype(np.bool_)
