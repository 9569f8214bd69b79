"""Phantom hospitals: repeatable, valid, fast, and as different as patients are."""

import time

import numpy as np
import pydicom
import pytest

from agssd_core.config.simulation import PhantomSiteConfig
from agssd_core.data.catalogue import open_catalogue
from agssd_core.data.index import index_folders
from agssd_core.data.nifti import read_nifti
from simulation.phantom_anatomy import LABEL_NAMES, LUNG, MUSCLE
from simulation.phantoms import make_phantom, write_phantom_site

SMALL = {"size": (40, 36, 24), "spacing_mm": (6.0, 6.5, 9.0)}


def test_one_seed_gives_the_same_bytes_and_another_does_not(tmp_path):
    site = PhantomSiteConfig(name="one", modalities=("CT", "MR"), patients=2, **SMALL)
    for name, file_format, seed in (
        ("a", "nifti", 0),
        ("b", "nifti", 0),
        ("c", "nifti", 1),
        ("d", "dicom", 0),
        ("e", "dicom", 0),
    ):
        chosen = site.model_copy(update={"format": file_format})
        assert write_phantom_site(tmp_path / name, chosen, seed=seed) == 4
    content = {
        name: {
            path.relative_to(tmp_path / name): path.read_bytes()
            for path in (tmp_path / name).rglob("*")
            if path.is_file()
        }
        for name in "abcde"
    }
    assert content["a"] == content["b"] != content["c"]
    assert content["d"] == content["e"]
    assert len(content["a"]) == 8


@pytest.mark.parametrize("file_format", ["nifti", "dicom"])
def test_files_hold_the_phantom_and_its_place(tmp_path, file_format):
    site = PhantomSiteConfig(
        name="one", modalities=("CT", "MR"), patients=1, format=file_format, scanner="b", **SMALL
    )
    write_phantom_site(tmp_path / "raw", site, seed=3)
    index_folders(tmp_path / "site", [tmp_path / "raw"])
    catalogue = open_catalogue(tmp_path / "site")
    assert {record.modality for record in catalogue.records} == {"CT", "MR"}
    assert {record.vendor for record in catalogue.records} == {"Philips"}
    assert catalogue.patient_count == 1
    if file_format == "nifti":
        for modality in ("CT", "MR"):
            phantom = make_phantom(site, 0, modality, seed=3)
            file = tmp_path / "raw" / "one-0000" / f"{modality}_image.nii.gz"
            volume = read_nifti(file, modality=modality)
            np.testing.assert_array_equal(volume.array, phantom.image)
            np.testing.assert_allclose(volume.affine, phantom.affine, atol=1e-4)


def test_dicom_phantoms_carry_what_de_identification_must_drop(tmp_path):
    site = PhantomSiteConfig(name="one", patients=1, format="dicom", **SMALL)
    write_phantom_site(tmp_path, site, seed=0)
    data = pydicom.dcmread(next(tmp_path.rglob("*.dcm")))
    assert str(data.PatientName).startswith("Phantom^")
    assert data.PatientBirthDate
    assert data.InstitutionName


def test_patients_differ_in_region_organs_and_size():
    site = PhantomSiteConfig(name="many", patients=24, **SMALL)
    phantoms = [make_phantom(site, number, "CT", seed=0) for number in range(24)]
    assert len({phantom.patient.region for phantom in phantoms}) >= 4
    organs = {frozenset(np.unique(phantom.labels).tolist()) for phantom in phantoms}
    assert len(organs) >= 12
    body = [np.count_nonzero(phantom.labels) / phantom.labels.size for phantom in phantoms]
    assert max(body) > 1.5 * min(body)
    assert min(body) > 0.05
    assert max(phantom.labels.max() for phantom in phantoms) < len(LABEL_NAMES)


def test_ct_values_are_hounsfield_and_scanners_differ():
    site = PhantomSiteConfig(name="many", patients=12, **SMALL)
    thorax = next(
        phantom
        for phantom in (make_phantom(site, number, "CT", seed=0) for number in range(12))
        if np.count_nonzero(phantom.labels == LUNG) > 500
    )
    assert np.median(thorax.image[thorax.labels == LUNG]) < -600
    assert -20 < np.median(thorax.image[thorax.labels == MUSCLE]) < 120
    assert thorax.image.min() >= -1024
    medians = {}
    for scanner in "abc":
        other = site.model_copy(update={"scanner": scanner})
        phantom = make_phantom(other, 3, "MR", seed=0)
        medians[scanner] = np.median(phantom.image[phantom.labels == MUSCLE])
    assert max(medians.values()) > 2 * min(medians.values())


def test_ct_and_mr_of_a_patient_show_the_same_body():
    site = PhantomSiteConfig(name="both", modalities=("CT", "MR"), **SMALL)
    ct, mr = (make_phantom(site, 0, modality, seed=0) for modality in ("CT", "MR"))
    np.testing.assert_array_equal(ct.labels, mr.labels)
    assert not np.array_equal(ct.image, mr.image)


def test_organ_labels_are_written_beside_the_scans_on_request(tmp_path):
    site = PhantomSiteConfig(name="one", patients=1, **SMALL)
    write_phantom_site(tmp_path / "raw", site, seed=0, labels_folder=tmp_path / "labels")
    (file,) = (tmp_path / "labels").iterdir()
    phantom = make_phantom(site, 0, "CT", seed=0)
    labels = read_nifti(file, modality="CT")
    np.testing.assert_array_equal(labels.array, phantom.labels)


def test_eight_patients_take_seconds(tmp_path):
    begun = time.process_time()
    write_phantom_site(tmp_path, PhantomSiteConfig(name="eight"), seed=0)
    assert time.process_time() - begun < 6  # about 1 s; room for a busy machine
