"""``agssd-site index``, ``prepare``, ``skipped`` and ``show`` as a user meets them."""

import json
import re
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from agssd_core.console import new_app, progress_bar
from agssd_core.errors import ConfigError
from client.cli import app
from tests.support.dicoms import write_series
from tests.support.sites import make_raw_site

SETTINGS = ["--set", "data.spacing_mm=[6,6,6]", "--set", "data.chunk=32", "--workers", "1"]


def _run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_index_prepare_show_and_skipped(tmp_path):
    raw = make_raw_site(tmp_path / "raw", ("CT", "MR"), patients=2)
    write_series(tmp_path / "Doe^John", patient="Doe-4711")
    broken = tmp_path / "Doe^John" / "0003.dcm"
    broken.write_bytes(broken.read_bytes()[:600])
    site = tmp_path / "site"
    indexed = _run("index", raw, tmp_path / "Doe^John", "--out", site)
    assert indexed.exit_code == 0, indexed.output
    assert "4 volume(s) of 2 patient(s): 4 new or changed" in indexed.stdout
    assert "1 slice(s) look missing" in indexed.stdout
    prepared = _run("prepare", site, *SETTINGS)
    assert prepared.exit_code == 0, prepared.output
    assert "4 volume(s) ready: 4 prepared now" in prepared.stdout
    assert "Preparing: 4/4" in prepared.stderr
    shown = _run("show", site)
    assert shown.stdout.count("patient") == 4 + 1
    listed = _run("skipped", site)
    assert "2 item(s) left out" in listed.stdout
    for result in (indexed, prepared, shown, listed):
        assert "Doe" not in result.output.replace(str(tmp_path), "")
    assert str(broken) in _run("skipped", site, "--paths").stdout
    rows = json.loads(_run("show", site, "--json").stdout)
    assert {row["modality"] for row in rows} == {"CT", "MR"}
    assert "paths" not in _run("skipped", site, "--json").stdout
    again = json.loads(_run("prepare", site, *SETTINGS, "--json").stdout)
    assert (again["ready"], again["prepared"]) == (4, 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("index", "{tmp}/empty", "--out", "{tmp}/site"), "1 folder(s) hold no file"),
        (("index", "{tmp}/nowhere", "--out", "{tmp}/site"), "does not exist"),
        (("prepare", "{tmp}/site"), "Make one with `agssd-site index"),
        (("show", "{tmp}/site"), "Make one with `agssd-site index"),
        (("prepare", "{tmp}/site", "--set", "data.spacing=3"), "data.spacing is not a known key"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(tmp_path, arguments, message):
    (tmp_path / "empty").mkdir()
    result = _run(*(part.replace("{tmp}", str(tmp_path)) for part in arguments))
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "site").exists()


def test_nothing_to_train_on_is_told_by_the_exit_code(tmp_path):
    array = np.arange(8 * 8 * 3, dtype=np.int16).reshape(8, 8, 3) - 100
    nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / "ct.nii.gz")
    site = tmp_path.with_name(tmp_path.name + "-site")
    assert _run("index", tmp_path, "--out", site).exit_code == 0
    result = _run("prepare", site, *SETTINGS)
    assert result.exit_code == 2
    assert "every side needs 8" in result.stdout
    assert "no volume is ready" in result.stderr
    (tmp_path / "ct.nii.gz").write_bytes(b"")
    fresh = tmp_path.with_name(tmp_path.name + "-fresh")
    assert _run("index", tmp_path, "--out", fresh).exit_code == 2
    result = _run("prepare", fresh, *SETTINGS)
    assert (result.exit_code, result.stderr[:30]) == (2, "the catalogue holds no volume,")


def test_the_console_script_ends_with_code_2(tmp_path):
    code = "from client.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "show", tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("verb", ["index", "prepare", "skipped", "show"])
def test_every_verb_has_help_with_an_example(verb):
    result = _run(verb, "--help")
    text = re.sub(r"\s+", " ", result.stdout)
    assert f"Example: agssd-site {verb}" in text


def test_every_problem_of_a_configuration_has_its_line_and_bugs_keep_their_traceback():
    broken = new_app("test")

    @broken.command()
    def config():
        raise ConfigError("two", ("first [wrong].", "second\nwrong."))

    @broken.command()
    def bug():
        raise ZeroDivisionError

    @broken.command()
    def stopped():
        raise KeyboardInterrupt

    result = CliRunner().invoke(broken, ["config"])
    assert (result.exit_code, result.stderr) == (2, "first [wrong].\nsecond wrong.\n")
    assert isinstance(CliRunner().invoke(broken, ["bug"]).exception, ZeroDivisionError)
    result = CliRunner().invoke(broken, ["stopped"])
    assert result.exit_code == 130
    assert "go on" in result.stderr


def test_progress_without_a_terminal_is_plain_lines(capsys):
    with progress_bar("Working") as advance:
        for done in range(1, 51):
            advance(done, 50)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("Working: 50/50, ")
