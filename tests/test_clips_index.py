"""Ultrasound in the catalogue: found, told apart, kept between runs, and told to nobody."""

import os
import shutil

import pytest

from agssd_core.data import headers as headers_module
from agssd_core.data import index as index_module
from agssd_core.data.catalogue import open_catalogue
from agssd_core.data.grouping import Selection
from agssd_core.data.index import index_folders
from agssd_core.data.prepare import prepare_site
from agssd_core.errors import CatalogueError
from tests.support.dicoms import write_series
from tests.support.raw_clips import SMALL, make_raw_clips, write_png, write_us_dicom
from tests.support.sites import make_raw_site


@pytest.fixture
def raw(tmp_path):
    return make_raw_clips(tmp_path / "raw")


def _reads(monkeypatch):
    """Count the files whose headers are read."""
    seen = []
    real = index_module._read_one

    def counted(path, *args, **kwargs):
        seen.append(path.name)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(index_module, "_read_one", counted)
    return seen


def _fingerprints(site):
    return {record.clip: record.fingerprint for record in open_catalogue(site).clips}


def test_stills_videos_and_dicom_become_clips(tmp_path, raw):
    report = index_folders(tmp_path / "site", [raw])
    catalogue = open_catalogue(tmp_path / "site")
    assert (report.volumes, report.clips, report.patients) == (0, 6, 2)
    found = sorted((r.kind, r.frames, r.rows, r.columns) for r in catalogue.clips)
    assert found == [
        *[("image", 1, 120, 160)] * 2,
        *[("us-dicom", 3, 120, 160)] * 2,
        *[("video", 4, 120, 160)] * 2,
    ]
    assert {record.vendor for record in catalogue.clips if record.kind == "us-dicom"} == {"GE"}
    # A patient's DICOM, images and videos are one person's.
    assert catalogue.patient_count == 2


def test_one_folder_may_hold_ct_mr_and_ultrasound(tmp_path, raw, monkeypatch):
    """Each file's header is read once: a slice of CT never meets the clip reader."""
    make_raw_site(raw / "nifti", "MR", patients=2, name="m")
    write_series(raw / "ct", patient="patient0")
    seen = []
    real = headers_module.read_clip_header

    def counted(path, *args):
        seen.append(path.name)
        return real(path, *args)

    monkeypatch.setattr(headers_module, "read_clip_header", counted)
    report = index_folders(tmp_path / "site", [raw])
    catalogue = open_catalogue(tmp_path / "site")
    assert (report.volumes, report.clips, report.added) == (3, 6, 9)
    assert len(seen) == 6
    assert catalogue.cohorts == ("ct-mr", "us")
    assert (catalogue.scan_count("ct-mr"), catalogue.scan_count("us")) == (3, 6)
    assert (len(catalogue.patients_of("ct-mr")), len(catalogue.patients_of("us"))) == (3, 2)
    assert len(catalogue.patients_of("ct-mr") & catalogue.patients_of("us")) == 1
    assert catalogue.patient_count == report.patients == 4


def test_a_site_without_ultrasound_has_no_such_cohort(tmp_path):
    index_folders(tmp_path / "site", [make_raw_site(tmp_path / "ct", "CT", patients=1)])
    catalogue = open_catalogue(tmp_path / "site")
    assert catalogue.cohorts == ("ct-mr",)
    assert (catalogue.patients_of("us"), catalogue.scan_count("us")) == (frozenset(), 0)


def test_a_second_run_reads_only_what_changed(tmp_path, raw, monkeypatch):
    site = tmp_path / "site"
    first = index_folders(site, [raw])
    before = _fingerprints(site)
    seen = _reads(monkeypatch)
    second = index_folders(site, [raw])
    assert (first.added, second.added, second.unchanged, seen) == (6, 0, 6, [])
    os.utime(raw / "patient0_loop.gif", ns=(1, 1))
    third = index_folders(site, [raw])
    assert (third.added, third.unchanged, seen) == (1, 5, ["patient0_loop.gif"])
    after = _fingerprints(site)
    assert before.keys() == after.keys()
    assert sum(before[name] != after[name] for name in before) == 1


def test_vanished_clips_leave_the_catalogue_and_other_folders_stay(tmp_path, raw):
    site = tmp_path / "site"
    index_folders(site, [make_raw_site(tmp_path / "ct", "CT", patients=1)])
    index_folders(site, [raw])
    (raw / "1.dcm").unlink()
    report = index_folders(site, [raw])
    assert (report.removed, report.volumes, report.clips) == (1, 1, 5)


def test_an_interrupted_run_keeps_what_was_read(tmp_path, raw, monkeypatch):
    monkeypatch.setattr(index_module, "COMMIT_SECONDS", -1.0)

    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index_folders(tmp_path / "site", [raw], progress=stop)
    seen = _reads(monkeypatch)
    assert index_folders(tmp_path / "site", [raw]).clips == 6
    assert len(seen) == sum(1 for path in raw.rglob("*") if path.is_file()) - 2


def test_copies_count_once(tmp_path, raw):
    for file in list(raw.iterdir()):
        shutil.copy(file, raw / f"patient9_{file.name}")
    # The same instance stored once more, with other bytes.
    write_us_dicom(raw / "again.dcm", seed=2, patient="patient0", ImageComments="exported twice")
    report = index_folders(tmp_path / "site", [raw])
    assert (report.clips, report.patients, len(report.skipped)) == (6, 2, 7)
    assert all("a copy of another file" in item.reason for item in report.skipped)


def test_a_folder_that_was_renamed_is_read_at_its_new_place(tmp_path, raw):
    site = tmp_path / "site"
    index_folders(site, [raw])
    before = _fingerprints(site).keys()
    moved = raw.rename(tmp_path / "moved")
    report = index_folders(site, [moved])
    assert (report.clips, report.skipped) == (6, ())
    assert _fingerprints(site).keys() == before
    assert prepare_site(site, SMALL).ready == 6


def test_clip_names_do_not_depend_on_where_the_folder_lies(tmp_path):
    names = []
    for place in ("here", "there"):
        raw = make_raw_clips(tmp_path / place / "raw")
        index_folders(tmp_path / place / "site", [raw], secret=b"k" * 32)
        names.append(list(_fingerprints(tmp_path / place / "site")))
    assert names[0] == names[1]
    # Two folders of one site may hold files of the same names.
    both = [tmp_path / "here" / "raw", tmp_path / "other"]
    write_png(tmp_path / "other" / "patient0_still.png", seed=99)
    assert index_folders(tmp_path / "both", both).clips == 7


def test_selection_by_modality_patient_and_vendor(tmp_path, raw):
    make_raw_site(raw / "ct", "CT", patients=2, name="m")
    chosen = Selection(modalities=("US",), patients=("Patient1",))
    report = index_folders(tmp_path / "a", [raw], selection=chosen)
    assert (report.volumes, report.clips, report.left_out) == (0, 3, 5)
    report = index_folders(tmp_path / "b", [raw], selection=Selection(modalities=("CT",)))
    assert (report.volumes, report.clips, report.left_out) == (2, 0, 6)
    report = index_folders(tmp_path / "c", [raw], selection=Selection(vendors=("GE",)))
    assert (report.volumes, report.clips, report.left_out) == (2, 2, 4)
    with pytest.raises(
        CatalogueError, match=r"8 scan\(s\) were found but the selection wants none"
    ):
        index_folders(tmp_path / "d", [raw], selection=Selection(vendors=("Canon",)))


def test_masks_are_listed_and_not_taken_for_frames(tmp_path, raw):
    write_png(raw / "patient0_still_mask.png", seed=50)
    write_png(raw / "GT" / "patient1.png", seed=51)
    report = index_folders(tmp_path / "site", [raw])
    assert report.clips == 6
    assert [item.reason[:34] for item in report.skipped] == [
        "a mask or label map by its name, n"
    ] * 2


def test_dicom_that_is_neither_is_listed_as_before(tmp_path, raw):
    report_storage = "1.2.840.10008.5.1.4.1.1.88.33"
    write_us_dicom(raw / "report.dcm", instance=77, SOPClassUID=report_storage, Modality="SR")
    cut = raw / "0.dcm"
    cut.write_bytes(cut.read_bytes()[:-3000])
    report = index_folders(tmp_path / "site", [raw])
    assert report.clips == 5
    first, second = (item.reason for item in report.skipped)
    assert "no CT or MR image" in first
    assert "cut short" in second


def test_a_folder_without_anything_usable_says_that_ultrasound_would_do(tmp_path):
    (tmp_path / "raw").mkdir()
    with pytest.raises(CatalogueError, match="CT, MR or ultrasound scan is needed"):
        index_folders(tmp_path / "site", [tmp_path / "raw"])
    (tmp_path / "raw" / "p1.png").write_bytes(b"no image")
    with pytest.raises(CatalogueError, match="no ultrasound, at least one is needed") as caught:
        index_folders(tmp_path / "site", [tmp_path / "raw"])
    assert "The first: the file is empty or no PNG" in str(caught.value)
