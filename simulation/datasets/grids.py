"""Stored voxels and their place, for each file format of a public data set.

Unlike the house's readers of scans, these also read one volume of a 4D file, and masks: empty ones,
ones without a place, ones of whole numbers.
"""

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import nibabel as nib
import numpy as np
from nibabel import orientations
from numpy.typing import NDArray
from PIL import Image

from agssd_core.data.quiet import quiet_readers
from agssd_core.data.series import LPS_TO_RAS
from agssd_core.data.volume import Affine, check_affine, check_shape
from agssd_core.errors import DataError, VolumeError
from simulation.datasets.rows import Source

# (I, J, K) stored numbers, and voxel index -> RAS millimetres; None where the header has no place.
Grid = tuple[NDArray[np.generic], Affine | None]
SLICE_SUFFIXES = (".png", ".jpg", ".jpeg")
_orient: Any = orientations


def source_file(root: Path, source: Source) -> Path:
    """Where a source lies.

    Raises:
        DataError: it would lie outside the root, or is missing.
    """
    parts = PurePosixPath(source.path)
    if parts.is_absolute() or ".." in parts.parts or "\\" in source.path:
        raise DataError("a row's path leads out of the data set. Read the rows again.")
    path = root / parts
    if not path.exists():
        raise DataError(
            "a file named by a row is missing. Unpack the download again, or read the rows again."
        )
    return path


def read_nifti_grid(path: Path, source: Source) -> Grid:
    """A NIfTI file, or its volume ``source.index``.

    Raises:
        DataError: it is damaged, or not of the dimensions that the source says.
    """
    with _readable("NIfTI"):
        image: Any = nib.load(path)
        array = _one_volume(image, source.index)
        return array, _nifti_place(image)


def read_analyze_grid(path: Path, source: Source) -> Grid:
    """An Analyze pair; the format defines x to run left and knows no other orientation.

    Raises:
        DataError: it is damaged, or not of the dimensions that the source says.
    """
    with _readable("Analyze"):
        image: Any = nib.load(path)
        return _one_volume(image, source.index), np.asarray(image.affine, dtype=np.float64)


def read_itk_grid(path: Path, source: Source) -> Grid:
    """A file of ITK's formats (.mha, .mhd, .nrrd), or its volume ``source.index``.

    Raises:
        DataError: it is damaged, in colour, or not of the dimensions that the source says.
    """
    with _readable("ITK"):
        sitk = _itk()
        # Its warnings would print what stands in headers.
        sitk.ProcessObject.SetGlobalWarningDisplay(False)  # noqa: FBT003 - the library's own
        reader = sitk.ImageFileReader()
        reader.SetFileName(str(path))
        reader.ReadImageInformation()
        size = _one_size(tuple(reader.GetSize()), source.index)
        if reader.GetNumberOfComponents() != 1:
            raise VolumeError("the voxels are colours or vectors, only grey values are allowed.")
        stored = sitk.GetArrayFromImage(reader.Execute())
        array = stored.reshape(-1, *size[::-1])[source.index or 0].transpose(2, 1, 0)
        dimensions = reader.GetDimension()
        direction = np.reshape(reader.GetDirection(), (dimensions, dimensions))[:3, :3]
        affine = np.eye(4)
        affine[:3, :3] = direction * np.asarray(reader.GetSpacing()[:3])
        affine[:3, 3] = reader.GetOrigin()[:3]
        return array, LPS_TO_RAS @ affine


def read_array_grid(path: Path, source: Source) -> Grid:
    """Row ``source.index`` of the array ``source.key`` of an .npz file, voxels of 1 mm.

    Raises:
        DataError: the file is damaged, or has no such array or row.
    """
    with _readable("NumPy"):
        array = _array(path, source.key, path.stat().st_mtime_ns)
        index = source.index
        if index is None:
            volume = array
        elif 0 <= index < len(array):
            volume = array[index]
        else:
            raise DataError("the array has fewer rows than the data set's rows say. Read it again.")
        check_shape(volume.shape)
        return volume, np.eye(4)


def read_slices_grid(folder: Path, spacing_mm: tuple[float, float, float]) -> Grid:
    """A folder of 8-bit slices in the order of the last number of their names.

    Args:
        folder: PNG or JPEG files, columns from right to left, rows from front to back.
        spacing_mm: of columns, rows and slices.

    Returns:
        (column, row, slice) uint8, and its place.

    Raises:
        DataError: there are none, they differ in size, or one is damaged or deeper than 8 bits.
    """
    with _readable("PNG or JPEG"):
        slices = [_grey(path) for path in numbered_slices(folder)]
        if not slices:
            raise DataError("the folder holds no slice. Unpack the download again.")
        sizes = {each.shape for each in slices}
        if len(sizes) > 1:
            raise DataError(
                f"the slices have {len(sizes)} different sizes, one is allowed. Leave the scan out."
            )
        stack = np.stack(slices).transpose(2, 1, 0)
    return stack, LPS_TO_RAS @ np.diag([*spacing_mm, 1.0])


def numbered_slices(folder: Path) -> list[Path]:
    """PNG and JPEG files of a folder, by the last number of their names, then by name."""
    files = [
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SLICE_SUFFIXES and not path.name.startswith(".")
    ]
    return sorted(files, key=lambda path: (slice_number(path), path.name))


def slice_number(path: Path) -> int:
    """The last number in a file's name, -1 where there is none."""
    numbers = re.findall(r"\d+", path.stem)
    return int(numbers[-1]) if numbers else -1


def _itk() -> Any:
    """SimpleITK, which only who reads public data sets needs."""
    try:
        return importlib.import_module("SimpleITK")
    except ImportError:
        raise DataError(
            "SimpleITK is not installed, so .mha, .mhd and .nrrd files cannot be read. Install "
            "`agssd-federation[research]`."
        ) from None


def _one_volume(image: Any, index: int | None) -> NDArray[np.generic]:
    shape = tuple(int(side) for side in image.shape)
    if np.dtype(image.header.get_data_dtype()).kind not in "iufb":
        raise VolumeError("the voxels are colours or complex numbers, only grey values are read.")
    size = _one_size(shape, index)
    if index is None:
        return np.asarray(image.dataobj).reshape(size)
    return np.asarray(image.dataobj[..., index]).reshape(size)


def _one_size(shape: tuple[int, ...], index: int | None) -> tuple[int, int, int]:
    """Sides of one volume, once the file is known to hold it."""
    while len(shape) > 3 and shape[-1] == 1 and index is None:
        shape = shape[:-1]
    if index is not None:
        if len(shape) != 4 or not 0 <= index < shape[3]:
            raise VolumeError(
                "the file holds fewer volumes than the data set's rows say. Read the rows again."
            )
        shape = shape[:3]
    check_shape(shape)
    return shape[0], shape[1], shape[2]


def _nifti_place(image: Any) -> Affine | None:
    """Sform, or qform where that is none or sheared, as ``nifti.read_nifti`` chooses."""
    placed = [
        np.asarray(matrix, dtype=np.float64)
        for matrix, code in (image.get_sform(coded=True), image.get_qform(coded=True))
        if matrix is not None and code > 0
    ]
    for matrix in placed[:-1]:
        try:
            check_affine(matrix)
        except VolumeError:
            continue
        return matrix
    return placed[-1] if placed else None


@lru_cache(maxsize=1)
def _array(path: Path, key: str, _changed: int) -> NDArray[np.generic]:
    """One array of a file: kept, as its rows are read one after the other."""
    with np.load(path, allow_pickle=False) as arrays:
        if key not in arrays:
            raise DataError("the file lacks an array that the rows name. Download it again.")
        array: NDArray[np.generic] = arrays[key]
    array.setflags(write=False)
    return array


def _grey(path: Path) -> NDArray[np.uint8]:
    with Image.open(path, formats=("PNG", "JPEG")) as image:
        check_shape((*image.size, 1))
        if image.mode not in ("1", "L", "LA", "P", "RGB", "RGBA"):
            raise DataError("a slice has more than 8 bits for a pixel. Leave the scan out.")
        return np.asarray(image.convert("L"), dtype=np.uint8)


@contextmanager
def _readable(kind: str) -> Iterator[None]:
    """Turn what a reader raises on a damaged file into one error that names no path."""
    with quiet_readers():
        try:
            yield
        except DataError:
            raise
        except MemoryError:
            raise DataError("the scan does not fit into memory. Free some, then go on.") from None
        except Exception as error:  # noqa: BLE001 - a damaged file may break the reader anywhere
            raise _unreadable(kind, error) from None


def _unreadable(kind: str, error: Exception) -> DataError:
    return DataError(
        f"a file is no readable {kind} ({type(error).__name__}): damaged, cut short or of another "
        "format. Download it again, or leave the scan out."
    )
