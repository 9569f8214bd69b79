"""NIfTI headers as they are met: odd, contradictory, silent."""

import nibabel as nib
import numpy as np
import pytest

from agssd_core.data.catalogue import open_catalogue
from agssd_core.data.index import index_folders
from agssd_core.data.nifti import read_nifti
from tests.support.sites import make_raw_site


@pytest.fixture
def raw(tmp_path):
    return make_raw_site(tmp_path / "raw", "CT", patients=2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("mirrored", "mirror images"),
        ("zero", "spacing of 0 mm"),
        ("complex", "colours or complex"),
        ("colour", "colours or complex"),
    ],
)
def test_nifti_headers_that_lie_are_refused(tmp_path, raw, change, message):
    array = np.arange(8000, dtype=np.int16).reshape(20, 20, 20)
    affine = np.diag([-2.0, 2.0, 2.0, 1.0])
    if change == "complex":
        array = array.astype(np.complex64)
    elif change == "colour":
        array = np.zeros((20, 20, 20), dtype=[(name, "u1") for name in "RGB"])
    image = nib.Nifti1Image(array, affine)
    image.set_sform(affine, code=1)
    image.set_qform(affine * [-1, 1, 1, 1] if change == "mirrored" else affine, code=1)
    content = bytearray(image.to_bytes())
    if change == "zero":
        content[80:84] = bytes(4)  # pixdim[1]
        content[254:256] = bytes(2)  # sform_code
    (raw / "CT.nii").write_bytes(content)
    (item,) = index_folders(tmp_path / "site", [raw]).skipped
    assert message in item.reason


def test_a_sheared_sform_gives_way_to_the_scanners_qform(tmp_path):
    affine = np.diag([-2.0, 2.0, 3.0, 1.0])
    sheared = affine.copy()
    sheared[0, 1] = 0.7  # as an affine registration to an atlas leaves it
    image = nib.Nifti1Image(np.arange(8000, dtype=np.int16).reshape(20, 20, 20), affine)
    image.set_qform(affine, code=1)
    image.set_sform(sheared, code=4)
    nib.save(image, tmp_path / "t1.nii.gz")
    volume = read_nifti(tmp_path / "t1.nii.gz", modality="MR")
    np.testing.assert_allclose(volume.spacing_mm, (2, 2, 3))
    np.testing.assert_allclose(np.abs(volume.affine[:3, :3]), np.diag([2, 2, 3]), atol=1e-6)


def test_one_time_point_big_endian_doubles_and_slopes_are_one_scan(tmp_path):
    array = np.random.default_rng(0).integers(0, 900, size=(9, 10, 11)).astype(np.int16)
    affine = np.diag([2.0, 2.0, 3.0, 1.0])
    swapped = nib.Nifti1Header(endianness=">")
    swapped.set_data_dtype(">i2")
    scaled = nib.Nifti1Image(array, affine)
    scaled.header.set_slope_inter(2, -7)
    images = {
        "t1_frame": nib.Nifti1Image(array[..., None], affine),
        "t1_big": nib.Nifti1Image(array.astype(">i2"), affine, swapped),
        "t1_double": nib.Nifti1Image(array.astype(np.float64), affine),
        "t1_left": nib.Nifti1Image(
            array[::-1], affine @ [[-1, 0, 0, 8], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
        ),
    }
    for name, image in images.items():
        nib.save(image, tmp_path / f"{name}.nii")
        volume = read_nifti(tmp_path / f"{name}.nii", modality="MR")
        np.testing.assert_array_equal(volume.array, array)
        np.testing.assert_allclose(volume.affine, affine)
    nib.save(scaled, tmp_path / "t1_scaled.nii")
    volume = read_nifti(tmp_path / "t1_scaled.nii", modality="MR")
    np.testing.assert_array_equal(volume.array, 2 * array - 7.0)


def test_the_named_modality_fills_in_and_does_not_overrule(tmp_path):
    raw = tmp_path / "raw"
    for name in ("PT_07/a1", "PT_07/ct_2", "PT_08/PET"):
        file = raw / f"{name}.nii.gz"
        file.parent.mkdir(parents=True, exist_ok=True)
        array = np.arange(1000, dtype=np.int16).reshape(10, 10, 10) + len(name)
        nib.save(nib.Nifti1Image(array, np.eye(4)), file)
    report = index_folders(tmp_path / "site", [raw], assume_modality="MR")
    assert sorted(r.modality for r in open_catalogue(tmp_path / "site").records) == ["CT", "MR"]
    assert "(PET, ultrasound or other)" in report.skipped[0].reason
