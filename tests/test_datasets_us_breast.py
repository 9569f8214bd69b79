"""Breast and thyroid ultrasound: BUSI, BUS-BRA, UDIAT-B, TN3K, TG3K, DDTI."""

import json

import numpy as np
import openpyxl
import pytest
from PIL import Image

from agssd_core.errors import DataError
from simulation.datasets import bus_bra, busi, ddti, tg3k, tn3k, udiat_b
from simulation.datasets.reading_images import read_image_masks
from simulation.datasets.rows import Mask, Source


def picture(file, value=90, size=(32, 24)):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size[1], size[0]), value, dtype=np.uint8)).save(file)


def sheet(file, *lines):
    book = openpyxl.Workbook()
    for line in lines:
        book.active.append(line)
    book.save(file)


def by_scan(found):
    return {row.scan: row for row in found.rows}


def notes(found):
    return "\n".join(found.notes)


ALL = [bus_bra, busi, ddti, tg3k, tn3k, udiat_b]


@pytest.mark.parametrize("adapter", ALL, ids=lambda each: each.INFO.name)
def test_another_folder_is_told_what_is_expected_where(tmp_path, adapter):
    picture(tmp_path / "somebody" / "picture.png")
    with pytest.raises(DataError, match="in its official layout") as caught:
        adapter.ADAPTER.read(tmp_path)
    assert adapter.INFO.layout[0] in str(caught.value)
    assert str(tmp_path) not in str(caught.value)
    assert "somebody" not in str(caught.value)


def test_busi_unites_masks_and_counts_what_is_missing(tmp_path):
    top = tmp_path / "Dataset_BUSI_with_GT"
    for name in ("benign (1)", "benign (2)", "benign (10)"):
        picture(top / "benign" / f"{name}.png")
    left, right = np.zeros((24, 32), np.uint8), np.zeros((24, 32), np.uint8)
    left[:, :8], right[:, -8:] = 255, 255
    Image.fromarray(left).save(top / "benign" / "benign (1)_mask.png")
    Image.fromarray(right).save(top / "benign" / "benign (1)_mask_1.png")
    picture(top / "benign" / "benign (2)_mask.png")
    picture(top / "malignant" / "malignant (1).png")
    picture(top / "malignant" / "malignant (1)_mask.png")
    picture(top / "malignant" / "malignant (9)_mask.png")
    picture(top / "normal" / "normal (1).png")
    picture(top / "normal" / "normal (1)_mask.png", 0)
    (top / "normal" / "._normal (1).png").write_bytes(b"junk")
    (top / ".DS_Store").write_bytes(b"junk")
    found = busi.read(tmp_path)
    rows = by_scan(found)
    assert set(rows) == {"benign_1", "benign_2", "benign_10", "malignant_1", "normal_1"}
    assert rows["malignant_1"].labels == {"pathology": "malignant"}
    assert rows["benign_10"].masks == ()
    masks = read_image_masks(tmp_path, rows["benign_1"], shape=(24, 32), frames=1)
    assert np.array_equal(masks[0] > 0, (left > 0) | (right > 0))
    assert read_image_masks(tmp_path, rows["normal_1"], shape=(24, 32), frames=1).sum() == 0
    assert "1 image(s) without outlines" in found.notes
    assert "1 set(s) of outlines without an image" in found.notes
    assert "5 image(s) counted as a patient each" in notes(found)
    assert [row.scan for row in busi.read(top).rows] == [row.scan for row in found.rows]


TABLE = """ID,Case,Histology,Pathology,BIRADS,Device,Width,Height,Side,BBOX
bus_0001-l,1,Fibroadenoma,benign,2,GE Logiq 5,32,24,left,[1 2 3 4]
bus_0001-r,1,Cyst,benign,3,GE Logiq 5,32,24,right,[1 2 3 4]
bus_0002-l,2,Carcinoma,malignant,5,Toshiba,32,24,left,[1 2 3 4]
bus_0003-s,3,Unknown,,,U-Systems,32,24,left,[1 2 3 4]
bus_0009-l,9,Unknown,benign,2,Toshiba,32,24,left,[1 2 3 4]
"""


def test_bus_bra_takes_scanners_cases_and_folds(tmp_path):
    top = tmp_path / "BUSBRA"
    for name in ("0001-l", "0001-r", "0002-l", "0003-s", "0077-l"):
        picture(top / "Images" / f"bus_{name}.png")
        if name != "0002-l":
            picture(top / "Masks" / f"mask_{name}.png")
    (top / "bus_data.csv").write_text(TABLE)
    (top / "5-fold-cv.csv").write_text(
        "ID,Case,Pathology,kFold\nbus_0001-l,1,benign,4\nbus_0001-r,1,benign,4\n"
    )
    found = bus_bra.read(tmp_path)
    rows = by_scan(found)
    assert set(rows) == {"bus_0001-l", "bus_0001-r", "bus_0002-l", "bus_0003-s"}
    assert rows["bus_0001-l"].patient == rows["bus_0001-r"].patient == "1"
    assert rows["bus_0001-l"].site == "GE Logiq 5"
    assert [rows[name].vendor for name in sorted(rows)] == ["GE", "GE", "Canon", ""]
    assert rows["bus_0001-l"].facts == {
        "histology": "Fibroadenoma",
        "side": "left",
        "fold_5": "4",
    }
    assert rows["bus_0002-l"].labels == {"pathology": "malignant", "birads": "5"}
    assert rows["bus_0002-l"].masks == ()
    assert rows["bus_0003-s"].labels == {}
    assert rows["bus_0001-r"].masks == (
        Mask(Source("BUSBRA/Masks/mask_0001-r.png", "image"), 1, 0.0),
    )
    for note in (
        "1 line(s) of the table without an image of their own",
        "1 image(s) without outlines",
        "1 image(s) that the table does not name",
        "1 list(s) of folds missing",
        "1 image(s) without a pathology",
    ):
        assert note in found.notes


@pytest.mark.parametrize(
    "lines",
    [
        [["Image", "Type"], [1, "Benign"], [2, "Malignant"]],
        [["Data set B"], ["No.", "Type"], ["000001.png", "benign"], ["000002.png", "malignant"]],
        [["Type", "Image ID"], ["Benign", "000001"], ["Malignant", "000002"]],
    ],
)
def test_udiat_takes_the_pathology_from_its_sheet(tmp_path, lines):
    for name in ("000001", "000002", "000003"):
        picture(tmp_path / "BUS" / "original" / f"{name}.png")
    picture(tmp_path / "BUS" / "GT" / "000001.png", 255)
    sheet(tmp_path / "BUS" / "DatasetB.xlsx", *lines)
    found = udiat_b.read(tmp_path)
    rows = by_scan(found)
    labels = [rows[name].labels.get("pathology") for name in sorted(rows)]
    assert labels == ["benign", "malignant", None]
    assert len(rows["000001"].masks) == 1
    assert "2 image(s) without outlines" in found.notes
    assert "1 image(s) without a pathology" in found.notes


@pytest.mark.parametrize("damaged", [True, False])
def test_udiat_goes_on_without_a_sheet(tmp_path, damaged):
    picture(tmp_path / "original" / "000001.png")
    picture(tmp_path / "GT" / "000001.png")
    if damaged:
        (tmp_path / "DatasetB.xlsx").write_bytes(b"PK\x03\x04 cut short")
    found = udiat_b.read(tmp_path)
    assert len(found.rows) == 1
    assert ("unreadable" if damaged else "missing") in notes(found)


def test_tn3k_takes_official_parts_classes_and_folds(tmp_path):
    top = tmp_path / "tn3k"
    for number in range(3):
        picture(top / "trainval-image" / f"{number:04d}.jpg")
        picture(top / "trainval-mask" / f"{number:04d}.jpg", 200 * (number > 0))
    for number in range(2):
        picture(top / "test-image" / f"{number:04d}.jpg")
    picture(top / "test-mask" / "0000.jpg")
    (top / "tn3k-trainval-fold0.json").write_text(json.dumps({"train": [1, 2], "val": [0]}))
    (top / "tn3k-trainval-fold3.json").write_text(json.dumps({"train": [0, 1], "val": [2]}))
    (top / "tn3k-trainval-fold4.json").write_text("{cut")
    (top / "label4trainval.csv").write_text("0000.jpg,0\n0001.jpg,1\n")
    found = tn3k.read(tmp_path)
    rows = by_scan(found)
    assert [row.split for row in found.rows] == ["test"] * 2 + ["train"] * 3
    # Numbers start again in the other part; they are other images.
    assert len({row.patient for row in found.rows}) == 5
    assert rows["trainval-0000"].facts == {"fold": "0"}
    assert rows["trainval-0002"].facts == {"fold": "3"}
    assert rows["test-0000"].facts == {}
    assert rows["trainval-0001"].labels == {"pathology": "malignant"}
    assert rows["trainval-0002"].labels == {}
    assert rows["trainval-0001"].masks[0].threshold == 127.0
    mask = read_image_masks(tmp_path, rows["trainval-0001"], shape=(24, 32), frames=1)
    assert mask.all()
    assert "3 list(s) of a fold missing or damaged" in found.notes
    assert "1 image(s) without outlines" in found.notes


def test_tg3k_says_that_frames_of_one_video_are_not_told_apart(tmp_path):
    for number in range(3):
        picture(tmp_path / "thyroid-image" / f"{number:04d}.jpg")
        picture(tmp_path / "thyroid-mask" / f"{number:04d}.jpg")
    (tmp_path / "tg3k-trainval.json").write_text(json.dumps({"train": [0, 1], "val": [2]}))
    found = tg3k.read(tmp_path)
    assert [row.split for row in found.rows] == ["train", "train", "validation"]
    assert "frames of few videos" in notes(found)
    assert found.rows[0].masks[0].threshold == 127.0


CASE = "<case><number>1</number><tirads>{grade}</tirads>{marks}</case>"
MARK = "<mark><image>{number}</image><svg>{svg}</svg></mark>"
BOX = '[{{"points":[{{"x":{x},"y":2}},{{"x":{e},"y":2}},{{"x":{e},"y":9}},{{"x":{x},"y":9}}]}}]'


def original(folder):
    for name in ("1_1", "1_2", "2_1", "3_1", "4_1"):
        picture(folder / f"{name}.jpg")
    near, far = BOX.format(x=1, e=8), BOX.format(x=20, e=28)
    marks = MARK.format(number=1, svg=near) + MARK.format(number=1, svg=far)
    marks += MARK.format(number=2, svg="")
    (folder / "1.xml").write_text(CASE.format(grade="4a", marks=marks))
    (folder / "2.xml").write_text(CASE.format(grade="", marks=MARK.format(number=1, svg=near)))
    (folder / "3.xml").write_text("<!DOCTYPE case>" + CASE.format(grade="2", marks=""))
    (folder / "9.xml").write_text(CASE.format(grade="2", marks=""))


def test_original_ddti_has_several_nodules_and_empty_grades(tmp_path):
    original(tmp_path)
    found = ddti.read(tmp_path)
    rows = by_scan(found)
    assert set(rows) == {"1_1", "1_2", "2_1", "3_1", "4_1"}
    assert rows["1_1"].patient == rows["1_2"].patient == "1"
    assert rows["1_1"].labels == {"tirads": "4a", "pathology": "malignant"}
    assert rows["1_1"].facts == {"nodules": "2"}
    assert rows["2_1"].labels == {}
    assert rows["1_2"].masks == rows["3_1"].masks == ()
    mask = read_image_masks(tmp_path, rows["1_1"], shape=(24, 32), frames=1)[0]
    assert mask[5, 4] == mask[5, 24] == 1
    assert mask[5, 14] == 0
    for note in (
        "1 case(s) without an image",
        "1 case(s) with a damaged file of outlines",
        "1 case(s) without a file of outlines",
        "3 image(s) without outlines",
        "3 image(s) without a TI-RADS grade",
    ):
        assert note in found.notes


def test_repackaged_ddti_has_masks_and_categories(tmp_path):
    top = tmp_path / "1_or_data"
    for number in range(3):
        picture(top / "image" / f"{number:04d}.PNG")
        picture(top / "mask" / f"{number:04d}.PNG", 255)
    (top / "category.csv").write_text("ID,CATE\n0000.PNG,1\n0001.PNG,0\n")
    picture(tmp_path / "2_preprocessed_data" / "stage1" / "p_image" / "0.PNG")
    found = ddti.read(tmp_path)
    labels = [row.labels.get("pathology") for row in found.rows]
    assert labels == ["malignant", "benign", None]
    assert all(len(row.masks) == 1 for row in found.rows)
    assert "this layout numbers no people" in notes(found)
