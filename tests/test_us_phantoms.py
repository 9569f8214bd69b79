"""Ultrasound phantoms: repeatable, readable by the site's own readers, and blanked by them."""

import numpy as np
import pydicom
import pytest
from PIL import Image
from pydantic import ValidationError
from scipy.ndimage import binary_dilation, binary_erosion, gaussian_filter

from agssd_core.config import FramesConfig, PhantomSiteConfig
from agssd_core.data.catalogue import open_catalogue
from agssd_core.data.clips import clip_kind, load_clip
from agssd_core.data.index import index_folders
from simulation.phantom_ultrasound import US_LOOKS, make_us_phantom
from simulation.phantom_us_anatomy import (
    BONE,
    LESION,
    MYOCARDIUM,
    US_LABEL_NAMES,
    VENTRICLE,
    draw_us_patient,
)
from simulation.phantoms import make_us_clip, write_phantom_site

ALL_FRAMES = FramesConfig(similarity=1.0)


def us_site(**changes):
    given = {"name": "us", "modalities": ("US",), "format": "dicom", "patients": 2}
    return PhantomSiteConfig(**(given | changes))


def files_in(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def kind_of(file):
    return "us-dicom" if file.suffix == ".dcm" else clip_kind(file)


@pytest.mark.parametrize("file_format", ["dicom", "png", "video"])
def test_one_seed_gives_the_same_bytes_and_another_does_not(tmp_path, file_format):
    site = us_site(format=file_format)
    contents = []
    for place, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert write_phantom_site(tmp_path / place, site, seed=seed) == 4
        contents.append(
            {
                path.relative_to(tmp_path / place): path.read_bytes()
                for path in files_in(tmp_path / place)
            }
        )
    assert contents[0] == contents[1]
    assert contents[0].keys() == contents[2].keys()
    pictures = [path for path in contents[0] if path.suffix != ".json"]
    assert len(pictures) == 4
    assert all(contents[0][path] != contents[2][path] for path in pictures)


@pytest.mark.parametrize("file_format", ["dicom", "png", "video"])
@pytest.mark.parametrize(("anatomy", "scanner"), [("heart", "b"), ("breast", "a"), ("muscle", "c")])
def test_the_site_s_reader_finds_the_sector_and_blanks_everything_else(
    tmp_path, file_format, anatomy, scanner
):
    """Name, ID, bars and ruler are burned in outside the sector: none of them may be left."""
    site = us_site(format=file_format, anatomy=anatomy, scanner=scanner, patients=1, frames=3)
    write_phantom_site(tmp_path, site, seed=0)
    files = [file for file in files_in(tmp_path) if file.suffix != ".json"]
    assert len(files) == 2
    for clip, file in enumerate(files):
        phantom = make_us_clip(site, 0, clip, seed=0)
        found = load_clip(file, kind_of(file), ALL_FRAMES)
        assert found.frames.shape[0] == len(phantom.frames)
        top, left, height, width = found.box
        sector = np.zeros(phantom.sector.shape, dtype=bool)
        sector[top : top + height, left : left + width] = found.sector
        both = (sector & phantom.sector).sum()
        assert both / (sector | phantom.sector).sum() > 0.92
        assert both / sector.sum() > 0.99
        assert not found.frames[:, ~found.sector].any()
        if file_format == "png":
            shown = phantom.frames[0, top : top + height, left : left + width, 0]
            assert np.array_equal(found.frames[0][found.sector], shown[found.sector])


def test_what_is_burned_in_names_a_made_up_patient_outside_the_sector():
    looks = dict.fromkeys(US_LOOKS)
    for scanner in looks:
        one, other = (
            make_us_phantom(
                draw_us_patient(np.random.default_rng(0)),
                US_LOOKS[scanner],
                anatomy="heart",
                frames=1,
                name=name,
                seed=0,
            )
            for name in ("Phantom^one-0001", "Phantom^two-0002")
        )
        differs = (one.frames != other.frames).any(axis=(0, 3))
        assert differs.sum() > 50
        assert not (differs & one.sector).any()


def test_patients_and_clips_are_told_apart_in_every_format(tmp_path):
    for file_format in ("dicom", "png", "video"):
        site = us_site(format=file_format, patients=3)
        write_phantom_site(tmp_path / file_format, site, seed=0)
        index_folders(tmp_path / f"{file_format}-site", [tmp_path / file_format])
        catalogue = open_catalogue(tmp_path / f"{file_format}-site")
        assert (catalogue.patient_count, len(catalogue.clips)) == (3, 6)
        assert catalogue.cohorts == ("us",)
        assert {clip.vendor for clip in catalogue.clips} == {"GE"}
        frames = sorted(clip.frames for clip in catalogue.clips)
        assert frames == ([1] * 6 if file_format == "png" else [1, 1, 1, 6, 6, 6])


def test_dicom_phantoms_come_as_rle_with_a_region_and_as_jpeg_without(tmp_path):
    write_phantom_site(tmp_path, us_site(patients=1), seed=0)
    clip, still = (pydicom.dcmread(file) for file in files_in(tmp_path))
    assert clip.file_meta.TransferSyntaxUID.name == "RLE Lossless"
    assert clip.pixel_array.shape[0] == clip.NumberOfFrames == 6
    (region,) = clip.SequenceOfUltrasoundRegions
    phantom = make_us_clip(us_site(), 0, 0, seed=0)
    rows = np.flatnonzero(phantom.sector.any(axis=1))
    assert (region.RegionLocationMinY0, region.RegionLocationMaxY1) == (rows[0], rows[-1])
    assert np.array_equal(clip.pixel_array, phantom.frames)
    assert still.file_meta.TransferSyntaxUID.name.startswith("JPEG Baseline")
    assert "SequenceOfUltrasoundRegions" not in still
    assert str(clip.PatientName).startswith("Phantom^")
    assert clip.PatientBirthDate


def test_labels_have_several_structures_and_stay_inside_the_sector():
    for anatomy in ("heart", "breast", "muscle"):
        for number in range(4):
            phantom = make_us_clip(us_site(anatomy=anatomy, frames=2), number, 0, seed=0)
            found = set(np.unique(phantom.labels)) - {0}
            assert len(found) >= 4
            assert max(found) < len(US_LABEL_NAMES)
            assert not phantom.labels[:, ~phantom.sector].any()


def test_blood_is_dark_and_bone_throws_a_shadow():
    heart = make_us_clip(us_site(), 0, 0, seed=0)
    grey = heart.frames[..., 0]
    assert grey[heart.labels == VENTRICLE].mean() < 0.5 * grey[heart.labels == MYOCARDIUM].mean()
    muscle = make_us_clip(us_site(anatomy="muscle"), 0, 0, seed=0)
    bone = muscle.labels[0] == BONE
    rows, columns = np.nonzero(bone)
    middle = np.median(columns).astype(int)
    inside = rows[columns == middle]
    surface, depth = inside[:4], inside[-6:]
    grey = muscle.frames[0, :, middle - 3 : middle + 4, 0].astype(float)
    assert grey[depth].mean() < 0.6 * grey[surface].mean()


def test_speckle_has_the_ratio_of_mean_and_spread_that_rayleigh_has():
    """Mean over standard deviation of the amplitude is sqrt(pi / (4 - pi)) = 1.91."""
    phantom = make_us_clip(us_site(frames=2), 1, 0, seed=0)
    structures = binary_dilation(phantom.labels[0] > 0, iterations=6)
    plain = binary_erosion(phantom.sector, iterations=3) & ~structures
    grey = phantom.frames[0, ..., 0].astype(float)
    amplitude = 10 ** (grey / 255 * US_LOOKS["a"].range_db / 20)
    # Deeper tissue is darker, so each place is compared with what surrounds it.
    around = gaussian_filter(amplitude * plain, 12) / (gaussian_filter(plain * 1.0, 12) + 1e-9)
    relative = (amplitude / (around + 1e-9))[plain]
    assert relative.size > 2000
    assert relative.mean() / relative.std() == pytest.approx(1.91, abs=0.25)


def test_frames_of_a_clip_move_but_resemble_each_other():
    phantom = make_us_clip(us_site(), 0, 0, seed=0)
    inside = phantom.frames[:, phantom.sector, 0].astype(float)
    following = np.corrcoef(inside)[0, 1]
    assert 0.3 < following < 0.98
    assert (phantom.labels[0] != phantom.labels[2]).sum() > 50


def test_scanners_differ_and_patients_do():
    sizes = {make_us_clip(us_site(scanner=s), 0, 1, seed=0).frames.shape for s in "abc"}
    assert len(sizes) == 3
    lesions = {
        int((make_us_clip(us_site(anatomy="breast"), n, 1, seed=0).labels[0] == LESION).sum())
        for n in range(5)
    }
    assert len(lesions) >= 4


def test_label_maps_are_written_as_the_delineation_takes_them(tmp_path):
    site = us_site(format="video", patients=1)
    write_phantom_site(tmp_path / "raw", site, seed=0, labels_folder=tmp_path / "labels")
    clips = {p.stem for p in files_in(tmp_path / "raw") if p.suffix != ".json"}
    maps = {p.stem: np.load(p) for p in files_in(tmp_path / "labels")}
    assert maps.keys() == clips
    for number, name in enumerate(sorted(maps)):
        assert np.array_equal(maps[name], make_us_clip(site, 0, number, seed=0).labels)


def test_a_png_phantom_is_a_picture_that_any_reader_opens(tmp_path):
    write_phantom_site(tmp_path, us_site(format="png", patients=1), seed=0)
    with Image.open(next(tmp_path.rglob("*.png"))) as image:
        assert image.mode == "RGB"
        assert image.size == (352, 264)


@pytest.mark.parametrize(
    ("modalities", "file_format", "remedy"),
    [
        (("US",), "nifti", "dicom, png, video"),
        (("CT",), "png", "dicom suits all three"),
        (("MR", "US"), "video", "dicom suits all three"),
    ],
)
def test_a_format_that_a_modality_cannot_have_is_refused(modalities, file_format, remedy):
    with pytest.raises(ValidationError, match=remedy):
        us_site(modalities=modalities, format=file_format)
