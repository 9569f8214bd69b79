"""BTCV, MSD, AMOS and FLARE: rows of miniatures in the official layouts."""

import json

import numpy as np
import pytest

from agssd_core.errors import DataError
from simulation.datasets import amos22, btcv, flare22, flare23, msd
from simulation.datasets.reading import read_volume, read_volume_mask
from tests.support.ct_sets import ct_array, save_mask, save_nifti


def by_scan(found):
    return {row.scan: row for row in found.rows}


def test_btcv_has_no_split_when_its_test_has_no_outlines(tmp_path):
    raw = tmp_path / "RawData"
    for number in (1, 21):
        save_nifti(raw / "Training" / "img" / f"img{number:04d}.nii.gz")
    save_mask(raw / "Training" / "label" / "label0001.nii.gz", value=13)
    save_nifti(raw / "Testing" / "img" / "img0061.nii.gz")
    (raw / "Training" / "img" / "._img0001.nii.gz").write_bytes(b"x")
    found = btcv.ADAPTER.read(tmp_path)
    rows = by_scan(found)
    assert list(rows) == ["img0001", "img0021", "img0061"]
    assert [row.split for row in found.rows] == ["", "", ""]
    assert rows["img0061"].facts == {"release": "test"}
    assert rows["img0001"].patient == "0001"
    volume = read_volume(tmp_path, rows["img0001"])
    assert set(np.unique(read_volume_mask(tmp_path, rows["img0001"], volume))) == {0, 13}
    assert btcv.INFO.structures[13] == "left adrenal gland"
    assert found.notes == (
        "1 training scan(s) without outlines",
        "1 scan(s) of the official test have no outlines; no split is taken",
    )
    # The folder RawData itself is a root as well.
    assert len(btcv.ADAPTER.read(raw).rows) == 3


def describe(folder, modality, labels):
    folder.mkdir(parents=True, exist_ok=True)
    said = {
        "modality": {str(place): name for place, name in enumerate(modality)},
        "labels": {str(value): name for value, name in enumerate(labels)},
    }
    (folder / "dataset.json").write_text(json.dumps(said))


def make_msd(root):
    brain, spleen = root / "Task01_BrainTumour", root / "Task09_Spleen"
    describe(brain, ["FLAIR", "T1w", "t1gd", "T2w"], ["background", "edema", "tumor"])
    describe(spleen, ["CT"], ["background", "spleen"])
    channels = np.stack([ct_array(seed=seed) for seed in range(4)], axis=3)
    save_nifti(brain / "imagesTr" / "BRATS_001.nii.gz", channels)
    save_mask(brain / "labelsTr" / "BRATS_001.nii.gz", value=2)
    save_nifti(spleen / "imagesTr" / "spleen_2.nii.gz")
    save_mask(spleen / "labelsTr" / "spleen_2.nii.gz")
    save_nifti(spleen / "imagesTs" / "spleen_1.nii.gz")
    for name in ("imagesTr/._spleen_2.nii.gz", "labelsTr/._spleen_2.nii.gz"):
        (spleen / name).write_bytes(b"\x00\x05\x16\x07")
    (root / "._Task09_Spleen").write_bytes(b"x")
    return channels


def test_msd_takes_each_channel_of_a_4d_file_as_a_row_of_one_patient(tmp_path):
    channels = make_msd(tmp_path)
    rows = by_scan(msd.ADAPTER.read(tmp_path))
    assert list(rows) == [
        "Task01-BRATS_001-FLAIR",
        "Task01-BRATS_001-T1w",
        "Task01-BRATS_001-T2w",
        "Task01-BRATS_001-t1gd",
        "Task09-spleen_1",
        "Task09-spleen_2",
    ]
    gd = rows["Task01-BRATS_001-t1gd"]
    assert (gd.modality, gd.sequence, gd.patient) == ("MR", "t1gd", "Task01-BRATS_001")
    np.testing.assert_array_equal(read_volume(tmp_path, gd).array, channels[..., 2])
    mask = read_volume_mask(tmp_path, gd, read_volume(tmp_path, gd))
    assert np.count_nonzero(mask == 2) == 27
    spleen = rows["Task09-spleen_2"]
    assert (spleen.modality, spleen.sequence, spleen.source.index) == ("CT", "", None)
    assert spleen.facts["task"] == "Task09_Spleen"
    assert spleen.facts["structure_1"] == "spleen"
    assert not rows["Task09-spleen_1"].masks


def test_msd_reads_one_task_and_knows_channels_without_its_description(tmp_path):
    make_msd(tmp_path)
    brain = tmp_path / "Task01_BrainTumour"
    (brain / "dataset.json").write_text("{ damaged")
    found = msd.ADAPTER.read(brain)
    told = [(row.source.index, row.sequence) for row in found.rows]
    assert sorted(told) == [(0, "FLAIR"), (1, "T1w"), (2, "T1gd"), (3, "T2w")]
    assert {row.source.path for row in found.rows} == {"imagesTr/BRATS_001.nii.gz"}
    assert found.notes == (
        "1 task(s) without a readable dataset.json: channels by the task's number",
    )


def make_amos(root):
    top = root / "amos22"
    for number in (1, 507):
        save_nifti(top / "imagesTr" / f"amos_{number:04d}.nii.gz")
        save_mask(top / "labelsTr" / f"amos_{number:04d}.nii.gz", value=15)
    save_nifti(top / "imagesVa" / "amos_0008.nii.gz")
    save_mask(top / "labelsVa" / "amos_0008.nii.gz")
    save_nifti(top / "imagesTs" / "amos_0011.nii.gz")
    for number in (5001, 5437):
        save_nifti(root / "amos22_unlabeled_ct_5000_5399" / f"amos_{number}.nii.gz")
    save_nifti(root / "amos22_unlabeled_mri" / "amos_7001.nii.gz")
    head = "amos_id,Patient's Sex,Manufacturer's Model Name,Manufacturer,Site\n"
    (root / "labeled_data_meta_0000_0599.csv").write_text(
        "\ufeff" + head + "amos_0001,M,Aquilion ONE,TOSHIBA,LGCH\n507,F,,SIEMENS,LGPH\n8,M,,,nan\n",
        encoding="utf-8",
    )
    (root / "unlabeled_data_meta_5000_5399.csv").write_text(
        head + "amos_5001,M,Brilliance16,Philips,SLC\n"
    )


def test_amos_takes_sites_and_makers_from_its_tables(tmp_path):
    make_amos(tmp_path)
    found = amos22.ADAPTER.read(tmp_path)
    rows = by_scan(found)
    assert "amos_5437" not in rows
    told = {scan: (row.modality, row.site, row.vendor, row.split) for scan, row in rows.items()}
    assert told == {
        "amos_0001": ("CT", "LGCH", "Canon", "train"),
        "amos_0008": ("CT", "", "", "validation"),
        "amos_0011": ("CT", "", "", "test"),
        "amos_0507": ("MR", "LGPH", "Siemens", "train"),
        "amos_5001": ("CT", "SLC", "Philips", ""),
        "amos_7001": ("MR", "", "", ""),
    }
    assert rows["amos_0001"].facts["scanner"] == "Aquilion ONE"
    assert rows["amos_0507"].masks[0].source.path == "amos22/labelsTr/amos_0507.nii.gz"
    assert not rows["amos_5001"].masks
    assert found.notes == (
        "1 scan(s) left out: known to be damaged in the release",
        "3 scan(s) of unknown site: not in a table",
    )


def test_flare22_tells_its_parts_apart(tmp_path):
    labelled = tmp_path / "Training" / "FLARE22_LabeledCase50"
    for number in (1, 2):
        save_nifti(labelled / "images" / f"FLARE22_Tr_{number:04d}_0000.nii.gz")
    save_mask(labelled / "labels" / "FLARE22_Tr_0001.nii.gz")
    for part, number in (("1-1000", 1), ("1001-2000", 1001)):
        folder = tmp_path / "Training" / f"FLARE22_UnlabeledCase{part}"
        save_nifti(folder / f"Case_{number:05d}_0000.nii.gz")
    save_nifti(tmp_path / "Tuning" / "images" / "FLARETs_0001_0000.nii.gz")
    save_mask(tmp_path / "Tuning" / "labels" / "FLARETs_0001.nii.gz")
    found = flare22.ADAPTER.read(tmp_path)
    told = [(row.scan, row.facts["part"], row.split, len(row.masks)) for row in found.rows]
    assert told == [
        ("Case_00001", "unlabelled", "train", 0),
        ("Case_01001", "unlabelled", "train", 0),
        ("FLARE22_Tr_0001", "labelled", "train", 1),
        ("FLARE22_Tr_0002", "labelled", "train", 0),
        ("FLARETs_0001", "tuning", "validation", 1),
    ]
    assert found.notes == ("1 training scan(s) without outlines",)


def test_flare23_says_that_its_outlines_are_partial(tmp_path):
    save_nifti(tmp_path / "imagesTr2200" / "FLARE23_0001_0000.nii.gz")
    save_mask(tmp_path / "labelsTr2200" / "FLARE23_0001.nii.gz", value=14)
    save_nifti(tmp_path / "unlabeledTr1800" / "FLARE23_2201_0000.nii.gz")
    save_nifti(tmp_path / "validation" / "FLARE23Ts_0001_0000.nii.gz")
    found = flare23.ADAPTER.read(tmp_path)
    rows = by_scan(found)
    assert list(rows) == ["FLARE23Ts_0001", "FLARE23_0001", "FLARE23_2201"]
    assert rows["FLARE23_0001"].facts["partial_labels"] == "not outlined organs are 0"
    assert "partial_labels" not in rows["FLARE23_2201"].facts
    assert not any(row.split for row in found.rows)
    assert "1 scan(s) with partial outlines: 0 is not background" in found.notes


@pytest.mark.parametrize(
    ("adapter", "fact"),
    [
        (btcv.ADAPTER, "no folder RawData/Training/img"),
        (msd.ADAPTER, "no folder such as Task09_Spleen/imagesTr"),
        (amos22.ADAPTER, "no folder amos22/imagesTr"),
        (flare22.ADAPTER, "no folder Training"),
        (flare23.ADAPTER, "no folder imagesTr2200"),
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
