"""Read DICOM files: the headers that the catalogue keeps, and the voxels of one series.

pydicom and its decoders read the files; the stack is assembled here. highdicom's
``get_volume_from_series`` gives the same volumes (a test compares them) but refuses series
without a FrameOfReferenceUID, which de-identified exports often lack.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.tag import Tag

from agssd_core.data.deidentify import (
    ALLOWED_KEYWORDS,
    Pseudonymiser,
    scanner_model,
    vendor_name,
)
from agssd_core.data.quiet import quiet_readers
from agssd_core.data.volume import MAX_SIDE, MAX_VOXELS, Modality
from agssd_core.errors import DataError, OtherStorageError, SeriesError

Triple = tuple[float, float, float]
Orientation = tuple[float, float, float, float, float, float]

STORAGE_CLASSES: dict[str, Modality] = {
    "1.2.840.10008.5.1.4.1.1.2": "CT",
    "1.2.840.10008.5.1.4.1.1.2.1": "CT",
    "1.2.840.10008.5.1.4.1.1.2.2": "CT",
    "1.2.840.10008.5.1.4.1.1.4": "MR",
    "1.2.840.10008.5.1.4.1.1.4.1": "MR",
    "1.2.840.10008.5.1.4.1.1.4.4": "MR",
}
UNWANTED_TYPES = frozenset(
    {"LOCALIZER", "SCOUT", "PROJECTION IMAGE", "PROJECTION", "MIP", "MINIP", "MAX_IP", "MIN_IP"}
    | {"VOLREN", "RENDERED", "SCREEN SAVE", "SCREENSHOT"}
)
# What the values of a CT may be called; dual-energy maps (MGML, Z_EFF, ED) are not Hounsfield.
HOUNSFIELD_TYPES = frozenset({"", "HU", "US", "HU_MOD"})
PREAMBLE_BYTES = 128


@dataclass(frozen=True)
class Frame:
    """Geometry of one slice, in DICOM's LPS millimetres."""

    position: Triple
    orientation: Orientation
    spacing: tuple[float, float]


@dataclass(frozen=True)
class DicomHeader:
    """What the catalogue keeps of a file; identifiers are pseudonyms."""

    patient: str
    study: str
    series: str
    instance: str
    modality: Modality
    vendor: str
    model: str
    rows: int
    columns: int
    frames: tuple[Frame, ...]


def looks_like_dicom(path: Path) -> bool:
    """Whether the first bytes are DICOM's, with or without the 128-byte preamble."""
    with path.open("rb") as stream:
        start = stream.read(PREAMBLE_BYTES + 4)
    # A file without preamble starts at once with an element of group 0002 or 0008.
    return start[PREAMBLE_BYTES:] == b"DICM" or start[:4] in (
        b"\x02\x00\x00\x00",
        b"\x08\x00\x00\x00",
        b"\x08\x00\x05\x00",
        b"\x08\x00\x08\x00",
        b"\x08\x00\x16\x00",
    )


def read_dicom_header(path: Path, pseudonymiser: Pseudonymiser) -> DicomHeader:
    """Read the allowed fields of one file; its pixels are only looked for.

    Raises:
        SeriesError: the file is damaged, no CT or MR image, or lacks its geometry.
    """
    with _readable():
        wanted = [*ALLOWED_KEYWORDS, "PixelData"]
        data = pydicom.dcmread(path, force=True, defer_size=1024, specific_tags=wanted)
        modality = _storage_modality(data)
        _check_kind(data)
        rows, columns, frames = _check_size(data)
        _check_pixels(data, path, rows * columns * frames)
        if modality == "CT":
            _check_hounsfield(data)
        geometry = tuple(_frames(data, frames))
        key = pseudonymiser.key
        study = _text(data, "StudyInstanceUID")
        series = _text(data, "SeriesInstanceUID")
        if not series:
            raise SeriesError("the file names no series. Export it again from the PACS.")
        return DicomHeader(
            # Without a patient's number the study is the smallest group known to be one person,
            # and without a study the series: two people are never taken for one.
            patient=pseudonymiser.patient(
                _text(data, "PatientID") or (f"study {study}" if study else f"series {series}")
            ),
            study=key("study", study),
            series=key("series", series),
            instance=key("instance", _text(data, "SOPInstanceUID") or str(path)),
            modality=modality,
            vendor=vendor_name(_text(data, "Manufacturer")),
            model=scanner_model(_text(data, "ManufacturerModelName")),
            rows=rows,
            columns=columns,
            frames=geometry,
        )


def read_pixels(path: Path) -> NDArray[np.float32]:
    """Decode one file and apply its rescale slope and intercept.

    Returns:
        (frames, rows, columns) float32, HU for CT.

    Raises:
        SeriesError: the pixels are missing, damaged or of an encoding that is not supported.
    """
    with _readable():
        data = pydicom.dcmread(path, force=True)
        rows, columns, frames = _check_size(data)
        _check_pixels(data, path, rows * columns * frames)
        pixels = np.asarray(data.pixel_array, dtype=np.float32).reshape(frames, rows, columns)
        scale = np.array([_rescale(data, index) for index in range(frames)], dtype=np.float32)
        return pixels * scale[:, 0, None, None] + scale[:, 1, None, None]


class _readable:  # noqa: N801 - reads as a statement
    """Turn whatever a reader raises on a hostile file into one SeriesError."""

    def __init__(self) -> None:
        self._quiet = quiet_readers()

    def __enter__(self) -> None:
        self._quiet.__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        self._quiet.__exit__(None, None, None)
        if kind is None or issubclass(kind, DataError) or not issubclass(kind, Exception):
            return
        if isinstance(error, OSError) and error.errno is not None:
            return  # the file system's fault, not the file's
        raise SeriesError(
            f"the DICOM reader gave up ({kind.__name__}): the file is damaged, cut short or of an "
            "encoding that is not supported. Export it again from the PACS."
        ) from None


def _text(data: Dataset, keyword: str) -> str:
    return str(data.get(keyword) or "").strip()


def _storage_modality(data: Dataset) -> Modality:
    storage = _text(data, "SOPClassUID")
    if not storage and not _text(data, "Rows"):
        raise SeriesError("the file is not DICOM, or is cut short. Export it again from the PACS.")
    modality = STORAGE_CLASSES.get(storage)
    if modality is None:
        message = (
            "the file holds no CT or MR image, nor ultrasound (report, secondary capture or other)."
            " Nothing needs doing."
        )
        raise OtherStorageError(message, storage=storage, modality=_text(data, "Modality"))
    return modality


def _check_kind(data: Dataset) -> None:
    if _text(data, "BurnedInAnnotation").upper() == "YES":
        raise SeriesError(
            "the header says that text is burned into the image, which may name a patient. Export "
            "the series without annotations."
        )
    kinds = data.get("ImageType") or ()
    named = {kinds} if isinstance(kinds, str) else {str(kind).upper() for kind in kinds}
    if named & UNWANTED_TYPES:
        message = "a localizer, projection or rendering, not a slice. Nothing needs doing."
        raise SeriesError(message)
    if "MOSAIC" in named:
        raise SeriesError(
            "a mosaic, which packs a whole volume of a time series into one image, is not read. "
            "Export it as enhanced DICOM or convert it to NIfTI, or leave it out."
        )
    grey = _text(data, "PhotometricInterpretation").upper() in ("", "MONOCHROME1", "MONOCHROME2")
    if int(data.get("SamplesPerPixel") or 1) != 1 or not grey:
        raise SeriesError("the image is in colour, only grey values are allowed. Leave it out.")


def _check_size(data: Dataset) -> tuple[int, int, int]:
    rows, columns = int(data.get("Rows") or 0), int(data.get("Columns") or 0)
    frames = int(data.get("NumberOfFrames") or 1)
    if min(rows, columns, frames) < 1:
        raise SeriesError("the image has no rows or columns. Export it again from the PACS.")
    if max(rows, columns, frames) > MAX_SIDE or rows * columns * frames > MAX_VOXELS:
        raise SeriesError(
            f"the header claims more than {MAX_SIDE} rows, columns or frames, or {MAX_VOXELS} "
            "voxels in all. Check the file, or leave it out."
        )
    return rows, columns, frames


def _check_pixels(data: Dataset, path: Path, pixels: int) -> None:
    """A native image must be as long as its header says, before memory is taken for it."""
    if "PixelData" not in data:
        raise SeriesError("the file holds no pixel data. Export it again from the PACS.")
    element = data.get_item("PixelData", keep_deferred=True)
    length = int(getattr(element, "length", 0) or 0)
    start = int(getattr(element, "value_tell", 0) or 0)
    if length in (0, 0xFFFFFFFF):
        return
    expected = pixels * int(data.get("BitsAllocated") or 16) // 8
    if start + length > path.stat().st_size or length < expected:
        raise SeriesError("the file is cut short: pixels are missing. Export it again.")


def _frames(data: Dataset, count: int) -> Iterator[Frame]:
    for index in range(count):
        position = _geometry(data, index, "ImagePositionPatient", "PlanePositionSequence", 3)
        turned = _geometry(data, index, "ImageOrientationPatient", "PlaneOrientationSequence", 6)
        spacing = _geometry(data, index, "PixelSpacing", "PixelMeasuresSequence", 2)
        yield Frame(
            (position[0], position[1], position[2]),
            (turned[0], turned[1], turned[2], turned[3], turned[4], turned[5]),
            (spacing[0], spacing[1]),
        )


def _geometry(data: Dataset, frame: int, keyword: str, group: str, size: int) -> Sequence[float]:
    value = _lookup(data, frame, keyword, group)
    numbers = [float(number) for number in value] if value is not None else []
    if len(numbers) != size or not np.isfinite(numbers).all():
        raise SeriesError(
            "a slice lacks its position, orientation or pixel spacing, so it cannot be placed in "
            "the body. Export the series again from the PACS."
        )
    return numbers


def _lookup(data: Dataset, frame: int, keyword: str, group: str) -> Any:
    """A field of one frame: its own functional group, the shared one, or the file's."""
    for holder in _groups(data, frame):
        if group in holder and len(holder[group].value):
            inner = holder[group].value[0]
            if keyword in inner:
                return inner[keyword].value
    # In an enhanced file a single top-level position would put all frames into one place.
    if keyword == "ImagePositionPatient" and int(data.get("NumberOfFrames") or 1) > 1:
        return None
    return data[keyword].value if keyword in data else None


def _groups(data: Dataset, frame: int) -> Iterator[Dataset]:
    own = data.get(Tag("PerFrameFunctionalGroupsSequence"))
    if own is not None and len(own.value or ()) > frame:
        yield own.value[frame]
    shared = data.get(Tag("SharedFunctionalGroupsSequence"))
    if shared is not None and len(shared.value or ()):
        yield shared.value[0]


def _check_hounsfield(data: Dataset) -> None:
    """CT values mean nothing without their offset, which most scanners set to -1024."""
    group = "PixelValueTransformationSequence"
    if _lookup(data, 0, "RescaleIntercept", group) is None:
        raise SeriesError(
            "the CT image lacks its rescale intercept, so its values cannot be turned into "
            "Hounsfield units. Export the series again from the PACS."
        )
    kind = str(_lookup(data, 0, "RescaleType", group) or "").strip().upper()
    if kind not in HOUNSFIELD_TYPES:
        raise SeriesError(
            "the CT image holds no Hounsfield units (a dual-energy or other map by its rescale "
            "type). Leave it out, or export the plain reconstruction."
        )


def _rescale(data: Dataset, frame: int) -> tuple[float, float]:
    group = "PixelValueTransformationSequence"
    slope = _lookup(data, frame, "RescaleSlope", group)
    intercept = _lookup(data, frame, "RescaleIntercept", group)
    return (
        1.0 if slope is None else float(slope),
        0.0 if intercept is None else float(intercept),
    )
