"""Prepared clips and reading them back: exactness and settings."""

import concurrent.futures
import pickle
import sys

import blosc2
import numpy as np
import pytest

from agssd_core.config.frames import FramesConfig
from agssd_core.data import array_file as array_file_module
from agssd_core.data import frames as frames_module
from agssd_core.data.cache import SiteVolumes
from agssd_core.data.cache_file import cache_folder
from agssd_core.data.clip_cache import frames_stamp, read_clip_entry
from agssd_core.data.clips import load_clip
from agssd_core.data.index import index_folders
from agssd_core.data.prepare import prepare_site
from agssd_core.errors import CacheError
from tests.support.frame_sites import open_frames, with_frames
from tests.support.raw_clips import (
    SMALL,
    make_clip_site,
    make_raw_clips,
)
from tests.support.sites import make_raw_site


@pytest.fixture(scope="module")
def shared_site(tmp_path_factory):
    return make_clip_site(tmp_path_factory.mktemp("frames") / "site")


def _all(frames):
    return [frames.read_frame(index) for index in range(len(frames))]


def test_the_cache_holds_what_the_readers_gave(shared_site):
    frames = open_frames(shared_site)
    clips = [info.clip for info in frames.infos]
    assert clips == sorted(clips)
    expected = {}
    kinds = {".png": "image", ".gif": "video", ".dcm": "us-dicom"}
    for file in shared_site.with_name("site-raw").iterdir():
        clip = load_clip(file, kinds[file.suffix], SMALL.frames)
        for number, frame in enumerate(clip.frames):
            expected[number, frame.tobytes()] = clip
    assert len(frames) == len(expected) == 2 * (1 + 4 + 3)
    for index, info in enumerate(frames.infos):
        frame, sector = frames.read_frame(index), frames.read_sector(index)
        clip = expected.pop((info.number, frame.tobytes()))
        assert frame.dtype == np.uint8
        assert sector.dtype == np.bool_
        assert frame.shape == sector.shape == info.shape == clip.frames.shape[1:]
        np.testing.assert_array_equal(sector, clip.sector)
        assert not frame[~sector].any()
        entry = read_clip_entry(shared_site, info.clip)
        assert (entry.numbers, entry.box) == (clip.numbers, clip.box)


def test_one_chunk_holds_one_frame(shared_site):
    """So that reading a frame of a long clip decompresses nothing else."""
    for info in open_frames(shared_site).infos:
        array = blosc2.open(str(cache_folder(shared_site) / f"{info.clip}.b2nd"), mode="r")
        assert array.chunks == (1, *info.shape)


def test_threads_and_other_processes_read_the_same_frames(shared_site, monkeypatch):
    monkeypatch.setattr(frames_module, "MAX_OPEN_FILES", 2)
    frames = open_frames(shared_site)
    expected = _all(frames)
    copied = pickle.loads(pickle.dumps(frames))  # noqa: S301 - what a loader's worker does
    assert copied.infos == frames.infos
    order = np.random.default_rng(0).integers(len(frames), size=400).tolist()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            read = list(pool.map(copied.read_frame, order))
    finally:
        sys.setswitchinterval(interval)
    for index, frame in zip(order, read, strict=True):
        np.testing.assert_array_equal(frame, expected[index])


def test_files_are_opened_late_checked_once_and_kept_within_a_limit(shared_site, monkeypatch):
    checked = []
    real = array_file_module.is_intact

    def counted(site_dir, stem, crc32):
        checked.append(stem)
        return real(site_dir, stem, crc32)

    monkeypatch.setattr(array_file_module, "is_intact", counted)
    monkeypatch.setattr(frames_module, "MAX_OPEN_FILES", 2)
    frames = open_frames(shared_site)
    assert checked == []
    for _ in range(3):
        _all(frames)
        assert len(frames._files._opened) == 2
    assert sorted(checked) == sorted({info.clip for info in frames.infos})


def test_patients_can_be_kept_apart(shared_site):
    frames = open_frames(shared_site)
    one = frames.infos[0].patient
    kept = frames.keep(frozenset({one}))
    assert len(kept) == 8
    assert {info.patient for info in kept.infos} == {one}
    wanted = [i for i, info in enumerate(frames.infos) if info.patient == one]
    for index, whole in enumerate(wanted):
        np.testing.assert_array_equal(kept.read_frame(index), frames.read_frame(whole))


def test_prepare_does_nothing_twice_and_redoes_other_settings(tmp_path):
    site = make_clip_site(tmp_path / "site")
    times = {path: path.stat().st_mtime_ns for path in cache_folder(site).iterdir()}
    report = prepare_site(site, SMALL)
    assert (report.prepared, report.unchanged, report.clips, report.volumes) == (0, 6, 6, 0)
    assert times == {path: path.stat().st_mtime_ns for path in cache_folder(site).iterdir()}
    other = with_frames(max_frames=2)
    with pytest.raises(CacheError, match=r"6 of 6 clip.* Run `agssd-site prepare SITE`"):
        open_frames(site, other)
    assert prepare_site(site, other).prepared == 6
    assert len(open_frames(site, other)) == 2 * (1 + 2 + 2)


def test_settings_of_ct_and_of_ultrasound_do_not_disturb_each_other(tmp_path):
    raw = make_raw_site(make_raw_clips(tmp_path / "raw") / "ct", "CT", patients=2).parent
    site = tmp_path / "site"
    index_folders(site, [raw])
    first = prepare_site(site, SMALL)
    assert (first.prepared, first.volumes, first.clips) == (8, 2, 6)
    volumes = SMALL.model_copy(update={"ct_window_hu": (-200.0, 300.0)})
    assert prepare_site(site, volumes).prepared == 2
    clips = volumes.model_copy(update={"frames": with_frames(max_frames=2).frames})
    assert prepare_site(site, clips).prepared == 6
    # Superpixels change label maps alone.
    labels = clips.model_copy(update={"frames": with_frames(max_frames=2, superpixels=9).frames})
    assert prepare_site(site, labels).prepared == 0
    assert (len(SiteVolumes.open(site, labels)), len(open_frames(site, labels))) == (2, 10)


def test_every_setting_of_frames_but_superpixels_is_in_the_stamp():
    plain = frames_stamp(FramesConfig())
    for name, value in FramesConfig().model_dump().items():
        changed = frames_stamp(
            FramesConfig(**{name: value / 2 if name == "similarity" else value + 1})
        )
        assert (changed == plain) == (name == "superpixels"), name
