"""Every format becomes the same grey frames, blank outside the sector."""

import json

import numpy as np
import pydicom
import pytest
from pydicom.pixels import convert_color_space
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless
from scipy import ndimage

from agssd_core.config.frames import FramesConfig
from agssd_core.data.clips import clip_kind, is_us_storage, load_clip, read_clip_header
from agssd_core.data.deidentify import Pseudonymiser
from agssd_core.data.dicom import read_dicom_header
from agssd_core.data.shrink import AreaShrink
from agssd_core.errors import ClipError, SeriesError
from tests.support import us_screens as us

PSEUDONYMISER = Pseudonymiser(b"s" * 32)
CONFIG = FramesConfig(similarity=1.0)
INSIDE = us.fan()
GREY = us.cine(INSIDE, 3)


def _colour(grey):
    return np.stack([grey] * 3, axis=-1)


def _encoded(syntax):
    def make():
        data = us.dicom(_colour(GREY), "RGB")
        data.compress(syntax, generate_instance_uid=False)
        return data

    return make


def _palette():
    # Stored values run backwards through the table, which has 16 bits.
    data = us.dicom(255 - GREY, "PALETTE COLOR")
    table = (np.arange(255, -1, -1) * 256).astype("<u2")
    for name in ("Red", "Green", "Blue"):
        setattr(data, f"{name}PaletteColorLookupTableDescriptor", [256, 0, 16])
        setattr(data, f"{name}PaletteColorLookupTableData", table.tobytes())
    return data


def _halved():
    """YBR_FULL_422: two luminances, then the colour that they share."""
    full = convert_color_space(_colour(GREY), "RGB", "YBR_FULL")
    packed = np.empty((*GREY.shape[:2], GREY.shape[2] // 2, 4), dtype=np.uint8)
    packed[..., 0], packed[..., 1] = full[:, :, ::2, 0], full[:, :, 1::2, 0]
    packed[..., 2:] = full[:, :, ::2, 1:]
    data = us.dicom(_colour(GREY), "YBR_FULL_422")
    data.PixelData = packed.tobytes()
    return data


DICOMS = {
    "grey": lambda: us.dicom(GREY),
    "inverse": lambda: us.dicom(255 - GREY, "MONOCHROME1"),
    "12 bits": lambda: us.dicom(GREY.astype("<u2") * 16, BitsStored=12, HighBit=11),
    "window": lambda: us.dicom(
        GREY.astype("<u2") * 4 + 100, BitsStored=12, HighBit=11, WindowCenter=610, WindowWidth=1021
    ),
    "signed": lambda: us.dicom(
        GREY.astype("<i2") - 128, WindowCenter=0, WindowWidth=256, BitsStored=16
    ),
    "rgb": lambda: us.dicom(_colour(GREY), "RGB"),
    "ybr": lambda: us.dicom(convert_color_space(_colour(GREY), "RGB", "YBR_FULL"), "YBR_FULL"),
    "ybr 422": _halved,
    "palette": _palette,
    "rle": _encoded(RLELossless),
    "jpeg-ls": _encoded(JPEGLSLossless),
    "jpeg 2000": _encoded(JPEG2000Lossless),
}


@pytest.mark.parametrize("name", DICOMS)
def test_every_dicom_form_holds_the_same_echoes_and_no_text(name, tmp_path):
    file = us.save(DICOMS[name](), tmp_path / "clip.dcm")
    clip = load_clip(file, "us-dicom", CONFIG)
    frames, sector = us.whole(clip)
    assert clip.numbers == (0, 1, 2)
    assert not frames[:, ~sector].any()
    assert (sector & INSIDE).sum() > 0.93 * INSIDE.sum()
    assert not (sector & ~ndimage.binary_dilation(INSIDE)).any()
    assert np.abs(frames[:, sector].astype(int) - GREY[:, sector]).max() <= 1


@pytest.mark.parametrize(
    "name", ["png", "bmp", "tiff", "tif", "jpg", "in palette", "16 bits", "with alpha"]
)
def test_every_image_form_holds_the_same_echoes_and_no_text(name, tmp_path):
    grey, options, lossy = GREY[0], {}, name == "jpg"
    file = tmp_path / f"patient1.{name if len(name) < 5 else 'png'}"
    if name == "jpg":
        options = {"quality": 97}
    if name == "16 bits":
        grey = grey.astype(np.uint16) * 257
    if name == "with alpha":
        # What is transparent is black, whatever it hides.
        grey = np.dstack([_colour(np.where(INSIDE, grey, 255)), INSIDE * np.uint8(255)])
        grey[120:140, 150:170, 3] = 0
    if name == "in palette":
        us.Image.fromarray(grey).convert("P").save(file)
    else:
        us.write_image(file, grey, **options)
    frames, sector = us.whole(load_clip(file, "image", CONFIG))
    assert not frames[:, ~sector].any()
    assert (sector & INSIDE).sum() > 0.9 * INSIDE.sum()
    near = ndimage.binary_dilation(INSIDE, iterations=4 if lossy else 1)
    assert not (sector & ~near).any()
    if name == "with alpha":
        assert not frames[0, 120:140, 150:170].any()
        sector[120:140, 150:170] = False
    assert np.abs(frames[0][sector].astype(int) - GREY[0][sector]).max() <= (25 if lossy else 1)


@pytest.mark.parametrize("suffix", ["mp4", "avi", "mkv", "mov", "mpg", "gif"])
def test_every_cine_form_holds_the_same_echoes_and_no_text(suffix, tmp_path):
    shown = us.cine(INSIDE, 5)
    file = tmp_path / f"loop.{suffix}"
    if suffix == "gif":
        us.write_pages(file, shown)
    else:
        us.write_video(file, shown, codec="mpeg2video" if suffix == "mpg" else "mpeg4")
    assert clip_kind(file) == "video"
    header = read_clip_header(file, "video", PSEUDONYMISER)
    assert (header.rows, header.columns) == us.SHAPE
    assert header.frames == 5
    clip = load_clip(file, "video", CONFIG)
    frames, sector = us.whole(clip)
    assert clip.numbers == (0, 1, 2, 3, 4)
    assert not frames[:, ~sector].any()
    assert (sector & INSIDE).sum() > 0.93 * INSIDE.sum()
    assert not (sector & ~ndimage.binary_dilation(INSIDE, iterations=4)).any()
    error = np.abs(frames[:, sector].astype(int) - shown[:, sector])
    assert error.mean() < (8 if suffix != "gif" else 0.01)


def test_jpeg_in_pieces_without_offset_table(tmp_path):
    shown = _colour(GREY)
    file = us.save(us.as_jpeg(us.dicom(shown, "YBR_FULL"), shown), tmp_path / "clip.dcm")
    frames, sector = us.whole(load_clip(file, "us-dicom", CONFIG))
    assert np.abs(frames[:, sector].astype(int) - GREY[:, sector]).mean() < 3


def test_a_region_of_the_header_bounds_the_sector(tmp_path):
    """Two views stand side by side; only the larger tissue region counts, and the fan in it."""
    pair = np.concatenate([GREY, GREY], axis=2)
    items = [us.region(0, 0, 239, 300), us.region(0, 320, 239, 639), us.region(0, 0, 9, 9)]
    items.append(us.region(0, 0, 239, 639, kind=3, plane=3))
    file = us.save(us.dicom(pair, SequenceOfUltrasoundRegions=items), tmp_path / "pair.dcm")
    _, sector = us.whole(load_clip(file, "us-dicom", CONFIG), pair.shape[1:])
    assert not sector[:, :320].any()
    assert (sector[:, 320:] & INSIDE).sum() > 0.93 * INSIDE.sum()
    assert not (sector[:, 320:] & ~ndimage.binary_dilation(INSIDE)).any()


def test_flow_becomes_dark_and_marks_on_black_vanish(tmp_path):
    shown = _colour(GREY[0])
    shown[100:130, 130:190] = (220, 30, 10)
    shown[120:122, 40:60] = (0, 255, 0)
    file = us.write_image(tmp_path / "doppler.png", shown)
    frames, sector = us.whole(load_clip(file, "image", CONFIG))
    assert sector[100:130, 130:190].all()
    assert (frames[0, 100:130, 130:190] == 10).all()
    assert not frames[0, 120:122, 40:60].any()


def test_a_tinted_display_keeps_its_echoes(tmp_path):
    grey = GREY[0]
    sepia = np.stack([grey, grey * 0.7, grey * 0.3], axis=-1).astype(np.uint8)
    file = us.write_image(tmp_path / "sepia.png", sepia)
    frames, sector = us.whole(load_clip(file, "image", CONFIG))
    assert (sector & INSIDE).sum() > 0.9 * INSIDE.sum()
    np.testing.assert_array_equal(frames[0][sector], grey[sector])


def test_the_exif_orientation_is_applied(tmp_path):
    exif = us.Image.Exif()
    exif[0x0112] = 6
    turned = np.rot90(GREY[0])
    file = us.write_image(tmp_path / "turned.png", turned, exif=exif)
    assert read_clip_header(file, "image", PSEUDONYMISER).rows == us.SHAPE[0]
    clip = load_clip(file, "image", CONFIG)
    frames, sector = us.whole(clip)
    np.testing.assert_array_equal(frames[0][sector], GREY[0][sector])


def test_a_large_frame_is_shrunk_by_area_and_nothing_leaks_in(tmp_path):
    big = GREY[0].repeat(4, axis=0).repeat(4, axis=1)
    big[~INSIDE.repeat(4, axis=0).repeat(4, axis=1)] = 0
    clip = load_clip(us.write_image(tmp_path / "big.png", big), "image", FramesConfig(max_side=180))
    assert max(clip.frames.shape[1:]) == 180
    assert not clip.frames[:, ~clip.sector].any()
    top, left, height, width = clip.box
    cut = big[top : top + height, left : left + width]
    exact = us.Image.fromarray(cut.astype(np.float32)).resize(
        clip.frames.shape[:0:-1], us.Image.Resampling.BOX
    )
    inner = ndimage.binary_erosion(clip.sector, iterations=4)
    # Pillow takes whole pixels into a box, so single ones differ a little.
    assert np.abs(clip.frames[0][inner] - np.array(exact)[inner]).mean() < 4


def test_the_edge_of_a_sector_is_neither_darkened_nor_mixed_with_the_outside():
    frame = np.where(INSIDE, 100, 255).astype(np.uint8)
    shrink = AreaShrink(INSIDE, 77)
    assert max(shrink.sector.shape) == 77
    assert (shrink(frame)[shrink.sector] == 100).all()
    assert not shrink(frame)[~shrink.sector].any()


def test_a_small_sector_is_refused(tmp_path):
    file = us.write_image(tmp_path / "small.png", GREY[0])
    with pytest.raises(ClipError, match=r"data\.frames\.min_side = 230"):
        load_clip(file, "image", FramesConfig(min_side=230))


def test_repeated_frames_are_thinned_and_long_clips_spread(tmp_path):
    frames = us.cine(INSIDE, 8).repeat(4, axis=0)
    blank = np.zeros_like(frames[:2])
    # Not GIF: its writer leaves out frames that repeat.
    file = us.write_pages(tmp_path / "loop.tif", np.concatenate([blank, frames]))
    clip = load_clip(file, "image", FramesConfig(similarity=0.98))
    assert clip.numbers == tuple(range(2, 34, 4))
    some = load_clip(file, "image", FramesConfig(similarity=0.98, max_frames=3))
    assert some.numbers == (2, 18, 30)
    shown, sector = us.whole(some)
    np.testing.assert_array_equal(shown[1][sector], frames[16][sector])


def test_a_header_tells_whose_it_is_and_names_nobody(tmp_path):
    file = us.save(us.dicom(GREY), tmp_path / "clip.dcm")
    header = read_clip_header(file, "us-dicom", PSEUDONYMISER)
    assert header.patient == PSEUDONYMISER.patient("4711")
    assert (header.vendor, header.model) == ("Philips", "EPIQ 7C")
    assert (header.frames, header.rows, header.columns) == (3, *us.SHAPE)
    again = us.save(us.dicom(GREY), tmp_path / "copy.dcm")
    assert read_clip_header(again, "us-dicom", PSEUDONYMISER) == header
    other = us.save(us.dicom(255 - GREY), tmp_path / "other.dcm")
    assert read_clip_header(other, "us-dicom", PSEUDONYMISER).content != header.content


@pytest.mark.parametrize("placeholder", ["", "--", "Anonymous", "0"])
def test_a_patient_that_nobody_named_is_the_study(tmp_path, placeholder):
    first = us.save(us.dicom(GREY, PatientID=placeholder), tmp_path / "a.dcm")
    second = us.save(
        us.dicom(GREY, PatientID=placeholder, StudyInstanceUID="1.2.99"), tmp_path / "b.dcm"
    )
    headers = [read_clip_header(file, "us-dicom", PSEUDONYMISER) for file in (first, second)]
    assert headers[0].patient != headers[1].patient


def test_storage_classes():
    for storage in ("6.1", "3.1", "6", "3"):
        assert is_us_storage(f"1.2.840.10008.5.1.4.1.1.{storage}")
    assert is_us_storage("1.2.840.10008.5.1.4.1.1.7", "US")
    assert is_us_storage("1.2.840.10008.5.1.4.1.1.7.4", "us")
    assert not is_us_storage("1.2.840.10008.5.1.4.1.1.7", "OT")
    assert not is_us_storage("1.2.840.10008.5.1.4.1.1.2", "US")
    assert not is_us_storage("1.2.840.10008.5.1.4.1.1.77.1.4", "US")


def test_ct_and_ultrasound_keep_to_their_readers(tmp_path):
    file = us.save(us.dicom(GREY), tmp_path / "clip.dcm")
    with pytest.raises(SeriesError, match="no CT or MR image"):
        read_dicom_header(file, PSEUDONYMISER)
    data = pydicom.dcmread(file)
    data.SOPClassUID = "1.2.840.10008.5.1.4.1.1.2"
    us.save(data, file)
    with pytest.raises(ClipError, match="no ultrasound image"):
        read_clip_header(file, "us-dicom", PSEUDONYMISER)


def test_a_sidecar_names_patient_and_scanner(tmp_path):
    file = us.write_image(tmp_path / "frame_1.png", GREY[0])
    content = {"PatientID": "Doe", "Manufacturer": "SonoSite", "ManufacturersModelName": "Edge"}
    file.with_suffix(".json").write_text(json.dumps(content))
    header = read_clip_header(file, "image", PSEUDONYMISER)
    assert header.patient == PSEUDONYMISER.patient("doe")
    assert (header.vendor, header.model) == ("SonoSite", "Edge")
