"""Real scans: against dcm2niix, in both formats, and every sample series."""

import subprocess
from pathlib import Path

import dcm2niix
import highdicom
import nibabel as nib
import numpy as np
import pydicom
import pytest

from agssd_core.config.data import DataConfig
from agssd_core.data.cache import SiteVolumes
from agssd_core.data.catalogue import open_catalogue
from agssd_core.data.index import index_folders
from agssd_core.data.nifti import read_nifti
from agssd_core.data.prepare import prepare_site
from agssd_core.data.series import read_series, select_slices
from agssd_core.errors import DataError
from tests.support.dicoms import stored

pytestmark = pytest.mark.realdata

STS = [("STS_019", "CT"), ("STS_019", "MR_T1"), ("STS_025", "CT"), ("STS_025", "MR_T1")]
LPS_TO_RAS = np.diag([-1, -1, 1, 1])


def _convert(folder: Path, out: Path) -> Path:
    out.mkdir(parents=True)
    # -p n: the rescale of the standard, not Philips' private scale.
    command = [dcm2niix.bin, "-p", "n", "-z", "y", "-f", "image", "-o", out, folder]
    subprocess.run(command, check=True, capture_output=True)
    (file,) = out.glob("*.nii.gz")
    return file


def _series(folder: Path):
    chosen, _ = select_slices(stored(sorted(folder.glob("*.dcm"))))
    return read_series(chosen)


@pytest.mark.parametrize(("patient", "kind"), STS)
def test_a_series_has_the_voxels_and_affine_of_dcm2niix(real_data, tmp_path, patient, kind):
    folder = real_data / "dicom" / "sts" / patient / kind
    file = _convert(folder, tmp_path / "out")
    ours = _series(folder)
    theirs = nib.as_closest_canonical(nib.load(file))
    np.testing.assert_array_equal(ours.array, theirs.get_fdata(dtype=np.float32))
    # dcm2niix stores float32.
    np.testing.assert_allclose(ours.affine, theirs.affine, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize(("patient", "kind"), STS)
def test_a_series_has_the_voxels_and_affine_of_highdicom(real_data, patient, kind):
    folder = real_data / "dicom" / "sts" / patient / kind
    slices = [pydicom.dcmread(file) for file in folder.glob("*.dcm")]
    reference = highdicom.get_volume_from_series(slices).to_patient_orientation("RAS")
    ours = _series(folder)
    np.testing.assert_array_equal(ours.array, reference.array)
    np.testing.assert_allclose(ours.affine, LPS_TO_RAS @ reference.affine, atol=1e-6)


def test_dicom_and_what_dcm2niix_makes_of_it_are_prepared_alike(real_data, tmp_path):
    """The whole way: catalogue, resampling, window, cache, crop; and a NIfTI round trip."""
    config = DataConfig(spacing_mm=(2.0, 2.0, 2.0))
    sources = {
        "dicom": tmp_path / "dicom",
        "nifti": tmp_path / "nifti",
        "again": tmp_path / "again",
    }
    for patient, kind in STS:
        folder = real_data / "dicom" / "sts" / patient / kind
        place = sources["dicom"] / patient / kind
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(folder)
        file = _convert(folder, tmp_path / "out" / patient / kind)
        target = sources["nifti"] / patient / f"{kind}_image.nii.gz"
        target.parent.mkdir(parents=True, exist_ok=True)
        file.rename(target)
        volume = read_nifti(target, modality=kind[:2])
        saved = sources["again"] / patient / f"{kind}_image.nii.gz"
        saved.parent.mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(volume.array, volume.affine), saved)
        reread = read_nifti(saved, modality=kind[:2])
        np.testing.assert_array_equal(reread.array, volume.array)
        np.testing.assert_array_equal(reread.affine.astype("f4"), volume.affine.astype("f4"))
    found = {}
    for name, folder in sources.items():
        site = tmp_path / f"site-{name}"
        folders = (
            sorted(folder.iterdir())
            if name != "dicom"
            else [path.resolve() for path in sorted(folder.glob("*/*"))]
        )
        index_folders(site, folders, secret=b"r" * 32)
        assert prepare_site(site, config).ready == 4
        volumes = SiteVolumes.open(site, config)
        found[name] = {
            (info.patient, info.modality): (info, volumes.read_crop(n, (0, 0, 0), info.shape))
            for n, info in enumerate(volumes.infos)
        }
    assert found["dicom"].keys() == found["nifti"].keys() == found["again"].keys()
    for key, (info, crop) in found["dicom"].items():
        for other, same in (found["nifti"][key], found["again"][key]):
            np.testing.assert_allclose(other.affine, info.affine, rtol=1e-6, atol=1e-4)
            assert np.abs(same - crop).max() < 2e-4  # float32 spacing moves a weight's last digit


SAMPLES = [
    "ge_anatomical_001",
    "generic_compressed_j2k_001",
    "generic_compressed_jpegls_001",
    "generic_compressed_rle_001",
    "hitachi_anatomical_001",
    "hyperfine_anatomical_001",
    "philips_anatomical_001",
    "philips_enhanced_anatomical_001",
    "siemens_anatomical_001",
]


def test_no_real_series_is_forgotten(real_data):
    dicom = real_data / "dicom"
    assert sorted(path.name for path in (dicom / "dicom2nifti").iterdir()) == SAMPLES
    assert sorted(path.parts[-2:] for path in (dicom / "sts").glob("*/*")) == sorted(STS)


def test_every_nifti_keeps_voxels_and_affine_through_a_round_trip(real_data, tmp_path):
    files = sorted(real_data.glob("3d/**/*_image.nii.gz"))
    assert len(files) >= 20
    for file in files:
        volume = read_nifti(file, modality="CT" if "CT" in file.name else "MR")
        theirs = nib.as_closest_canonical(nib.load(file))
        np.testing.assert_array_equal(volume.array, theirs.get_fdata(dtype=np.float32))
        np.testing.assert_array_equal(volume.affine, theirs.affine)
        nib.save(nib.Nifti1Image(volume.array, volume.affine), tmp_path / "again.nii")
        again = read_nifti(tmp_path / "again.nii", modality=volume.modality)
        np.testing.assert_array_equal(again.array, volume.array)
        np.testing.assert_array_equal(again.affine.astype("f4"), volume.affine.astype("f4"))


@pytest.mark.parametrize("name", SAMPLES)
def test_sample_series_are_read_as_dcm2niix_reads_them(real_data, tmp_path, name):
    folder = real_data / "dicom" / "dicom2nifti" / name
    ours = _series(folder)
    theirs = nib.as_closest_canonical(nib.load(_convert(folder, tmp_path / "out")))
    np.testing.assert_allclose(ours.array, theirs.get_fdata(dtype=np.float32), rtol=1e-5)
    np.testing.assert_allclose(ours.affine, theirs.affine, rtol=1e-6, atol=1e-4)


def test_compressed_samples_hold_the_same_voxels(real_data):
    folder = real_data / "dicom" / "dicom2nifti"
    arrays = [
        _series(folder / f"generic_compressed_{name}_001") for name in ("rle", "jpegls", "j2k")
    ]
    np.testing.assert_array_equal(arrays[0].array, arrays[1].array)
    np.testing.assert_array_equal(arrays[0].array, arrays[2].array)


def test_ultrasound_is_no_volume(real_data):
    for file in sorted((real_data / "dicom" / "us").iterdir()):
        with pytest.raises(DataError, match="no CT or MR image"):
            stored([file])


def test_the_whole_folder_is_catalogued_and_nobody_is_named(real_data, tmp_path):
    site = tmp_path / "site"
    report = index_folders(site, [real_data])
    catalogue = open_catalogue(site)
    assert report.volumes == 33
    assert report.clips > 150
    assert catalogue.cohorts == ("ct-mr", "us")
    by_patient = {record.patient for record in catalogue.records if record.kind == "dicom"}
    nifti = {record.patient for record in catalogue.records if record.kind == "nifti"}
    assert len(nifti) == 11
    assert len(by_patient & nifti) == 2  # the two patients that exist in both formats
    prepared = prepare_site(site, DataConfig(spacing_mm=(3.0, 3.0, 3.0)))
    assert prepared.volumes == 27
    assert len(prepared.skipped) == 6 + report.clips - prepared.clips
    assert prepared.clips > 150
    for item in prepared.skipped:
        assert "every side needs 8" in item.reason or "no echo area" in item.reason
    public = repr(catalogue.scans) + repr([item.reason for item in report.skipped])
    for word in ("STS_", "dicom2nifti", "benign", "Reg_"):
        assert word not in public
