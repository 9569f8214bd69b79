"""BraTS 2021 and FeTS 2022 in miniature, and FeTS with all of its 1251 patients."""

from collections import Counter
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from agssd_core.errors import DataError
from simulation.datasets import brats21, fets22
from simulation.datasets.rows import DatasetRows, Mask, Source
from simulation.partition import partition

SEQUENCES = ("flair", "t1", "t1ce", "t2")
# Patients of each institution, as published.
INSTITUTIONS = {
    **{1: 511, 2: 6, 3: 15, 4: 47, 5: 22, 6: 34, 7: 12, 8: 8, 9: 4, 10: 8, 11: 14, 12: 11},
    **{13: 35, 14: 6, 15: 13, 16: 30, 17: 9, 18: 382, 19: 4, 20: 33, 21: 35, 22: 7, 23: 5},
}
# Institutions that the second partition cuts into three parts each here, which makes 33.
CUT = (1, 4, 13, 18, 21)


def glioma(folder: Path, patient: str, *, without: tuple[str, ...] = (), empty: bool = False):
    """Write a patient's folder."""
    place = folder / patient
    place.mkdir(parents=True)
    for name in (*SEQUENCES, "seg"):
        file = place / f"{patient}_{name}.nii.gz"
        if name in without:
            continue
        if empty:
            file.touch()
        else:
            nib.save(nib.Nifti1Image(np.zeros((3, 3, 2), np.int16), np.eye(4)), file)
    (place / f"._{patient}_t1.nii.gz").touch()


def parts(found: DatasetRows, name: str) -> Counter[str]:
    """Patients by a fact, each counted once."""
    of = {row.patient: row.facts.get(name, "") for row in found.rows}
    return Counter(of.values())


def test_brats_has_a_row_for_each_sequence(tmp_path):
    training = tmp_path / "RSNA_ASNR_MICCAI_BraTS2021_TrainingData_16July2021"
    glioma(training, "BraTS2021_00000")
    glioma(training, "BraTS2021_00002", without=("t2", "seg"))
    glioma(tmp_path / "BraTS2021_ValidationData", "BraTS2021_00001", without=("seg",))
    (tmp_path / "BraTS21-17_Mapping.csv").write_text(
        "BraTS2021,Data Collection (as on TCIA+additional),Site No (represents the originating"
        " institution),BraTS2020\nBraTS2021_00000,TCGA-GBM,7,N/A\nBraTS2021_00002,,N/A,\n",
        encoding="utf-8",
    )
    found = brats21.ADAPTER.read(tmp_path)
    assert len(found.rows) == 4 + 3 + 4
    row = found.rows[0]
    assert (row.scan, row.patient, row.sequence) == (
        "BraTS2021_00000-flair",
        "BraTS2021_00000",
        "flair",
    )
    outlines = f"{training.name}/BraTS2021_00000/BraTS2021_00000_seg.nii.gz"
    assert row.masks == (Mask(Source(outlines, "nifti")),)
    assert row.facts == {"release": "training", "collection": "TCGA-GBM"}
    sites = {row.patient: row.site for row in found.rows}
    assert sites == {"BraTS2021_00000": "7", "BraTS2021_00001": "", "BraTS2021_00002": ""}
    assert parts(found, "release") == {"training": 2, "validation": 1}
    assert found.notes == ("1 patient(s) without outlines", "1 patient(s) without the sequence t2")
    assert {row.split for row in found.rows} == {""}


def test_brats_without_its_table_and_twice_on_disk(tmp_path):
    glioma(tmp_path / "a", "BraTS2021_00000")
    glioma(tmp_path / "b", "BraTS2021_00000")
    found = brats21.ADAPTER.read(tmp_path)
    assert len(found.rows) == 4
    assert found.notes == (
        "no BraTS21-17_Mapping.csv: sites are unknown",
        "1 patient(s) left out the second time: two folders of one name",
    )


def test_files_in_folders_of_their_own_name_are_found(tmp_path):
    glioma(tmp_path, "BraTS2021_00000")
    flair = tmp_path / "BraTS2021_00000" / "BraTS2021_00000_flair.nii.gz"
    flair.unlink()
    inner = tmp_path / "BraTS2021_00000" / "BraTS2021_00000_flair.nii" / "00000057_brain_flair.nii"
    inner.parent.mkdir()
    inner.touch()
    paths = [row.source.path for row in brats21.ADAPTER.read(tmp_path).rows]
    assert inner.relative_to(tmp_path).as_posix() in paths


@pytest.fixture(scope="module")
def whole_fets(tmp_path_factory) -> Path:
    """All training patients, files empty, and both partitions."""
    root = tmp_path_factory.mktemp("fets")
    data = root / "MICCAI_FeTS2022_TrainingData"
    first, second = ["Partition_ID,Subject_ID"], ["Partition_ID,Subject_ID"]
    number, next_part = 0, len(INSTITUTIONS) + 1
    for institution, size in INSTITUTIONS.items():
        cut = institution in CUT
        names = [institution, next_part, next_part + 1] if cut else [institution]
        next_part += 2 if cut else 0
        for at in range(size):
            patient = f"FeTS2022_{number:05d}"
            number += 1
            glioma(data, patient, empty=True)
            first.append(f"{institution},{patient}")
            second.append(f"{names[at % len(names)]},{patient}")
    (data / "partitioning_1.csv").write_text("\n".join(first), encoding="utf-8")
    (data / "partitioning_2.csv").write_text("\n".join(second), encoding="utf-8")
    return root


def test_all_institutions_of_fets_come_back_through_its_rows(whole_fets):
    found = fets22.ADAPTER.read(whole_fets)
    assert found.notes == ()
    assert len(found.rows) == 4 * 1251
    assert {row.patient: row.site for row in found.rows} == {
        row.patient: row.facts["partition_1"] for row in found.rows
    }
    sizes = {str(institution): size for institution, size in INSTITUTIONS.items()}
    assert parts(found, "partition_1") == sizes
    second = parts(found, "partition_2")
    assert (len(second), sum(second.values())) == (33, 1251)
    assert second["1"] == 171
    assert {row.split for row in found.rows} == {""}


@pytest.mark.parametrize(
    ("by", "fact", "sites"),
    [("site", "partition_1", 23), ("fact:partition_2", "partition_2", 33)],
)
def test_fets_is_divided_along_its_partitions(whole_fets, by, fact, sites):
    rows = fets22.ADAPTER.read(whole_fets).rows
    placed = partition(rows, by=by)
    assert len(placed) == len(rows)
    members: dict[str, set[str]] = {}
    for item in placed:
        members.setdefault(item.site, set()).add(item.row.facts[fact])
    assert all(len(values) == 1 for values in members.values())
    assert len(members) == sites


def test_fets_counts_what_its_tables_and_folders_do_not_share(tmp_path):
    data = tmp_path / "MICCAI_FeTS2022_TrainingData"
    for number in (0, 1, 2):
        glioma(data, f"FeTS2022_0000{number}")
    glioma(tmp_path / "MICCAI_FeTS2022_ValidationData", "FeTS2022_00009", without=("seg",))
    (data / "partitioning_1.csv").write_text(
        "Partition_ID,Subject_ID\n3,FeTS2022_00000\n1,FeTS2022_00001\n2,FeTS2022_00001\n"
        "4,FeTS2022_77777\n",
        encoding="utf-8",
    )
    found = fets22.ADAPTER.read(tmp_path)
    assert {row.patient[-1]: row.site for row in found.rows} == {
        "0": "3",
        "1": "",
        "2": "",
        "9": "",
    }
    assert found.notes == (
        "no partitioning_2.csv: its parts are unknown",
        "1 patient(s) stand in two parts of partitioning_1.csv and count as in none",
        "1 patient(s) of partition_1 have no folder",
        "2 training patient(s) stand not in partition_1",
    )


@pytest.mark.parametrize("module", [brats21, fets22])
def test_another_folder_is_refused_with_what_was_expected(tmp_path, module):
    with pytest.raises(DataError, match=r"no folder such as \w+2\d_00000. Expected below"):
        module.ADAPTER.read(tmp_path)
