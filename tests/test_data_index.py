"""The catalogue: what is found, what is kept between runs, and what never leaves the folder."""

import hashlib
import os

import nibabel as nib
import numpy as np
import pytest

from agssd_core.data import index as index_module
from agssd_core.data.catalogue import open_catalogue
from agssd_core.data.deidentify import ensure_secret
from agssd_core.data.grouping import Selection
from agssd_core.data.index import index_folders
from agssd_core.data.naming import describe_name
from agssd_core.errors import CatalogueError
from tests.support.dicoms import write_series
from tests.support.sites import make_raw_site


@pytest.fixture
def raw(tmp_path):
    return make_raw_site(tmp_path / "raw", "CT", patients=2)


def _reads(monkeypatch):
    """Count the files whose headers are read."""
    seen = []
    real = index_module._read_one

    def counted(path, *args, **kwargs):
        seen.append(path.name)
        return real(path, *args, **kwargs)

    monkeypatch.setattr(index_module, "_read_one", counted)
    return seen


def test_a_second_run_reads_only_what_changed(tmp_path, raw, monkeypatch):
    site = tmp_path / "site"
    first = index_folders(site, [raw])
    before = {r.volume: r.fingerprint for r in open_catalogue(site).records}
    seen = _reads(monkeypatch)
    second = index_folders(site, [raw])
    assert (first.added, second.added, second.unchanged, seen) == (2, 0, 2, [])
    file = next(raw.rglob("*.nii.gz"))
    os.utime(file, ns=(1, 1))
    third = index_folders(site, [raw])
    assert (third.added, third.unchanged, seen) == (1, 1, [file.name])
    after = {r.volume: r.fingerprint for r in open_catalogue(site).records}
    assert before.keys() == after.keys()
    assert sum(before[name] != after[name] for name in before) == 1


def test_vanished_scans_leave_the_catalogue_and_other_folders_stay(tmp_path, raw):
    other = make_raw_site(tmp_path / "other", "MR", patients=1)
    site = tmp_path / "site"
    index_folders(site, [raw])
    index_folders(site, [other])
    assert len(open_catalogue(site).records) == 3
    next(raw.rglob("*.nii.gz")).unlink()
    report = index_folders(site, [raw])
    assert (report.removed, report.volumes) == (1, 2)


def test_an_interrupted_run_keeps_what_was_read(tmp_path, raw, monkeypatch):
    site = tmp_path / "site"
    monkeypatch.setattr(index_module, "COMMIT_SECONDS", -1.0)

    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        index_folders(site, [raw], progress=stop)
    seen = _reads(monkeypatch)
    report = index_folders(site, [raw])
    assert report.volumes == 2
    assert len(seen) == sum(1 for path in raw.rglob("*") if path.is_file()) - 2


def test_an_empty_folder_is_refused_and_leaves_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CatalogueError, match=r"hold no file.* Name folders"):
        index_folders(tmp_path / "site", [tmp_path / "empty"])
    assert not (tmp_path / "site").exists()


def test_a_missing_folder_is_refused_without_its_name(tmp_path):
    with pytest.raises(CatalogueError, match="folder 1 of 1 does not exist") as caught:
        index_folders(tmp_path / "site", [tmp_path / "4711"])
    assert "4711" not in str(caught.value)


def test_a_folder_of_unusable_scans_is_refused_but_listed(tmp_path):
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "ct.nii.gz").write_bytes(b"not gzip at all")
    with pytest.raises(CatalogueError, match="no usable CT or MR scan was found among 1 file"):
        index_folders(tmp_path / "site", [tmp_path / "raw"])
    (item,) = open_catalogue(tmp_path / "site").skipped
    assert "no readable NIfTI" in item.reason


def test_an_unreadable_file_is_listed(tmp_path, raw):
    # Reading this file fails whoever asks, root included.
    (raw / "scan.dcm").symlink_to("/proc/self/mem")
    report = index_folders(tmp_path / "site", [raw])
    assert report.volumes == 2
    assert "cannot be opened (OSError)" in report.skipped[0].reason


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("ct_4d", (8, 8, 8, 5), "4 dimensions, only 3"),
        ("ct_flat", (8, 8), "2 dimensions, only 3"),
        ("ct_mask", (8, 8, 8), "a mask or label map"),
        ("pet", (8, 8, 8), "neither CT nor MR"),
        ("anything", (8, 8, 8), "--modality MR"),
    ],
)
def test_unusable_nifti_is_listed_with_its_reason(tmp_path, raw, name, shape, message):
    image = nib.Nifti1Image(np.arange(np.prod(shape), dtype=np.int16).reshape(shape), np.eye(4))
    nib.save(image, raw / f"{name}.nii.gz")
    report = index_folders(tmp_path / "site", [raw])
    assert report.volumes == 2
    assert message in report.skipped[0].reason


def test_a_nifti_of_unknown_kind_takes_the_modality_named(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    image = nib.Nifti1Image(np.arange(1000, dtype=np.int16).reshape(10, 10, 10), np.eye(4))
    nib.save(image, raw / "p7.nii.gz")
    with pytest.raises(CatalogueError):
        index_folders(tmp_path / "site", [raw])
    index_folders(tmp_path / "site", [raw], assume_modality="MR")
    assert open_catalogue(tmp_path / "site").records[0].modality == "MR"


def test_an_image_placed_nowhere_is_refused(tmp_path, raw):
    image = nib.Nifti1Image(np.arange(1000, dtype=np.int16).reshape(10, 10, 10), np.eye(4))
    image.set_sform(None, code=0)
    image.set_qform(None, code=0)
    nib.save(image, raw / "ct.nii.gz")
    report = index_folders(tmp_path / "site", [raw])
    assert "left and right are unknown" in report.skipped[0].reason


@pytest.mark.parametrize(
    ("path", "patient", "modality"),
    [
        ("STS_002/CT_image.nii.gz", "STS_002", "CT"),
        ("STS_002/MR_T1_image.nii.gz", "STS_002", "MR"),
        ("ms/patient01_study1_FLAIR.nii.gz", "patient01", "MR"),
        ("bids/sub-07/ses-1/anat/sub-07_ses-1_T1w.nii.gz", "07", "MR"),
        ("s0001/ct.nii.gz", "s0001", "CT"),
        ("BraTS2021_00003/BraTS2021_00003_t1ce.nii.gz", "brats2021_00003", "MR"),
        ("amos/amos_0001.nii.gz", "amos_0001", None),
    ],
)
def test_names_tell_patient_and_modality(tmp_path, path, patient, modality):
    named = describe_name(tmp_path / path)
    assert named.patient.casefold() == patient.casefold()
    assert named.modality == modality


def test_the_same_patient_is_known_in_dicom_and_nifti(tmp_path):
    raw = make_raw_site(tmp_path / "raw", "MR", patients=1, name="pt")
    write_series(tmp_path / "raw" / "series", patient="PT-0000 ")
    index_folders(tmp_path / "site", [raw])
    catalogue = open_catalogue(tmp_path / "site")
    assert len(catalogue.records) == 2
    assert {r.kind for r in catalogue.records} == {"dicom", "nifti"}
    assert catalogue.patient_count == 1


def test_selection_by_patient_and_modality(tmp_path):
    raw = make_raw_site(tmp_path / "raw", ("CT", "MR"), patients=3, name="pt")
    chosen = Selection(modalities=("MR",), patients=("pt-0000", "pt-0002"))
    report = index_folders(tmp_path / "site", [raw], selection=chosen)
    assert (report.volumes, report.left_out) == (2, 4)
    with pytest.raises(CatalogueError, match="the selection wants none"):
        index_folders(tmp_path / "site", [raw], selection=Selection(vendors=("Canon",)))


def test_sites_with_one_secret_agree_on_patients_and_others_do_not(tmp_path, raw):
    secret = hashlib.sha256(b"x").digest()
    for name, given in (("a", secret), ("b", secret), ("c", None)):
        index_folders(tmp_path / name, [raw], secret=given)
    a, b, c = (open_catalogue(tmp_path / name) for name in "abc")
    assert a.patients == b.patients
    assert a.secret_fingerprint == b.secret_fingerprint != c.secret_fingerprint
    assert not a.patients & c.patients
    with pytest.raises(CatalogueError, match="another secret"):
        ensure_secret(tmp_path / "c", secret)


def test_volume_names_do_not_depend_on_where_the_folder_lies(tmp_path):
    names = []
    for place in ("here", "there"):
        raw = make_raw_site(tmp_path / place / "raw", "MR", patients=2, name="pt")
        index_folders(tmp_path / place / "site", [raw], secret=b"k" * 32)
        names.append([r.volume for r in open_catalogue(tmp_path / place / "site").records])
    assert names[0] == names[1]
