"""Scans with labels or outlines, as pre-training saw them, one ``.npz`` file each.

A file holds ``image`` (uint16 or uint8, its full scale is 1), ``inside``, ``mask`` where there are
outlines, and ``about``, the facts as JSON in bytes. Nothing is pickled.
"""

import json
import os
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from numpy.typing import NDArray

from agssd_core.config.node import ScanModality
from agssd_core.config.tasks import TaskConfig
from agssd_core.errors import CacheError, DataError, ShapeError
from agssd_core.evaluation.tasks import answers, task_classes, task_targets
from agssd_core.weights import sync_folder

_UNREADABLE = (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error)
Split = Literal["train", "test"]


@dataclass(frozen=True)
class LabelledArrays:
    """Pixels of one scan.

    Attributes:
        image: (D, H, W) or (H, W) float32 in [0, 1].
        mask: uint8, same shape; None where nobody outlined anything.
        inside: bool, same shape: the body, or the sector.
    """

    image: NDArray[np.float32]
    mask: NDArray[np.uint8] | None
    inside: NDArray[np.bool_]


@dataclass(frozen=True)
class LabelledScan:
    """One scan's facts.

    Attributes:
        scan: unique in its set.
        labels: class by the name of what is classified.
        file: its pixels.
        spacing_mm: edges of a voxel or pixel; None where unknown.
        outlined: values of the mask above 0; None where there is no mask.
    """

    scan: str
    patient: str
    site: str
    split: Split
    modality: ScanModality
    labels: Mapping[str, str]
    file: Path
    spacing_mm: tuple[float, ...] | None = None
    outlined: tuple[int, ...] | None = None

    def load(self) -> LabelledArrays:
        """Read the pixels.

        Raises:
            CacheError: the file is missing or damaged.
        """
        try:
            with self.file.open("rb") as stream, np.load(stream, allow_pickle=False) as held:
                image, mask = held["image"], held.get("mask")
                inside = np.unpackbits(held["inside"], count=image.size).reshape(image.shape)
            scale = np.float32(1.0 / np.iinfo(image.dtype).max)
        except _UNREADABLE:
            raise _damaged() from None
        return LabelledArrays(
            np.multiply(image, scale, dtype=np.float32), mask, inside.astype(np.bool_)
        )


@dataclass(frozen=True)
class LabelledSet:
    """Labelled scans in the order of their names.

    Attributes:
        skipped: scan -> why it could not be used.
    """

    scans: tuple[LabelledScan, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        """Number of scans."""
        return len(self.scans)

    @property
    def train(self) -> "LabelledSet":
        """Scans to learn from."""
        return LabelledSet(tuple(scan for scan in self.scans if scan.split == "train"))

    @property
    def test(self) -> "LabelledSet":
        """Held-out scans."""
        return LabelledSet(tuple(scan for scan in self.scans if scan.split == "test"))

    def of(self, task: TaskConfig) -> "LabelledSet":
        """Scans that take part in a task."""
        return LabelledSet(tuple(scan for scan in self.scans if answers(scan, task)))

    def targets(self, task: TaskConfig, classes: Sequence[str] = ()) -> NDArray[np.int64]:
        """(N,) number of each scan's class.

        Args:
            task: a classification.
            classes: their order; empty takes those of this set, which a subset may not have all.

        Raises:
            DataError: a scan has none of the classes.
        """
        return task_targets(self.scans, task, classes or task_classes(self.scans, task))


def store_scan(
    scan: LabelledScan,
    image: NDArray[np.uint8] | NDArray[np.uint16],
    *,
    inside: NDArray[np.bool_],
    mask: NDArray[np.uint8] | None = None,
    stamp: str = "",
) -> LabelledScan:
    """Write a scan to ``scan.file``, complete or not at all.

    Args:
        scan: its facts; ``outlined`` is taken from the mask.
        image: (D, H, W) or (H, W); its type's largest value stands for 1.
        inside: same shape.
        mask: same shape, or None.
        stamp: of what it was made from; see ``read_scan``.

    Returns:
        The scan with ``outlined``.

    Raises:
        ShapeError: shapes differ, or the image is of another type.
        CacheError: the disk is full or the folder cannot be written.
    """
    shapes = {image.shape, inside.shape, image.shape if mask is None else mask.shape}
    if len(shapes) > 1 or image.dtype not in (np.uint8, np.uint16):
        raise ShapeError(
            f"image {image.dtype} {image.shape}, inside and mask must have one shape, the image "
            "8 or 16 bits without sign. Cut all three alike."
        )
    outlined = None if mask is None else tuple(int(v) for v in np.unique(mask) if v)
    stored = LabelledScan(**{**_facts(scan), "file": scan.file, "outlined": outlined})
    about = json.dumps({**_facts(stored), "stamp": stamp}, sort_keys=True)
    arrays: dict[str, NDArray[Any]] = {
        "about": np.frombuffer(about.encode(), dtype=np.uint8),
        "image": image,
        "inside": np.packbits(inside),
    }
    if mask is not None:
        arrays["mask"] = mask.astype(np.uint8)
    _write(scan.file, arrays)
    return stored


def read_scan(file: Path, *, stamp: str = "") -> LabelledScan | None:
    """Facts of a stored scan; None where it is missing, damaged or made from something else.

    Args:
        file: what ``store_scan`` wrote.
        stamp: that it must have; empty takes any.
    """
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as held:
            about = json.loads(held["about"].tobytes())
        if stamp and about["stamp"] != stamp:
            return None
        del about["stamp"]
        spacing, outlined = about["spacing_mm"], about["outlined"]
        about["spacing_mm"] = None if spacing is None else tuple(spacing)
        about["outlined"] = None if outlined is None else tuple(outlined)
        return LabelledScan(**about, file=file)
    except _UNREADABLE:
        return None


def read_labelled(folder: Path) -> LabelledSet:
    """All scans that were stored in a folder.

    Raises:
        DataError: it holds none.
    """
    found = [scan for file in sorted(folder.glob("*.npz")) if (scan := read_scan(file))]
    if not found:
        raise DataError("the folder holds no labelled scan. Make them from a split first.")
    return LabelledSet(tuple(sorted(found, key=lambda scan: scan.scan)))


def _facts(scan: LabelledScan) -> dict[str, Any]:
    held = {item.name: getattr(scan, item.name) for item in fields(scan) if item.name != "file"}
    return {**held, "labels": dict(scan.labels)}


def _write(file: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with temporary.open("wb") as stream:
            np.savez_compressed(stream, allow_pickle=False, **cast(dict[str, Any], arrays))
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(file)
        sync_folder(file.parent)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink()
        raise CacheError(
            f"a labelled scan could not be written ({type(error).__name__}). Free disk space or "
            "mend the folder's permissions, then run the command again."
        ) from None


def _damaged() -> CacheError:
    return CacheError(
        "a labelled scan's file is missing or damaged. Delete the folder of labelled scans and "
        "run the command again."
    )
