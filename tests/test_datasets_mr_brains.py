"""IXI, OASIS-1, ADNI and OpenMind in miniature."""

import struct
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from agssd_core.errors import DataError
from simulation.datasets import adni, ixi, oasis1, openmind
from simulation.datasets.rows import Mask, Source

Cell = str | float


def touch(*files: Path) -> None:
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()


def write_xls(file: Path, lines: list[list[Cell]]) -> None:
    """A worksheet of Excel 2: records of a number, a length and content. "" is an empty cell."""
    records = [(0x0009, struct.pack("<HH", 2, 0x10))]
    for at, cells in enumerate(lines):
        for column, cell in enumerate(cells):
            place = struct.pack("<HH3x", at, column)
            if isinstance(cell, str):
                text = cell.encode()
                records += [(0x0004, place + bytes([len(text)]) + text)] if text else []
            else:
                records.append((0x0003, place + struct.pack("<d", cell)))
    records.append((0x000A, b""))
    file.write_bytes(b"".join(struct.pack("<HH", n, len(body)) + body for n, body in records))


def test_ixi_takes_the_hospital_from_the_name(tmp_path):
    touch(
        tmp_path / "IXI-T1/IXI002-Guys-0828-T1.nii.gz",
        tmp_path / "IXI-T1/IXI012-HH-1211-T1.nii.gz",
        tmp_path / "IXI-T2/IXI012-HH-1211-T2.nii.gz",
        tmp_path / "IXI-DTI/IXI035-IOP-0873-DTI-07.nii.gz",
        tmp_path / "IXI-T1/._IXI002-Guys-0828-T1.nii.gz",
        tmp_path / "IXI-T1/mean.nii.gz",
        tmp_path / "IXI002-Guys-0828-T1.nii",
    )
    found = ixi.ADAPTER.read(tmp_path)
    assert [(row.scan, row.patient, row.site, row.vendor, row.sequence) for row in found.rows] == [
        ("IXI002-Guys-0828-T1", "IXI002", "Guys", "Philips", "T1"),
        ("IXI012-HH-1211-T1", "IXI012", "HH", "Philips", "T1"),
        ("IXI012-HH-1211-T2", "IXI012", "HH", "Philips", "T2"),
        ("IXI035-IOP-0873-DTI-07", "IXI035", "IOP", "GE", "DTI"),
    ]
    assert [row.facts["field_tesla"] for row in found.rows] == ["1.5", "3", "3", "1.5"]
    assert sorted(found.notes) == [
        "1 file(s) left out: a copy lies in another folder or with another ending",
        "1 file(s) left out: not named as an IXI scan",
        "no IXI.xls: sex and age are unknown",
    ]


def test_ixi_takes_from_its_table_only_what_is_sure(tmp_path):
    for number in (2, 12, 13, 14, 15):
        touch(tmp_path / f"IXI{number:03d}-Guys-0828-T1.nii.gz")
    write_xls(
        tmp_path / "IXI.xls",
        [
            ["IXI_ID", "SEX_ID (1=m, 2=f)", "HEIGHT", "AGE"],
            [2.0, 2.0, 164.0, 35.8001],
            [12.0, 1.0, 175.0, 38.78],
            [12.0, 1.0, 175.0, 39.5],
            [13.0, 1.0, 182.0, ""],
            [14.0, 0.0, 0.0, 0.0],
        ],
    )
    found = ixi.ADAPTER.read(tmp_path)
    said = {row.patient: (row.labels.get("sex"), row.facts.get("age")) for row in found.rows}
    assert said == {
        "IXI002": ("female", "35.8"),
        "IXI012": ("male", None),
        "IXI013": ("male", None),
        "IXI014": (None, None),
        "IXI015": (None, None),
    }
    assert found.notes == (
        "1 person(s) stand twice in IXI.xls; what differs is left out",
        "1 person(s) with scans stand not in IXI.xls",
    )


@pytest.mark.parametrize("content", [b"", b"no table", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" * 90])
def test_a_damaged_table_of_ixi_costs_labels_only(tmp_path, content, capsys):
    touch(tmp_path / "IXI002-Guys-0828-T1.nii.gz")
    (tmp_path / "IXI.xls").write_bytes(content)
    found = ixi.ADAPTER.read(tmp_path)
    assert (len(found.rows), found.notes) == (1, ("IXI.xls is damaged: sex and age are unknown",))
    assert capsys.readouterr().out == ""


def analyze(file: Path) -> None:
    """Write header and image."""
    file.parent.mkdir(parents=True, exist_ok=True)
    nib.AnalyzeImage(np.zeros((3, 3, 2, 1), np.int16), np.eye(4)).to_filename(file)


def test_oasis_as_on_its_discs(tmp_path):
    first, second = tmp_path / "disc1/OAS1_0001_MR1", tmp_path / "disc2/OAS1_0002_MR1"
    third = tmp_path / "disc2/OAS1_0001_MR2"
    t88 = "PROCESSED/MPRAGE/T88_111"
    analyze(first / f"{t88}/OAS1_0001_MR1_mpr_n4_anon_111_t88_gfc.hdr")
    analyze(first / f"{t88}/OAS1_0001_MR1_mpr_n4_anon_111_t88_masked_gfc.hdr")
    analyze(first / "FSL_SEG/OAS1_0001_MR1_mpr_n4_anon_111_t88_masked_gfc_fseg.hdr")
    for number in (1, 2):
        analyze(second / f"RAW/OAS1_0002_MR1_mpr-{number}_anon.hdr")
    (second / "OAS1_0002_MR1.txt").write_text(
        "SESSION ID:   OAS1_0002_MR1\n\nAGE:          55\nM/F:          Female\nCDR:          1\n",
        encoding="utf-8",
    )
    touch(third / "RAW/OAS1_0001_MR2_mpr-1_anon.hdr")
    (tmp_path / "oasis_cross-sectional.csv").write_text(
        "ID,M/F,Hand,Age,Educ,SES,MMSE,CDR\nOAS1_0001_MR1,M,R,74,2,3,29,0.0\n", encoding="utf-8"
    )
    found = oasis1.ADAPTER.read(tmp_path)
    raw, atlas = found.rows[1], found.rows[0]
    place = "disc1/OAS1_0001_MR1"
    name = "OAS1_0001_MR1_mpr_n4_anon_111_t88_masked_gfc"
    assert (atlas.scan, atlas.patient) == ("OAS1_0001_MR1", "OAS1_0001")
    assert atlas.source == Source(f"{place}/{t88}/{name}.hdr", "analyze")
    assert atlas.masks == (Mask(Source(f"{place}/FSL_SEG/{name}_fseg.hdr", "analyze")),)
    assert atlas.labels == {"cdr": "0", "sex": "male"}
    assert raw.source.path == "disc2/OAS1_0002_MR1/RAW/OAS1_0002_MR1_mpr-1_anon.hdr"
    assert (raw.labels, raw.masks) == ({"cdr": "1", "sex": "female"}, ())
    assert raw.facts == {"space": "raw", "age": "55"}
    assert sorted(found.notes) == [
        "1 session(s) left out: no whole image",
        "1 session(s) without outlines",
    ]


def test_oasis_as_prepared_for_neurite(tmp_path):
    for name in ("aligned_norm", "aligned_seg4", "aligned_seg35", "norm", "seg4"):
        touch(tmp_path / f"OASIS_OAS1_0003_MR1/{name}.nii.gz")
    (tmp_path / "oasis_cross-sectional.csv").write_text(
        "ID,M/F,Age,CDR\nOAS1_0003_MR1,F,20,N/A\n", encoding="utf-8"
    )
    found = oasis1.ADAPTER.read(tmp_path)
    (row,) = found.rows
    assert row.source == Source("OASIS_OAS1_0003_MR1/aligned_norm.nii.gz", "nifti")
    assert row.labels == {"sex": "female"}
    # Laid over each other: cortex and deep grey matter 2, white matter 3, fluid 1.
    drawn = np.zeros(5, int)
    for mask in row.masks:
        assert mask.source.path == "OASIS_OAS1_0003_MR1/aligned_seg4.nii.gz"
        drawn[np.arange(5) > mask.threshold] = mask.value
    assert drawn.tolist() == [0, 2, 2, 3, 1]
    assert (
        "1 session(s) without a rating of dementia (cdr); most are of young people" in found.notes
    )


def test_adni_takes_the_site_from_the_subject(tmp_path):
    root = tmp_path / "ADNI"
    touch(
        root / "002_S_0295/MP-RAGE/2006-04-18_08_20_30.0/I13722/ADNI_002_S_0295_MR_x_I13722.nii",
        root / "002_S_0295/MP-RAGE/2007-04-18_08_20_30.0/I13999/ADNI_002_S_0295_MR_1_I13999.dcm",
        root / "002_S_0295/MP-RAGE/2007-04-18_08_20_30.0/I13999/ADNI_002_S_0295_MR_2_I13999.dcm",
        root / "130_S_4405/FDG/2012-01-01_00_00_00.0/I50000/ADNI_130_S_4405_PT_I50000.dcm",
        root / "130_S_4405/MPRAGE/2012-01-01_00_00_00.0/S1234/ADNI_130_S_4405_MR_S1_I50001.nii",
        root / "130_S_4405/MPRAGE/2012-01-01_00_00_00.0/I50002/readme.txt",
    )
    (tmp_path / "collection_1_01_2024.csv").write_text(
        '"Image Data ID","Subject","Group","Sex","Age","Visit","Modality","Description","Type"\n'
        '"I13722","002_S_0295","CN","M","84","sc","MRI","MP-RAGE repeat","Original"\n'
        '"I50001","130_S_4405","AD","F","71","sc","MRI","MPRAGE","Original"\n'
        '"I50000","130_S_4405","AD","F","71","sc","PET","FDG","Original"\n'
        '"I77777","130_S_4405","AD","F","71","sc","MRI","MPRAGE","Original"\n',
        encoding="utf-8",
    )
    (tmp_path / "other.csv").write_text("a,b\n1,2\n", encoding="utf-8")
    found = adni.ADAPTER.read(tmp_path)
    assert [(row.scan, row.patient, row.site, row.source.kind) for row in found.rows] == [
        ("002_S_0295-I13722", "002_S_0295", "002", "nifti"),
        ("002_S_0295-I13999", "002_S_0295", "002", "dicom"),
        ("130_S_4405-I50001", "130_S_4405", "130", "nifti"),
    ]
    first, second, third = found.rows
    assert (first.sequence, first.labels) == ("MP-RAGE repeat", {"diagnosis": "CN", "sex": "male"})
    assert first.facts == {"image": "13722", "visit": "sc", "age": "84", "type": "Original"}
    assert (second.sequence, second.labels) == ("MP-RAGE", {})
    assert second.source.path.endswith("/I13999")
    assert third.labels["diagnosis"] == "AD"
    assert sorted(found.notes) == [
        "1 MR image(s) of the table have no file",
        "1 image folder(s) left out: neither NIfTI nor DICOM files",
        "1 image(s) left out: no MR",
        "1 image(s) stand not in the table",
    ]


def test_adni_without_a_table_knows_other_modalities_by_the_file(tmp_path):
    place = tmp_path / "002_S_0295/x/y"
    touch(place / "I1/ADNI_002_S_0295_PT_I1.dcm", place / "I2/ADNI_002_S_0295_MR_I2.nii.gz")
    found = adni.ADAPTER.read(tmp_path)
    assert [row.scan for row in found.rows] == ["002_S_0295-I2"]
    assert "no collection's table: diagnoses are unknown" in found.notes


def test_openmind_reads_what_is_on_disk(tmp_path):
    data = tmp_path / "OpenMind"
    t1 = "ds000001/sub-01/ses-02/anat/sub-01_ses-02_T1w.nii.gz"
    dwi = "ds000002/sub-01/dwi/sub-01_dwi/sub-01_ADC.nii.gz"
    pet = "ds000002/sub-01/pet/sub-01_pet.nii.gz"
    touch(*(data / path for path in (t1, dwi, pet)), data / "ds000001/mask.nii.gz")
    touch(tmp_path / "ds000003/a.nii.gz")
    (tmp_path / "openneuro_metadata.csv").write_text(
        "unique_id,modality,image_path,anon_mask_path,anat_mask_path,derived_from,"
        "image_quality_score,age,sex,health_status,manufacturer,magnetic_field_strength\n"
        f"ds000001_7,T1w,{t1},,ds000001/mask.nii.gz,,1.5,34.0,F,control,SIEMENS,3.0\n"
        f"ds000002_1,ADC,{dwi},,gone.nii.gz,dwi,3,,,,,\n"
        f"ds000002_2,PET,{pet},,,,2,,,,GE,\n"
        "ds000003_1,T1w,ds000003/sub-9/anat/a.nii.gz,,,,2,nan,n/a,,,\n"
        "ds000003_2,T1w,../ds000003/a.nii.gz,,,,2,,,,,\n",
        encoding="utf-8",
    )
    found = openmind.ADAPTER.read(tmp_path)
    first, second = found.rows
    assert (first.patient, first.site, first.vendor) == ("ds000001-sub-01", "ds000001", "Siemens")
    assert first.source == Source(f"OpenMind/{t1}", "nifti")
    assert first.masks == (Mask(Source("OpenMind/ds000001/mask.nii.gz", "nifti"), value=1),)
    assert first.labels == {"sex": "female", "health": "control"}
    assert first.facts == {"age": "34", "quality": "1.5", "field_tesla": "3"}
    assert (second.sequence, second.vendor, second.labels, second.masks) == ("ADC", "", {}, ())
    assert second.patient == "ds000002-sub-01"
    assert found.notes == (
        "1 anatomy mask(s) are not on disk",
        "1 image(s) left out: no MR",
        "2 image(s) of the table are not on disk",
    )


@pytest.mark.parametrize(
    ("module", "missing"),
    [
        (ixi, "no file such as IXI002-Guys-0828-T1.nii.gz"),
        (oasis1, "no folder OAS1_0001_MR1 or OASIS_OAS1_0001_MR1 with an image"),
        (adni, "no MR image in a folder such as 002_S_0295/.../I13722"),
        (openmind, "no file openneuro_metadata.csv"),
    ],
)
def test_another_folder_is_refused_with_what_was_expected(tmp_path, module, missing):
    with pytest.raises(DataError) as caught:
        module.ADAPTER.read(tmp_path)
    assert f"{missing}. Expected below the folder" in str(caught.value)
    assert str(tmp_path) not in str(caught.value)
