"""ACDC and M&Ms in miniature."""

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from agssd_core.errors import DataError
from simulation.datasets import acdc, mnms
from simulation.datasets.rows import Mask, Source

TABLE = "211230_M&Ms_Dataset_information_diagnosis_opendataset.csv"
HEADER = ",External code,VendorName,Vendor,Centre,ED,ES,Age,Pathology,Sex,Height,Weight"


def volume(file: Path, *shape: int) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.zeros(shape, np.int16), np.eye(4)), file)


def heart(folder: Path, info: str, *, frames: tuple[int, ...], gt: bool = True) -> None:
    """Write a patient of ACDC."""
    name = folder.name
    volume(folder / f"{name}_4d.nii.gz", 3, 3, 2, 12)
    for frame in frames:
        volume(folder / f"{name}_frame{frame:02d}.nii.gz", 3, 3, 2)
        if gt:
            volume(folder / f"{name}_frame{frame:02d}_gt.nii.gz", 3, 3, 2)
    (folder / "Info.cfg").write_text(info, encoding="utf-8")


def test_acdc_has_a_row_for_each_phase(tmp_path):
    info = "ED: 1\nES: 12\nGroup: DCM\nHeight: 184.0\nNbFrame: 30\nWeight: 95.0\n"
    heart(tmp_path / "database/training/patient001", info, frames=(1, 12))
    heart(tmp_path / "database/testing/patient101", "ED: 4\nES: 11\nGroup: RV", frames=(4, 11))
    found = acdc.ADAPTER.read(tmp_path)
    assert found.notes == ()
    assert [(row.scan, row.sequence, row.split) for row in found.rows] == [
        ("patient001-frame01", "ED", "train"),
        ("patient001-frame12", "ES", "train"),
        ("patient101-frame04", "ED", "test"),
        ("patient101-frame11", "ES", "test"),
    ]
    place = "database/training/patient001/patient001_frame12"
    row = found.rows[1]
    assert row.source == Source(f"{place}.nii.gz", "nifti")
    assert row.masks == (Mask(Source(f"{place}_gt.nii.gz", "nifti")),)
    assert row.labels == {"pathology": "DCM"}
    assert row.facts == {"height": "184.0", "weight": "95.0"}


def test_acdc_goes_on_without_keys_frames_and_outlines(tmp_path):
    heart(tmp_path / "training/patient001", "ED: 1\nGroup: ???\n", frames=(1, 12))
    heart(tmp_path / "training/patient002", "ED: 1\nES: 9\nGroup: NOR", frames=(1,), gt=False)
    (tmp_path / "training/patient003").mkdir()
    found = acdc.ADAPTER.read(tmp_path)
    rows = {row.scan: row for row in found.rows}
    assert [row.sequence for row in found.rows] == ["ED", "", "ED", "ES"]
    assert rows["patient001-frame12"].labels == {}
    # Frames count from 1, volumes of a file from 0.
    assert rows["patient002-frame09"].source == Source(
        "training/patient002/patient002_4d.nii.gz", "nifti", index=8
    )
    assert rows["patient002-frame09"].masks == ()
    assert sorted(found.notes) == [
        "1 frame(s) taken from the 4D file, without outlines",
        "1 frame(s) without outlines",
        "1 patient(s) without a usable frame",
        "2 patient(s) whose Info.cfg does not name both phases",
        "2 patient(s) without a group",
    ]


def cine(folder: Path, *, gt: bool = True, frames: int = 10) -> None:
    """Write a patient of M&Ms."""
    volume(folder / f"{folder.name}_sa.nii.gz", 3, 3, 2, frames)
    if gt:
        volume(folder / f"{folder.name}_sa_gt.nii.gz", 3, 3, 2, frames)


def people(root: Path, *lines: str) -> None:
    (root / TABLE).write_text("\n".join([HEADER, *lines]), encoding="utf-8")


def test_mnms_has_both_phases_with_vendor_and_centre(tmp_path):
    cine(tmp_path / "Training/Labeled/A0S9V9")
    cine(tmp_path / "Training/Unlabeled/B1C2D3", gt=False)
    cine(tmp_path / "Validation/E4F5G6")
    cine(tmp_path / "Testing/H7I8J9")
    people(
        tmp_path,
        "0,A0S9V9,Siemens,A,1,0,9,57,HCM,M,170,80",
        "1,B1C2D3,GE,C,4,3,8,,,F,,",
        "2,E4F5G6,Philips,B,3,0,7,40,NOR,F,160,60",
        "3,H7I8J9,Canon,D,5,1,6,40,DCM,F,160,60",
    )
    found = mnms.ADAPTER.read(tmp_path)
    assert found.notes == ("1 patient(s) without outlines",)
    assert [(row.scan, row.site, row.vendor, row.split) for row in found.rows] == [
        ("A0S9V9-ED", "1", "Siemens", "train"),
        ("A0S9V9-ES", "1", "Siemens", "train"),
        ("B1C2D3-ED", "4", "GE", "train"),
        ("B1C2D3-ES", "4", "GE", "train"),
        ("E4F5G6-ED", "3", "Philips", "validation"),
        ("E4F5G6-ES", "3", "Philips", "validation"),
        ("H7I8J9-ED", "5", "Canon", "test"),
        ("H7I8J9-ES", "5", "Canon", "test"),
    ]
    place = "Training/Labeled/A0S9V9/A0S9V9_sa"
    row = found.rows[1]
    assert row.source == Source(f"{place}.nii.gz", "nifti", index=9)
    assert row.masks == (Mask(Source(f"{place}_gt.nii.gz", "nifti", index=9)),)
    assert row.labels == {"pathology": "HCM"}
    assert row.facts["age"] == "57"
    assert found.rows[2].labels == {}


def test_mnms_counts_what_it_cannot_use(tmp_path):
    cine(tmp_path / "Training/Labeled/A0S9V9", frames=5)
    cine(tmp_path / "Training/Labeled/B1C2D3")
    (tmp_path / "Training/Labeled/C1C1C1").mkdir()
    damaged = tmp_path / "Training/Labeled/D1D1D1/D1D1D1_sa.nii.gz"
    damaged.parent.mkdir()
    damaged.write_bytes(b"\x1f\x8b broken")
    people(
        tmp_path,
        "0,A0S9V9,Siemens,A,1,0,9,57,HCM,M,170,80",
        "1,D1D1D1,Siemens,A,1,0,9,57,HCM,M,170,80",
        "2,Z9Z9Z9,Siemens,A,1,0,9,57,HCM,M,170,80",
    )
    found = mnms.ADAPTER.read(tmp_path)
    assert [row.scan for row in found.rows] == ["A0S9V9-ED"]
    assert sorted(found.notes) == [
        "1 patient(s) left out: no image",
        "1 patient(s) left out: not in the table, so their phases are unknown",
        "1 patient(s) of the table have no folder",
        "1 patient(s) without outlines",
        "3 phase(s) left out: not in the table or not in the image",
    ]


def test_other_folders_are_refused_with_what_was_expected(tmp_path):
    with pytest.raises(DataError, match=r"no frame of a patient .* Expected below"):
        acdc.ADAPTER.read(tmp_path)
    with pytest.raises(DataError, match=r"no table of patients. Expected below"):
        mnms.ADAPTER.read(tmp_path)
    people(tmp_path, "0,A0S9V9,Siemens,A,1,0,9,57,HCM,M,170,80")
    with pytest.raises(DataError, match="no patient's folder such as Training/Labeled/A0S9V9"):
        mnms.ADAPTER.read(tmp_path)
