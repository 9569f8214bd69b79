"""The catalogue: what is nobody else's, damage, links and folders that moved."""

import hashlib
import json
import os
import re
import shutil
import stat
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

from agssd_core.data.catalogue import CATALOGUE_NAME, database, open_catalogue, site_lock
from agssd_core.data.deidentify import Pseudonymiser
from agssd_core.data.grouping import Selection
from agssd_core.data.index import index_folders
from agssd_core.data.prepare import CHANGED, prepare_site
from agssd_core.errors import CatalogueError
from client.cli import app
from tests.support.dicoms import write_series
from tests.support.sites import FAST, make_raw_site


@pytest.fixture
def raw(tmp_path):
    return make_raw_site(tmp_path / "raw", "CT", patients=2)


def test_nothing_identifying_stands_in_public_records(tmp_path):
    write_series(tmp_path / "Doe^John" / "raw", patient="Doe-4711")
    site = tmp_path / "site"
    report = index_folders(site, [tmp_path / "Doe^John"])
    catalogue = open_catalogue(site)
    public = repr(catalogue.records) + repr(report.skipped)
    for word in ("Doe", "4711", "John", "Phantom^", "1960", "Hospital"):
        assert word not in public
    # The table of files holds paths, as it must, but no header text beyond them.
    with database(site) as table:
        headers = " ".join(row[0] for row in table.execute("SELECT header FROM files"))
    assert "Doe" not in headers
    assert "Phantom^" not in headers
    assert json.loads(table_row(headers))["patient"] == catalogue.records[0].patient


def table_row(headers):
    return headers[: headers.index("} {") + 1] if "} {" in headers else headers


def test_private_files_are_for_their_owner_alone(tmp_path, raw):
    site = tmp_path / "site"
    index_folders(site, [raw])
    key = site / "private" / "secret.key"
    for path, mode in ((site, 0o700), (key, 0o600), (site / CATALOGUE_NAME, 0o600)):
        assert stat.S_IMODE(path.stat().st_mode) == mode
    key.chmod(0o644)
    with pytest.raises(CatalogueError, match="Run `chmod 600`"):
        index_folders(site, [raw])
    key.chmod(0o600)
    key.write_text("zz")
    with pytest.raises(CatalogueError, match=r"Restore private/secret\.key"):
        index_folders(site, [raw])


def test_pseudonyms_need_the_secret():
    one, two = Pseudonymiser(b"1" * 32), Pseudonymiser(b"2" * 32)
    assert one.patient(" Doe  4711") == one.patient("doe 4711")
    assert one.patient("Doe 4711") != two.patient("Doe 4711")
    assert one.patient("Doe") not in hashlib.sha256(b"doe").hexdigest()


def test_a_damaged_catalogue_is_named(tmp_path, raw):
    site = tmp_path / "site"
    index_folders(site, [raw])
    (site / CATALOGUE_NAME).write_bytes(b"garbage " * 100)
    with pytest.raises(CatalogueError, match=r"catalogue is damaged\. Move"):
        open_catalogue(site)


def test_two_commands_do_not_change_a_site_at_once(tmp_path, raw):
    site = tmp_path / "site"
    index_folders(site, [raw])
    with site_lock(site), pytest.raises(CatalogueError, match="another agssd-site command"):
        index_folders(site, [raw])


def test_a_run_that_would_leave_nothing_changes_nothing(tmp_path, raw):
    """A share that is not mounted must not cost a site its prepared volumes."""
    site = tmp_path / "site"
    index_folders(site, [raw])
    before = open_catalogue(site).records
    hidden = raw.rename(tmp_path / "hidden")
    raw.mkdir()
    with pytest.raises(CatalogueError, match="is a network share not mounted"):
        index_folders(site, [raw])
    (raw / "readme.txt").write_text("away")
    with pytest.raises(CatalogueError, match="no usable CT or MR scan"):
        index_folders(site, [raw])
    with pytest.raises(CatalogueError, match="the selection wants none"):
        index_folders(site, [hidden], selection=Selection(vendors=("Canon",)))
    assert open_catalogue(site).records == before
    assert {item.reason for item in prepare_site(site, FAST).skipped} == {CHANGED}
    raw.rename(tmp_path / "empty")
    hidden.rename(raw)
    assert index_folders(site, [raw]).unchanged == 2
    assert prepare_site(site, FAST).ready == 2


def test_linked_folders_are_followed_and_what_cannot_be_reached_is_listed(tmp_path, raw):
    linked = tmp_path / "linked"
    linked.mkdir()
    (linked / "scans").symlink_to(raw)
    (linked / "again").symlink_to(linked)  # a circle
    (linked / "gone.nii.gz").symlink_to(tmp_path / "nowhere")
    (linked / "turning.nii.gz").symlink_to(linked / "turning.nii.gz")
    os.mkfifo(linked / "pipe.nii.gz")  # opening it would wait for ever
    report = index_folders(tmp_path / "site", [linked])
    assert report.volumes == 2
    assert [item.reason[:23] for item in report.skipped] == ["a link leads to no file"] * 2


def test_a_folder_that_cannot_be_opened_is_listed(tmp_path, raw, monkeypatch):
    closed = raw / "closed"
    closed.mkdir()
    really = os.scandir

    def scandir(path):
        if os.fspath(path) == str(closed):
            raise PermissionError(13, "denied", str(closed))  # root may open every folder
        return really(path)

    monkeypatch.setattr(os, "scandir", scandir)
    (item,) = index_folders(tmp_path / "site", [raw]).skipped
    assert "folder cannot be opened" in item.reason
    assert item.paths == (str(closed),)


@pytest.mark.parametrize("name", ["a.nrrd", "a.mha", "CT.hdr", "all.zip", "s.tar.gz"])
def test_formats_that_are_not_read_are_listed(tmp_path, raw, name):
    (raw / name).write_bytes(b"whatever")
    (item,) = index_folders(tmp_path / "site", [raw]).skipped
    assert re.search("convert it to .nii.gz|unpack it", item.reason)


def test_a_copy_of_a_nifti_counts_once(tmp_path, raw):
    file = next(raw.rglob("*.nii.gz"))
    (raw / "Doe").mkdir()
    shutil.copy(file, raw / "Doe" / "CT.nii.gz")
    report = index_folders(tmp_path / "site", [raw])
    assert (report.volumes, report.patients) == (2, 2)
    assert "a copy of another file" in report.skipped[0].reason


def test_names_that_are_no_text_are_read_and_printed(tmp_path, raw):
    place = os.fsdecode(os.fsencode(raw) + b"/M\xfcller\n")
    Path(place).mkdir()
    for number, name in enumerate(("CT_1.nii.gz", "CT_cut.nii.gz")):
        array = np.arange(8000, dtype=np.int16).reshape(20, 20, 20) - 1000 - number
        nib.save(nib.Nifti1Image(array, np.diag([6.0, 6.0, 6.0, 1.0])), raw / name)
        (raw / name).rename(Path(place) / name)
    cut = Path(place) / "CT_cut.nii.gz"
    cut.write_bytes(cut.read_bytes()[:-900])
    site = tmp_path / "site"
    assert index_folders(site, [raw]).volumes == 4
    assert index_folders(site, [raw]).unchanged == 4
    assert prepare_site(site, FAST).ready == 3
    result = CliRunner().invoke(app, ["skipped", str(site), "--paths"])
    assert r"M\xfcller\n/CT_cut.nii.gz" in result.stdout
    cut.unlink()
    assert index_folders(site, [raw]).removed == 1


def test_a_folder_that_was_renamed_is_read_at_its_new_place(tmp_path, raw):
    write_series(raw / "series", patient="Roe")
    site = tmp_path / "site"
    index_folders(site, [raw])
    before = {record.volume for record in open_catalogue(site).records}
    moved = raw.rename(tmp_path / "moved")
    report = index_folders(site, [moved])
    assert (report.volumes, report.skipped) == (3, ())
    assert {record.volume for record in open_catalogue(site).records} == before
    assert prepare_site(site, FAST).ready == 3
