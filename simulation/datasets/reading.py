"""Read the pixels of CT and MR rows, and the outlines that lie over them."""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agssd_core.data.deidentify import Pseudonymiser, vendor_name
from agssd_core.data.dicom import looks_like_dicom, read_dicom_header
from agssd_core.data.label_volume import (
    MAX_VALUE,
    canonical_grid,
    require_same_place,
    whole_labels,
)
from agssd_core.data.nifti import read_nifti
from agssd_core.data.series import StoredFile, read_series, select_slices
from agssd_core.data.volume import Modality, Volume, canonical_volume, check_affine
from agssd_core.errors import DataError, OtherStorageError
from simulation.datasets.contours import read_contours
from simulation.datasets.grids import (
    Grid,
    read_analyze_grid,
    read_array_grid,
    read_itk_grid,
    read_nifti_grid,
    read_slices_grid,
    source_file,
)
from simulation.datasets.rows import Mask, Row, Source

# Pictures of 8 bits instead of Hounsfield units: 0 is taken for air and 255 for bone.
PICTURE_WINDOW_HU = (-1000.0, 1000.0)
SLICE_SPACING_MM = (1.0, 1.0, 1.0)
# Names in this process only, to tell files of one series apart; nothing is written under them.
_NAMES = Pseudonymiser(b"rows of public data sets".ljust(32, b"."))


def read_volume(root: Path, row: Row) -> Volume:
    """Read one scan of CT or MR.

    CT is in Hounsfield units. Where a data set publishes 8-bit pictures of CT (kind ``slices``, or
    bytes in an ``npz`` file), 0..255 become -1000..1000 HU linearly: the window that they were made
    with is not published, so their values are no measurements. Cubes of an ``npz`` file have voxels
    of 1 mm with axes taken as RAS. Slices have the spacing (column, row, slice) of the row's fact
    ``spacing_mm``, such as ``0.7 0.7 3``, else 1 mm; they are taken as axial, seen from the feet,
    from the feet upwards. Analyze files say nothing of left and right: x is taken to run left, as
    the format defines.

    Args:
        root: folder of the data set.
        row: one of its rows of modality CT or MR.

    Returns:
        A volume in RAS order; the vendor is the row's, or the DICOM header's where it has none.

    Raises:
        DataError: the file is missing, damaged or unusable; names no path.
    """
    modality = _modality(row)
    path = source_file(root, row.source)
    vendor = _vendor(row)
    if row.source.kind == "dicom":
        volume = read_series(series_files(path))
        if volume.modality != modality:
            raise DataError(
                f"the row says {modality} and the DICOM header {volume.modality}. Read the rows of "
                "the data set again."
            )
        return volume if vendor == "other" else _named(volume, vendor)
    if row.source.kind == "nifti" and row.source.index is None:
        return read_nifti(path, modality=modality, vendor=vendor)
    array, affine = _grid(path, row.source, row.facts)
    if affine is None:
        raise DataError(
            "the header places the image nowhere, so left and right are unknown. Leave it out."
        )
    if modality == "CT" and array.dtype == np.uint8 and row.source.kind in ("npz", "slices"):
        low, high = PICTURE_WINDOW_HU
        array = low + array.astype(np.float32) * np.float32((high - low) / MAX_VALUE)
    return canonical_volume(array, affine, modality=modality, vendor=vendor)


def read_volume_mask(root: Path, row: Row, volume_like: Volume) -> NDArray[np.uint8]:
    """Read the outlines of one scan, united as ``Mask`` says.

    Args:
        root: folder of the data set.
        row: one of its rows of modality CT or MR.
        volume_like: what ``read_volume`` gave for this row.

    Returns:
        (D, H, W) uint8 in the order and shape of ``volume_like.array``; 0 where nothing is
        outlined, everywhere so for a row without masks.

    Raises:
        DataError: a file is missing or damaged, has another shape or place than the scan, or
            holds numbers that are no structures.
    """
    united = np.zeros(volume_like.array.shape, dtype=np.uint8)
    for mask in row.masks:
        values = _mask_grid(root, row, mask, volume_like)
        if values.shape != united.shape:
            raise DataError(
                f"a mask has {values.shape} voxels and its scan {united.shape}, they must be "
                "equal. Download both again, or leave the scan out."
            )
        inside = np.asarray(values, dtype=np.float64) > mask.threshold
        united[inside] = mask.value if mask.value is not None else whole_labels(values[inside])
    return united


def series_files(folder: Path) -> list[StoredFile]:
    """The files of the one series that a folder holds; files of other kinds are passed over.

    Raises:
        DataError: there is none, or a slice cannot be used.
    """
    files = []
    for path in sorted(folder.iterdir()):
        if path.name.startswith(".") or not path.is_file() or not looks_like_dicom(path):
            continue
        try:
            files.append(StoredFile(str(path), read_dicom_header(path, _NAMES)))
        except OtherStorageError:
            continue
    if not files:
        raise DataError("the folder holds no DICOM slice. Download the series again.")
    if len({file.header.series for file in files}) > 1:
        raise DataError(
            "the folder holds several DICOM series, one is allowed. Give each a folder of its own."
        )
    return select_slices(files)[0]


def _grid(path: Path, source: Source, facts: Mapping[str, str]) -> Grid:
    """(I, J, K) stored numbers and where they lie; no affine where the header has none."""
    if source.kind == "slices":
        return read_slices_grid(path, _spacing(facts))
    reader = _READERS.get(source.kind)
    if reader is None:
        raise DataError(
            f"a file of kind {source.kind} holds no volume. Read it with the images' reader."
        )
    return reader(path, source)


_READERS: dict[str, Callable[[Path, Source], Grid]] = {
    "nifti": read_nifti_grid,
    "itk": read_itk_grid,
    "analyze": read_analyze_grid,
    "npz": read_array_grid,
}


def _mask_grid(root: Path, row: Row, mask: Mask, volume: Volume) -> NDArray[np.generic]:
    """A mask's numbers in RAS order; one whose header has no place lies as its scan is stored."""
    if mask.source.kind == "contours":
        return _contours(root, row, mask)
    values, affine = _grid(source_file(root, mask.source), mask.source, row.facts)
    if affine is None:
        affine = _grid(source_file(root, row.source), row.source, row.facts)[1]
        if affine is None:
            raise DataError("neither scan nor mask says where it lies. Leave the scan out.")
    check_affine(affine)
    turned, placed = canonical_grid(values, affine)
    if turned.shape == volume.array.shape:
        require_same_place(placed, volume)
    return turned


def _contours(root: Path, row: Row, mask: Mask) -> NDArray[np.uint8]:
    if row.source.kind != "dicom":
        raise DataError("contours lie over a DICOM series only. Name the series as the scan.")
    files = series_files(source_file(root, row.source))
    return read_contours(source_file(root, mask.source), files, _NAMES)


def _spacing(facts: Mapping[str, str]) -> tuple[float, float, float]:
    if "spacing_mm" not in facts:
        return SLICE_SPACING_MM
    try:
        x, y, z = (float(part) for part in facts["spacing_mm"].split())
    except ValueError:
        raise DataError(
            "a row's fact spacing_mm is no three numbers, such as `0.7 0.7 3`. Read the rows again."
        ) from None
    return x, y, z


def _modality(row: Row) -> Modality:
    if row.modality == "US":
        raise DataError("ultrasound is no volume. Read the row with the images' reader.")
    return row.modality


def _vendor(row: Row) -> str:
    return vendor_name(row.vendor) if row.vendor else "other"


def _named(volume: Volume, vendor: str) -> Volume:
    return Volume(volume.array, volume.affine, volume.modality, vendor)
