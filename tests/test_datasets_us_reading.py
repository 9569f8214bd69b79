"""Outlines over ultrasound frames, and frames that are written for the house."""

import nibabel as nib
import numpy as np
import pytest
import SimpleITK
from PIL import Image
from scipy import io

from agssd_core.config.frames import FramesConfig
from agssd_core.data.clips import load_clip
from agssd_core.data.still import ImageFrames
from agssd_core.errors import DataError
from simulation.datasets.reading_images import read_image_masks, write_frames_from
from simulation.datasets.rows import Mask, Row, Source

SHAPE = (20, 30)


def row_of(*masks, source=None):
    return Row("p1_2CH_ED", "p1", "US", source or Source("image.png", "image"), masks=masks)


def save_png(file, array):
    Image.fromarray(array).save(file)
    return Mask(Source(file.name, "image"), 1)


def square(top, left, value=255):
    array = np.zeros(SHAPE, dtype=np.uint8)
    array[top : top + 5, left : left + 5] = value
    return array


def test_masks_of_one_value_are_united_and_later_ones_lie_on_top(tmp_path):
    first = save_png(tmp_path / "a.png", square(0, 0))
    second = save_png(tmp_path / "b.png", square(10, 10))
    third = Mask(save_png(tmp_path / "c.png", square(10, 12)).source, 7)
    found = read_image_masks(tmp_path, row_of(first, second, third), shape=SHAPE, frames=1)
    assert found.shape == (1, *SHAPE)
    assert found.dtype == np.uint8
    assert (found == 1).sum() == 25 + 10
    assert (found == 7).sum() == 25


def test_the_blurred_edge_of_a_jpeg_mask_is_no_outline(tmp_path):
    Image.fromarray(square(5, 5)).save(tmp_path / "m.jpg", quality=60)
    mask = Mask(Source("m.jpg", "image"), 1, 127.0)
    found = read_image_masks(tmp_path, row_of(mask), shape=SHAPE, frames=1)
    assert np.array_equal(found[0], square(5, 5, 1))
    loose = read_image_masks(tmp_path, row_of(Mask(mask.source, 1)), shape=SHAPE, frames=1)
    assert loose.sum() > found.sum()


@pytest.mark.parametrize("mode", ["1", "RGB", "RGBA"])
def test_masks_in_other_modes_of_png_are_the_same(tmp_path, mode):
    Image.fromarray(square(2, 3)).convert(mode).save(tmp_path / "m.png")
    mask = Mask(Source("m.png", "image"), 1)
    found = read_image_masks(tmp_path, row_of(mask), shape=SHAPE, frames=1)
    assert np.array_equal(found[0], square(2, 3, 1))


def test_a_mask_of_another_size_is_refused(tmp_path):
    mask = save_png(tmp_path / "m.png", square(0, 0))
    with pytest.raises(DataError, match="Download both again"):
        read_image_masks(tmp_path, row_of(mask), shape=(30, 20), frames=1)


def test_a_damaged_mask_names_no_path(tmp_path):
    (tmp_path / "secret.png").write_bytes(b"\x89PNG\r\n\x1a\nrest")
    with pytest.raises(DataError, match="leave it out") as caught:
        read_image_masks(
            tmp_path, row_of(Mask(Source("secret.png", "image"))), shape=SHAPE, frames=1
        )
    assert "secret" not in str(caught.value)


def test_a_path_out_of_the_data_set_is_refused(tmp_path):
    with pytest.raises(DataError, match="leads out"):
        read_image_masks(tmp_path, row_of(Mask(Source("../m.png", "image"))), shape=SHAPE, frames=1)


@pytest.mark.parametrize("frames_last", [False, True])
def test_matlab_masks_are_stretched_and_lie_over_their_beat(tmp_path, frames_last):
    stored = np.zeros((3, 10, 10), dtype=np.uint8)
    stored[:, :5, :] = 1  # upper half
    stored[2, :, :] = 0
    array = np.moveaxis(stored, 0, -1) if frames_last else stored
    io.savemat(tmp_path / "Mask_x.mat", {"predicted": array})
    mask = Mask(Source("Mask_x.mat", "mat", index=4, key="predicted"), 1)
    found = read_image_masks(tmp_path, row_of(mask), shape=SHAPE, frames=8)
    assert [int(frame.sum()) for frame in found] == [0, 0, 0, 0, 300, 300, 0, 0]
    assert found[4, :10].all()
    with pytest.raises(DataError, match="do not fit a clip of 6"):
        read_image_masks(tmp_path, row_of(mask), shape=SHAPE, frames=6)


def test_a_matlab_file_without_the_array_is_refused(tmp_path):
    io.savemat(tmp_path / "m.mat", {"other": np.zeros((2, 4, 4))})
    mask = Mask(Source("m.mat", "mat", key="predicted"), 1)
    with pytest.raises(DataError, match="lacks an array"):
        read_image_masks(tmp_path, row_of(mask), shape=SHAPE, frames=2)


def case_xml(*marks, head=""):
    body = "".join(f"<mark><image>{number}</image><svg>{svg}</svg></mark>" for number, svg in marks)
    return f"{head}<case><number>7</number><tirads>4a</tirads>{body}</case>"


BOX = '[{"points": [{"x": 3, "y": 2}, {"x": 13, "y": 2}, {"x": 13, "y": 8}, {"x": 3, "y": 8}]}]'


def test_polygons_of_one_image_are_united_and_others_left_out(tmp_path):
    far = BOX.replace('"x": 3', '"x": 20').replace('"x": 13', '"x": 25')
    (tmp_path / "7.xml").write_text(case_xml(("1", BOX), ("2", BOX), ("1", far)))
    mask = Mask(Source("7.xml", "polygons", key="1"), 1)
    found = read_image_masks(tmp_path, row_of(mask), shape=SHAPE, frames=1)[0]
    assert found[5, 8] == 1
    assert found[5, 22] == 1
    assert found[5, 16] == 0
    assert found[12:, :].sum() == 0
    other = Mask(Source("7.xml", "polygons", key="2"), 1)
    assert read_image_masks(tmp_path, row_of(other), shape=SHAPE, frames=1)[0, 5, 22] == 0


@pytest.mark.parametrize("head", ["<!DOCTYPE case []>", '<!DOCTYPE a [<!ENTITY b "c">]>'])
def test_xml_with_definitions_of_its_own_is_refused(tmp_path, head):
    (tmp_path / "7.xml").write_text(case_xml(("1", BOX), head=head))
    mask = Mask(Source("7.xml", "polygons", key="1"), 1)
    with pytest.raises(DataError, match="definitions of its own"):
        read_image_masks(tmp_path, row_of(mask), shape=SHAPE, frames=1)


@pytest.mark.parametrize("svg", ["[{}]", "{", '[{"points": [{"x": "a", "y": 1}]}]', "7"])
def test_a_damaged_polygon_is_refused(tmp_path, svg):
    (tmp_path / "7.xml").write_text(case_xml(("1", svg)))
    mask = Mask(Source("7.xml", "polygons", key="1"), 1)
    with pytest.raises(DataError, match="outline is no list"):
        read_image_masks(tmp_path, row_of(mask), shape=SHAPE, frames=1)


def fan(rows=160, columns=120, frames=1):
    """Frames whose depth (rows) is told from width; grey grows downwards inside a fan."""
    y, x = np.mgrid[:rows, :columns]
    inside = (abs(x - columns / 2) < 8 + y * 0.35) & (y > 4)
    grey = (40 + y + 3 * ((x + y) % 7)) * inside
    # A bright spot that wanders keeps frames from being near-duplicates.
    clip = np.stack([grey] * frames).astype(np.uint8)
    for frame in range(frames):
        clip[frame, 20 + 25 * frame : 45 + 25 * frame, 50:70] = 250
    return clip


@pytest.mark.parametrize("kind", ["nifti", "itk"])
@pytest.mark.parametrize("frames", [1, 4])
def test_written_frames_have_depth_running_down_and_every_grey(tmp_path, kind, frames):
    clip = fan(frames=frames)
    if kind == "nifti":
        stored = clip.transpose(2, 1, 0)  # (column, row, time)
        array = stored[..., 0] if frames == 1 else stored
        nib.save(nib.Nifti1Image(array, np.eye(4)), tmp_path / "scan.nii.gz")
        source = Source("scan.nii.gz", "nifti")
    else:
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(clip), str(tmp_path / "scan.mhd"))
        source = Source("scan.mhd", "itk")
    (tmp_path / "out").mkdir()
    path = write_frames_from(tmp_path, row_of(source=source), tmp_path / "out")
    read = np.stack([frame for _, frame in ImageFrames(path).frames()])
    assert np.array_equal(read, clip)
    assert [each.name for each in (tmp_path / "out").iterdir()] == [path.name]
    prepared = load_clip(path, "image", FramesConfig(max_side=256, min_side=32))
    top, left, high, wide = prepared.box
    number = prepared.numbers[-1]
    cut = clip[number, top : top + high, left : left + wide]
    assert np.array_equal(prepared.frames[-1], np.where(prepared.sector, cut, 0))


@pytest.mark.parametrize("kind", ["nifti", "itk"])
def test_masks_of_a_sequence_lie_where_the_written_frames_are(tmp_path, kind):
    labels = np.zeros((3, *SHAPE), dtype=np.uint8)
    labels[0, 2:6, 10:25], labels[2, 15:, :4] = 1, 3
    if kind == "nifti":
        nib.save(nib.Nifti1Image(labels.transpose(2, 1, 0), np.eye(4)), tmp_path / "gt.nii.gz")
        mask = Mask(Source("gt.nii.gz", "nifti"))
    else:
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(labels), str(tmp_path / "gt.mhd"))
        mask = Mask(Source("gt.mhd", "itk"))
    assert np.array_equal(read_image_masks(tmp_path, row_of(mask), shape=SHAPE, frames=3), labels)


def test_values_below_zero_are_no_grey_and_leave_no_file(tmp_path):
    nib.save(nib.Nifti1Image(np.full((9, 8), -3.0, np.float32), np.eye(4)), tmp_path / "s.nii.gz")
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="no grey"):
        write_frames_from(tmp_path, row_of(source=Source("s.nii.gz", "nifti")), tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []
