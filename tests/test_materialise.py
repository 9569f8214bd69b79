"""Raw folders of simulated sites: indexed as a hospital's, whole or absent, nobody's files lost."""

from dataclasses import replace

import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from agssd_core.config import PhantomSiteConfig
from agssd_core.data.catalogue import open_catalogue
from agssd_core.data.index import index_folders
from agssd_core.errors import DataError
from simulation import materialise
from simulation.datasets.rows import Row, Source
from simulation.materialise import remove_raw_site, unusable_scans, write_raw_site
from simulation.phantom_rows import phantom_rows


def save(file, seed=0, shape=(20, 20, 16)):
    file.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(seed).integers(-1000, 500, shape).astype(np.int16)
    nib.save(nib.Nifti1Image(array, np.diag([3.0, 3.0, 3.0, 1.0])), file)


@pytest.fixture
def root(tmp_path):
    """Two plain volumes of one patient, two of a 4D file, and a still with a misleading name."""
    root = tmp_path / "data"
    for name, seed in (("label_seg", 0), ("pet_07", 1)):
        save(root / f"{name}.nii.gz", seed)
    save(root / "four.nii.gz", 2, (20, 20, 16, 2))
    frame = np.random.default_rng(3).integers(40, 250, (200, 220), dtype=np.uint8)
    Image.fromarray(frame).save(root / "mask.PNG")
    return root


ROWS = (
    Row("x", "p 1", "CT", Source("label_seg.nii.gz", "nifti"), vendor="GE"),
    Row("y", "p 1", "MR", Source("pet_07.nii.gz", "nifti"), vendor="Philips"),
    Row("t1", "p2", "MR", Source("four.nii.gz", "nifti", 0), vendor="Siemens"),
    Row("t2", "p2", "MR", Source("four.nii.gz", "nifti", 1), vendor="Siemens"),
    Row("u", "p2", "US", Source("mask.PNG", "image"), vendor="Mindray"),
)


def state(folder):
    return {
        path.relative_to(folder): (path.lstat().st_mtime_ns, path.lstat().st_ino)
        for path in folder.rglob("*")
    }


def test_a_site_of_any_files_is_indexed_with_its_patients_modalities_and_vendors(root, tmp_path):
    told = []
    made = write_raw_site(root, ROWS, tmp_path / "raw", progress=lambda *done: told.append(done))
    assert made == 5
    assert told[-1] == (5, 5)
    report = index_folders(tmp_path / "site", [tmp_path / "raw"])
    assert not report.skipped
    catalogue = open_catalogue(tmp_path / "site")
    found = sorted((record.modality, record.vendor) for record in catalogue.scans)
    assert found == sorted((row.modality, row.vendor) for row in ROWS)
    by_patient = {}
    for record in catalogue.scans:
        by_patient.setdefault(record.patient, set()).add(record.vendor)
    assert sorted(map(sorted, by_patient.values())) == [["GE", "Philips"], ["Mindray", "Siemens"]]


def test_phantom_hospitals_in_every_format_are_indexed(tmp_path):
    site = PhantomSiteConfig(
        name="all", modalities=("CT", "MR", "US"), format="dicom", patients=2, size=(24, 24, 20)
    )
    rows = phantom_rows(tmp_path / "data", [site], seed=0).rows
    assert write_raw_site(tmp_path / "data", rows, tmp_path / "raw") == len(rows)
    report = index_folders(tmp_path / "site", [tmp_path / "raw"])
    assert (report.volumes + report.clips, report.patients) == (len(rows), 2)


def test_a_second_call_does_nothing_and_a_killed_one_goes_on(root, tmp_path, monkeypatch):
    raw = tmp_path / "raw"
    real, calls = materialise._fill, []

    def killed(data, row, place):
        calls.append(row.scan)
        real(data, row, place)
        if row.scan == "t2":
            raise KeyboardInterrupt

    monkeypatch.setattr(materialise, "_fill", killed)
    with pytest.raises(KeyboardInterrupt):
        write_raw_site(root, ROWS, raw)
    assert not [path for path in raw.rglob("*") if path.name.endswith(".tmp")]
    monkeypatch.setattr(materialise, "_fill", lambda *a: calls.append(a[1].scan) or real(*a))
    assert write_raw_site(root, ROWS, raw) == 5
    assert calls == ["x", "y", "t1", "t2", "t2", "u"]
    before = state(raw)
    assert write_raw_site(root, ROWS, raw) == 5
    assert state(raw) == before


def test_what_a_killed_process_left_half_done_is_no_scan(root, tmp_path):
    raw = tmp_path / "raw"
    write_raw_site(root, ROWS, raw)
    place = next(raw.glob("scan-*/scan-*"))
    half = place.with_name(f".{place.name}.tmp")
    place.rename(half)
    (half / materialise.MADE).unlink()
    assert write_raw_site(root, ROWS, raw) == 5
    assert place.is_dir()
    assert not half.exists()


def test_patients_who_are_held_out_later_do_not_stay(root, tmp_path):
    raw = tmp_path / "raw"
    write_raw_site(root, ROWS, raw)
    assert write_raw_site(root, ROWS[:2], raw) == 2
    assert index_folders(tmp_path / "site", [raw]).patients == 1


def test_somebodys_own_files_are_never_removed(root, tmp_path):
    precious = root / "raw" / "north"
    save(precious / "scan.nii.gz")
    with pytest.raises(DataError, match="nothing in it was changed"):
        write_raw_site(root, ROWS, precious)
    remove_raw_site(precious)
    assert [path.name for path in precious.iterdir()] == ["scan.nii.gz"]
    write_raw_site(root, ROWS, tmp_path / "raw")
    (tmp_path / "raw" / "notes.txt").write_text("mine")
    remove_raw_site(tmp_path / "raw")
    assert [path.name for path in (tmp_path / "raw").iterdir()] == ["notes.txt"]
    assert (root / "label_seg.nii.gz").is_file()


def test_an_unusable_scan_is_listed_and_does_not_stop_the_others(root, tmp_path):
    (root / "bad.nii.gz").write_bytes(b"no scan")
    bad = Row("bad", "p3", "CT", Source("bad.nii.gz", "nifti", 0))
    gone = Row("gone", "p3", "CT", Source("gone.nii.gz", "nifti"))
    raw = tmp_path / "raw"
    assert write_raw_site(root, [bad, gone, *ROWS], raw) == 5
    assert sorted(unusable_scans(raw)) == ["bad", "gone"]
    assert "missing" in unusable_scans(raw)["gone"]
    assert "no readable NIfTI" in unusable_scans(raw)["bad"]
    save(root / "gone.nii.gz", 9)
    assert write_raw_site(root, [bad, gone, *ROWS], raw) == 6
    with pytest.raises(DataError, match=r"none of the site's 1 scan\(s\) can be used"):
        write_raw_site(root, [bad], tmp_path / "other")


def test_a_moved_or_mended_data_set_is_seen(root, tmp_path):
    raw = tmp_path / "raw"
    write_raw_site(root, ROWS, raw)
    moved = root.rename(tmp_path / "moved")
    write_raw_site(moved, ROWS, raw)
    assert not index_folders(tmp_path / "site", [raw]).skipped
    said = [replace(ROWS[0], vendor="Canon"), *ROWS[1:]]
    write_raw_site(moved, said, raw)
    index_folders(tmp_path / "again", [raw])
    assert "Canon" in {record.vendor for record in open_catalogue(tmp_path / "again").scans}
