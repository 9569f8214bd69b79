"""Hostile ultrasound files: each is read or refused with a reason, and nobody is named."""

import logging
import os
import random
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
from pydicom.encaps import encapsulate, generate_frames

from agssd_core.config.frames import FramesConfig
from agssd_core.data import frame_source
from agssd_core.data.clips import clip_kind, load_clip, read_clip_header
from agssd_core.data.deidentify import Pseudonymiser
from agssd_core.errors import ClipError
from tests.support import us_screens as us

PSEUDONYMISER = Pseudonymiser(b"s" * 32)
CONFIG = FramesConfig()
SMALL = (96, 128)
MUTANTS = 40


def _small(frames=3):
    inside = np.zeros(SMALL, dtype=bool)
    inside[12:90, 20:110] = True
    return us.cine(inside, frames, text=False)


def _kind(file):
    return "us-dicom" if file.suffix == ".dcm" else clip_kind(file)


def _read(file):
    read_clip_header(file, _kind(file), PSEUDONYMISER)
    return load_clip(file, _kind(file), CONFIG)


def _refused(file, match):
    with pytest.raises(ClipError, match=match) as caught:
        _read(file)
    assert "mueller" not in str(caught.value).casefold()


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "gif", "mp4", "mpg", "avi", "mkv"])
@pytest.mark.parametrize(
    "content", [b"", b"Mueller, Anna; born 1961\n" * 90], ids=["empty", "text"]
)
def test_what_is_no_picture_is_refused(tmp_path, suffix, content):
    file = tmp_path / f"mueller.{suffix}"
    file.write_bytes(content)
    _refused(file, "whatever its name says. Export it again, or leave it out")


@pytest.mark.parametrize(
    "content", [b"", b"Mueller, Anna; born 1961\n" * 90], ids=["empty", "text"]
)
def test_what_is_no_dicom_is_refused(tmp_path, content):
    file = tmp_path / "mueller.dcm"
    file.write_bytes(content)
    _refused(file, "Export it again|Nothing needs doing")


def test_a_play_list_is_not_followed(tmp_path):
    us.write_video(tmp_path / "other.mp4", _small())
    file = tmp_path / "list.mp4"
    file.write_text(f"#EXTM3U\n#EXTINF:1,\n{tmp_path}/other.mp4\n#EXT-X-ENDLIST\n")
    _refused(file, "no video that is read")


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "gif", "mp4", "mpg", "dcm"])
def test_a_file_cut_short_is_refused_or_shorter(tmp_path, suffix):
    file = tmp_path / f"cut.{suffix}"
    if suffix in ("mp4", "mpg"):
        us.write_video(file, _small(40), codec="mpeg4" if suffix == "mp4" else "mpeg2video")
    elif suffix == "dcm":
        us.save(us.dicom(_small()), file)
    else:
        us.write_image(file, _small()[0])
    content = file.read_bytes()
    file.write_bytes(content[: len(content) * 2 // 3])
    if suffix in ("mpg", "gif"):
        # Without an index of its frames a file cannot tell that some are missing.
        with suppress(ClipError):
            assert len(_read(file).frames) >= 1
    else:
        _refused(file, r"Export it again|Copy or export it again")


def test_a_video_whose_index_promises_more_frames_is_refused(tmp_path):
    file = us.write_video(tmp_path / "cut.mp4", _small(40), movflags="faststart")
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    _refused(file, r"of 40 frames are there. Copy or export it again")


def _png(width, height):
    """A PNG that claims a size and holds next to nothing."""

    def chunk(name, data):
        body = name + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    head = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
    return start + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(60_000, 60_000), (9000, 10), (8000, 8000)])
def test_a_bomb_is_refused_by_its_header(tmp_path, size):
    file = tmp_path / "bomb.png"
    file.write_bytes(_png(*size))
    _refused(file, "claims frames of more than")
    claims = {"Rows": size[0], "Columns": size[1]}
    _refused(us.save(us.dicom(_small(1), **claims), tmp_path / "bomb.dcm"), "claims frames of more")


def test_too_many_frames_are_refused(tmp_path, monkeypatch):
    file = us.save(us.dicom(_small(1), NumberOfFrames=20_000), tmp_path / "long.dcm")
    _refused(file, "more than 10000 frames")
    file = us.save(us.dicom(_small(1), NumberOfFrames=2000), tmp_path / "cut.dcm")
    _refused(file, "pixels are missing")
    monkeypatch.setattr(frame_source, "MAX_CLIP_FRAMES", 5)
    for suffix in ("gif", "mp4"):
        write = us.write_video if suffix == "mp4" else us.write_pages
        _refused(write(tmp_path / f"many.{suffix}", _small(8)), "more than 5 frames")


def test_a_decoder_that_takes_too_long_is_stopped(tmp_path, monkeypatch):
    monkeypatch.setattr(frame_source, "MAX_SECONDS", -1)
    _refused(us.write_video(tmp_path / "slow.mp4", _small()), "took longer")


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"SamplesPerPixel": 3}, "contradicts itself: 3 sample"),
        ({"PhotometricInterpretation": "RGB"}, "contradicts itself: 1 sample"),
        ({"PhotometricInterpretation": "HSV"}, "colour space that is not read"),
        ({"PhotometricInterpretation": "PALETTE COLOR"}, "gave up"),
        ({"BitsAllocated": 32}, "no pixels of 8 or 16 bits"),
        ({"Rows": 0}, "no frame"),
        ({"Rows": 4000}, "pixels are missing"),
        ({"SOPClassUID": "1.2.840.10008.5.1.4.1.1.88.11"}, "no ultrasound"),
    ],
)
def test_a_header_that_contradicts_its_pixels_is_refused(tmp_path, fields, match):
    _refused(us.save(us.dicom(_small(), **fields), tmp_path / "odd.dcm"), match)


def test_frames_of_different_sizes_are_refused(tmp_path):
    first = us.Image.fromarray(_small()[0])
    first.save(tmp_path / "pages.tif", save_all=True, append_images=[first.resize((99, 99))])
    _refused(tmp_path / "pages.tif", "change size")


def test_a_mask_is_known_by_name_or_by_its_few_levels(tmp_path):
    mask = np.zeros(SMALL, dtype=np.uint8)
    mask[30:60, 40:80] = 255
    folder = tmp_path / "busi_with_gt"
    for name in ("benign (1)_mask.png", "x_mask_1.png", "x_gt.png", "x_seg.png"):
        _refused(us.write_image(folder / name, mask), "a mask or label map by its name")
    _refused(
        us.write_image(tmp_path / "test-GT" / "0001.png", mask), "a mask or label map by its name"
    )
    _refused(us.write_image(folder / "0001.png", mask), "fewer than 16 grey levels")
    _refused(us.write_image(folder / "ct_01.png", _small()[0]), "no ultrasound by its name")


@pytest.mark.skipif(os.name != "posix", reason="names of other systems are always text")
def test_a_name_that_is_no_text_is_read(tmp_path):
    file = us.write_image(tmp_path / os.fsdecode(b"M\xfcller_7.png"), _small()[0])
    assert read_clip_header(file, "image", PSEUDONYMISER).patient
    assert len(load_clip(file, "image", CONFIG).frames) == 1


def _mutate(content, draw):
    spoilt = bytearray(content)
    kind = draw.randrange(3)
    if kind == 0:
        return bytes(spoilt[: draw.randrange(len(spoilt))])
    if kind == 1:
        start = draw.randrange(len(spoilt) - 64)
        return bytes(spoilt[:start] + spoilt[start + draw.randrange(1, 64) :])
    area = len(spoilt) if draw.randrange(2) else min(len(spoilt), 900)
    for _ in range(draw.randrange(1, 40)):
        spoilt[draw.randrange(area)] = draw.randrange(256)
    return bytes(spoilt)


@pytest.mark.parametrize("suffix", ["png", "jpg", "tif", "gif", "mp4", "mpg", "dcm", "rle", "j2k"])
def test_mutants_are_read_or_refused_without_naming_anybody(
    tmp_path, suffix, caplog, recwarn, capfd
):
    caplog.set_level(logging.DEBUG)
    name = "Mueller-4711"
    file = (
        tmp_path
        / f"{name}.{suffix if len(suffix) == 3 and suffix not in ('rle', 'j2k') else 'dcm'}"
    )
    if suffix in ("mp4", "mpg"):
        us.write_video(file, _small(), codec="mpeg4" if suffix == "mp4" else "mpeg2video")
    elif file.suffix == ".dcm":
        data = us.dicom(_small(), PatientID=name)
        if suffix != "dcm":
            syntax = {"rle": "1.2.840.10008.1.2.5", "j2k": "1.2.840.10008.1.2.4.90"}[suffix]
            data.compress(syntax, generate_instance_uid=False)
        us.save(data, file)
    else:
        us.write_image(file, _small()[0])
    content, draw, reasons = file.read_bytes(), random.Random(0), []
    for _ in range(MUTANTS):
        file.write_bytes(_mutate(content, draw))
        try:
            clip = _read(file)
            assert not clip.frames[:, ~clip.sector].any()
        except ClipError as error:
            reasons.append(str(error))
    assert reasons
    warned = "".join(str(warning.message) for warning in recwarn)
    for text in (caplog.text + warned + "".join(capfd.readouterr()), *reasons):
        assert name not in text
        assert "EPIQ" not in text
        assert "Mueller" not in text


@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.80"])
def test_a_compressed_frame_may_not_claim_more_than_the_header(tmp_path, syntax):
    data = us.dicom(_small(1))
    data.compress(syntax, generate_instance_uid=False)
    frame = bytearray(next(generate_frames(data.PixelData, number_of_frames=1)))
    if syntax.endswith("90"):
        place = frame.index(b"\xff\x51")
        frame[place + 6 : place + 14] = struct.pack(">II", 20_000, 20_000)
    else:
        place = frame.index(b"\xff\xf7")
        frame[place + 5 : place + 9] = struct.pack(">HH", 30_000, 30_000)
    data.PixelData = encapsulate([bytes(frame)])
    with pytest.raises(ClipError, match="a compressed frame is of another size"):
        load_clip(us.save(data, tmp_path / "bomb.dcm"), "us-dicom", CONFIG)
