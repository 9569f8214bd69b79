"""Real ultrasound: every file is read or refused with its reason, and looks as it should."""

from pathlib import Path

import numpy as np
import pytest

from agssd_core.config.frames import FramesConfig
from agssd_core.data.clips import clip_kind, load_clip, read_clip_header
from agssd_core.data.deidentify import Pseudonymiser
from agssd_core.errors import ClipError

pytestmark = pytest.mark.realdata

PSEUDONYMISER = Pseudonymiser(b"r" * 32)
CONFIG = FramesConfig()


def _read(file: Path):
    kind = "us-dicom" if file.suffix == ".dcm" else clip_kind(file)
    header = read_clip_header(file, kind, PSEUDONYMISER)
    clip = load_clip(file, kind, CONFIG)
    assert clip.frames.dtype == np.uint8
    assert not clip.frames[:, ~clip.sector].any()
    assert 1 <= len(clip.numbers) <= min(CONFIG.max_frames, header.frames)
    assert max(clip.frames.shape[1:]) <= CONFIG.max_side
    top, left, height, width = clip.box
    assert 0 <= top <= top + height <= header.rows
    assert 0 <= left <= left + width <= header.columns
    return header, clip


# name: box (top, left, height, width) of the echoes by eye, and frames; None is refused.
DICOMS = {
    "US1_UNCR.dcm": ((120, 0, 216, 640), 1),
    "US1_J2KR.dcm": ((120, 0, 216, 640), 1),
    "JPGLosslessP14SV1_1s_1f_8b.dcm": ((160, 140, 480, 740), 1),
    "gdcm-US-ALOKA-16.dcm": ((24, 32, 392, 304), 1),
    "IM00001.fragmented_no_bot_jpeg_baseline.50.dcm": ((16, 0, 202, 320), 8),
    "OBXXXX1A.dcm": None,
    "OBXXXX1A_rle_2frame.dcm": None,
}


def test_every_ultrasound_dicom_is_read_or_refused(real_data):
    files = {file.name: file for file in (real_data / "dicom" / "us").iterdir()}
    assert files.keys() == DICOMS.keys()
    for name, file in files.items():
        if DICOMS[name] is None:
            # The probe is in the air: hardly more than its own echo is lit.
            with pytest.raises(ClipError, match="no echo area of at least 5%"):
                _read(file)
            continue
        box, frames = DICOMS[name]
        header, clip = _read(file)
        assert header.frames == frames
        assert np.abs(np.subtract(clip.box, box)).max() < 40, (name, clip.box)


def test_one_picture_is_the_same_raw_and_as_jpeg_2000(real_data):
    folder = real_data / "dicom" / "us"
    raw, coded = (_read(folder / f"US1_{name}.dcm")[1] for name in ("UNCR", "J2KR"))
    np.testing.assert_array_equal(raw.frames, coded.frames)
    np.testing.assert_array_equal(raw.sector, coded.sector)


def test_a_palette_of_16_bits_is_shown_as_grey(real_data):
    """The full bladder is dark, the wall behind it bright, the coloured cursor gone."""
    _, clip = _read(real_data / "dicom" / "us" / "gdcm-US-ALOKA-16.dcm")
    height, width = clip.sector.shape
    bladder = clip.frames[0, height * 35 // 100 : height * 40 // 100, width // 5 : width // 2]
    tissue = clip.frames[0, height * 60 // 100 : height * 75 // 100, width // 5 : width // 2]
    assert bladder.mean() < 12
    assert 30 < tissue.mean() < 90


def test_cropped_breast_images_are_nearly_all_sector_and_masks_no_frames(real_data):
    files = sorted((real_data / "us2d" / "busi").rglob("*.png"))
    images = [file for file in files if "mask" not in file.name]
    assert (len(images), len(files)) == (66, 132)
    shares, patients = [], set()
    for file in images:
        header, clip = _read(file)
        patients.add(header.patient)
        shares.append(clip.box[2] * clip.box[3] / (header.rows * header.columns))
    assert len(patients) == 66
    assert np.median(shares) == 1
    assert min(shares) > 0.5
    for file in set(files) - set(images):
        with pytest.raises(ClipError, match="a mask or label map"):
            read_clip_header(file, "image", PSEUDONYMISER)


# group: box of the echoes in its frames by eye, and how many people its names tell apart.
MUSCLES = {
    "dataset1": ((0, 25, 458, 470), 7),
    "dataset2": ((60, 112, 464, 578), 6),
    "dataset3": ((85, 378, 720, 905), 1),
    "dataset4_SampleA": ((45, 235, 640, 760), 10),
    "dataset4_SampleB": ((70, 112, 446, 630), 10),
}


def test_muscle_screens_are_cut_to_their_echoes(real_data):
    root, read = real_data / "us2d" / "timtrack", 0
    for group, (box, people) in MUSCLES.items():
        seen, patients = [], set()
        for file in sorted((root / group).iterdir()):
            header, clip = _read(file)
            patients.add(header.patient)
            seen.append(clip.box)
        read += len(seen)
        assert len(patients) == people
        # Dark muscle may end early; nothing reaches further than the echoes.
        outer = np.array(seen)
        assert (outer[:, 0] > box[0] - 20).all()
        assert (outer[:, 1] > box[1] - 30).all()
        assert (outer[:, :2] + outer[:, 2:] < np.add(box[:2], box[2:]) + 40).all(), group
        assert np.median(outer[:, 3]) > 0.8 * box[3]
    assert read == 66


def test_lung_clips_are_fans_and_thinned(real_data):
    files = sorted((real_data / "us_cine" / "pocus_neuruppin").iterdir())
    assert len(files) == 10
    patients = set()
    for file in files:
        header, clip = _read(file)
        patients.add(header.patient)
        assert 4 <= len(clip.numbers) < header.frames / 2
        assert 0.55 < clip.sector.sum() / (header.rows * header.columns) < 0.85
        top = np.flatnonzero(clip.sector[5])
        assert len(top) < 0.7 * clip.sector.any(0).sum()  # narrow at the face
    assert len(patients) == 5


# name: box of the echoes by eye.
POCUS = {
    "clarius-ocular-image.png": (90, 265, 780, 745),
    "clarius-ocular-short.mp4": (90, 265, 780, 745),
    "interson-image.jpg": (65, 395, 790, 515),
    "interson-phantom.png": (470, 450, 420, 545),
    "sonoque_anechoic-3mm-3mm.dcm": (75, 378, 1340, 1325),
    "sonosite-anon-eye1-video.mp4": (45, 390, 595, 335),
    "sonosite-anon-eye1.jpg": (45, 390, 595, 335),
}


def test_portable_scanners_are_cut_to_their_echoes(real_data):
    for name, box in POCUS.items():
        header, clip = _read(real_data / "us_cine" / "itkpocus" / name)
        limit = 0.06 * max(header.rows, header.columns)
        assert np.abs(np.subtract(clip.box, box)).max() < limit, (name, clip.box)
    assert clip_kind(real_data / "us_cine" / "itkpocus" / "sonivate-anechoic_1-1.nrrd") is None
