"""Small scans and readings in the formats of public CT data sets."""

import nibabel as nib
import numpy as np
from PIL import Image

from tests.support.dicoms import change, write_series

AFFINE = np.diag([2.0, 3.0, 4.0, 1.0])
NAMESPACE = "http://www.nih.gov"


def ct_array(shape=(10, 9, 8), seed=0):
    """Hounsfield-like whole numbers."""
    return np.random.default_rng(seed).integers(-1000, 1000, shape).astype(np.int16)


def save_nifti(file, array=None, affine=AFFINE):
    """Write an array (default: a small CT) and return it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    array = ct_array() if array is None else array
    nib.save(nib.Nifti1Image(array, affine), file)
    return array


def save_mask(file, shape=(10, 9, 8), affine=AFFINE, value=1):
    mask = np.zeros(shape, dtype=np.uint8)
    mask[2:5, 3:6, 1:4] = value
    return save_nifti(file, mask, affine)


def save_slices(folder, numbers, *, ending="png", size=(12, 10)):
    """Pictures (columns, rows) whose grey value is their number."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in numbers:
        pixels = np.full(size[::-1], number, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:04d}.{ending}")


def save_lidc_series(folder, patient, *, maker="SIEMENS", seed="1", modality="CT"):
    """A DICOM series of a patient; returns its files from the lowest slice up."""
    files = write_series(folder, patient=patient, modality=modality, seed=seed)
    for file in files:
        change(file, Manufacturer=maker, Modality=modality)
    return files


def square(first, last):
    """The closed outline of a square in pixels (column, row)."""
    side = range(first, last)
    top = [(x, first) for x in side] + [(last, y) for y in side]
    return (
        top
        + [(x, last) for x in range(last, first, -1)]
        + [(first, y) for y in range(last, first, -1)]
    )


def roi(sop, points, *, inclusion="TRUE"):
    edges = "".join(
        f"<edgeMap><xCoord>{x}</xCoord><yCoord>{y}</yCoord></edgeMap>" for x, y in points
    )
    return (
        f"<roi><imageZposition>0</imageZposition><imageSOP_UID>{sop}</imageSOP_UID>"
        f"<inclusion>{inclusion}</inclusion>{edges}</roi>"
    )


def nodule(*rois, malignancy=None):
    said = f"<characteristics><malignancy>{malignancy}</malignancy></characteristics>"
    said = said if malignancy else ""
    return f"<unblindedReadNodule><noduleID>n</noduleID>{said}{''.join(rois)}</unblindedReadNodule>"


def save_reading(file, sessions, *, series="", tag="LidcReadMessage"):
    """An XML file with one session of nodules for each reader."""
    inner = "".join(f"<readingSession>{''.join(each)}</readingSession>" for each in sessions)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(
        f'<?xml version="1.0" encoding="UTF-8"?>\n<{tag} xmlns="{NAMESPACE}"><ResponseHeader>'
        f"<SeriesInstanceUid>{series}</SeriesInstanceUid></ResponseHeader>{inner}</{tag}>",
        encoding="utf-8",
    )
