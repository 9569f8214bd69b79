"""`agssd-sim split` over its whole life: made again, disturbed, drawn, and trained on."""

import json
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from agssd_core.config import dump_config, parse_config
from agssd_core.errors import ConfigError, DataError
from simulation.cli import app
from simulation.datasets.rows import Row, Source
from simulation.partition import Placed
from simulation.run import run_simulation
from simulation.sites_csv import read_sites
from simulation.split import read_split, with_split
from simulation.split_greys import site_greys
from simulation.split_picture import MOST_SITES, split_picture


@pytest.fixture
def root(tmp_path):
    """Eight people at three hospitals."""
    root, lines = tmp_path / "data", ["path,modality,patient,site,vendor,split,label"]
    rng = np.random.default_rng(0)
    for number in range(8):
        name = f"scans/p{number}/CT_image.nii.gz"
        (root / name).parent.mkdir(parents=True)
        array = rng.integers(-1000, 500, (24, 24, 20)).astype(np.int16)
        nib.save(nib.Nifti1Image(array, np.diag([3.0, 3.0, 3.0, 1.0])), root / name)
        site = ("North", "South", "North", "South", "North", "South", "Lone", "North")[number]
        part = "test" if number == 7 else "train"
        lines.append(f"{name},CT,p{number},{site},GE,{part},{'yes' if number % 2 else 'no'}")
    (root / "MANIFEST.csv").write_text("\n".join(lines))
    return root


def split(root, out, *more):
    arguments = ["split", "manifest", root, "--out", out, *more]
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_it_is_made_again_with_other_sites_and_touches_nothing_else(root, tmp_path):
    out = tmp_path / "out"
    assert split(root, out, "--by", "site").exit_code == 0
    (out / "notes.txt").write_text("mine")
    (out / "raw" / "elsewhere").mkdir()
    (out / "raw" / "elsewhere" / "scan.bin").write_text("mine")
    assert split(root, out, "--by", "quantity:5", "--sites", 2).exit_code == 0
    assert {path.name for path in (out / "raw").iterdir()} == {"elsewhere", "site-1", "site-2"}
    assert (out / "raw" / "elsewhere" / "scan.bin").is_file()
    assert (out / "notes.txt").is_file()


def test_a_download_with_folders_of_the_same_names_is_not_overwritten(root):
    own = root / "raw" / "North"
    own.mkdir(parents=True)
    (own / "scan.bin").write_text("mine")
    answer = split(root, root, "--by", "site")
    assert answer.exit_code == 2
    assert "nothing in it was changed" in answer.output
    assert (own / "scan.bin").is_file()
    with pytest.raises(DataError, match="holds no division"):
        read_split(root)


def test_a_scan_that_cannot_be_used_is_counted_with_its_reason(root, tmp_path):
    (root / "bad.mha").write_text("no image")
    table = root / "MANIFEST.csv"
    table.write_text(table.read_text() + "\nbad.mha,CT,p9,Far,GE,train,no")
    answer = split(root, tmp_path / "out", "--by", "site", "--folds", 0)
    assert answer.exit_code == 0, answer.output
    assert "1 scan(s) cannot train: " in answer.output
    assert not (tmp_path / "out" / "raw" / "Far").exists()
    assert (tmp_path / "out" / "raw" / "Lone").is_dir()


def test_the_official_test_set_is_held_out_or_left_aside(root, tmp_path):
    assert split(root, tmp_path / "out", "--by", "site").exit_code == 0
    held = [one for one in read_sites(tmp_path / "out" / "sites.csv") if one.split == "test"]
    assert [one.row.patient for one in held] == ["p7"]
    assert split(root, tmp_path / "own", "--by", "site", "--no-official").exit_code == 0
    division, placed = read_split(tmp_path / "own")
    assert division.official is False
    assert Counter(one.split for one in placed) == {"test": 2, "train": 6}


def test_downstream_is_a_folder_or_its_table_and_must_be_whole(root, tmp_path):
    assert split(root, tmp_path / "down", "--by", "site", "--no-official").exit_code == 0
    for name in ("down", "down/sites.csv"):
        more = ("--by", "site", "--no-official", "--fold", "1", "--downstream", tmp_path / name)
        answer = split(root, tmp_path / "up", *more)
        assert answer.exit_code == 2
        assert "none may be" in answer.output
    about = tmp_path / "down" / "split.json"
    for text in ("{", "[]", '{"dataset": 1}'):
        about.write_text(text)
        answer = split(root, tmp_path / "up", "--by", "site", "--downstream", tmp_path / "down")
        assert answer.exit_code == 2
        assert "holds no division" in answer.output


def test_a_table_that_was_edited_no_longer_belongs_to_its_folders(root, tmp_path):
    split(root, tmp_path / "out", "--by", "site")
    file = tmp_path / "out" / "sites.csv"
    file.write_text(file.read_text().replace(",GE,", ",Philips,"))
    with pytest.raises(DataError, match="Make the division again"):
        read_split(tmp_path / "out")
    assert (tmp_path / "out" / "split.json").stat().st_mode & 0o777 == 0o600


ONE = "federation.min_sites=1"


@contextmanager
def quiet(title):
    yield lambda done, total: (done, total)


def settings(tmp_path, *more):
    return parse_config(
        {},
        [
            *("preset=tiny", "name=of-split", f"output={tmp_path / 'runs'}", "cohorts=[ct-mr]"),
            *("federation.rounds=1", "federation.steps_per_round=1", "federation.min_sites=2"),
            *more,
        ],
    )


def test_a_run_trains_on_the_sites_of_a_split_and_on_no_other_later(root, tmp_path):
    out = tmp_path / "out"
    assert split(root, out, "--by", "quantity:100", "--sites", 2, "--seed", 3).exit_code == 0
    config = settings(tmp_path, f"simulation.split={out}")
    assert [entry.name for entry in with_split(config).data.sites] == ["site-1", "site-2"]
    assert "out" not in json.loads(dump_config(config))["simulation"]
    said = []
    report = run_simulation(config, say=said.append, bar=quiet)
    assert report.is_file()
    assert sum("patient(s) ready" in line for line in said) == 2
    trained = sum(int(line.split(": ")[1].split()[0]) for line in said if "ready" in line)
    assert trained == sum(one.split == "train" for one in read_sites(out / "sites.csv"))
    assert split(root, out, "--by", "quantity:100", "--sites", 2, "--seed", 4).exit_code == 0
    with pytest.raises(ConfigError, match="Use the same, or another name"):
        run_simulation(config, say=said.append, bar=quiet)


def test_a_run_has_one_source_of_sites(root, tmp_path):
    split(root, tmp_path / "out", "--by", "site")
    both = settings(
        tmp_path, f"simulation.split={tmp_path / 'out'}", f"data.sites={{a: {root}}}", ONE
    )
    with pytest.raises(ConfigError, match="Leave one of them out"):
        with_split(both)
    with pytest.raises(DataError, match="holds no division"):
        with_split(settings(tmp_path, f"simulation.split={tmp_path}"))


def test_a_picture_of_very_many_sites_shows_the_largest_and_is_the_same_each_time(root):
    rows = [
        Row(f"s{n}", f"p{n}", "CT", Source("scans/p0/CT_image.nii.gz", "nifti"), labels={"c": "x"})
        for n in range(MOST_SITES + 20)
    ]
    placed = [Placed(row, f"site-{n}", "train") for n, row in enumerate(rows)]
    first = split_picture(root, placed)
    assert first == split_picture(root, placed[::-1])
    assert len(first) < 500_000


def test_grey_values_are_of_the_body_and_unreadable_scans_are_passed_over(root):
    rows = [
        Row(f"s{n}", f"p{n}", "CT", Source(path, "nifti"))
        for n, path in enumerate(["scans/p0/CT_image.nii.gz", "gone.nii.gz"])
    ]
    placed = [Placed(row, site, "train") for row, site in zip(rows, "ab", strict=True)]
    told = []
    found = site_greys(root, placed, ["a", "b"], progress=lambda *done: told.append(done))
    assert list(found) == ["CT"]
    assert list(found["CT"]) == ["a"]
    density = found["CT"]["a"]
    assert density.sum() == pytest.approx(1)
    # Values were drawn evenly from -1000 to 500 HU; air below -900 is left out.
    assert density[:3].sum() == 0
    assert density[4:46].min() > 0.5 * density.max()
    assert told == [(1, 2), (2, 2)]


def test_the_documented_table_is_the_one_that_the_command_prints():
    page = (Path(__file__).parent.parent / "docs" / "datasets.md").read_text(encoding="utf-8")
    printed = CliRunner().invoke(app, ["datasets"]).output
    assert page.endswith(printed)
