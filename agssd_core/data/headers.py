"""Headers of source files as the catalogue stores them."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from agssd_core.data.clips import ClipHeader, ClipKind, clip_kind, read_clip_header
from agssd_core.data.deidentify import Pseudonymiser
from agssd_core.data.dicom import (
    DicomHeader,
    Frame,
    looks_like_dicom,
    read_dicom_header,
)
from agssd_core.data.nifti import SUFFIXES, NiftiHeader, read_nifti_header
from agssd_core.data.us_dicom import is_us_storage
from agssd_core.data.volume import Modality
from agssd_core.errors import OtherStorageError, VolumeError

DICOM_SUFFIXES = (".dcm", ".dic", ".dicom", ".ima")
OTHER_VOLUMES = (".nrrd", ".nhdr", ".mha", ".mhd", ".mgz", ".mgh", ".mnc", ".hdr", ".nii.bz2")
CLIP_KINDS: tuple[ClipKind, ...] = ("us-dicom", "image", "video")
ARCHIVES = (".zip", ".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".7z", ".rar", ".dcm.gz")


def scan_kind(path: Path) -> str | None:
    """``nifti``, ``dicom``, ``image``, ``video``, or None for what is none by name and content.

    Whether a DICOM file is ultrasound is known when its header is read.

    Raises:
        OSError: the file cannot be read.
        VolumeError: it may hold a scan, but in a form that is not read.
    """
    name = path.name.casefold()
    if name.startswith("."):
        return None
    if name.endswith(SUFFIXES):
        return "nifti"
    if name.endswith(OTHER_VOLUMES):
        raise VolumeError(
            "the format (NRRD, MetaImage, MGH, MINC, or a .hdr/.img pair) is not read, only DICOM "
            "and NIfTI are, and images and videos of ultrasound. If it is a scan, convert it to "
            ".nii.gz."
        )
    if name.endswith(ARCHIVES):
        raise VolumeError("an archive is not looked into. If it holds scans, unpack it.")
    if name.endswith(DICOM_SUFFIXES) or looks_like_dicom(path):
        return None if name == "dicomdir" else "dicom"
    return clip_kind(path)


def read_header(
    path: Path, kind: str, pseudonymiser: Pseudonymiser, *, modality: Modality | None
) -> tuple[str, str]:
    """A file's kind, now that it is known whether DICOM is ultrasound, and its allowed fields.

    Returns:
        ``dicom``, ``nifti`` or one of ``CLIP_KINDS``; the fields as JSON.

    Raises:
        DataError: the file is no usable scan.
    """
    header: DicomHeader | NiftiHeader | ClipHeader
    if kind == "nifti":
        header = read_nifti_header(path, pseudonymiser, modality=modality)
    elif kind == "dicom":
        try:
            header = read_dicom_header(path, pseudonymiser)
        except OtherStorageError as other:
            if not is_us_storage(other.storage, other.modality):
                raise
            kind, header = "us-dicom", read_clip_header(path, "us-dicom", pseudonymiser)
    else:
        header = read_clip_header(path, "image" if kind == "image" else "video", pseudonymiser)
    return kind, json.dumps(asdict(header))


def dicom_header(text: str) -> DicomHeader:
    """Undo ``read_header``."""
    plain: dict[str, Any] = json.loads(text)
    frames = tuple(
        Frame(tuple(one["position"]), tuple(one["orientation"]), tuple(one["spacing"]))
        for one in plain.pop("frames")
    )
    return DicomHeader(**plain, frames=frames)


def nifti_header(text: str) -> NiftiHeader:
    """Undo ``read_header``."""
    plain: dict[str, Any] = json.loads(text)
    shape, spacing = tuple(plain.pop("shape")), tuple(plain.pop("spacing_mm"))
    return NiftiHeader(**plain, shape=shape, spacing_mm=spacing)


def clip_header(text: str) -> ClipHeader:
    """Undo ``read_header``."""
    return ClipHeader(**json.loads(text))
