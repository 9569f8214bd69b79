"""TotalSegmentator and KiTS: rows of miniatures in the official layouts."""

import json

import numpy as np
import pytest

from agssd_core.errors import DataError
from simulation.datasets import kits, totalsegmentator
from simulation.datasets.reading import read_volume, read_volume_mask
from tests.support.ct_sets import ct_array, save_mask, save_nifti

# KiTS: index 0 runs down the body, 2 to the left.
ZYX = np.array([[0, 0, -1.0, 0], [0, -1.0, 0, 0], [-4.0, 0, 0, 0], [0, 0, 0, 1.0]])


def make_total(root, mark):
    for number in (0, 1, 4):
        save_nifti(root / f"s{number:04d}" / "ct.nii.gz")
    masks = root / "s0000" / "segmentations"
    for name in ("liver", "vertebrae_S1", "face", "._liver"):
        save_mask(masks / f"{name}.nii.gz")
    save_nifti(masks / "aorta.nii.gz", np.zeros((10, 9, 8), dtype=np.uint8))
    lines = [
        ["image_id", "age", "gender", "institute", "study_type", "split", "manufacturer"],
        ["s0000", "62.0", "m", "C", "ct abdomen", "train", "Siemens"],
        ["s0001", "", "", "A", "", "val", ""],
        ["s0002", "50", "f", "A", "ct thorax", "test", ""],
    ]
    (root / "meta.csv").write_text("\n".join(mark.join(line) for line in lines) + "\n")


@pytest.mark.parametrize("mark", [";", ","])
def test_totalsegmentator_reads_institutes_and_whatever_masks_there_are(tmp_path, mark):
    make_total(tmp_path, mark)
    found = totalsegmentator.ADAPTER.read(tmp_path)
    told = [(row.scan, row.site, row.split, row.vendor, len(row.masks)) for row in found.rows]
    assert told == [
        ("s0000", "C", "train", "Siemens", 3),
        ("s0001", "A", "validation", "", 0),
        ("s0004", "", "", "", 0),
    ]
    first = found.rows[0]
    assert first.facts == {"sex": "m", "study_type": "ct abdomen", "age": "62"}
    mask = read_volume_mask(tmp_path, first, read_volume(tmp_path, first))
    names = {totalsegmentator.INFO.structures[value] for value in np.unique(mask) if value}
    # Both lie in one place, the later one over the earlier.
    assert names == {"vertebrae_S1"}
    assert set(found.notes) == {
        "1 outline(s) passed over: of no structure of version 2",
        "2 patient(s) without outlines",
        "1 patient(s) stand not in meta.csv: site and split unknown",
        "1 patient(s) of meta.csv have no scan",
    }


def test_values_of_totalsegmentator_are_places_in_the_sorted_list_of_117():
    names = list(totalsegmentator.INFO.structures.values())
    assert len(names) == 117
    assert names == sorted(set(names))
    assert list(totalsegmentator.INFO.structures) == list(range(1, 118))
    for name in ("rib_left_12", "vertebrae_T7", "kidney_cyst_right", "atrial_appendage_left"):
        assert name in names


def make_kits(root, folder):
    scan = ct_array((8, 9, 10))
    scan[2:5, 3:6, 1:4] = 3000
    for number in (0, 5, 7):
        save_nifti(root / folder / f"case_{number:05d}" / "imaging.nii.gz", scan, ZYX)
    for number in (0, 5, 9):
        file = root / folder / f"case_{number:05d}" / "segmentation.nii.gz"
        save_mask(file, (8, 9, 10), ZYX, value=2)


@pytest.mark.parametrize("folder", ["data", "dataset", ""])
def test_kits_places_scans_by_their_affine_in_all_layouts(tmp_path, folder):
    make_kits(tmp_path, folder)
    found = kits.ADAPTER.read(tmp_path)
    assert [row.scan for row in found.rows] == ["case_00000", "case_00005", "case_00007"]
    volume = read_volume(tmp_path, found.rows[0])
    assert volume.array.shape == (10, 9, 8)
    assert volume.spacing_mm == pytest.approx((1, 1, 4))
    mask = read_volume_mask(tmp_path, found.rows[0], volume)
    np.testing.assert_array_equal(mask == 2, volume.array == 3000)
    assert set(found.notes) == {
        "1 case(s) left out: no imaging.nii.gz (2019 and 2023 download it apart)",
        "1 case(s) without outlines (part of them is the challenge's test)",
        "3 case(s) of unknown site: in no table",
    }


def test_kits_takes_hospitals_silos_and_classes_from_tables(tmp_path):
    make_kits(tmp_path, "data")
    tables = tmp_path / "fed_kits19" / "metadata"
    tables.mkdir(parents=True)
    (tables / "thresholded_sites.csv").write_text(
        "case_ids,site_ids,train_test_split,train_test_split_silo\ncase_00005,0,train,train_0\n"
    )
    rows = {row.scan: row for row in kits.ADAPTER.read(tmp_path).rows}
    assert [row.site for row in rows.values()] == ["", "0", ""]
    (tables / "anony_sites.csv").write_text("case,site_id\ncase_00000,41\ncase_00005,12\n")
    said = [{"case_id": "case_00000", "malignant": True, "gender": "male"}, {"case_id": 3}, 4]
    (tmp_path / "data" / "kits.json").write_text(json.dumps(said))
    rows = {row.scan: row for row in kits.ADAPTER.read(tmp_path).rows}
    assert [row.site for row in rows.values()] == ["41", "12", ""]
    assert rows["case_00005"].facts == {"silo": "0"}
    assert rows["case_00000"].labels == {"malignant": "yes"}
    assert rows["case_00000"].facts == {"sex": "male"}


@pytest.mark.parametrize(
    ("adapter", "fact"),
    [
        (totalsegmentator.ADAPTER, "no file such as s0000/ct.nii.gz"),
        (kits.ADAPTER, "no folder such as data/case_00000 or dataset/case_00000"),
    ],
    ids=lambda each: each if isinstance(each, str) else each.info.name,
)
def test_another_layout_is_refused_with_what_was_expected_where(tmp_path, adapter, fact):
    (tmp_path / "images").mkdir()
    with pytest.raises(DataError, match=fact) as caught:
        adapter.read(tmp_path)
    assert adapter.info.title in str(caught.value)
    assert all(line in str(caught.value) for line in adapter.info.layout)
    assert str(tmp_path) not in str(caught.value)
