"""Volumes and outlines of rows come out in RAS order, on one grid, whatever the file format."""

import nibabel as nib
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk  # noqa: N813 - the library's own custom
from PIL import Image

from agssd_core.errors import DataError
from simulation.datasets.reading import read_volume, read_volume_mask
from simulation.datasets.rows import Mask, Row, Source
from tests.support.ct_sets import (
    ct_array,
    nodule,
    roi,
    save_lidc_series,
    save_mask,
    save_nifti,
    save_reading,
    save_slices,
    square,
)

LPS = np.diag([-2.0, -3.0, 4.0, 1.0])
# Stored slices first, as KiTS: index 0 runs down, 2 runs left.
ZYX = np.array([[0, 0, -2.0, 0], [0, -3.0, 0, 0], [-4.0, 0, 0, 0], [0, 0, 0, 1.0]])


def row_of(path, kind, *, masks=(), modality="CT", index=None, key="", **more):
    return Row("s", "p", modality, Source(path, kind, index, key), masks=tuple(masks), **more)


def nifti_mask(path, **more):
    return Mask(Source(path, "nifti"), **more)


def test_a_volume_of_a_4d_file_is_the_one_that_the_row_names(tmp_path):
    channels = np.stack([ct_array(seed=seed) for seed in range(3)], axis=3)
    save_nifti(tmp_path / "a.nii.gz", channels, LPS)
    volume = read_volume(tmp_path, row_of("a.nii.gz", "nifti", modality="MR", index=2))
    np.testing.assert_array_equal(volume.array, channels[::-1, ::-1, :, 2])
    assert volume.modality == "MR"
    assert volume.spacing_mm == pytest.approx((2, 3, 4))
    with pytest.raises(DataError, match="fewer volumes than the data set's rows say"):
        read_volume(tmp_path, row_of("a.nii.gz", "nifti", index=3))
    with pytest.raises(DataError, match="4 dimensions"):
        read_volume(tmp_path, row_of("a.nii.gz", "nifti"))


@pytest.mark.parametrize("affine", [LPS, ZYX], ids=["lps", "slices first"])
def test_outlines_lie_where_the_scan_shows_them(tmp_path, affine):
    scan = ct_array()
    scan[2:5, 3:6, 1:4] = 3000
    save_nifti(tmp_path / "scan.nii.gz", scan, affine)
    save_mask(tmp_path / "mask.nii.gz", affine=affine, value=7)
    row = row_of("scan.nii.gz", "nifti", masks=[nifti_mask("mask.nii.gz")])
    volume = read_volume(tmp_path, row)
    mask = read_volume_mask(tmp_path, row, volume)
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask == 7, volume.array == 3000)
    assert np.count_nonzero(mask) == 27


def test_a_mask_stored_in_another_order_still_lies_over_its_scan(tmp_path):
    scan = ct_array()
    scan[2:5, 3:6, 1:4] = 3000
    save_nifti(tmp_path / "scan.nii.gz", scan, LPS)
    image = nib.load(tmp_path / "scan.nii.gz")
    turned = nib.as_closest_canonical(image)
    save_nifti(
        tmp_path / "mask.nii.gz", (turned.get_fdata() == 3000).astype(np.uint8), turned.affine
    )
    row = row_of("scan.nii.gz", "nifti", masks=[nifti_mask("mask.nii.gz")])
    volume = read_volume(tmp_path, row)
    mask = read_volume_mask(tmp_path, row, volume)
    np.testing.assert_array_equal(mask == 1, volume.array == 3000)


def test_a_mask_without_a_place_lies_as_its_scan_is_stored(tmp_path):
    scan = ct_array()
    scan[2:5, 3:6, 1:4] = 3000
    save_nifti(tmp_path / "scan.nii.gz", scan, LPS)
    image = nib.Nifti1Image((scan == 3000).astype(np.uint8), None)
    nib.save(image, tmp_path / "mask.nii.gz")
    row = row_of("scan.nii.gz", "nifti", masks=[nifti_mask("mask.nii.gz")])
    volume = read_volume(tmp_path, row)
    mask = read_volume_mask(tmp_path, row, volume)
    np.testing.assert_array_equal(mask == 1, volume.array == 3000)


def test_masks_of_one_value_are_united_and_later_ones_lie_over_earlier(tmp_path):
    save_nifti(tmp_path / "scan.nii.gz")
    for name, part in (("a", 0), ("b", 1), ("c", 2)):
        array = np.zeros((10, 9, 8), dtype=np.uint8)
        array[part : part + 2] = 1
        save_nifti(tmp_path / f"{name}.nii.gz", array)
    save_nifti(tmp_path / "none.nii.gz", np.zeros((10, 9, 8), dtype=np.uint8))
    masks = [nifti_mask("a.nii.gz", value=4), nifti_mask("b.nii.gz", value=4)]
    masks += [nifti_mask("c.nii.gz", value=9), nifti_mask("none.nii.gz", value=5)]
    row = row_of("scan.nii.gz", "nifti", masks=masks)
    mask = read_volume_mask(tmp_path, row, read_volume(tmp_path, row))
    assert mask[:, 0, 0].tolist() == [4, 4, 9, 9, 0, 0, 0, 0, 0, 0]
    bare = row_of("scan.nii.gz", "nifti")
    assert not read_volume_mask(tmp_path, bare, read_volume(tmp_path, bare)).any()


def test_masks_that_do_not_fit_are_refused(tmp_path):
    save_nifti(tmp_path / "scan.nii.gz")
    moved = np.diag([2.0, 3.0, 4.0, 1.0])
    moved[0, 3] = 30
    save_mask(tmp_path / "small.nii.gz", (10, 9, 7))
    save_mask(tmp_path / "moved.nii.gz", affine=moved)
    save_nifti(tmp_path / "odd.nii.gz", np.full((10, 9, 8), 0.5, dtype=np.float32))
    for name, fact in (
        ("small", r"a mask has \(10, 9, 7\) voxels"),
        ("moved", "a mask lies 30.0 mm beside its scan"),
        ("odd", "numbers that are no structures"),
        ("gone", "a file named by a row is missing"),
    ):
        row = row_of("scan.nii.gz", "nifti", masks=[nifti_mask(f"{name}.nii.gz")])
        volume = read_volume(tmp_path, row)
        with pytest.raises(DataError, match=fact):
            read_volume_mask(tmp_path, row, volume)


def test_itk_files_keep_their_directions(tmp_path):
    scan = ct_array()
    image = sitk.GetImageFromArray(scan.transpose(2, 1, 0))
    image.SetSpacing((2.0, 3.0, 4.0))
    image.SetOrigin((10.0, -20.0, 30.0))
    image.SetDirection((-1.0, 0, 0, 0, 1.0, 0, 0, 0, 1.0))
    for name in ("a.mha", "a.mhd", "a.nrrd"):
        sitk.WriteImage(image, str(tmp_path / name))
        row = row_of(name, "itk", vendor="Toshiba", masks=[Mask(Source(name, "itk"), value=2)])
        volume = read_volume(tmp_path, row)
        # In ITK's LPS the second axis runs back; the first runs right by its direction.
        np.testing.assert_array_equal(volume.array, scan[:, ::-1])
        assert volume.vendor == "Canon"
        far = image.TransformIndexToPhysicalPoint((0, 8, 0))
        np.testing.assert_allclose(volume.affine[:3, 3], [-far[0], -far[1], far[2]])
        mask = read_volume_mask(tmp_path, row, volume)
        np.testing.assert_array_equal(mask == 2, volume.array > 0)


def test_analyze_pairs_are_read_with_x_to_the_left(tmp_path):
    scan = ct_array()
    header = nib.AnalyzeImage(scan[..., None], np.diag([-2.0, 3.0, 4.0, 1.0]))
    nib.save(header, tmp_path / "a.img")
    volume = read_volume(tmp_path, row_of("a.hdr", "analyze", modality="MR"))
    np.testing.assert_array_equal(volume.array, scan[::-1])


def test_cubes_of_bytes_become_hounsfield_units_for_ct_alone(tmp_path):
    cubes = np.random.default_rng(0).integers(0, 256, (3, 9, 9, 9), dtype=np.uint8)
    cubes[1, 0, 0, :2] = 0, 255
    np.savez_compressed(tmp_path / "set.npz", train_images=cubes, mask=cubes > 100)
    row = row_of("set.npz", "npz", index=1, key="train_images")
    ct = read_volume(tmp_path, row)
    np.testing.assert_allclose(ct.array, -1000 + cubes[1] / 255 * 2000, atol=1e-3)
    assert ct.spacing_mm == (1, 1, 1)
    mr = read_volume(tmp_path, row_of("set.npz", "npz", index=1, key="train_images", modality="MR"))
    np.testing.assert_array_equal(mr.array, cubes[1])
    with pytest.raises(DataError, match="fewer rows"):
        read_volume(tmp_path, row_of("set.npz", "npz", index=3, key="train_images"))
    with pytest.raises(DataError, match="lacks an array"):
        read_volume(tmp_path, row_of("set.npz", "npz", index=0, key="val_images"))


def test_pickled_arrays_are_refused(tmp_path):
    np.savez(tmp_path / "set.npz", images=np.array([{"a": 1}], dtype=object))
    with pytest.raises(DataError, match=r"no readable NumPy \(ValueError\)"):
        read_volume(tmp_path, row_of("set.npz", "npz", index=0, key="images"))


def test_slices_are_stacked_by_number_with_hounsfield_units(tmp_path):
    save_slices(tmp_path / "scan", [2, 100, 11, 9], ending="jpg")
    (tmp_path / "scan" / "._0002.jpg").write_bytes(b"junk")
    Image.new("L", (12, 10), 200).save(tmp_path / "scan" / "0200.png")
    row = row_of("scan", "slices", facts={"spacing_mm": "0.7 0.8 3"})
    volume = read_volume(tmp_path, row)
    assert volume.array.shape == (12, 10, 5)
    grey = (volume.array[3, 3] + 1000) / 2000 * 255
    np.testing.assert_allclose(grey, [2, 9, 11, 100, 200], atol=1)
    assert volume.spacing_mm == pytest.approx((0.7, 0.8, 3))


def test_the_first_pixel_of_a_slice_is_right_and_in_front(tmp_path):
    save_slices(tmp_path / "scan", range(8))
    pixels = np.zeros((10, 12), dtype=np.uint8)
    pixels[0, 0] = 255
    Image.fromarray(pixels).save(tmp_path / "scan" / "0000.png")
    volume = read_volume(tmp_path, row_of("scan", "slices"))
    # Seen from the feet the picture's left is the patient's right, where D ends.
    assert np.argwhere(volume.array > 900).tolist() == [[11, 9, 0]]


def test_slices_of_two_sizes_or_none_are_refused(tmp_path):
    save_slices(tmp_path / "scan", range(3))
    save_slices(tmp_path / "scan", [3], size=(9, 9))
    with pytest.raises(DataError, match="2 different sizes"):
        read_volume(tmp_path, row_of("scan", "slices"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no slice"):
        read_volume(tmp_path, row_of("empty", "slices"))
    deep = np.arange(120, dtype=np.uint16).reshape(10, 12)
    (tmp_path / "deep").mkdir()
    Image.fromarray(deep).save(tmp_path / "deep" / "1.png")
    with pytest.raises(DataError, match="more than 8 bits"):
        read_volume(tmp_path, row_of("deep", "slices"))


def test_contours_are_where_more_than_half_of_the_readers_saw_a_nodule(tmp_path):
    files = save_lidc_series(tmp_path / "series", "LIDC-IDRI-0001")
    sops = [str(pydicom.dcmread(file).SOPInstanceUID) for file in files]
    large = nodule(roi(sops[5], square(4, 12)))
    holed = nodule(roi(sops[5], square(4, 12)), roi(sops[5], square(6, 9), inclusion="FALSE"))
    alone = nodule(roi(sops[9], square(4, 12)))
    point = nodule(roi(sops[2], [(3, 3)]))
    gone = nodule(roi("1.2.3", square(4, 12)))
    save_reading(tmp_path / "series" / "r.xml", [[large, point], [large], [holed], [alone, gone]])
    masks = [Mask(Source("series/r.xml", "contours"), value=1)]
    row = row_of("series", "dicom", masks=masks)
    volume = read_volume(tmp_path, row)
    assert volume.vendor == "Siemens"
    mask = read_volume_mask(tmp_path, row, volume)
    assert mask.shape == volume.array.shape
    # Pixels strictly within the outline, 5 to 11, but the hole's 7 and 8; columns run to the left,
    # rows to the back.
    expected = np.zeros((36, 32), dtype=np.uint8)
    expected[5:12, 5:12] = 1
    expected[7:9, 7:9] = 0
    np.testing.assert_array_equal(mask[:, :, 5], expected[::-1, ::-1])
    assert not mask[:, :, [2, 9]].any()


def test_readings_of_another_series_and_hostile_xml_are_refused(tmp_path):
    save_lidc_series(tmp_path / "series", "LIDC-IDRI-0001")
    save_reading(tmp_path / "other.xml", [[nodule(roi("1.2.3", square(4, 12)))]])
    (tmp_path / "entity.xml").write_text('<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>')
    (tmp_path / "cut.xml").write_text("<LidcReadMessage><reading")
    for name, fact in (
        ("other", "belongs to another series"),
        ("entity", "no plain XML"),
        ("cut", "damaged XML"),
    ):
        row = row_of("series", "dicom", masks=[Mask(Source(f"{name}.xml", "contours"), value=1)])
        with pytest.raises(DataError, match=fact):
            read_volume_mask(tmp_path, row, read_volume(tmp_path, row))


def test_a_folder_of_two_series_is_no_scan(tmp_path):
    save_lidc_series(tmp_path / "a", "LIDC-IDRI-0001", seed="1")
    for file in save_lidc_series(tmp_path / "b", "LIDC-IDRI-0001", seed="2"):
        file.rename(tmp_path / "a" / f"b{file.name}")
    with pytest.raises(DataError, match="several DICOM series"):
        read_volume(tmp_path, row_of("a", "dicom"))
    with pytest.raises(DataError, match="no DICOM slice"):
        read_volume(tmp_path, row_of("b", "dicom"))


@pytest.mark.parametrize("kind", ["nifti", "itk", "analyze", "npz", "slices", "dicom"])
def test_damaged_files_are_refused_without_their_path(tmp_path, kind):
    name = {"nifti": "x.nii.gz", "itk": "x.mha", "analyze": "x.hdr", "npz": "x.npz"}.get(kind, "x")
    file = tmp_path / name
    if kind in ("slices", "dicom"):
        file.mkdir()
        file = file / "Doe-1.png"
    file.write_bytes(b"\x00" * 128 + b"DICM junk of Doe")
    with pytest.raises(DataError) as caught:
        read_volume(tmp_path, row_of(name, kind, index=None if kind != "npz" else 0, key="a"))
    assert str(tmp_path) not in str(caught.value)
    assert "Doe" not in str(caught.value)


@pytest.mark.parametrize("path", ["../a.nii.gz", "/etc/passwd", "a/../../b.nii.gz"])
def test_rows_cannot_lead_out_of_the_data_set(tmp_path, path):
    with pytest.raises(DataError, match="leads out of the data set"):
        read_volume(tmp_path, row_of(path, "nifti"))
