"""DICOM series: geometry, transfer syntaxes, and the checks that refuse a series."""

import highdicom
import numpy as np
import pydicom
import pytest
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless

from agssd_core.data.dicom import read_dicom_header
from agssd_core.data.series import read_series, select_slices, stack_affine
from agssd_core.errors import SeriesError, VolumeError
from tests.support.dicoms import PHANTOM, PSEUDONYMISER, change, shift, stored, write_series


def _read(files):
    chosen, _ = select_slices(stored(files))
    return read_series(chosen)


def test_a_phantom_comes_back_with_its_voxels_and_place(tmp_path):
    volume = _read(write_series(tmp_path))
    np.testing.assert_array_equal(volume.array, PHANTOM.image)
    np.testing.assert_allclose(volume.affine, PHANTOM.affine, atol=1e-4)
    assert (volume.modality, volume.vendor) == ("CT", "GE")


def test_the_order_of_files_does_not_matter(tmp_path):
    files = write_series(tmp_path)
    for place, file in enumerate(files):  # names against the order of slices
        file.rename(tmp_path / f"{len(files) - place:02d}x.dcm")
    shuffled = sorted(tmp_path.iterdir(), key=lambda file: hash(file.name))
    np.testing.assert_array_equal(_read(shuffled).array, PHANTOM.image)


@pytest.mark.parametrize("orientation", ["sagittal", "coronal", "oblique", "feet first"])
def test_any_orientation_agrees_with_highdicom(tmp_path, orientation):
    turned = {
        "sagittal": ([0, 1, 0, 0, 0, -1], [-1, 0, 0]),
        "coronal": ([1, 0, 0, 0, 0, -1], [0, 1, 0]),
        "oblique": ([0.8, 0.6, 0, -0.6, 0.8, 0], [0, 0, 1]),
        "feet first": ([-1, 0, 0, 0, 1, 0], [0, 0, -1]),
    }[orientation]
    files = write_series(tmp_path)
    for level, file in enumerate(files):
        place = np.array([10, -20, 30]) + np.multiply(turned[1], 7.0 * level)
        position = [f"{part:.6g}" for part in place]
        change(file, ImageOrientationPatient=turned[0], ImagePositionPatient=position)
    ours = _read(files)
    reference = highdicom.get_volume_from_series([pydicom.dcmread(file) for file in files])
    theirs = reference.to_patient_orientation("RAS") if orientation != "oblique" else None
    lps_to_ras = np.diag([-1, -1, 1, 1])
    if theirs is not None:
        np.testing.assert_array_equal(ours.array, theirs.array)
        np.testing.assert_allclose(ours.affine, lps_to_ras @ theirs.affine, atol=1e-5)
    # Whatever the order of axes: the same value lies at the same place in the body.
    index = np.argwhere(reference.array == reference.array.max())[:1]
    place = lps_to_ras @ reference.affine @ [*index[0], 1]
    ours_index = np.rint(np.linalg.inv(ours.affine) @ place)[:3].astype(int)
    assert ours.array[tuple(ours_index)] == reference.array.max()


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless])
def test_compressed_series_give_the_same_voxels(tmp_path, syntax):
    files = write_series(tmp_path)
    for file in files:
        data = pydicom.dcmread(file)
        data.compress(syntax, generate_instance_uid=False)
        data.save_as(file)
    np.testing.assert_array_equal(_read(files).array, PHANTOM.image)


def test_each_slice_keeps_its_own_rescale(tmp_path):
    files = write_series(tmp_path)
    data = pydicom.dcmread(files[3])
    halved = (data.pixel_array // 2).astype("<u2")
    change(files[3], RescaleSlope=2, PixelData=halved.tobytes())
    volume = _read(files)
    assert np.abs(volume.array[:, :, 3] - PHANTOM.image[:, :, 3]).max() <= 1
    np.testing.assert_array_equal(volume.array[:, :, 4], PHANTOM.image[:, :, 4])


def test_missing_slices_are_counted(tmp_path):
    files = write_series(tmp_path)
    with pytest.raises(SeriesError, match=r"about 2 slice\(s\) look missing. Export the series"):
        stack_affine(file.header for file in stored(files[:5] + files[7:]))


def test_doubled_positions_are_refused(tmp_path):
    files = write_series(tmp_path)
    shift(files[4], [0, 0, 7.0])
    with pytest.raises(SeriesError, match=r"taken more than once .* series of its own"):
        stack_affine(file.header for file in stored(files))


def test_gantry_tilt_is_refused(tmp_path):
    files = write_series(tmp_path)
    for level, file in enumerate(files):
        shift(file, [0, 1.5 * level, 0])
    with pytest.raises(SeriesError, match=r"stacked 12.1 degrees off .* upright grid"):
        stack_affine(file.header for file in stored(files))


def test_a_mixed_series_is_refused_but_a_scout_is_left_out(tmp_path):
    files = write_series(tmp_path)
    for file in files[:2]:
        change(file, ImageOrientationPatient=[0, 1, 0, 0, 0, -1])
    chosen, left_out = select_slices(stored(files))
    assert len(chosen) == len(files) - 2
    assert "a scout" in left_out[0].reason
    for file in files[2:6]:
        change(file, ImageOrientationPatient=[0, 1, 0, 0, 0, -1])
    with pytest.raises(SeriesError, match=r"mixes 2 image sizes.* series of its own"):
        select_slices(stored(files))


def test_copies_of_an_instance_count_once(tmp_path):
    files = write_series(tmp_path / "one")
    again = write_series(tmp_path / "two")
    chosen, left_out = select_slices(stored([*files, *again]))
    assert len(chosen) == len(files)
    assert len(left_out[0].paths) == len(files)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"PixelData": None}, "holds no pixel data"),
        ({"PixelData": b"\0" * 64}, "cut short"),
        ({"Rows": 60000, "Columns": 60000}, "claims more than 4096 rows"),
        ({"ImagePositionPatient": None}, "lacks its position"),
        ({"PixelSpacing": None}, "lacks its position, orientation or pixel spacing"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "a localizer"),
        ({"BurnedInAnnotation": "YES"}, "burned into the image"),
        ({"SamplesPerPixel": 3}, "in colour"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.6.1"}, "no CT or MR image"),
        ({"SeriesInstanceUID": None}, "names no series"),
        ({"RescaleIntercept": None}, "lacks its rescale intercept"),
        ({"RescaleType": "MGML"}, "dual-energy"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "M", "MOSAIC"]}, "a mosaic"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "in colour"),
    ],
    ids=str,
)
def test_what_is_no_slice_is_refused_by_name(tmp_path, fields, message):
    file = write_series(tmp_path)[0]
    change(file, **fields)
    with pytest.raises(SeriesError, match=message):
        read_dicom_header(file, PSEUDONYMISER)


def test_a_compressed_bomb_is_refused_before_it_is_decoded(tmp_path):
    file = write_series(tmp_path)[0]
    data = pydicom.dcmread(file)
    data.compress(RLELossless)
    data.Rows = data.Columns = 4096
    data.NumberOfFrames = 4096
    data.save_as(file)
    with pytest.raises(SeriesError, match="voxels in all"):
        read_dicom_header(file, PSEUDONYMISER)


def test_a_flat_series_is_refused(tmp_path):
    files = write_series(tmp_path, image=np.zeros_like(PHANTOM.image))
    with pytest.raises(VolumeError, match="same value"):
        _read(files)


def test_reformatted_series_are_read(tmp_path):
    files = write_series(tmp_path)
    for file in files:
        change(file, ImageType=["DERIVED", "SECONDARY", "REFORMATTED"])
    np.testing.assert_array_equal(_read(files).array, PHANTOM.image)


def test_orientations_that_differ_in_their_last_digit_are_one_stack(tmp_path):
    files = write_series(tmp_path)
    for level, file in enumerate(files):  # either side of where two decimals would round
        turn = 0.00499 + 0.00002 * (level % 2)
        change(file, ImageOrientationPatient=[1, turn, 0, -turn, 1, 0])
    np.testing.assert_array_equal(_read(files).array, PHANTOM.image)


def test_positions_rounded_to_a_tenth_are_even(tmp_path):
    files = write_series(tmp_path)
    for level, file in enumerate(files):
        change(file, ImagePositionPatient=[0, 0, round(1.25 * level + 0.001, 1)])
    assert abs(_read(files).spacing_mm[2] - 1.25) < 0.01


@pytest.mark.parametrize("signed", [True, False])
def test_bits_above_the_stored_ones_mean_nothing(tmp_path, signed):
    """12 bits in 16: a sign to extend, or an overlay's bits to drop."""
    files = write_series(tmp_path)
    for file in files:
        data = pydicom.dcmread(file)
        values = data.pixel_array.astype(np.int32) - (1024 if signed else 0)
        packed = (values & 0xFFF) | (0 if signed else 0x8000)
        data.BitsStored, data.HighBit, data.PixelRepresentation = 12, 11, int(signed)
        data.RescaleIntercept = 0 if signed else -1024
        data.PixelData = packed.astype("<u2").tobytes()
        data.save_as(file)
    np.testing.assert_array_equal(_read(files).array, PHANTOM.image)


def test_people_without_a_number_are_not_taken_for_one(tmp_path):
    first = write_series(tmp_path / "a", patient="")[0]
    second = write_series(tmp_path / "b", patient="", seed="2")[0]
    change(second, StudyInstanceUID="1.2.3")
    headers = [read_dicom_header(file, PSEUDONYMISER) for file in (first, second)]
    assert headers[0].patient != headers[1].patient
    for file in (first, second):
        change(file, StudyInstanceUID=None)
    headers = [read_dicom_header(file, PSEUDONYMISER) for file in (first, second)]
    assert headers[0].patient != headers[1].patient


def test_a_series_number_shared_by_patients_is_refused(tmp_path):
    files = write_series(tmp_path)
    change(files[0], PatientID="Roe-1")
    with pytest.raises(SeriesError, match="2 patients share one series number"):
        _read(files)
