"""Resampling keeps places, does not alias; windows, percentiles and the body's box."""

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from agssd_core.config.data import DataConfig
from agssd_core.data.nifti import read_nifti
from agssd_core.data.preprocess import foreground_box, foreground_mask, preprocess, resample
from agssd_core.data.volume import Volume, canonical_volume, check_affine
from agssd_core.errors import VolumeError

SIDES = st.tuples(*[st.integers(10, 24)] * 3)
SPACINGS = st.tuples(*[st.floats(0.5, 4.0)] * 3)


def _oblique(spacing, angle=0.3):
    turn = np.array(
        [[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1]]
    )
    affine = np.eye(4)
    affine[:3, :3] = turn * np.asarray(spacing)
    affine[:3, 3] = [12, -30, 55]
    return affine


def _places(shape, affine):
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), axis=-1)
    return grid @ affine[:3, :3].T + affine[:3, 3]


@settings(max_examples=40, deadline=None)
@given(shape=SIDES, old=SPACINGS, new=SPACINGS)
def test_a_ramp_in_the_body_stays_where_it_is(shape, old, new):
    """A field linear in millimetres is reproduced wherever no border is touched."""
    affine = _oblique(old)
    slope = np.array([0.7, -1.1, 0.4])
    field = (_places(shape, affine) @ slope).astype(np.float32)
    result, placed = resample(field, affine, spacing_mm=new)
    expected = _places(result.shape, placed) @ slope
    index = np.stack(np.meshgrid(*map(np.arange, result.shape), indexing="ij"), axis=-1)
    source = (index @ placed[:3, :3].T + placed[:3, 3] - affine[:3, 3]) @ np.linalg.inv(
        affine[:3, :3]
    ).T
    reach = 1 + np.maximum(1.0, np.asarray(new) / np.asarray(old)) / 2
    inner = np.all((source >= reach) & (source <= np.asarray(shape) - 1 - reach), axis=-1)
    np.testing.assert_allclose(result[inner], expected[inner], atol=1e-3)


@settings(max_examples=40, deadline=None)
@given(shape=SIDES, old=SPACINGS, new=SPACINGS)
def test_the_middle_and_the_field_of_view_stay(shape, old, new):
    affine = _oblique(old)
    result, placed = resample(np.zeros(shape, np.float32), affine, spacing_mm=new)
    for axis, (count, other) in enumerate(zip(shape, result.shape, strict=True)):
        kept = abs(new[axis] / old[axis] - 1) < 1e-3
        assert kept or abs(count * old[axis] - other * new[axis]) <= new[axis] / 2 + 1e-6
    middle = affine @ [*(np.array(shape) - 1) / 2, 1]
    np.testing.assert_allclose(placed @ [*(np.array(result.shape) - 1) / 2, 1], middle, atol=1e-6)


def test_the_wanted_spacing_changes_nothing():
    array = np.random.default_rng(0).normal(size=(9, 8, 7)).astype(np.float32)
    result, affine = resample(array, _oblique((2, 2, 2)), spacing_mm=(2, 2, 2))
    np.testing.assert_array_equal(result, array)
    np.testing.assert_array_equal(affine, _oblique((2, 2, 2)))


def test_finer_grids_interpolate_as_scipy_does():
    array = np.random.default_rng(0).normal(size=(12, 11, 10)).astype(np.float32)
    result, placed = resample(array, np.diag([3.0, 2.0, 2.0, 1]), spacing_mm=(1.5, 1.7, 0.9))
    index = np.linalg.inv(np.diag([3.0, 2.0, 2.0, 1])) @ placed
    places = _places(result.shape, index).reshape(-1, 3).T
    reference = ndimage.map_coordinates(array, places, order=1, mode="nearest")
    np.testing.assert_allclose(result.ravel(), reference, atol=1e-5)


def test_coarser_grids_do_not_alias():
    # Stripes finer than the new voxel must become grey, not other stripes.
    stripes = np.tile([[[0.0]], [[1.0]]], (32, 16, 16)).astype(np.float32)[:63]
    result, _ = resample(stripes, np.eye(4), spacing_mm=(3.0, 1.0, 1.0))
    assert np.abs(result[2:-2] - 0.5).max() < 0.12
    naive = stripes[::3]
    assert np.abs(naive - 0.5).min() == 0.5


def test_a_ct_is_windowed_and_a_mr_scaled_by_its_body():
    rng = np.random.default_rng(0)
    body = np.full((40, 40, 40), -1000.0, dtype=np.float32)
    body[8:32, 8:32, 8:32] = rng.uniform(-100, 100, size=(24, 24, 24))
    config = DataConfig(spacing_mm=(1, 1, 1), ct_window_hu=(-100, 100), foreground_margin=2)
    ct = preprocess(Volume(body, np.eye(4), "CT"), config)
    expected = np.clip((body + 100) / 200, 0, 1)
    np.testing.assert_allclose(ct.array / 65535, expected, atol=1e-5)
    assert ct.foreground_start == (6, 6, 6)
    assert ct.foreground_size == (28, 28, 28)
    signal = np.where(body > -500, body + 600, 2).astype(np.float32)
    mr = preprocess(Volume(signal, np.eye(4), "MR"), config)
    # Scanner units are arbitrary: another gain gives the same picture.
    louder = preprocess(Volume(signal * 37, np.eye(4), "MR"), config)
    assert np.abs(mr.array.astype(int) - louder.array).max() <= 1
    inner = signal[8:32, 8:32, 8:32]
    low, high = np.percentile(inner, config.mr_percentiles)
    np.testing.assert_allclose(
        mr.array[8:32, 8:32, 8:32] / 65535, np.clip((inner - low) / (high - low), 0, 1), atol=1e-3
    )


def test_padding_outside_the_field_of_view_is_air():
    body = np.full((40, 40, 40), -1000.0, dtype=np.float32)
    body[8:32, 8:32, 8:32] = 0
    padded = body.copy()
    padded[:, :, :3] = -3024
    config = DataConfig(spacing_mm=(2, 2, 2))
    one, other = (preprocess(Volume(a, np.eye(4), "CT"), config) for a in (body, padded))
    np.testing.assert_array_equal(one.array, other.array)


def test_lungs_belong_to_the_body_and_specks_do_not():
    body = np.full((64, 64, 64), -1000.0, dtype=np.float32)
    body[12:52, 12:52, 12:52] = 40
    body[20:44, 20:44, 16:48] = -850
    body[2:4, 2:4, 2:4] = 300
    mask = foreground_mask(body, modality="CT")
    assert mask[8, 8, 8]
    assert not mask[0, 0, 0]
    start, size = foreground_box(mask, body.shape, margin=0)
    assert (start, size) == ((12, 12, 12), (40, 40, 40))


@pytest.mark.parametrize("codes", ["LPS", "RAS", "SAR", "PIL", "ASR"])
def test_any_stored_order_gives_the_same_canonical_volume(tmp_path, codes):
    rng = np.random.default_rng(0)
    array = rng.integers(0, 500, size=(10, 12, 14)).astype(np.int16)
    image = nib.Nifti1Image(array, _oblique((1.5, 2.0, 2.5)))
    turn = nib.orientations.ornt_transform(
        nib.io_orientation(image.affine), nib.orientations.axcodes2ornt(codes)
    )
    nib.save(image.as_reoriented(turn), tmp_path / "x.nii.gz")
    volume = read_nifti(tmp_path / "x.nii.gz", modality="MR")
    np.testing.assert_array_equal(volume.array, array)
    np.testing.assert_allclose(volume.affine, image.affine, atol=1e-4)


def test_scaled_nifti_values_are_applied(tmp_path):
    image = nib.Nifti1Image(np.arange(512, dtype=np.int16).reshape(8, 8, 8), np.eye(4))
    image.header.set_slope_inter(2.0, -1024.0)
    nib.save(image, tmp_path / "ct.nii.gz")
    assert read_nifti(tmp_path / "ct.nii.gz", modality="CT").array[0, 0, 1] == -1022


@pytest.mark.parametrize(
    ("affine", "message"),
    [
        (np.diag([1.0, 1.0, 0.0, 1.0]), "spacing lies outside"),
        (np.diag([1.0, 1.0, np.nan, 1.0]), "not finite"),
        (np.array([[1, 0.2, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1.0]]), "right angles"),
        (np.diag([1.0, 1.0, 90.0, 1.0]), "spacing lies outside"),
    ],
)
def test_unusable_geometry_is_refused(affine, message):
    with pytest.raises(VolumeError, match=message):
        check_affine(affine)


def test_infinite_voxels_are_counted():
    array = np.arange(1000, dtype=np.float32).reshape(10, 10, 10)
    array[0, 0, :3] = np.inf
    with pytest.raises(VolumeError, match=r"3 voxel\(s\) are NaN or infinite"):
        canonical_volume(array, np.eye(4), modality="MR")
