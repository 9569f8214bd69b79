"""Prepared clips: damage, interruption, crashes and unusable files."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from agssd_core.config.data import DataConfig
from agssd_core.data import prepare as prepare_module
from agssd_core.data.cache import SiteVolumes
from agssd_core.data.cache_file import cache_folder
from agssd_core.data.catalogue import open_catalogue
from agssd_core.data.clip_cache import write_clip
from agssd_core.data.clips import PreparedClip
from agssd_core.data.frames import SiteFrames
from agssd_core.data.index import index_folders
from agssd_core.data.prepare import CHANGED, prepare_site
from agssd_core.errors import CacheError, CatalogueError, ShapeError
from tests.support.crashing import crash_on_video, wait_until_gone
from tests.support.frame_sites import open_frames, with_frames
from tests.support.raw_clips import (
    SMALL,
    label_clip,
    make_clip_site,
    make_raw_clips,
    write_gif,
    write_us_dicom,
)
from tests.support.sites import make_raw_site


@pytest.fixture(scope="module")
def shared_site(tmp_path_factory):
    return make_clip_site(tmp_path_factory.mktemp("frames") / "site")


def test_an_unusable_clip_is_remembered_until_its_settings_change(tmp_path):
    raw = make_raw_site(make_raw_clips(tmp_path / "raw", 1) / "ct", "CT", patients=1).parent
    write_us_dicom(raw / "black.dcm", seed=7, PixelData=bytes(3 * 120 * 160))
    site = tmp_path / "site"
    index_folders(site, [raw])
    first = prepare_site(site, SMALL)
    assert (first.volumes, first.clips, len(first.skipped)) == (1, 3, 1)
    assert "it is blank" in first.skipped[0].reason
    calls = []
    again = prepare_site(site, SMALL, progress=lambda *given: calls.append(given))
    assert (again.prepared, again.unchanged, again.skipped, calls) == (0, 4, first.skipped, [])
    assert len(open_frames(site)) == 1 + 4 + 3
    # Another window for CT does not try the clip again.
    other = SMALL.model_copy(update={"ct_window_hu": (-200.0, 300.0)})
    prepare_site(site, other, progress=lambda *given: calls.append(given))
    assert calls == [(1, 1)]
    assert prepare_site(site, with_frames(max_frames=2)).skipped == first.skipped


def test_a_flipped_byte_is_found_and_mended(tmp_path):
    site = make_clip_site(tmp_path / "site")
    frames = open_frames(site)
    whole = frames.read_frame(0)
    clip = frames.infos[0].clip
    file = cache_folder(site) / f"{clip}.b2nd"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    damaged = open_frames(site)
    other = next(i for i, info in enumerate(damaged.infos) if info.clip != clip)
    assert damaged.read_frame(other).any()
    with pytest.raises(CacheError, match=r"agssd-site prepare SITE --verify"):
        damaged.read_frame(0)
    assert prepare_site(site, SMALL).prepared == 0
    assert prepare_site(site, SMALL, verify=True).prepared == 1
    np.testing.assert_array_equal(open_frames(site).read_frame(0), whole)


@pytest.mark.parametrize("damage", ["cut", "gone", "json", "list"])
def test_a_lost_clip_is_refused_and_made_again(tmp_path, damage):
    site = make_clip_site(tmp_path / "site")
    file = sorted(cache_folder(site).glob("*.b2nd"))[0]
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:-9])
    elif damage == "gone":
        file.unlink()
    else:
        text = {"json": '{"clip": 3}', "list": "[1, 2]"}[damage]
        file.with_suffix(".json").write_text(text)
    with pytest.raises(CacheError, match="1 of 6 clip"):
        open_frames(site)
    assert prepare_site(site, SMALL).prepared == 1
    assert len(open_frames(site)) == 16


def test_a_killed_run_leaves_nothing_half_written_and_goes_on(tmp_path):
    """With two workers, whose files are those of one."""
    site = make_clip_site(tmp_path / "site")
    expected = {path.name: path.read_bytes() for path in cache_folder(site).iterdir()}
    for path in cache_folder(site).iterdir():
        path.unlink()
    file = tmp_path / "program.py"  # a file: spawned workers import the main program
    file.write_text(SLOW_PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    process = subprocess.Popen(
        [sys.executable, file, site], stdout=subprocess.PIPE, env=environment
    )
    workers = {int(process.stdout.readline()) for _ in range(2)} - {process.pid}
    # A second command keeps off while the first is at it.
    with pytest.raises(CatalogueError, match="another agssd-site command"):
        prepare_site(site, SMALL)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert workers
    wait_until_gone(workers)
    ready = len(list(cache_folder(site).glob("*.json")))
    assert 2 <= ready < 6
    (cache_folder(site) / ".left-behind.1.tmp").write_bytes(b"half")
    calls = []
    report = prepare_site(site, SMALL, progress=lambda *given: calls.append(given))
    assert (report.prepared, report.unchanged) == (6 - ready, ready)
    assert calls == [(done, 6 - ready) for done in range(1, 7 - ready)]
    assert {path.name: path.read_bytes() for path in cache_folder(site).iterdir()} == expected


SLOW_PROGRAM = """
import sys
from pathlib import Path

from agssd_core.data import prepare
from tests.support.crashing import wait_after_two
from tests.support.raw_clips import SMALL

if __name__ == "__main__":
    prepare.prepare_one = wait_after_two
    prepare.prepare_site(Path(sys.argv[1]), SMALL, workers=2)
"""


def test_a_crashing_decoder_costs_its_own_clips_alone(tmp_path, monkeypatch):
    site = tmp_path / "site"
    index_folders(site, [make_raw_clips(tmp_path / "raw", patients=1)])
    monkeypatch.setattr(prepare_module, "prepare_one", crash_on_video)
    report = prepare_site(site, SMALL, workers=2)
    assert (report.ready, report.clips) == (2, 2)
    assert [item.reason for item in report.skipped] == [prepare_module.CRASHED]


def test_changed_and_vanished_sources(tmp_path):
    site = make_clip_site(tmp_path / "site")
    raw = tmp_path / "site-raw"
    # What is prepared stays usable when the source is archived away.
    (raw / "patient0_still.png").unlink()
    assert len(open_frames(site)) == 16
    write_gif(raw / "patient0_loop.gif", frames=2, seed=70)
    index_folders(site, [raw])
    with pytest.raises(CacheError, match="1 of 5 clip"):
        open_frames(site)
    os.utime(raw / "patient0_loop.gif", ns=(5, 5))
    assert [item.reason for item in prepare_site(site, SMALL).skipped] == [CHANGED]
    index_folders(site, [raw])
    assert prepare_site(site, SMALL).prepared == 1
    assert len(open_frames(site)) == 16 - 1 - 2


def test_what_no_longer_belongs_is_swept_away_with_its_label_maps(tmp_path):
    site = make_clip_site(tmp_path / "site")
    for record in open_catalogue(site).clips:
        label_clip(site, record.clip)
    before = {path.name for path in cache_folder(site).iterdir()}
    assert len(before) == 6 * 4
    gone = {r.clip for r in open_catalogue(site).clips if r.kind == "image"}
    for file in (tmp_path / "site-raw").glob("*.png"):
        file.unlink()
    index_folders(site, [tmp_path / "site-raw"])
    prepare_site(site, SMALL)
    after = {path.name for path in cache_folder(site).iterdir()}
    assert after == {name for name in before if name.split(".")[0] not in gone}
    assert len(SiteFrames.open(site, SMALL)) == 14


def test_a_site_of_clips_has_no_volume_and_the_other_way_round(tmp_path, shared_site):
    with pytest.raises(CatalogueError, match="no prepared volume, at least one is needed"):
        SiteVolumes.open(shared_site, SMALL)
    index_folders(tmp_path / "site", [make_raw_site(tmp_path / "ct", "CT", patients=1)])
    prepare_site(tmp_path / "site", SMALL)
    with pytest.raises(CatalogueError, match=r"no prepared ultrasound clip.* Index folders"):
        open_frames(tmp_path / "site")


def test_frames_and_sector_that_do_not_fit_are_not_stored(tmp_path, shared_site):
    record = open_catalogue(shared_site).clips[0]
    frames, sector = np.zeros((2, 40, 50), np.uint8), np.ones((40, 50), bool)
    for bad in (
        PreparedClip(frames, sector.T, (0, 1), (0, 0, 40, 50)),
        PreparedClip(frames, sector, (0,), (0, 0, 40, 50)),
        PreparedClip(frames[:0], sector, (), (0, 0, 40, 50)),
        PreparedClip(frames.astype(np.float32), sector, (0, 1), (0, 0, 40, 50)),
    ):
        with pytest.raises(ShapeError, match="Mend the reader"):
            write_clip(tmp_path, record, bad, config=SMALL)
    assert not list(tmp_path.iterdir())


@pytest.mark.realdata
def test_real_ultrasound_and_a_ct_make_one_site(real_data, tmp_path):
    folders = [real_data / "dicom" / "us", real_data / "dicom" / "sts" / "STS_019" / "CT"]
    few = tmp_path / "few"
    few.mkdir()
    for name in ("benign (1)", "benign (1)_mask", "malignant (10)", "malignant (10)_mask"):
        kind = name.split()[0]
        (few / f"{name}.png").symlink_to(real_data / "us2d" / "busi" / kind / f"{name}.png")
    cine = "Reg_pat1Image_133410.mpeg"
    (few / cine).symlink_to(real_data / "us_cine" / "pocus_neuruppin" / cine)
    site = tmp_path / "site"
    report = index_folders(site, [*folders, few])
    catalogue = open_catalogue(site)
    # Two of the seven DICOM files, a still and a clip, bear one instance number.
    assert (report.volumes, report.clips) == (1, 7 + 2 + 1)
    assert [item.reason[:20] for item in report.skipped] == ["a mask or label map "] * 2
    assert {"GE", "Philips", "Hitachi", "Siemens"} >= {r.vendor for r in catalogue.clips} - {
        "other"
    }
    config = DataConfig(spacing_mm=(4.0, 4.0, 4.0))
    prepared = prepare_site(site, config, workers=2)
    # Those two show a probe in air.
    assert (prepared.volumes, prepared.clips) == (1, 8)
    assert ["no echo area" in item.reason for item in prepared.skipped] == [True, True]
    frames = open_frames(site, config)
    counts = {r.kind: 0 for r in catalogue.clips}
    kinds = {r.clip: r.kind for r in catalogue.clips}
    for index, info in enumerate(frames.infos):
        frame, sector = frames.read_frame(index), frames.read_sector(index)
        assert frame.shape == sector.shape == info.shape
        assert min(frame.shape) >= 64
        assert max(frame.shape) <= config.frames.max_side
        assert not frame[~sector].any()
        assert frame[sector].std() > 5
        counts[kinds[info.clip]] += 1
    assert counts["image"] == 2
    assert 10 < counts["video"] <= config.frames.max_frames
    public = repr(catalogue.clips) + repr([item.reason for item in report.skipped])
    for word in ("benign", "pat1", "Reg", "STS_"):
        assert word not in public
