"""MedMNIST3D in miniature: real files with a few cubes each."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from agssd_core.errors import DataError
from simulation.datasets.medmnist3d import ADAPTER, SETS
from simulation.datasets.rows import Source

SIZES = {"train": 5, "val": 2, "test": 3}


def write(file: Path, *, side: int = 4, classes: int = 2, **instead: object) -> None:
    """A set with all its arrays; ``instead`` replaces some."""
    arrays: dict[str, object] = {}
    for part, count in SIZES.items():
        arrays[f"{part}_images"] = np.zeros((count, side, side, side), np.uint8)
        arrays[f"{part}_labels"] = (np.arange(count, dtype=np.uint8) % classes)[:, None]
    np.savez_compressed(file, **{**arrays, **instead})  # type: ignore[arg-type]


def test_all_six_sets_in_both_sizes(tmp_path):
    for name, kind in SETS.items():
        for side, ending in ((28, ""), (64, "_64")):
            file = tmp_path / f"{name}mnist3d{ending}.npz"
            write(file, side=side, classes=len(kind.classes))
    found = ADAPTER.read(tmp_path)
    assert found.notes == ()
    assert Counter(row.facts["set"] for row in found.rows) == dict.fromkeys(SETS, 20)
    assert Counter(row.split for row in found.rows) == {"train": 60, "validation": 24, "test": 36}
    # A cube in two sizes is one patient, so it cannot stand on both sides of a split.
    assert len({row.patient for row in found.rows}) == 60
    assert len({(row.patient, row.split) for row in found.rows}) == 60
    row = next(row for row in found.rows if row.scan == "organ64-test-0001")
    assert row.source == Source("organmnist3d_64.npz", "npz", index=1, key="test_images")
    assert row.labels == {"organ": "kidney-right"}
    assert (row.modality, row.patient, row.facts["size"]) == ("CT", "organ-test-0001", "64")


@pytest.mark.parametrize(
    ("name", "modality", "first"),
    [
        ("organ", "CT", "liver"),
        ("nodule", "CT", "benign"),
        ("adrenal", "CT", "normal"),
        ("fracture", "CT", "buckle rib fracture"),
        ("vessel", "MR", "vessel"),
        ("synapse", "MR", "inhibitory synapse"),
    ],
)
def test_classes_bear_the_names_of_the_authors(tmp_path, name, modality, first):
    write(tmp_path / f"{name}mnist3d.npz")
    row = ADAPTER.read(tmp_path).rows[0]
    assert (row.modality, row.labels) == (modality, {name: first})


@pytest.mark.parametrize(
    "instead",
    [
        {"val_labels": np.zeros((9, 1), np.uint8)},
        {"val_images": np.zeros((2, 4, 4), np.uint8)},
        {"val_images": np.zeros((2, 4, 4, 4), np.float32)},
        {"val_labels": np.array([["a"], [{}]], object)},
    ],
    ids=["count", "flat", "float", "pickle"],
)
def test_a_part_that_is_no_such_part_is_left_out(tmp_path, instead):
    write(tmp_path / "nodulemnist3d.npz", **instead)
    found = ADAPTER.read(tmp_path)
    assert Counter(row.split for row in found.rows) == {"train": 5, "test": 3}
    assert found.notes == ("1 part(s) of a set left out: damaged, or images and labels differ",)


def test_a_class_that_the_set_does_not_have_is_none(tmp_path):
    write(tmp_path / "nodulemnist3d.npz", val_labels=np.array([[0], [7]], np.uint8))
    found = ADAPTER.read(tmp_path)
    assert [dict(r.labels) for r in found.rows if r.split == "validation"] == [
        {"nodule": "benign"},
        {},
    ]
    assert len(found.notes) == 1


def test_a_broken_download_does_not_stop_the_others(tmp_path):
    write(tmp_path / "nodulemnist3d.npz")
    whole = (tmp_path / "nodulemnist3d.npz").read_bytes()
    (tmp_path / "organmnist3d.npz").write_bytes(whole[: len(whole) // 2])
    found = ADAPTER.read(tmp_path)
    assert {row.facts["set"] for row in found.rows} == {"nodule"}
    assert found.notes[0].startswith("3 part(s) of a set left out")


def test_another_folder_is_refused_with_what_was_expected(tmp_path):
    (tmp_path / "breastmnist.npz").touch()
    with pytest.raises(DataError, match=r"no whole file such as organmnist3d.npz. Expected below"):
        ADAPTER.read(tmp_path)
