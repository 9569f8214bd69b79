from pathlib import Path

import numpy as np
import pytest

from agssd_core.config.tasks import TaskConfig
from agssd_core.errors import CacheError, DataError, ShapeError
from agssd_core.evaluation.labelled import (
    LabelledScan,
    LabelledSet,
    read_labelled,
    read_scan,
    store_scan,
)
from agssd_core.evaluation.tasks import share_of_patients, task_classes, task_mask

ORGANS = TaskConfig(name="organs", kind="segmentation", structures=(3, 7))
SIDE = TaskConfig(name="side", kind="classification", label="side")


def _scan(name="s1", **changed):
    facts = {
        "patient": "p1",
        "site": "a",
        "split": "train",
        "modality": "CT",
        "labels": {"side": "left"},
        "file": Path(f"{name}.npz"),
        "spacing_mm": (1.0, 2.0, 3.0),
    }
    return LabelledScan(scan=name, **{**facts, **changed})


def _stored(folder, name="s1", *, dtype=np.uint16, shape=(4, 5, 6), stamp="", mask=True):
    rng = np.random.default_rng(0)
    image = rng.integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)
    inside = rng.random(shape) < 0.5
    labels = (rng.integers(0, 2, shape) * 7).astype(np.uint8) if mask else None
    scan = _scan(name, file=folder / f"{name}.npz")
    return store_scan(scan, image, inside=inside, mask=labels, stamp=stamp), image, inside, labels


@pytest.mark.parametrize(("dtype", "shape"), [(np.uint16, (4, 5, 6)), (np.uint8, (7, 9))])
def test_a_stored_scan_comes_back_whole(tmp_path, dtype, shape):
    scan, image, inside, mask = _stored(tmp_path, dtype=dtype, shape=shape)
    arrays = scan.load()
    assert arrays.image.dtype == np.float32
    np.testing.assert_allclose(arrays.image, image / np.iinfo(dtype).max, rtol=1e-6)
    np.testing.assert_array_equal(arrays.inside, inside)
    np.testing.assert_array_equal(arrays.mask, mask)
    assert scan.outlined == (7,)
    assert read_labelled(tmp_path).scans == (scan,)


def test_a_scan_without_mask_has_none(tmp_path):
    scan, *_ = _stored(tmp_path, mask=False)
    assert scan.load().mask is None
    assert scan.outlined is None
    assert len(LabelledSet((scan,)).of(ORGANS)) == 0


def test_a_scan_made_from_something_else_is_not_taken(tmp_path):
    scan, *_ = _stored(tmp_path, stamp="one")
    assert read_scan(scan.file, stamp="one") == scan
    assert read_scan(scan.file, stamp="two") is None


@pytest.mark.parametrize("keep", [0, 30, 200, -20], ids=str)
def test_a_cut_file_is_damaged_and_not_taken(tmp_path, keep):
    scan, *_ = _stored(tmp_path)
    scan.file.write_bytes(scan.file.read_bytes()[:keep])
    assert read_scan(scan.file) is None
    with pytest.raises(CacheError, match="run the command again"):
        scan.load()
    with pytest.raises(DataError, match="Make them from a split"):
        read_labelled(tmp_path)


def test_a_file_holds_no_pickle(tmp_path):
    file = tmp_path / "s1.npz"
    np.savez(file, about=np.array([{"a": 1}], dtype=object), image=np.array([None]))
    assert read_scan(file) is None
    with pytest.raises(CacheError):
        _scan(file=file).load()


def test_a_mask_of_another_shape_is_refused_and_nothing_is_left(tmp_path):
    image, inside = np.zeros((4, 4), np.uint8), np.ones((4, 4), bool)
    scan = _scan(file=tmp_path / "s1.npz")
    with pytest.raises(ShapeError, match="Cut all three alike"):
        store_scan(scan, image, inside=inside, mask=np.zeros((4, 5), np.uint8))
    assert list(tmp_path.iterdir()) == []


def test_a_task_chooses_its_scans():
    scans = LabelledSet(
        (
            _scan("both", outlined=(3, 9)),
            _scan("other", outlined=(9,)),
            _scan("bare", outlined=None, labels={}),
            _scan("mr", outlined=(3,), modality="MR", split="test", labels={"side": "right"}),
        )
    )

    def names(task):
        return [scan.scan for scan in scans.of(task).scans]

    assert names(ORGANS) == ["both", "mr"]
    assert names(ORGANS.model_copy(update={"unlabelled": True})) == ["both", "other", "mr"]
    assert names(ORGANS.model_copy(update={"structures": ()})) == ["both", "other", "mr"]
    assert names(ORGANS.model_copy(update={"modalities": ("MR",)})) == ["mr"]
    assert names(SIDE) == ["both", "other", "mr"]
    assert names(SIDE.model_copy(update={"classes": ("left", "up")})) == ["both", "other"]
    assert scans.of(SIDE).targets(SIDE).tolist() == [0, 0, 1]
    assert scans.of(SIDE).test.targets(SIDE, ("left", "right")).tolist() == [1]
    assert task_classes(scans.scans, SIDE) == ("left", "right")
    with pytest.raises(DataError, match=r"LabelledSet\.of"):
        scans.targets(SIDE)


def test_structures_get_the_numbers_of_the_task():
    mask = np.array([[0, 3, 7, 9]], np.uint8)
    assert task_mask(mask, ORGANS).tolist() == [[0, 1, 2, 0]]
    assert task_mask(mask, ORGANS.model_copy(update={"structures": ()})).tolist() == [[0, 1, 1, 1]]


def _cohort():
    """Twelve patients with two scans each, two of the patients on the right."""
    return [
        _scan(f"s{n:02d}.{k}", patient=f"p{n:02d}", labels={"side": "right" if n > 9 else "left"})
        for n in range(12)
        for k in range(2)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_a_share_keeps_whole_patients_and_one_of_each_class(seed):
    kept = share_of_patients(_cohort(), SIDE, fraction=0.01, seed=seed)
    assert {scan.labels["side"] for scan in kept} == {"left", "right"}
    assert len(kept) == 4
    assert len({scan.patient for scan in kept}) == 2


def test_a_larger_share_holds_the_smaller_one_and_the_seed_matters():
    def names(fraction, seed=0):
        return {s.scan for s in share_of_patients(_cohort(), SIDE, fraction=fraction, seed=seed)}

    assert names(0.25) < names(0.5) < names(1.0)
    assert len(names(0.25)) == 6
    assert len(names(1.0)) == 24
    assert len({frozenset(names(0.25, seed)) for seed in range(6)}) > 1
    with pytest.raises(DataError, match=r"\(0, 1\]"):
        names(0.0)


def test_a_single_case_of_a_segmentation_has_an_outline():
    scans = [_scan(f"s{n}", patient=f"p{n}", outlined=(3,) if n == 5 else ()) for n in range(9)]
    (kept,) = share_of_patients(scans, ORGANS, fraction=0.01, seed=0)
    assert kept.scan == "s5"
