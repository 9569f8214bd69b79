"""Write phantoms as the files that hospitals have: DICOM series and NIfTI with a sidecar."""

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, MRImageStorage, generate_uid

from simulation.phantom_images import ScannerLook

# Explicit, so that the files' bytes do not change with the date of a run.
STUDY_DATE = "20240102"
GZIP_LEVEL = 1
CT_INTERCEPT = -1024


@dataclass(frozen=True)
class ScanLabel:
    """Whose scan it is and where it stands."""

    patient: str
    modality: str
    spacing_mm: tuple[float, float, float]
    look: ScannerLook
    uid_seed: str


def ras_affine(size: tuple[int, ...], spacing_mm: tuple[float, float, float]) -> Any:
    """(4, 4) affine of an array in RAS order whose middle lies at the scanner's origin."""
    affine = np.diag([*spacing_mm, 1.0])
    affine[:3, 3] = -(np.asarray(size) - 1) / 2 * np.asarray(spacing_mm)
    return affine


def nifti_image(array: NDArray[Any], affine: NDArray[np.float64]) -> Any:
    """A nibabel image; nibabel gives its constructor no types."""
    make: Any = nib.Nifti1Image
    return make(array, affine)


def write_nifti(file: Path, array: NDArray[np.int16], label: ScanLabel) -> None:
    """Write ``file`` (.nii.gz) in LPS order, as converters do, and its BIDS sidecar."""
    affine = ras_affine(array.shape, label.spacing_mm)
    turned = np.eye(4)
    turned[0, 0], turned[0, 3] = -1, array.shape[0] - 1
    turned[1, 1], turned[1, 3] = -1, array.shape[1] - 1
    image = nifti_image(array[::-1, ::-1], affine @ turned)
    image.set_sform(image.affine, code=1)
    image.set_qform(image.affine, code=1)
    file.parent.mkdir(parents=True, exist_ok=True)
    # No name and time in the gzip header: equal phantoms give equal files.
    file.write_bytes(gzip.compress(image.to_bytes(), GZIP_LEVEL, mtime=0))
    sidecar = {
        "Modality": label.modality,
        "Manufacturer": label.look.vendor,
        "ManufacturersModelName": label.look.model,
    }
    name = file.name.removesuffix(".nii.gz") + ".json"
    file.with_name(name).write_text(json.dumps(sidecar), encoding="utf-8")


def write_dicom(folder: Path, array: NDArray[np.int16], label: ScanLabel) -> None:
    """Write one axial series, a file for each slice, with made-up identifying fields."""
    folder.mkdir(parents=True, exist_ok=True)
    series = generate_uid(entropy_srcs=[label.uid_seed, "series"])
    affine = ras_affine(array.shape, label.spacing_mm)
    # First voxel in DICOM order: rows run to the left, columns to the back.
    corner = affine @ [array.shape[0] - 1, array.shape[1] - 1, 0, 1]
    for level in range(array.shape[2]):
        data = _identified(label, series, level)
        position = (-corner[0], -corner[1], corner[2] + level * label.spacing_mm[2])
        data.ImagePositionPatient = [f"{part:.6g}" for part in position]
        _set_pixels(data, array[::-1, ::-1, level].T, label)
        data.save_as(folder / f"{level + 1:04d}.dcm", enforce_file_format=True)


def _identified(label: ScanLabel, series: str, level: int) -> FileDataset:
    storage = CTImageStorage if label.modality == "CT" else MRImageStorage
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = storage
    meta.MediaStorageSOPInstanceUID = generate_uid(entropy_srcs=[label.uid_seed, str(level)])
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    data = FileDataset("", Dataset(), file_meta=meta, preamble=b"\0" * 128)
    data.SOPClassUID = storage
    data.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    data.StudyInstanceUID = generate_uid(entropy_srcs=[label.patient, label.uid_seed, "study"])
    data.SeriesInstanceUID = series
    data.FrameOfReferenceUID = generate_uid(entropy_srcs=[label.uid_seed, "frame"])
    data.PatientName = f"Phantom^{label.patient}"
    data.PatientID = label.patient
    data.PatientBirthDate = "19600229"
    data.PatientSex = "O"
    data.InstitutionName = "Phantom General Hospital"
    data.ReferringPhysicianName = "Phantom^Referrer"
    data.AccessionNumber = "PH0001"
    data.StudyID = "1"
    data.StudyDate = STUDY_DATE
    data.StudyTime = "120000"
    data.Modality = label.modality
    data.Manufacturer = label.look.vendor
    data.ManufacturerModelName = label.look.model
    data.PositionReferenceIndicator = ""
    data.SeriesNumber = 1
    data.InstanceNumber = level + 1
    data.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL" if label.modality == "CT" else "OTHER"]
    return data


def _set_pixels(data: FileDataset, pixels: NDArray[np.int16], label: ScanLabel) -> None:
    x, y, z = label.spacing_mm
    data.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    data.PixelSpacing = [y, x]
    data.SliceThickness = z
    data.SamplesPerPixel = 1
    data.PhotometricInterpretation = "MONOCHROME2"
    data.Rows, data.Columns = pixels.shape
    data.BitsAllocated, data.BitsStored, data.HighBit = 16, 16, 15
    data.PixelRepresentation = 0
    stored = pixels.astype(np.int32)
    if label.modality == "CT":
        data.KVP = 120
        data.AcquisitionNumber = 1
        data.RescaleIntercept, data.RescaleSlope, data.RescaleType = CT_INTERCEPT, 1, "HU"
        stored -= CT_INTERCEPT
    else:
        data.ScanningSequence, data.SequenceVariant, data.ScanOptions = "SE", "NONE", ""
        data.MRAcquisitionType = "2D"
        data.EchoTime, data.RepetitionTime, data.EchoTrainLength = 20, 600, 1
    data.PixelData = stored.astype("<u2").tobytes()
