"""Bad input at the commands: a line with fact, limit and remedy, exit code 2, nothing half done."""

import errno
import os

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from client.cli import app as site_app
from server.cli import app as server_app
from server.manifest import RoundRecord
from server.store import RunStore
from simulation.cli import app as sim_app
from tests.support.dicoms import change, write_series
from tests.support.sites import make_raw_site

SMALL = """
name: small
preset: tiny
data: {spacing_mm: [6, 6, 6], foreground_margin: 2}
agssd:
  cvac: {global_size: [16, 16, 16], local_size: [8, 8, 8], n_local: 1}
  model: {width: 24, depth: 1, heads: 2}
  head: {prototypes: 32, hidden: 32, bottleneck: 16}
training: {batch_size: 2}
federation: {rounds: 1, steps_per_round: 1, min_sites: 2, poll_s: 0.01}
simulation: {workers: 1}
"""


def _nifti(folder, shape, *, spoil=None, spacing_mm=6.0):
    array = np.random.default_rng(0).normal(0, 100, shape).astype(np.float32)
    if spoil is not None:
        array[(2,) * array.ndim] = spoil
    affine = np.diag([spacing_mm, spacing_mm, spacing_mm, 1.0])
    nib.save(nib.Nifti1Image(array, affine), folder / "p1_ct.nii.gz")


def _unreadable(folder):
    (folder / "p1_ct.nii.gz").write_bytes(b"\x1f\x8b" + b"no gzip" * 400)


def _cut(folder):
    for file in write_series(folder):
        file.write_bytes(file.read_bytes()[:700])


def _mixed(folder):
    for file in write_series(folder)[::2]:
        change(file, ImageOrientationPatient=[0, 1, 0, 0, 0, -1])


def _missing(folder):
    for file in write_series(folder)[6:9]:
        file.unlink()


BAD = {
    "empty folder": (lambda _folder: None, "hold no file, at least one", "Name folders"),
    "unreadable file": (_unreadable, "no readable NIfTI", "again"),
    "cut file": (_cut, "no usable CT or MR scan was found among 16 file(s)", "The first:"),
    "mixed series": (_mixed, "mixes 2 image sizes", "series of its own"),
    "missing slices": (_missing, "3 slice(s) look missing", "Export"),
    "nan": (lambda f: _nifti(f, (30,) * 3, spoil=np.nan), "1 voxel(s) are NaN", "Replace them"),
    "4d": (lambda f: _nifti(f, (16, 16, 16, 3)), "4 dimensions, only 3", "Split"),
    "small": (lambda f: _nifti(f, (4, 5, 3)), "every side needs", "or leave the scan out"),
}


def _invoke(app, *arguments):
    """Run a command that must refuse, and return what it said on stderr and stdout."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 2, (result.output, result.exception)
    assert isinstance(result.exception, SystemExit)
    assert result.stderr.strip()
    assert "Traceback" not in result.output
    return result.output


def _half_written(folder):
    return [path for path in folder.rglob("*") if ".tmp" in path.name]


@pytest.fixture
def config(tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text(SMALL)
    return file


@pytest.mark.parametrize("case", BAD)
def test_index_and_prepare_refuse_a_site_of_bad_scans(tmp_path, config, case):
    write, fact, remedy = BAD[case]
    raw, site = tmp_path / "raw", tmp_path / "site"
    raw.mkdir()
    write(raw)
    indexed = CliRunner().invoke(site_app, ["index", str(raw), "--out", str(site)])
    said = indexed.output
    if indexed.exit_code == 0:  # what only the voxels tell
        said += _invoke(site_app, "prepare", site, "--config", config, "--workers", 1)
    else:
        _invoke(site_app, "index", raw, "--out", site)
    assert fact in said
    assert remedy in said
    assert "Doe" not in said
    assert not _half_written(tmp_path)
    assert not list(site.glob("cache/*"))


@pytest.mark.parametrize("case", BAD)
def test_a_simulation_refuses_a_site_of_bad_scans(tmp_path, config, case):
    write, fact, remedy = BAD[case]
    bad, good = tmp_path / "bad", tmp_path / "good"
    bad.mkdir()
    write(bad)
    make_raw_site(good, "MR", patients=1)
    said = _invoke(
        sim_app, "run", config, f"output={tmp_path}", f"data.sites={{a: {bad}, b: {good}}}"
    )
    assert fact in said
    assert remedy in said
    assert not _half_written(tmp_path)
    assert not (tmp_path / "small" / "report.html").exists()
    assert RunStore(tmp_path / "small").rounds() == [0]


@pytest.mark.parametrize("case", [name for name in BAD if name != "empty folder"])
def test_bad_scans_among_good_ones_are_told_and_cost_nothing_else(tmp_path, config, case):
    raw, site = tmp_path / "raw", tmp_path / "site"
    make_raw_site(raw, "MR", patients=1)
    (raw / "bad").mkdir()
    BAD[case][0](raw / "bad")
    indexed = CliRunner().invoke(site_app, ["index", str(raw), "--out", str(site)])
    prepared = CliRunner().invoke(
        site_app, ["prepare", str(site), "--config", str(config), "--workers", "1"]
    )
    assert (indexed.exit_code, prepared.exit_code) == (0, 0)
    if case != "cut file":
        assert BAD[case][1] in indexed.stdout + prepared.stdout
    assert "1 volume(s) ready" in prepared.stdout
    assert not _half_written(tmp_path)


@pytest.mark.parametrize("app", [sim_app, server_app], ids=["sim", "server"])
def test_a_wrong_key_names_the_right_one(tmp_path, config, app):
    config.write_text(SMALL.replace("steps_per_round", "step_per_round"))
    said = _invoke(app, "check", config)
    assert "federation.step_per_round is not a known key. Did you mean 'steps_per_round'?" in said
    command = ["run", config] if app is sim_app else ["serve", config, "--loopback"]
    assert "Did you mean" in _invoke(app, *command, f"output={tmp_path}")
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("place", ["nowhere.yaml", "."])
def test_a_config_that_is_no_file_is_refused(tmp_path, place):
    assert "is not a file. Name a YAML file" in _invoke(sim_app, "run", tmp_path / place)


def test_an_output_that_is_no_folder_is_refused(tmp_path, config):
    said = _invoke(sim_app, "run", config, f"output={config}")
    assert "cannot be written" in said
    assert "mend the folder's permissions" in said


@pytest.fixture
def begun(tmp_path, config):
    """A run's folder with checkpoints 0 and 1, the second with a flipped byte."""
    result = CliRunner().invoke(sim_app, ["init", str(config), f"output={tmp_path}"])
    assert result.exit_code == 0, result.output
    store = RunStore(tmp_path / "small")
    first = store.load(0)
    facts = ("run", "cohort", "config")
    record = {name: getattr(first.manifest, name) for name in facts}
    store.save_round(RoundRecord(round=1, **record), first.weights)
    return store


@pytest.mark.parametrize("file", ["weights.safetensors", "manifest.json"])
@pytest.mark.parametrize("verb", ["run", "init", "export", "serve"])
def test_a_checkpoint_with_a_flipped_byte_stops_every_command(tmp_path, config, begun, file, verb):
    path = begun.checkpoints / "round-0001" / file
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    before = {p: p.stat().st_mtime_ns for p in begun.checkpoints.rglob("*")}
    out = tmp_path / "vit.safetensors"
    if verb == "export":
        for more in ([], ["--round", 1]):
            said = _invoke(sim_app, "export", begun.folder, "--out", out, *more)
            assert "damaged" in said
            assert "Restore" in said
        assert not out.exists()
    elif verb == "serve":
        given = [f"output={tmp_path}", "federation.expected_sites=2", "--loopback"]
        assert "Restore" in _invoke(server_app, "serve", config, *given, "federation.rounds=1")
    else:
        said = _invoke(sim_app, verb, config, f"output={tmp_path}")
        assert "the last whole one is that of round 0" in said
        assert "move it out of checkpoints/" in said
    assert {p: p.stat().st_mtime_ns for p in begun.checkpoints.rglob("*")} == before
    assert not _half_written(tmp_path)


@pytest.mark.parametrize("file", ["sites.json", "enrolment.json", "phantoms.json", "report.html"])
def test_a_disk_that_fills_up_anywhere_is_named(tmp_path, config, monkeypatch, file):
    """Small files as well as checkpoints, which tests/test_store.py fills disks with."""
    really_open = os.open

    def full(path, *more, **kwargs):
        if file in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return really_open(path, *more, **kwargs)

    given = [f"output={tmp_path}", "federation.min_sites=1"]
    sites = "[{name: a, patients: 1, size: [32, 32, 24], spacing_mm: [8, 8, 9]}]"
    given.append(f"simulation.phantoms={sites}")
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", full)
        said = _invoke(sim_app, "run", config, *given)
    assert "No space left on device" in said or "OSError" in said
    assert "Free disk space" in said
    assert not _half_written(tmp_path)
    again = CliRunner().invoke(sim_app, ["run", str(config), *given])
    assert again.exit_code == 0, again.output
    assert RunStore(tmp_path / "small").rounds() == [0, 1]
