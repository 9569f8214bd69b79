"""Read ultrasound DICOM: single frames and clips, in every photometric interpretation in use."""

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.pixels.processing import (
    apply_color_lut,
    apply_modality_lut,
    apply_voi_lut,
    convert_color_space,
)
from pydicom.pixels.utils import expand_ybr422, iter_pixels

from agssd_core.data.codestream import check_codestreams
from agssd_core.data.deidentify import ALLOWED_KEYWORDS
from agssd_core.data.frame_source import (
    Box,
    FrameCount,
    Patience,
    Pixels,
    bits_used,
    check_size,
    eight_bits,
)
from agssd_core.errors import ClipError

US_STORAGE = frozenset(
    {
        "1.2.840.10008.5.1.4.1.1.6.1",
        "1.2.840.10008.5.1.4.1.1.3.1",
        # Retired, but on every older archive.
        "1.2.840.10008.5.1.4.1.1.6",
        "1.2.840.10008.5.1.4.1.1.3",
    }
)
# Frame grabbers and converters store ultrasound as secondary capture.
CAPTURE_STORAGE = "1.2.840.10008.5.1.4.1.1.7"
# Region Data Type: tissue, colour flow; Region Spatial Format: 2D. DICOM PS3.3 C.8.5.5.
TISSUE, COLOUR_FLOW, PLANE = 1, 2, 1
GREY = ("MONOCHROME1", "MONOCHROME2")
COLOURS = ("RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT", "YBR_PARTIAL_420")
LEAST_REGION = 16
HEADER_LIMIT_BYTES = 1 << 16


def is_us_storage(storage: str, modality: str = "") -> bool:
    """Whether a file of this storage class is ultrasound.

    Secondary capture is when its header gives the modality US; what is a report or a work sheet
    among it holds no sector and is left out then.
    """
    captured = storage == CAPTURE_STORAGE or storage.startswith(CAPTURE_STORAGE + ".")
    return storage in US_STORAGE or (captured and modality.strip().upper() == "US")


def read_us_dataset(path: Path) -> Dataset:
    """The allowed fields of a file whose header has been checked.

    Raises:
        ClipError: the file is no ultrasound image, or contradicts itself.
    """
    wanted = [*ALLOWED_KEYWORDS, "PixelData"]
    data = pydicom.dcmread(path, force=True, defer_size=HEADER_LIMIT_BYTES, specific_tags=wanted)
    if not is_us_storage(_text(data, "SOPClassUID"), _text(data, "Modality")):
        raise ClipError("the file holds no ultrasound image. Nothing needs doing.")
    _check_form(data)
    size = dicom_size(data)
    _check_pixels(data, path, size)
    return data


def dicom_size(data: Dataset) -> FrameCount:
    """Rows, columns and frames of a header.

    Raises:
        ClipError: there are none, or more than allowed.
    """
    rows, columns = int(data.get("Rows") or 0), int(data.get("Columns") or 0)
    frames = int(data.get("NumberOfFrames") or 1)
    check_size(rows, columns, frames)
    return FrameCount(frames, rows, columns)


class DicomFrames:
    """The frames of an ultrasound file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._data = read_us_dataset(path)
        self._count = dicom_size(self._data).frames
        start, length = _native(self._data)
        if start and not length:
            check_codestreams(path, start, dicom_size(self._data))
        self._bits = 0
        self._table: NDArray[np.uint8] | None = None
        self.region = echo_region(self._data)

    def frames(self, wanted: Collection[int] | None = None) -> Iterator[tuple[int, Pixels]]:
        """Frames in their order; without ``wanted`` all of them."""
        numbers = list(range(self._count)) if wanted is None else sorted(wanted)
        patience = Patience()
        halved = _photometric(self._data) == "YBR_FULL_422" and _native(self._data)[1]
        decoded = self._halved(numbers) if halved else iter_pixels(self._path, indices=numbers)
        for number, values in zip(numbers, decoded, strict=True):
            patience.check(number, values)
            yield number, self._shown(values)

    def _halved(self, numbers: Collection[int]) -> Iterator[NDArray[Any]]:
        """Native frames of which two pixels share their colour.

        pydicom 3.0 looks for all but the first of them in the wrong place.
        """
        size = dicom_size(self._data)
        length = size.rows * size.columns * 2
        start = _native(self._data)[0]
        with self._path.open("rb") as stream:
            for number in numbers:
                stream.seek(start + number * length)
                full = np.frombuffer(expand_ybr422(stream.read(length), 8), dtype=np.uint8)
                pixels = full.reshape(size.rows, size.columns, 3)
                yield convert_color_space(pixels, "YBR_FULL", "RGB")

    def _shown(self, values: NDArray[Any]) -> Pixels:
        photometric = _photometric(self._data)
        if photometric == "PALETTE COLOR":
            if self._table is None:
                self._table = _palette(self._data, values.dtype)
            return np.asarray(self._table[values])
        if photometric in GREY:
            grey = self._grey(values)
            return np.asarray(255 - grey) if photometric == "MONOCHROME1" else grey
        stored = int(self._data.get("BitsStored") or 8)
        return eight_bits(values, stored)

    def _grey(self, values: NDArray[Any]) -> Pixels:
        """Apply the window, or else the bits that are in use."""
        if _windowed(self._data):
            scaled = np.asarray(apply_modality_lut(values, self._data))
            shown = np.asarray(apply_voi_lut(scaled, self._data), dtype=np.float32)
            low, high = _output_range(self._data)
            share = np.clip((shown - low) / (high - low), 0, 1)
            return np.asarray(np.rint(share * 255), dtype=np.uint8)
        if values.min(initial=0) < 0:
            raise ClipError(
                "the image holds negative grey values and no window. Export it with a window, or "
                "leave it out."
            )
        self._bits = self._bits or bits_used(values)
        return eight_bits(values, self._bits)


def echo_region(data: Dataset) -> Box | None:
    """The largest region of two-dimensional tissue, else of colour flow, that the header describes.

    Two views side by side are two regions; the first of the larger ones is taken.
    """
    rows, columns = int(data.get("Rows") or 0), int(data.get("Columns") or 0)
    found: dict[int, Box] = {}
    for region in data.get("SequenceOfUltrasoundRegions") or ():
        kind = int(region.get("RegionDataType") or 0)
        if int(region.get("RegionSpatialFormat") or 0) != PLANE:
            continue
        left, top = _place(region, "X0", columns), _place(region, "Y0", rows)
        # Both corners lie within the region.
        right, bottom = _place(region, "X1", columns - 1), _place(region, "Y1", rows - 1)
        box = Box(top, left, bottom + 1 - top, right + 1 - left)
        known = found.get(kind)
        if min(box.height, box.width) >= LEAST_REGION and (
            known is None or box.height * box.width > known.height * known.width
        ):
            found[kind] = box
    return found.get(TISSUE) or found.get(COLOUR_FLOW)


def _place(region: Dataset, corner: str, limit: int) -> int:
    side = "Min" if corner.endswith("0") else "Max"
    value = region.get(f"RegionLocation{side}{corner}")
    return min(max(int(value if value is not None else -1), 0), limit)


def _text(data: Dataset, keyword: str) -> str:
    return str(data.get(keyword) or "").strip()


def _photometric(data: Dataset) -> str:
    return _text(data, "PhotometricInterpretation").upper() or "MONOCHROME2"


def _check_form(data: Dataset) -> None:
    """Colour and samples must agree, and the pixels be whole numbers of 8 or 16 bits."""
    samples, photometric = int(data.get("SamplesPerPixel") or 1), _photometric(data)
    single = photometric in GREY or photometric == "PALETTE COLOR"
    if not single and photometric not in COLOURS:
        raise ClipError(
            "the header names a colour space that is not read (grey, palette, RGB and YBR are). "
            "Export the image again as RGB."
        )
    if samples != (1 if single else 3):
        raise ClipError(
            f"the header contradicts itself: {samples} sample(s) per pixel do not fit its colour "
            f"space, which has {1 if single else 3}. Export the image again."
        )
    if int(data.get("BitsAllocated") or 8) not in (8, 16) or "PixelData" not in data:
        raise ClipError(
            "the file holds no pixels of 8 or 16 bits. Export it again, or leave it out."
        )


def _check_pixels(data: Dataset, path: Path, size: FrameCount) -> None:
    """A native image must be as long as its header says, before memory is taken for it."""
    start, length = _native(data)
    if not length:
        return
    samples = int(data.get("SamplesPerPixel") or 1)
    # 4:2:2 stores two samples for three.
    share = 2 / 3 if _photometric(data) == "YBR_FULL_422" else 1
    pixels = size.rows * size.columns * size.frames * samples
    expected = int(pixels * share) * int(data.get("BitsAllocated") or 8) // 8
    if start + length > path.stat().st_size or length < expected:
        raise ClipError("the file is cut short: pixels are missing. Export it again.")


def _native(data: Dataset) -> tuple[int, int]:
    """Where pixels that are not compressed begin in the file, and their bytes; 0 if they are."""
    element: Any = data.get_item("PixelData", keep_deferred=True)
    length = int(getattr(element, "length", 0) or 0)
    start = int(getattr(element, "value_tell", 0) or 0)
    return (start, 0) if length == 0xFFFFFFFF else (start, length)


def _palette(data: Dataset, kind: np.dtype[Any]) -> NDArray[np.uint8]:
    """(256 or 65536, 3) the colour of every stored value."""
    entries = np.arange(np.iinfo(kind).max + 1, dtype=kind)
    table = np.asarray(apply_color_lut(entries[None], data))[0, :, :3]
    # Many writers store 8-bit colours in a table of 16 bits.
    return (table >> 8 if table.max(initial=0) > 255 else table).astype(np.uint8)


def _windowed(data: Dataset) -> bool:
    if data.get("VOILUTSequence"):
        return True
    width = data.get("WindowWidth")
    first = width[0] if isinstance(width, list | pydicom.multival.MultiValue) and width else width
    return first is not None and float(first) >= 1 and data.get("WindowCenter") is not None


def _output_range(data: Dataset) -> tuple[float, float]:
    """Values between which a windowed image lies, as pydicom computes them."""
    tables = data.get("VOILUTSequence")
    if tables:
        return 0.0, float((1 << min(16, max(1, int(tables[0].LUTDescriptor[2])))) - 1)
    bits = int(data.get("BitsStored") or 8)
    signed = int(data.get("PixelRepresentation") or 0) == 1
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)
    slope, intercept = float(data.get("RescaleSlope", 1)), float(data.get("RescaleIntercept", 0))
    return low * slope + intercept, high * slope + intercept
