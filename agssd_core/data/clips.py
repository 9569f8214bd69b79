"""Ultrasound files as the catalogue and the cache see them: header, and grey frames.

One form whatever the scanner: 8-bit grey, everything outside the sector 0, cropped to the sector,
no larger than needed, without near-duplicate frames. Burned-in names lie outside the sector.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from agssd_core.config.frames import FramesConfig
from agssd_core.data.cine import START_BYTES, VideoFrames, video_format, video_size
from agssd_core.data.clip_naming import describe_clip
from agssd_core.data.clip_survey import Survey
from agssd_core.data.deidentify import Pseudonymiser, scanner_model, vendor_name
from agssd_core.data.frame_source import (
    Box,
    FrameCount,
    FrameSource,
    Pixels,
    grey_frame,
    readable_clip,
)
from agssd_core.data.shrink import AreaShrink
from agssd_core.data.still import SIGNATURES, ImageFrames, image_size
from agssd_core.data.thinning import thin
from agssd_core.data.us_dicom import DicomFrames, dicom_size, is_us_storage, read_us_dataset
from agssd_core.errors import ClipError

__all__ = [
    "ClipHeader",
    "ClipKind",
    "PreparedClip",
    "clip_kind",
    "is_us_storage",
    "load_clip",
    "read_clip_header",
]

ClipKind = Literal["us-dicom", "image", "video"]
Mask = NDArray[np.bool_]

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".jpe", ".bmp", ".tif", ".tiff"})
# What portable scanners and de-identification write where nobody was named.
NOBODY = frozenset(
    {"0", "anon", "anonymous", "anonymized", "anonymised", "unknown", "none", "no id", "n/a", "na"}
)
VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mpeg", ".mpg", ".avi", ".mov", ".mkv", ".gif"})


@dataclass(frozen=True)
class ClipHeader:
    """What the catalogue keeps of a file; identifiers are pseudonyms.

    ``content`` is equal for copies of one file; it says nothing without the site's secret.
    """

    patient: str
    study: str
    instance: str
    vendor: str
    model: str
    frames: int
    rows: int
    columns: int
    content: str


@dataclass(frozen=True)
class PreparedClip:
    """The frames of one clip that are kept.

    Attributes:
        frames: (F, H, W) uint8, 0 outside the sector.
        sector: (H, W) True inside.
        numbers: which frames of the source were kept, from 0.
        box: (top, left, height, width) of the sector in the source, pixels.
    """

    frames: Pixels
    sector: Mask
    numbers: tuple[int, ...]
    box: tuple[int, int, int, int]


def clip_kind(path: Path) -> ClipKind | None:
    """``image`` or ``video`` by the name, or by the first bytes of a file without a suffix.

    None for all else; DICOM files are told apart by their storage class, see ``is_us_storage``.

    Raises:
        OSError: the file cannot be read.
    """
    suffix = path.suffix.casefold()
    if path.name.startswith("."):
        return None
    if suffix in IMAGE_SUFFIXES:
        return "image"
    if suffix in VIDEO_SUFFIXES:
        return "video"
    if suffix:
        return None
    with path.open("rb") as stream:
        start = stream.read(START_BYTES)
    if start.startswith(b"GIF8") or video_format(start):
        return "video"
    # Two letters are too few to tell a bitmap by.
    known = tuple(signature for signature in SIGNATURES if len(signature) > 2)
    return "image" if start.startswith(known) else None


def read_clip_header(path: Path, kind: ClipKind, pseudonymiser: Pseudonymiser) -> ClipHeader:
    """Find out whose clip a file holds and how large it is; no pixels are decoded.

    Raises:
        ClipError: the file is a mask, no ultrasound, unreadable, or claims too much.
    """
    if kind == "us-dicom":
        return _dicom_header(path, pseudonymiser)
    named = describe_clip(path)
    if named.is_mask:
        raise ClipError("a mask or label map by its name, not a frame. Nothing needs doing.")
    if named.other_modality:
        raise ClipError(
            "no ultrasound by its name (CT, MR, PET or X-ray). If it is ultrasound, put the word "
            "us into its name; else nothing needs doing."
        )
    with readable_clip():
        size = _file_size(path, kind)
        content = pseudonymiser.key("content", _content(path))
    return ClipHeader(
        patient=pseudonymiser.patient(named.patient),
        study="",
        instance=content,
        vendor=vendor_name(named.manufacturer),
        model=scanner_model(named.model),
        frames=size.frames,
        rows=size.rows,
        columns=size.columns,
        content=content,
    )


def load_clip(path: Path, kind: ClipKind, config: FramesConfig) -> PreparedClip:
    """Decode a clip into grey frames that hold nothing but echoes.

    The file is read twice, so that a long clip never lies in memory: once for its sector and for
    small pictures of all frames, once for the frames that are kept.

    Raises:
        ClipError: the file is damaged, holds no sector, or one that is too small.
    """
    with readable_clip():
        survey = Survey(_source(path, kind))
        box = _bounds(survey.sector)
        shrink = AreaShrink(_cut(survey.sector, box), config.max_side)
        if min(shrink.sector.shape) < config.min_side:
            high, wide = shrink.sector.shape
            raise ClipError(
                f"the sector is {high} x {wide} pixels, its shorter side needs "
                f"data.frames.min_side = {config.min_side}. Leave the file out, or export it "
                "larger."
            )
        places = thin(
            survey.sector_thumbnails(),
            similarity=config.similarity,
            max_frames=config.max_frames,
        )
        numbers = tuple(survey.numbers[place] for place in places)
        frames = [
            shrink(grey_frame(_cut(frame, box), tinted=survey.tinted))
            for frame in survey.frames(numbers)
        ]
        if len(frames) != len(numbers):
            raise ClipError("the file changed while it was read. Try again.")
        return PreparedClip(np.stack(frames), shrink.sector, numbers, box)


def _bounds(sector: Mask) -> Box:
    rows, columns = np.flatnonzero(sector.any(1)), np.flatnonzero(sector.any(0))
    return Box(int(rows[0]), int(columns[0]), int(np.ptp(rows)) + 1, int(np.ptp(columns)) + 1)


def _cut(values: NDArray[Any], box: Box) -> NDArray[Any]:
    return values[box.top : box.top + box.height, box.left : box.left + box.width]


def _source(path: Path, kind: ClipKind) -> FrameSource:
    if kind == "us-dicom":
        return DicomFrames(path)
    if kind == "image" or _is_gif(path):
        return ImageFrames(path)
    return VideoFrames(path)


def _is_gif(path: Path) -> bool:
    with path.open("rb") as stream:
        return path.suffix.casefold() == ".gif" or stream.read(4) == b"GIF8"


def _file_size(path: Path, kind: ClipKind) -> FrameCount:
    return image_size(path) if kind == "image" or _is_gif(path) else video_size(path)


def _content(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _dicom_header(path: Path, pseudonymiser: Pseudonymiser) -> ClipHeader:
    with readable_clip():
        data = read_us_dataset(path)
        size = dicom_size(data)
        content = pseudonymiser.key("content", _content(path))
        patient, study, series, instance, maker, model = (
            str(data.get(keyword) or "").strip()
            for keyword in (
                "PatientID",
                "StudyInstanceUID",
                "SeriesInstanceUID",
                "SOPInstanceUID",
                "Manufacturer",
                "ManufacturerModelName",
            )
        )
    if patient.casefold() in NOBODY or not any(letter.isalnum() for letter in patient):
        patient = ""
    # Without a patient's number the smallest group known to be one person stands for it.
    fallback = f"study {study}" if study else f"series {series}" if series else f"file {content}"
    return ClipHeader(
        patient=pseudonymiser.patient(patient or fallback),
        study=pseudonymiser.key("study", study) if study else "",
        instance=pseudonymiser.key("instance", instance or content),
        vendor=vendor_name(maker),
        model=scanner_model(model),
        frames=size.frames,
        rows=size.rows,
        columns=size.columns,
        content=content,
    )
