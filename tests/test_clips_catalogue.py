"""The catalogue of clips: older ones, lost shares, commands, and nothing identifying."""

import json
import sqlite3

import pytest
from typer.testing import CliRunner

from agssd_core.data.catalogue import CATALOGUE_NAME, open_catalogue
from agssd_core.data.index import index_folders
from agssd_core.data.prepare import CHANGED, prepare_site
from agssd_core.errors import CatalogueError
from client.cli import app
from tests.support.raw_clips import SMALL, make_raw_clips, write_gif, write_png, write_us_dicom
from tests.support.sites import make_raw_site


@pytest.fixture
def raw(tmp_path):
    return make_raw_clips(tmp_path / "raw")


def _run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_share_that_is_not_mounted_costs_no_clip(tmp_path, raw):
    site = tmp_path / "site"
    index_folders(site, [raw])
    before = open_catalogue(site).clips
    hidden = raw.rename(tmp_path / "hidden")
    raw.mkdir()
    (raw / "readme.txt").write_text("away")
    with pytest.raises(CatalogueError, match="no ultrasound"):
        index_folders(site, [raw])
    assert open_catalogue(site).clips == before
    assert {item.reason for item in prepare_site(site, SMALL).skipped} == {CHANGED}
    raw.rename(tmp_path / "empty")
    hidden.rename(raw)
    assert index_folders(site, [raw]).unchanged == 6


AS_BEFORE = """
DROP TABLE clips;
DELETE FROM meta WHERE name = 'readers';
UPDATE files SET kind = 'other', header = NULL WHERE kind IN ('image', 'video');
UPDATE files SET kind = 'unusable', header = NULL, reason = 'no CT or MR image'
    WHERE kind = 'us-dicom';
"""


def test_a_catalogue_from_before_ultrasound_opens_and_is_brought_up_to_date(tmp_path, raw):
    make_raw_site(raw / "ct", "CT", patients=1)
    site = tmp_path / "site"
    index_folders(site, [raw])
    with sqlite3.connect(site / CATALOGUE_NAME) as table:
        table.executescript(AS_BEFORE)
    table.close()
    content = (site / CATALOGUE_NAME).read_bytes()
    catalogue = open_catalogue(site)
    assert (len(catalogue.records), catalogue.clips, catalogue.cohorts) == (1, (), ("ct-mr",))
    assert (site / CATALOGUE_NAME).read_bytes() == content
    assert prepare_site(site, SMALL).volumes == 1
    report = index_folders(site, [raw])
    assert (report.volumes, report.clips, report.unchanged, report.added) == (1, 6, 1, 6)
    assert report.skipped == ()


def test_nothing_identifying_stands_in_public_records(tmp_path):
    folder = tmp_path / "Doe^John"
    write_us_dicom(folder / "a.dcm", patient="Doe-4711", InstitutionName="Hospital")
    write_gif(folder / "Doe_4711.gif", seed=3)
    write_png(folder / "Doe_mask.png", seed=4)
    report = index_folders(tmp_path / "site", [folder])
    catalogue = open_catalogue(tmp_path / "site")
    public = repr(catalogue.clips) + repr([item.reason for item in report.skipped])
    with sqlite3.connect(tmp_path / "site" / CATALOGUE_NAME) as table:
        rows = table.execute("SELECT header FROM files WHERE header IS NOT NULL").fetchall()
    table.close()
    for word in ("Doe", "4711", "John", "Hospital", "1.2.4"):
        assert word not in public
        assert word not in repr(rows)


def test_the_commands_speak_of_volumes_and_clips(tmp_path, raw):
    make_raw_site(raw / "ct", "CT", patients=1, name="m")
    write_png(raw / "Doe_mask.png", seed=50)
    site = tmp_path / "site"
    indexed = _run("index", raw, "--out", site)
    assert indexed.exit_code == 0, indexed.output
    assert "1 volume(s) and 6 clip(s) of 3 patient(s): 7 new or changed" in indexed.stdout
    settings = ["--set", "data.spacing_mm=[6,6,6]", "--set", "data.frames.min_side=32"]
    prepared = _run("prepare", site, *settings, "--workers", "1")
    assert prepared.exit_code == 0, prepared.output
    assert "1 volume(s) and 6 clip(s) ready: 7 prepared now, 0 before" in prepared.stdout
    assert "Preparing: 7/7" in prepared.stderr
    shown = _run("show", site)
    assert shown.stdout.count("  US  ") == 6
    assert "4 frame(s) of 120x160 pixels" in shown.stdout
    assert "1 volume(s) and 6 clip(s) of 3 patient(s)." in shown.stdout
    for result in (indexed, prepared, shown, _run("skipped", site)):
        assert "Doe" not in result.output
        assert "patient0" not in result.output.replace(str(tmp_path), "")
    assert "Doe_mask.png" in _run("skipped", site, "--paths").stdout
    rows = json.loads(_run("show", site, "--json").stdout)
    assert sorted(row["modality"] for row in rows) == ["CT", *["US"] * 6]
    again = json.loads(_run("prepare", site, *settings, "--workers", "1", "--json").stdout)
    assert {name: again[name] for name in ("ready", "volumes", "clips", "prepared")} == {
        "ready": 7,
        "volumes": 1,
        "clips": 6,
        "prepared": 0,
    }
    again = json.loads(_run("index", raw, "--out", site, "--only", "US", "--json").stdout)
    assert {name: again[name] for name in ("volumes", "clips", "removed", "left_out")} == {
        "volumes": 0,
        "clips": 6,
        "removed": 1,
        "left_out": 1,
    }
    assert "6 clip(s) of 2 patient(s)." in _run("show", site).stdout
    assert "volume" not in _run("show", site).stdout


def test_a_clip_that_cannot_be_prepared_is_among_the_skipped(tmp_path, raw):
    site = tmp_path / "site"
    index_folders(site, [raw])
    prepare_site(
        site, SMALL.model_copy(update={"frames": SMALL.frames.model_copy(update={"min_side": 100})})
    )
    listed = _run("skipped", site, "--paths")
    assert "6 item(s) left out" in listed.stdout
    assert "data.frames.min_side = 100" in listed.stdout
    assert "patient1_loop.gif" in listed.stdout
