"""`agssd-sim split` and `datasets`: the folder that other commands read."""

import json

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from agssd_core.data.catalogue import open_catalogue
from agssd_core.data.index import index_folders
from agssd_core.errors import ConfigError, DataError
from simulation.cli import app
from simulation.datasets.known import ADAPTERS
from simulation.leakage import refuse_leakage
from simulation.sites_csv import read_sites

HEAD = "path,modality,patient,site,vendor,mask,label"


@pytest.fixture
def data_set(tmp_path):
    """Six people at two hospitals, each with one volume."""
    root, lines = tmp_path / "data", [HEAD]
    rng = np.random.default_rng(0)
    for number in range(6):
        name = f"scans/p{number}/CT_image.nii.gz"
        (root / name).parent.mkdir(parents=True)
        array = rng.integers(-1000, 500, (24, 24, 20)).astype(np.int16)
        nib.save(nib.Nifti1Image(array, np.diag([3.0, 3.0, 3.0, 1.0])), root / name)
        site = "North General" if number < 3 else "South"
        lines.append(f"{name},CT,p{number},{site},GE,,{'yes' if number % 2 else 'no'}")
    (root / "MANIFEST.csv").write_text("\n".join(lines))
    return root


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def split(root, out, *more):
    return run("split", "manifest", root, "--by", "site", "--folds", 3, "--out", out, *more)


def test_it_writes_a_table_a_picture_and_sites_that_can_be_indexed(data_set, tmp_path):
    answer = split(data_set, tmp_path / "out")
    assert answer.exit_code == 0, answer.output
    assert "North-General: 2 scan(s) train, 1 held out" in answer.output
    assert (tmp_path / "out" / "split.png").stat().st_size > 10_000
    index_folders(tmp_path / "site", [tmp_path / "out" / "raw" / "North-General"])
    catalogue = open_catalogue(tmp_path / "site")
    assert (len(catalogue.records), catalogue.patient_count) == (2, 2)
    assert {record.vendor for record in catalogue.records} == {"GE"}


def test_the_same_seed_gives_the_same_bytes_and_a_second_run_changes_nothing(data_set, tmp_path):
    for name in ("one", "two", "one"):
        assert split(data_set, tmp_path / name).exit_code == 0
    one, two = (tmp_path / name / "sites.csv" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    assert one.stat().st_mode & 0o777 == 0o600


def test_a_table_in_which_a_patient_straddles_is_refused(data_set, tmp_path):
    split(data_set, tmp_path / "out")
    file = tmp_path / "out" / "sites.csv"
    lines = file.read_text().splitlines()
    north = next(line.split(",")[2] for line in lines if line.startswith("North-General,train"))
    last = lines[-1].split(",")
    lines[-1] = ",".join([*last[:2], north, *last[3:]])
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match="Give each patient one site and one side"):
        read_sites(file)


def test_pretraining_on_tomorrows_test_patients_is_refused(data_set, tmp_path):
    assert split(data_set, tmp_path / "down", "--seed", 1).exit_code == 0
    answer = split(data_set, tmp_path / "up", "--fold", 1, "--downstream", tmp_path / "down")
    assert answer.exit_code == 2
    assert "none may be" in answer.output
    same = split(data_set, tmp_path / "same", "--seed", 1, "--downstream", tmp_path / "down")
    assert same.exit_code == 0, same.output


def test_data_sets_that_show_the_same_people_are_refused():
    pair = next(
        (name, other)
        for name, adapter in ADAPTERS.items()
        for other in adapter.info.shares_patients_with
        if other in ADAPTERS
    )
    with pytest.raises(ConfigError, match="Pre-train on another data set"):
        refuse_leakage((), (), names=pair)


def test_the_list_names_every_data_set_and_its_layout():
    answer = run("datasets")
    assert answer.exit_code == 0
    assert all(f"| {name} |" in answer.output for name in ADAPTERS)
    told = run("datasets", "busi")
    assert "Dataset_BUSI_with_GT" in told.output
    plain = json.loads(run("datasets", "--json").output)
    assert {one["name"] for one in plain} == set(ADAPTERS)


def test_unknown_names_are_said(tmp_path):
    assert "agssd-sim datasets" in run("split", "x", tmp_path, "--by", "site", "--out", "o").output
    wrong = run("split", "busi", tmp_path, "--by", "site", "--out", tmp_path / "o")
    assert wrong.exit_code == 2
    assert "official layout" in wrong.output
