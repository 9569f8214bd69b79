"""Public ultrasound images with the masks that somebody drew: what LP-SAM is fitted on.

Read from folders, where the masks of ``X.png`` are ``X_mask.png``, ``X_mask_1.png``, ...; and from
CSV files with the columns ``image,mask``, an image's masks in one row each.
"""

import csv
import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from agssd_core.config.frames import FramesConfig
from agssd_core.data.clips import load_clip
from agssd_core.data.frame_source import readable_clip
from agssd_core.data.label_image import MAX_LABEL, read_label_image
from agssd_core.data.still import image_size
from agssd_core.errors import ClipError, DataError
from agssd_core.weights import file_digest

Pixel = TypeVar("Pixel", bound=np.generic)

IMAGES = (".png", ".jpg", ".jpeg", ".bmp")
_MASK = re.compile(r"(.+)_mask(_\d+)?")


@dataclass(frozen=True)
class ImagePair:
    """One image and its masks; ``name`` is what a message calls it."""

    name: str
    image: Path
    masks: tuple[Path, ...]


@dataclass(frozen=True)
class LabelledFrame:
    """A grey frame and its structures.

    Attributes:
        frame: uint8 (H, W), 0 outside the sector.
        sector: bool (H, W).
        structures: bool (K, H, W), K may be 0: a frame in which nothing was drawn.
    """

    frame: NDArray[np.uint8]
    sector: NDArray[np.bool_]
    structures: NDArray[np.bool_]


@dataclass
class ImageMaskPairs:
    """Pairs in the order of their names, and what was left out: name -> reason."""

    pairs: tuple[ImagePair, ...]
    skipped: dict[str, str] = field(default_factory=dict)

    @classmethod
    def open(cls, sources: Sequence[Path]) -> "ImageMaskPairs":
        """Look through folders and CSV files.

        Raises:
            DataError: a source is neither, or no image with a mask was found.
        """
        found: dict[str, ImagePair] = {}
        skipped: dict[str, str] = {}
        for source in sources:
            for pair in _pairs_of(source):
                if pair.masks:
                    found[str(pair.image)] = pair
                else:
                    skipped[pair.name] = (
                        "has no mask. Name one X_mask.png beside X.png, or list both in a CSV."
                    )
        if not found:
            raise DataError(
                f"no image with a mask was found in {len(sources)} source(s). Name folders with "
                "X.png and X_mask.png, or a CSV with the columns image,mask."
            )
        return cls(tuple(sorted(found.values(), key=lambda pair: pair.name)), skipped)

    def digest(self) -> str:
        """SHA-256 over names and bytes of all images and masks."""
        total = hashlib.sha256()
        for pair in self.pairs:
            total.update(repr(pair.name).encode())
            for file in (pair.image, *pair.masks):
                total.update(file_digest(file).encode())
        return total.hexdigest()


def read_pair(
    pair: ImagePair, frames: FramesConfig, *, structures: Literal["separate", "union"]
) -> LabelledFrame:
    """Read one image as a site would prepare it, and cut its masks the same way.

    Raises:
        ClipError: image or mask cannot be used, or their sizes differ.
    """
    prepared = load_clip(pair.image, "image", frames)
    frame, sector = prepared.frames[0], prepared.sector
    with readable_clip():
        size = image_size(pair.image)
    found = [layer for mask in pair.masks for layer in _layers(mask, (size.rows, size.columns))]
    if len(found) > MAX_LABEL:
        raise ClipError(
            f"the image has {len(found)} structures, at most {MAX_LABEL} are told apart. Merge "
            "some of its masks."
        )
    if structures == "union" and found:
        found = [np.logical_or.reduce(found)]
    shape = (frame.shape[0], frame.shape[1])
    shrunk = [fit_labels(layer, prepared.box, shape) & sector for layer in found]
    kept = [layer for layer in shrunk if layer.any()]
    empty = np.zeros((0, *frame.shape), dtype=bool)
    return LabelledFrame(frame, sector, np.stack(kept) if kept else empty)


def shrink_labels(labels: NDArray[Pixel], shape: tuple[int, int]) -> NDArray[Pixel]:
    """Nearest neighbour at pixel centres, (H, W) to ``shape``."""
    rows, columns = (
        np.minimum((np.arange(new) + 0.5) * old // new, old - 1).astype(int)
        for new, old in zip(shape, labels.shape, strict=True)
    )
    return np.asarray(labels[rows[:, None], columns])


def fit_labels(
    labels: NDArray[Pixel], box: tuple[int, int, int, int], shape: tuple[int, int]
) -> NDArray[Pixel]:
    """Labels of a whole source frame as its prepared frame was cut out and shrunk."""
    top, left, height, width = box
    return shrink_labels(labels[top : top + height, left : left + width], shape)


def _layers(mask: Path, size: tuple[int, int]) -> list[NDArray[np.bool_]]:
    if mask.suffix.lower() != ".png":
        raise ClipError("a mask is no PNG, and lossy pictures are no masks. Save it as PNG.")
    labels = read_label_image(mask)[0]
    if labels.shape != size:
        raise ClipError(
            f"a mask of {labels.shape} pixels does not fit an image of {size}. Save it at the "
            "image's own size."
        )
    return [labels == value for value in np.unique(labels) if value]


def _pairs_of(source: Path) -> Iterable[ImagePair]:
    if source.is_dir():
        return _of_folder(source)
    if source.is_file() and source.suffix.lower() == ".csv":
        return _of_table(source)
    raise DataError(
        "a source of public images is neither a folder nor a .csv file. Name a folder with X.png "
        "and X_mask.png, or a CSV with the columns image,mask."
    )


def _of_folder(folder: Path) -> list[ImagePair]:
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in IMAGES)
    masks: dict[Path, list[Path]] = {}
    for file in files:
        match = _MASK.fullmatch(file.stem)
        if match:
            masks.setdefault(file.with_name(match[1]), []).append(file)
    return [
        ImagePair(
            str(file.relative_to(folder)), file, tuple(masks.get(file.with_name(file.stem), ()))
        )
        for file in files
        if not _MASK.fullmatch(file.stem)
    ]


def _of_table(table: Path) -> list[ImagePair]:
    masks: dict[str, list[Path]] = {}
    try:
        with table.open(newline="", encoding="utf-8-sig") as stream:
            rows = csv.DictReader(stream)
            if not {"image", "mask"} <= set(rows.fieldnames or ()):
                raise DataError("a CSV of public images lacks a column image or mask. Add both.")
            for row in rows:
                listed = masks.setdefault(row["image"] or "", [])
                if row["mask"]:
                    listed.append(table.parent / row["mask"])
    except (csv.Error, UnicodeDecodeError):
        message = "a CSV of public images cannot be read. Save it as UTF-8 with commas."
        raise DataError(message) from None
    return [ImagePair(name, table.parent / name, tuple(found)) for name, found in masks.items()]
