"""Ultrasound of heart, lung and several organs: CAMUS, HMC-QU, POCUS, Butterfly."""

import nibabel as nib
import numpy as np
import openpyxl
import pytest
import SimpleITK
from PIL import Image
from scipy import io

from agssd_core.errors import DataError
from simulation.datasets import butterfly, camus, hmc_qu, pocus
from simulation.datasets.reading_images import read_image_masks, write_frames_from


def picture(file, value=90):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((24, 32), value, dtype=np.uint8)).save(file)


def touch(file):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"not opened")


def by_scan(found):
    return {row.scan: row for row in found.rows}


ALL = [butterfly, camus, hmc_qu, pocus]


@pytest.mark.parametrize("adapter", ALL, ids=lambda each: each.INFO.name)
def test_another_folder_is_told_what_is_expected_where(tmp_path, adapter):
    picture(tmp_path / "somebody" / "picture.png")
    with pytest.raises(DataError, match="official layout") as caught:
        adapter.ADAPTER.read(tmp_path)
    assert adapter.INFO.layout[0] in str(caught.value)
    assert str(tmp_path) not in str(caught.value)


FRAME = np.arange(30 * 20, dtype=np.int64).reshape(30, 20).astype(np.uint8)  # rows, columns
LABELS = np.where(np.mgrid[:30, :20][0] > 20, 3, 1).astype(np.uint8)


def nifti(file, array):
    """Stored as CAMUS does: the first axis is the column."""
    file.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array.T, np.eye(4)), file)


def mhd(file, array):
    file.parent.mkdir(parents=True, exist_ok=True)
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(array), str(file))


def camus_patient(folder, save, ending, sequence):
    name = folder.name
    for view in ("2CH", "4CH"):
        for phase in ("ED", "ES"):
            save(folder / f"{name}_{view}_{phase}.{ending}", FRAME)
            save(folder / f"{name}_{view}_{phase}_gt.{ending}", LABELS)
        save(folder / f"{name}_{view}_{sequence}.{ending}", np.stack([FRAME] * 3))
        save(folder / f"{name}_{view}_{sequence}_gt.{ending}", np.stack([LABELS] * 3))
        info = "ED: 1\nES: 3\nNbFrame: 3\nSex: F\nAge: 56\nImageQuality: {}\nEF: 54\n"
        quality = "Good" if view == "2CH" else "Poor"
        (folder / f"Info_{view}.cfg").write_text(info.format(quality))


def test_camus_as_nifti(tmp_path):
    top = tmp_path / "CAMUS_public"
    data = top / "database_nifti"
    for number in (1, 2):
        camus_patient(data / f"patient000{number}", nifti, "nii.gz", "half_sequence")
    (data / "patient0002" / "patient0002_4CH_ES_gt.nii.gz").unlink()
    (data / "patient0002" / "._patient0002_4CH_ES_gt.nii.gz").write_bytes(b"junk")
    (data / "patient0003").mkdir()
    (top / "database_split").mkdir()
    (top / "database_split" / "subgroup_training.txt").write_text("patient0001\n")
    (top / "database_split" / "subgroup_testing.txt").write_text("patient0002\n")
    found = camus.read(tmp_path)
    rows = by_scan(found)
    assert len(rows) == 12
    assert {row.split for row in found.rows if row.patient == "patient0002"} == {"test"}
    row = rows["patient0001_2CH_ED"]
    assert (row.split, row.sequence, row.vendor, row.site) == ("train", "2CH", "GE", "")
    assert row.labels == {"view": "2CH", "image_quality": "Good"}
    assert row.facts["phase"] == "ED"
    assert row.facts["ef"] == "54"
    assert rows["patient0001_4CH_ES"].labels["image_quality"] == "Poor"
    # The sequence holds both outlined frames again.
    assert rows["patient0001_2CH_half_sequence"].masks == ()
    assert "1 frame(s) without outlines" in found.notes
    assert "1 patient(s) without a frame" in found.notes
    (tmp_path / "out").mkdir()
    with Image.open(write_frames_from(tmp_path, row, tmp_path / "out")) as written:
        assert np.array_equal(np.array(written), FRAME)
    masks = read_image_masks(tmp_path, row, shape=FRAME.shape, frames=1)
    assert np.array_equal(masks[0], LABELS)


def test_a_sequence_of_camus_keeps_its_outlines_where_no_frame_has_them(tmp_path):
    folder = tmp_path / "patient0001"
    nifti(folder / "patient0001_2CH_half_sequence.nii.gz", np.stack([FRAME] * 3))
    nifti(folder / "patient0001_2CH_half_sequence_gt.nii.gz", np.stack([LABELS] * 3))
    row = camus.read(tmp_path).rows[0]
    masks = read_image_masks(tmp_path, row, shape=FRAME.shape, frames=3)
    assert np.array_equal(masks, np.stack([LABELS] * 3))


def test_camus_of_the_challenge_has_no_split_without_outlines_to_test(tmp_path):
    camus_patient(tmp_path / "training" / "patient0001", mhd, "mhd", "sequence")
    folder = tmp_path / "testing" / "patient0002"
    camus_patient(folder, mhd, "mhd", "sequence")
    for file in list(folder.iterdir()):
        if "_gt" in file.name or file.suffix == ".cfg":
            file.unlink()
    found = camus.read(tmp_path)
    rows = by_scan(found)
    assert len(rows) == 12
    assert {row.split for row in found.rows} == {""}
    assert rows["patient0002_4CH_ED"].facts["release"] == "test"
    assert "6 scan(s) of the official test have no outlines; no split is taken" in found.notes
    row = rows["patient0001_4CH_ED"]
    masks = read_image_masks(tmp_path, row, shape=FRAME.shape, frames=1)
    assert np.array_equal(masks[0], LABELS)


def hmc_sheet(file, *lines, merged=True):
    book = openpyxl.Workbook()
    page = book.active
    if merged:
        page.append(["ECHO", "SEG1", "SEG2", "One cardiac-cycle frames", None, "LV Wall"])
        page.append([None, None, None, "Reference Frame", "End of Cycle", None])
    else:
        page.append(["ECHO", "SEG1", "SEG2", "Reference Frame", "End of Cycle", "LV Wall"])
    for line in lines:
        page.append(line)
    book.save(file)


@pytest.mark.parametrize("merged", [True, False])
def test_hmc_qu_joins_clips_sheets_and_masks(tmp_path, merged):
    names = ("ES0001 _4CH_1", "ES0002_4CH_1", "ES0003_4CH_1")
    for name in names:
        touch(tmp_path / "HMC-QU" / "A4C" / f"{name}.avi")
    touch(tmp_path / "HMC-QU" / "A2C" / "ES0001_2CH_1.avi")
    touch(tmp_path / "HMC-QU" / "A4C" / "._ES0001 _4CH_1.avi")
    folder = tmp_path / "LV Ground-truth Segmentation Masks"
    folder.mkdir()
    array = np.ones((3, 8, 8), dtype=np.uint8)
    for name in (names[0], names[2]):
        io.savemat(folder / f"Mask_{name}.mat", {"predicted": array})
    hmc_sheet(
        tmp_path / "A4C.xlsx",
        [names[0], "MI", "non-MI", 5, 7, "u"],
        [names[1], "non-MI", "non-MI", 2, 9, None],
        merged=merged,
    )
    found = hmc_qu.read(tmp_path)
    rows = by_scan(found)
    first = rows["A4C-ES0001__4CH_1"]
    assert first.patient == rows["A2C-ES0001_2CH_1"].patient == "ES0001"
    assert first.labels == {"infarction": "MI"}
    assert first.facts == {"seg1": "MI", "seg2": "non-MI"}
    assert rows["A4C-ES0002_4CH_1"].labels == {"infarction": "non-MI"}
    masks = read_image_masks(tmp_path, first, shape=(16, 20), frames=10)
    assert [bool(frame.any()) for frame in masks] == [4 <= number <= 6 for number in range(10)]
    # Outlines of an unknown beat are no outlines.
    assert rows["A4C-ES0003_4CH_1"].masks == ()
    assert any("no first frame" in note for note in found.notes)
    assert "1 sheet missing: A2C.xlsx" in found.notes
    assert "2 clip(s) that no sheet calls MI or non-MI" in found.notes


METADATA = (
    "Date added,Current location,Filename,URL (Video Name),Label,License,Probe,Source ID,"
    "Patient ID / Name\n"
    "20.04.20,x,Cov-Atlas-Day+1,http://www.thepocusatlas.com/a (Day1),COVID-19,CC BY-NC 4.0,"
    "convex,2,35\n"
    "20.04.20,x,Cov-Atlas-Day+2,http://www.thepocusatlas.com/a (Day2),COVID-19,CC BY-NC 4.0,"
    "convex,2,35\n"
    "20.04.20,x,Cov-Atlas-suspectedCovid,http://www.thepocusatlas.com/b,COVID-19,None,convex,2,35\n"
    "20.04.20,x,Reg-somewhere,https://www.example.org/v,regular,None,convex,5,\n"
)


def test_pocus_in_both_layouts(tmp_path):
    data = tmp_path / "data"
    videos, images = data / "pocus_videos" / "convex", data / "pocus_images"
    for name in ("Cov-Atlas-Day+1.gif", "Pneu_northumbria_0409_set1_vid1.avi"):
        touch(videos / name)
    touch(videos / "Reg_pat1Image_133043.mpeg")
    touch(videos / "Reg_pat1Image_133410.mpeg")
    touch(videos / "Reg-somewhere.mp4")
    touch(videos / "Cov-Atlas-suspectedCovid.mp4")
    touch(videos / "notes.txt")
    touch(videos / "dknow-C_ConvexProb_score0.mp4")
    picture(images / "Convex" / "covid" / "Cov-Atlas-Day+2.gif_frame39.jpg")
    picture(images / "linear" / "Vir_Avi_Image1.png")
    (data / "dataset_metadata.csv").write_text(METADATA)
    found = pocus.read(tmp_path)
    rows = {row.source.path.rsplit("/", 1)[1]: row for row in found.rows}
    assert len(rows) == 8
    day1, day2 = rows["Cov-Atlas-Day+1.gif"], rows["Cov-Atlas-Day+2.gif_frame39.jpg"]
    assert day1.patient == day2.patient == rows["Cov-Atlas-suspectedCovid.mp4"].patient
    assert (day1.source.kind, day2.source.kind) == ("video", "image")
    assert day1.site == "atlas"
    assert day1.labels == {"pathology": "covid"}
    assert day2.facts == {"probe": "convex", "licence": "CC BY-NC 4.0"}
    assert rows["Reg_pat1Image_133043.mpeg"].site == "neuruppin"
    assert rows["Reg_pat1Image_133043.mpeg"].patient == rows["Reg_pat1Image_133410.mpeg"].patient
    assert rows["Pneu_northumbria_0409_set1_vid1.avi"].site == "northumbria"
    assert rows["Reg-somewhere.mp4"].site == "example.org"
    assert rows["Vir_Avi_Image1.png"].labels == {"pathology": "viral"}
    assert rows["Vir_Avi_Image1.png"].facts == {"probe": "linear"}
    assert "1 file(s) left out: the name starts with no class" in found.notes
    assert "4 file(s) without a line in dataset_metadata.csv" in found.notes


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("Cov_denault_proposedUS_vid1.mov", "Cov_denault_proposedUS_vid10.mov", True),
        ("Cov-Atlas+(44).gif", "Cov-Atlas+(44).gif_frame18.jpg", True),
        ("Reg_pat1Image_133043.mpeg", "Reg_pat2Image_133044.mpeg", False),
        ("Pneu-grep-pneumonia1.mp4", "Reg-Atlas-alines.gif", False),
        ("Reg_Image_181602_trimmed_crop.mp4", "Reg_Image_182106_crop.mp4", True),
        ("Pneu_liftl_pneu_case3_clip3.mp4", "Pneu_liftl_pneu_case3_clip4.mp4", True),
    ],
)
def test_pocus_without_its_table_has_clips_that_differ_in_a_counter_as_one_person(
    tmp_path, one, other, same
):
    touch(tmp_path / "pocus_videos" / "convex" / one)
    touch(tmp_path / "pocus_videos" / "convex" / other)
    first, second = pocus.read(tmp_path).rows
    assert (first.patient == second.patient) is same


def test_butterfly_takes_people_classes_and_parts(tmp_path):
    top = tmp_path / "butterfly_dataset"
    picture(top / "training" / "1" / "morisons_pouch" / "img000.png")
    picture(top / "training" / "1" / "4ch" / "img000.png")
    picture(top / "training" / "2" / "lungs" / "img003.png")
    picture(top / "training" / "2" / "strange" / "img003.png")
    picture(top / "test" / "7" / "carotid" / "img001.png")
    picture(top / "test" / "2" / "carotid" / "img001.png")
    picture(top / "test" / "7" / "carotid" / "._img001.png")
    found = butterfly.read(tmp_path)
    rows = {row.source.path.removeprefix("butterfly_dataset/"): row for row in found.rows}
    assert len(rows) == 6
    row = rows["training/1/morisons_pouch/img000.png"]
    assert (row.patient, row.split, row.vendor) == ("1", "train", "Butterfly")
    assert row.labels == {"view": "morisons_pouch"}
    assert rows["test/7/carotid/img001.png"].split == "test"
    # One number is one person, on one side.
    assert rows["test/2/carotid/img001.png"].split == "train"
    assert rows["training/2/strange/img003.png"].labels == {}
    assert "1 person(s) in both parts, counted as training" in found.notes
    assert "1 image(s) without a class: the folder's name is none" in found.notes
    assert len(butterfly.read(top / "training").rows) == 4
