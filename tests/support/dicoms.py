"""Small DICOM series for tests, written slice by slice and easily spoilt."""

from pathlib import Path

import numpy as np
import pydicom

from agssd_core.config.simulation import PhantomSiteConfig
from agssd_core.data.deidentify import Pseudonymiser
from agssd_core.data.dicom import read_dicom_header
from agssd_core.data.series import StoredFile
from simulation.phantom_files import ScanLabel, write_dicom
from simulation.phantom_images import LOOKS
from simulation.phantoms import make_phantom

PSEUDONYMISER = Pseudonymiser(b"s" * 32)
SPACING_MM = (6.0, 5.0, 7.0)
PHANTOM = make_phantom(
    PhantomSiteConfig(name="dicoms", size=(36, 32, 16), spacing_mm=SPACING_MM), 0, "CT", seed=0
)


def write_series(folder: Path, *, patient="Doe-4711", modality="CT", seed="1", image=None):
    """Write one axial series and return its files in slice order."""
    label = ScanLabel(patient, modality, SPACING_MM, LOOKS["a"], seed)
    write_dicom(folder, PHANTOM.image if image is None else image, label)
    return sorted(folder.glob("*.dcm"))


def change(file: Path, **fields):
    """Set header fields of one file in place; None deletes one."""
    data = pydicom.dcmread(file)
    for name, value in fields.items():
        if value is None:
            delattr(data, name)
        else:
            setattr(data, name, value)
    data.save_as(file)


def shift(file: Path, offset):
    """Move one slice by an offset in LPS millimetres."""
    data = pydicom.dcmread(file)
    moved = np.asarray(data.ImagePositionPatient, dtype=float) + offset
    data.ImagePositionPatient = [f"{part:.6g}" for part in moved]
    data.save_as(file)


def stored(files):
    """The catalogued form of files."""
    return [StoredFile(str(file), read_dicom_header(file, PSEUDONYMISER)) for file in files]
