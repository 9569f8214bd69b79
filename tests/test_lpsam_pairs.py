import numpy as np
import pytest
from PIL import Image

from agssd_core.config.frames import FramesConfig
from agssd_core.config.lpsam import LpsamConfig
from agssd_core.data.label_image import read_label_image
from agssd_core.data.pairs import ImageMaskPairs, fit_labels, read_pair, shrink_labels
from agssd_core.errors import ClipError, DataError
from agssd_core.training.lpsam_frames import read_fit_frames
from tests.support.raw_clips import screens, write_png

FRAMES = FramesConfig(min_side=32)


def _mask(file, *boxes, shape=(120, 160), values=None):
    labels = np.zeros(shape, dtype=np.uint8)
    for number, (top, left, bottom, right) in enumerate(boxes):
        labels[top:bottom, left:right] = (values or [255] * len(boxes))[number]
    Image.fromarray(labels).save(file)
    return labels


def _read(folder, structures="separate"):
    (pair,) = ImageMaskPairs.open([folder]).pairs
    return read_pair(pair, FRAMES, structures=structures)


def test_masks_beside_an_image_are_separate_structures_or_one_union(tmp_path):
    write_png(tmp_path / "a (1).png")
    _mask(tmp_path / "a (1)_mask.png", (30, 40, 50, 60))
    _mask(tmp_path / "a (1)_mask_1.png", (60, 80, 80, 120))
    assert _read(tmp_path).structures.shape[0] == 2
    union = _read(tmp_path, "union").structures
    assert union.shape[0] == 1
    assert union.sum() == pytest.approx(20 * 20 + 20 * 40, rel=0.02)


def test_a_mask_is_cut_with_its_image(tmp_path):
    write_png(tmp_path / "a.png")  # speckle in rows 15-105 and columns 20-140 of a black screen
    _mask(tmp_path / "a_mask.png", (0, 0, 60, 160))
    frame = _read(tmp_path)
    assert frame.frame.shape == frame.structures.shape[1:]
    assert frame.frame.shape[1] == pytest.approx(120, abs=4)
    rows = np.flatnonzero(frame.structures[0].any(1))
    assert rows[-1] + 1 == pytest.approx(60 - 15, abs=3)


def test_a_label_map_with_several_ids_is_several_structures(tmp_path):
    write_png(tmp_path / "a.png")
    _mask(tmp_path / "a_mask.png", (30, 40, 50, 60), (60, 80, 80, 120), values=[1, 3])
    assert _read(tmp_path).structures.shape[0] == 2


def test_a_table_names_images_and_masks(tmp_path):
    (tmp_path / "m").mkdir()
    write_png(tmp_path / "one.png")
    write_png(tmp_path / "two.png", seed=1)
    _mask(tmp_path / "m" / "x.png", (30, 40, 50, 60))
    _mask(tmp_path / "m" / "y.png", (60, 40, 70, 60))
    table = tmp_path / "list.csv"
    table.write_text("image,mask\none.png,m/x.png\none.png,m/y.png\ntwo.png,\n")
    pairs = ImageMaskPairs.open([table])
    assert [(pair.name, len(pair.masks)) for pair in pairs.pairs] == [("one.png", 2)]
    assert "has no mask" in pairs.skipped["two.png"]
    table.write_text("picture,mask\n")
    with pytest.raises(DataError, match="Add both"):
        ImageMaskPairs.open([table])


def test_sources_without_pairs_are_refused(tmp_path):
    with pytest.raises(DataError, match="neither a folder nor"):
        ImageMaskPairs.open([tmp_path / "absent"])
    write_png(tmp_path / "a.png")
    with pytest.raises(DataError, match="no image with a mask"):
        ImageMaskPairs.open([tmp_path])


def test_the_digest_holds_names_and_bytes(tmp_path):
    write_png(tmp_path / "a.png")
    _mask(tmp_path / "a_mask.png", (30, 40, 50, 60))
    before = ImageMaskPairs.open([tmp_path]).digest()
    assert before == ImageMaskPairs.open([tmp_path]).digest()
    _mask(tmp_path / "a_mask.png", (30, 40, 50, 61))
    assert ImageMaskPairs.open([tmp_path]).digest() != before


def _colour(file):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (120, 160, 3), dtype=np.uint8)).save(
        file
    )


def _many(file):
    Image.fromarray((np.arange(120 * 160) % 301).reshape(120, 160).astype(np.uint16)).save(file)


BAD = {
    "another size": (lambda file: _mask(file, shape=(60, 80)), "Save it at the image's own size"),
    "colours": (_colour, "colours are no labels"),
    "300 ids": (_many, "Merge labels"),
    "no picture": (lambda file: file.write_bytes(b"hello"), "the file is damaged"),
    "empty": (lambda file: file.write_bytes(b""), "the file is damaged"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_mask_is_listed_and_the_others_are_read(tmp_path, kind):
    make, remedy = BAD[kind]
    write_png(tmp_path / "bad.png")
    make(tmp_path / "bad_mask.png")
    write_png(tmp_path / "good.png", seed=1)
    _mask(tmp_path / "good_mask.png", (30, 40, 50, 60))
    pairs = ImageMaskPairs.open([tmp_path])
    frames = read_fit_frames(pairs, LpsamConfig(image_size=64), FRAMES, progress=lambda *_: None)
    assert len(frames) == 1
    assert remedy in pairs.skipped["bad.png"]
    assert str(tmp_path) not in pairs.skipped["bad.png"]


def test_a_mask_as_jpeg_is_refused(tmp_path):
    write_png(tmp_path / "a.png")
    Image.fromarray(screens()[0]).save(tmp_path / "a_mask.jpg")
    with pytest.raises(ClipError, match="Save it as PNG"):
        _read(tmp_path)


def test_nothing_left_is_an_error(tmp_path):
    write_png(tmp_path / "a.png")
    _mask(tmp_path / "a_mask.png")
    pairs = ImageMaskPairs.open([tmp_path])
    with pytest.raises(DataError, match="none of 1 public image"):
        read_fit_frames(pairs, LpsamConfig(image_size=64), FRAMES, progress=lambda *_: None)


def test_grey_in_three_channels_and_one_bit_masks_are_read(tmp_path):
    labels = np.zeros((8, 8), dtype=np.uint8)
    labels[2:4, 2:4] = 255
    Image.fromarray(labels).convert("RGB").save(tmp_path / "rgb.png")
    Image.fromarray(labels).convert("1").save(tmp_path / "bit.png")
    for name in ("rgb.png", "bit.png"):
        np.testing.assert_array_equal(read_label_image(tmp_path / name)[0] > 0, labels > 0)


def test_numpy_labels(tmp_path):
    maps = np.zeros((2, 4, 4), dtype=np.int32)
    maps[1, 0, 0], maps[1, 1, 1] = 1000, 7
    np.save(tmp_path / "a.npy", maps)
    found = read_label_image(tmp_path / "a.npy")
    assert found.dtype == np.uint8
    # Numbers above 255 are renumbered in ascending order.
    assert (found[1, 1, 1], found[1, 0, 0], found[0].max()) == (1, 2, 0)
    for array in (np.zeros((4, 4)), np.array([{"a": 1}]), np.zeros(3, np.uint8), -maps):
        np.save(tmp_path / "bad.npy", array, allow_pickle=True)
        with pytest.raises(ClipError):
            read_label_image(tmp_path / "bad.npy")


def test_nearest_neighbour_keeps_every_label_at_its_place():
    labels = np.arange(16, dtype=np.uint8).reshape(4, 4)
    np.testing.assert_array_equal(shrink_labels(labels, (4, 4)), labels)
    np.testing.assert_array_equal(shrink_labels(labels, (2, 2)), labels[1::2, 1::2])
    grown = shrink_labels(labels, (8, 12))
    np.testing.assert_array_equal(grown, labels.repeat(2, 0).repeat(3, 1))
    np.testing.assert_array_equal(
        fit_labels(labels, (1, 2, 2, 2), (4, 4)), labels[1:3, 2:4].repeat(2, 0).repeat(2, 1)
    )
