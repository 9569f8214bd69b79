"""What was tested downstream was not learnt from: by patient, by data set, by file."""

from pathlib import Path

import pytest

from agssd_core.errors import ConfigError
from simulation.datasets.rows import Row, Source
from simulation.leakage import equal_scans, refuse_leakage
from simulation.partition import Placed


def placed(name, split, source=None):
    return Placed(Row(name, name, "CT", source or Source(f"{name}.nii", "nifti")), "a", split)


def test_only_learning_then_testing_is_refused():
    train, test = [placed("p", "train")], [placed("p", "test")]
    refuse_leakage(train, train)
    refuse_leakage(test, test)
    refuse_leakage(test, train)
    with pytest.raises(ConfigError, match=r"1 patient\(s\) are both"):
        refuse_leakage(train, test)


def test_patients_of_unrelated_data_sets_may_have_one_number():
    train, test = [placed("001", "train")], [placed("001", "test")]
    refuse_leakage(train, test, names=("busi", "kits"))
    for names in (("brats21", "fets22"), ("fets22", "brats21")):
        with pytest.raises(ConfigError, match="Pre-train on another data set"):
            refuse_leakage(train, test, names=names)


def roots(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    return tmp_path / "one", tmp_path / "two"


def test_a_copy_under_another_name_is_found(tmp_path):
    one, two = roots(tmp_path)
    (one / "a.nii").write_bytes(b"scan" * 9000)
    (two / "b.nii").write_bytes(b"scan" * 9000)
    check = ([placed("a", "train")], [placed("b", "test")])
    with pytest.raises(ConfigError, match=r"1 scan\(s\), byte for byte"):
        refuse_leakage(*check, names=("busi", "kits"), roots=(one, two))
    # As long, and alike wherever samples are taken.
    content = bytearray(b"scan" * 9000)
    content[6000] ^= 1
    (two / "b.nii").write_bytes(content)
    refuse_leakage(*check, names=("busi", "kits"), roots=(one, two))


@pytest.mark.parametrize("kind", ["dicom", "slices"])
def test_a_copied_series_is_found(tmp_path, kind):
    one, two = roots(tmp_path)
    for folder in (one / "series", two / "renamed"):
        folder.mkdir()
        for level in range(5):
            (folder / f"{level}.dcm").write_bytes(bytes([level]) * 500)
    check = (
        [placed("a", "train", Source("series", kind))],
        [placed("b", "test", Source("renamed", kind))],
    )
    with pytest.raises(ConfigError, match="byte for byte"):
        refuse_leakage(*check, names=("busi", "kits"), roots=(one, two))


def test_two_rows_of_one_array_are_two_scans(tmp_path):
    (tmp_path / "all.npz").write_bytes(b"many scans")
    train = [placed("a", "train", Source("all.npz", "npz", 0, "images"))]
    test = [placed("b", "test", Source("all.npz", "npz", 1, "images"))]
    refuse_leakage(train, test, roots=(tmp_path, tmp_path))
    again = [placed("c", "test", Source("all.npz", "npz", 0, "images"))]
    with pytest.raises(ConfigError, match="byte for byte"):
        refuse_leakage(train, again, roots=(tmp_path, tmp_path))


def test_files_are_read_whole_only_where_lengths_and_samples_agree(tmp_path, monkeypatch):
    from simulation import leakage

    read = []
    monkeypatch.setattr(leakage, "file_digest", lambda path: read.append(path.name) or path.name)
    files = {"a": b"x" * 50, "b": b"y" * 50, "c": b"z" * 51, "d": b"x" * 50}
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    told = []
    some = [(tmp_path / name, None, "") for name in "ac"]
    equal_scans(some, [(tmp_path / name, None, "") for name in "bd"],
                progress=lambda *done: told.append(done))  # fmt: skip
    assert sorted(read) == ["a", "d"]
    assert told == [(3, 3)]
    assert equal_scans([(Path("gone"), None, "")], some) == 0
