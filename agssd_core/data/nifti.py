"""Read NIfTI files."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.spatialimages import HeaderDataError

from agssd_core.data.deidentify import Pseudonymiser, scanner_model, vendor_name
from agssd_core.data.naming import describe_name
from agssd_core.data.quiet import quiet_readers
from agssd_core.data.volume import (
    Modality,
    Volume,
    canonical_volume,
    check_affine,
    check_shape,
    spacing_of,
)
from agssd_core.errors import DataError, VolumeError

SUFFIXES = (".nii", ".nii.gz")
AIR_HU = -500
SAMPLES, SAMPLE_BYTES = 16, 4096


@dataclass(frozen=True)
class NiftiHeader:
    """What the catalogue keeps of a file; identifiers are pseudonyms.

    ``content`` is equal for copies of one file; it says nothing without the site's secret.
    """

    patient: str
    modality: Modality
    vendor: str
    model: str
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    content: str


def read_nifti_header(
    path: Path, pseudonymiser: Pseudonymiser, *, modality: Modality | None = None
) -> NiftiHeader:
    """Check a file's header and find out patient and modality.

    Args:
        path: a .nii or .nii.gz file.
        pseudonymiser: of the site.
        modality: of a scan whose name and sidecar do not say it.

    Raises:
        VolumeError: the file is a mask, unreadable, not 3D or of unknown modality.
    """
    named = describe_name(path)
    if named.is_mask:
        raise VolumeError("a mask or label map by its name, not a scan. Nothing needs doing.")
    if named.other_modality and named.modality is None:
        raise VolumeError(
            "neither CT nor MR by the name of the file, its folder or its sidecar (PET, ultrasound "
            'or other). If it is CT or MR, write {"Modality": "MR"} into a file NAME.json beside '
            "it; else leave it out."
        )
    image = _open(path)
    shape = _shape(image)
    affine = _affine(image)
    _require_spacing(path, image)
    found = named.modality or modality or _guess_modality(image)
    return NiftiHeader(
        patient=pseudonymiser.patient(named.patient),
        modality=found,
        vendor=vendor_name(named.manufacturer),
        model=scanner_model(named.model),
        shape=shape,
        spacing_mm=spacing_of(affine),
        content=pseudonymiser.key("content", _content(path)),
    )


def read_nifti(path: Path, *, modality: Modality, vendor: str = "other") -> Volume:
    """Read one scan.

    Raises:
        VolumeError: the file is damaged, not 3D, or holds unusable voxels or geometry.
    """
    image = _open(path)
    shape = _shape(image)
    return canonical_volume(
        _voxels(image).reshape(shape), _affine(image), modality=modality, vendor=vendor
    )


def _open(path: Path) -> Any:
    try:
        with quiet_readers():
            return nib.load(path)
    except (PermissionError, FileNotFoundError):
        raise
    except (ImageFileError, HeaderDataError, OSError, EOFError, ValueError, KeyError) as error:
        raise _unreadable(error) from None


def _shape(image: Any) -> tuple[int, int, int]:
    shape = tuple(int(side) for side in image.shape)
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    check_shape(shape)
    if np.dtype(image.header.get_data_dtype()).kind not in "iuf":
        raise VolumeError(
            "the voxels are colours or complex numbers, only grey values are allowed. Leave it out."
        )
    return shape[0], shape[1], shape[2]


def _affine(image: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """The scan's place: its sform, or its qform where the sform is none or is sheared.

    Registration tools write affine transforms to an atlas as sform; the qform then still places the
    scan upright in the scanner.
    """
    placed = [matrix for matrix in (_form(image.get_sform), _form(image.get_qform)) if len(matrix)]
    if not placed:
        raise VolumeError(
            "the header places the image nowhere (sform and qform codes are 0), so left and right "
            "are unknown. Convert the scan again from its DICOM series."
        )
    first, last = placed[0], placed[-1]
    try:
        check_affine(first)
    except VolumeError:
        check_affine(last)
        return last
    if (np.sign(np.linalg.det(first[:3, :3])) * np.sign(np.linalg.det(last[:3, :3]))) < 0:
        raise VolumeError(
            "the header's sform and qform are mirror images of each other, so left and right are "
            "unknown. Convert the scan again from its DICOM series."
        )
    return first


def _require_spacing(path: Path, image: Any) -> None:
    """Refuse a zero in the stored spacing where it matters: nibabel silently makes it 1 mm."""
    if int(image.header["sform_code"]) > 0:
        return
    with quiet_readers(), nib.openers.ImageOpener(str(path)) as stream:
        stored = image.header_class.from_fileobj(stream, check=False)["pixdim"][1:4]
    if not np.all(np.abs(stored) > 0):
        raise VolumeError(
            "the header gives a voxel spacing of 0 mm. Mend the header, or convert the scan again "
            "from its DICOM series."
        )


def _form(read: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    """One of a header's two affines; empty where it is not set or cannot be computed."""
    try:
        matrix, code = read(coded=True)
    except HeaderDataError:
        return np.empty((0, 0))
    return np.empty((0, 0)) if matrix is None or code <= 0 else np.asarray(matrix, dtype=np.float64)


def _content(path: Path) -> str:
    """Digest of a file's size and of samples over all its length: the same for copies alone."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as stream:
        for place in np.linspace(0, max(0, size - SAMPLE_BYTES), SAMPLES).astype(int):
            stream.seek(int(place))
            digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _voxels(image: Any) -> np.ndarray[Any, np.dtype[np.float32]]:
    try:
        with quiet_readers(), np.errstate(all="ignore"):
            return np.asarray(image.get_fdata(dtype=np.float32, caching="unchanged"))
    except MemoryError:
        raise VolumeError("the scan does not fit into memory. Free some, then go on.") from None
    except DataError:
        raise
    except Exception as error:  # noqa: BLE001 - a damaged file may break the reader anywhere
        raise _unreadable(error) from None


def _guess_modality(image: Any) -> Modality:
    """Hounsfield numbers are whole, reach below -500 (air) and are bounded.

    MR is not guessed: PET, label maps and rescaled CT are not negative either.
    """
    values = _voxels(image)
    low, high = float(values.min()), float(values.max())
    whole = bool(np.isfinite(values).all() and np.all(np.mod(values[::3, ::3, ::3], 1) == 0))
    if whole and -4096 <= low <= AIR_HU and 100 <= high <= 32767:
        return "CT"
    raise VolumeError(
        "neither the file's name, nor a sidecar, nor its values tell whether it is CT or MR. Index "
        "its folder with `agssd-site index FOLDER --modality MR` (or CT), which names all scans "
        'that do not say it, or write {"Modality": "MR"} into a file NAME.json beside the scan.'
    )


def _unreadable(error: Exception) -> VolumeError:
    return VolumeError(
        f"the file is no readable NIfTI ({type(error).__name__}): damaged, cut short or of "
        "another format. Copy it again, or leave it out."
    )
