"""Whose a file is by its name: never two people taken for one, nor one clip for many people."""

import json
from pathlib import Path

import pytest

from agssd_core.data.clip_naming import describe_clip
from agssd_core.data.deidentify import vendor_name


@pytest.mark.parametrize(
    ("path", "patient"),
    [
        ("busi/benign/benign (12).png", "benign (12)"),
        ("set/S1_L20_step_025.png", "S1"),
        ("set/S1_R20_step_325.png", "S1"),
        ("set/p6_isokinetic030_01_push_01_10.jpg", "p6"),
        ("clips/Reg_pat1Image_133043.mpeg", "pat1"),
        ("clips/Reg_Image_182106_crop.mp4", "Reg_182106"),
        ("echo/0X1A2B3C4D.avi", "0X1A2B3C4D"),
        ("a/sub-07/images/foo.png", "07"),
        ("a/sub-07_us.png", "07"),
        ("a/patient7/left kidney.png", "patient7"),
        ("a/case_12/3.png", "case_12"),
        ("a/repeat1.png", "repeat1"),
        ("STS_002/frame_012.png", "STS_002"),
        ("STS_002/12.png", "STS_002"),
        ("site/c-7/US/c-7_01.png", "c-7"),
        ("anna/kidney/frame_012.png", "anna/kidney"),
        ("anna/kidney/slice7.png", "anna/kidney"),
        ("busi/benign/0012.png", "busi/benign/0012"),
        ("busi/malignant/0012.png", "busi/malignant/0012"),
        ("busi/images/img_0001.png", "busi/0001"),
        ("a/dataset001/0001.jpg", "a/dataset001/0001"),
        ("a/TN3K_2021/0001.jpg", "a/TN3K_2021/0001"),
        ("a/20200428/105523.mp4", "a/20200428/105523"),
    ],
)
def test_the_patient_by_a_files_name(path, patient):
    assert describe_clip(Path(path)).patient == patient


def test_a_sidecar_goes_before_the_name(tmp_path):
    (tmp_path / "S1_01.json").write_text(json.dumps({"PatientID": "Doe"}))
    assert describe_clip(tmp_path / "S1_01.png").patient == "Doe"
    (tmp_path / "S1_01.json").write_text("[1]")
    assert describe_clip(tmp_path / "S1_01.png").patient == "S1"
    (tmp_path / "S2_01.png.json").write_text(json.dumps({"PatientID": "Roe"}))
    assert describe_clip(tmp_path / "S2_01.png").patient == "Roe"


@pytest.mark.parametrize(
    ("path", "mask"),
    [
        ("a/x_mask.png", True),
        ("a/x_mask_1.png", True),
        ("a/trainval-mask/0001.jpg", True),
        ("a/GT/0001.png", True),
        ("BUSI_with_GT/0001.png", False),
        ("a/damask.png", False),
    ],
)
def test_masks_by_name(path, mask):
    assert describe_clip(Path(path)).is_mask is mask


@pytest.mark.parametrize(
    ("maker", "vendor"),
    [
        ("G.E. Medical Systems", "GE"),
        ("ACUSON", "Siemens"),
        ("ALOKA CO., LTD.", "Hitachi"),
        ("FUJIFILM SonoSite, Inc.", "SonoSite"),
        ("SAMSUNG MEDISON CO., LTD.", "Samsung"),
        ("Mindray Bio-Medical", "Mindray"),
        ("Mr. Meier's garage", "other"),
    ],
)
def test_makers_of_ultrasound_scanners(maker, vendor):
    assert vendor_name(maker) == vendor
