"""None"""

import numpy as np
import pytest

from agssd_core.config import RunConfig
from agssd_core.data.frames import SiteFrames
from agssd_core.data.index import index_folders
from agssd_core.errors import CacheError, ConfigError, WeightsError
from agssd_core.training.lpsam_file import open_key, write_lpsam
from agssd_core.training.lpsam_fit import FitRecord, build_lpsam
from client.delineate import delineate_site
from tests.support.lpsam import SHORT
from tests.support.raw_clips import SMALL, make_clip_site, write_png

RUN = RunConfig(data=SMALL)


@pytest.fixture
def site(tmp_path):
    return make_clip_site(tmp_path / "site", patients=1)


@pytest.fixture
def lpsam(tmp_path):
    """A signed file whose masks pass: nothing is fitted here."""
    rules = SHORT.rules.model_copy(update={"iou": 0.0, "mask": 0.01})
    config = SHORT.model_copy(update={"rules": rules})
    network, _ = build_lpsam(config, seed=0)
    head = network.mask_decoder.iou_prediction_head.proj_out
    head.weight.data.zero_()
    head.bias.data.fill_(0.8)
    path = tmp_path / "lpsam-a.safetensors"
    key = open_key(tmp_path / "key.pem")
    digest = write_lpsam(path, network, config, record=FitRecord(0, 1, 1), pairs_digest="", key=key)
    return path, digest


def test_superpixels_are_the_fall_back_and_are_called_so(site):
    report = delineate_site(site, RUN)
    assert (report.done, report.unchanged, report.source) == (3, 0, "superpixels")
    frames = SiteFrames.open(site, SMALL)
    assert frames.label_source == "superpixels"
    for index in range(len(frames)):
        labels = frames.read_labels(index)
        np.testing.assert_array_equal(labels > 0, frames.read_sector(index))
        assert 2 <= labels.max() <= SMALL.frames.superpixels


def test_a_second_run_does_nothing_and_changed_settings_draw_again(site):
    delineate_site(site, RUN)
    files = {file: file.stat().st_mtime_ns for file in (site / "cache").iterdir()}
    report = delineate_site(site, RUN)
    assert (report.done, report.unchanged) == (0, 3)
    assert files == {file: file.stat().st_mtime_ns for file in (site / "cache").iterdir()}
    fewer = SMALL.model_copy(update={"frames": SMALL.frames.model_copy(update={"superpixels": 3})})
    assert delineate_site(site, RunConfig(data=fewer)).done == 3
    assert SiteFrames.open(site, fewer).read_labels(0).max() <= 3


def test_a_killed_run_goes_on_where_it_stopped(site):
    def kill(done, _total):
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        delineate_site(site, RUN, progress=kill)
    report = delineate_site(site, RUN)
    assert (report.done, report.unchanged) == (1, 2)


def test_lpsam_labels_every_frame_and_keeps_its_confidence(site, lpsam):
    path, digest = lpsam
    told = []
    report = delineate_site(
        site, RUN, lpsam=path, digest=digest, progress=lambda *now: told.append(now)
    )
    assert (report.done, report.source, report.skipped) == (3, "lpsam", ())
    assert told == [(1, 3), (2, 3), (3, 3)]
    frames = SiteFrames.open(site, SMALL)
    assert frames.label_source == "lpsam"
    for index in range(len(frames)):
        labels = frames.read_labels(index)
        assert labels.any()
        assert not labels[~frames.read_sector(index)].any()
        confidence = frames.read_confidence(index)
        assert set(confidence) == set(np.unique(labels[labels > 0]).tolist())
        assert all(value == pytest.approx(0.8) for value in confidence.values())
    assert delineate_site(site, RUN, lpsam=path, digest=digest).done == 0


def test_lpsam_does_not_depend_on_how_frames_are_batched(site, lpsam, monkeypatch):
    path, digest = lpsam
    delineate_site(site, RUN, lpsam=path, digest=digest)
    before = [f.read_labels(i) for f in [SiteFrames.open(site, SMALL)] for i in range(len(f))]
    for file in (site / "cache").glob("*.lpsam.*"):
        file.unlink()
    monkeypatch.setattr("client.delineate.BATCH", 1)
    assert delineate_site(site, RUN, lpsam=path, digest=digest).done == 3
    after = [f.read_labels(i) for f in [SiteFrames.open(site, SMALL)] for i in range(len(f))]
    assert np.mean([(a == b).mean() for a, b in zip(before, after, strict=True)]) > 0.999


def test_a_file_that_the_site_does_not_trust_writes_nothing(site, lpsam):
    path, digest = lpsam
    for given in ("", "0" * 64):
        with pytest.raises(WeightsError, match="Compare it with the coordinator's"):
            delineate_site(site, RUN, lpsam=path, digest=given)
    with pytest.raises(ConfigError, match="64 hexadecimal digits"):
        delineate_site(site, RUN, lpsam=path, digest="abc")
    assert not list((site / "cache").glob("*.lpsam.*"))
    (site / "policy.yaml").write_text(f"lpsam:\n  digests: [{digest.upper()}]\n")
    assert delineate_site(site, RUN, lpsam=path).done == 3
    for text in ("lpsam: {digests: 5}", "lpsam: [1]", "a: [", "- 1", "lpsam: {digests: [7]}"):
        (site / "policy.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"Write policy\.yaml as"):
            delineate_site(site, RUN, lpsam=path, digest=digest)


def test_the_policy_may_hold_other_things_or_nothing(site, lpsam):
    path, digest = lpsam
    for text in ("", "other: 1", "lpsam:"):
        (site / "policy.yaml").write_text(text)
        assert delineate_site(site, RUN, lpsam=path, digest=digest).source == "lpsam"


def test_two_sources_at_once_are_refused(site, lpsam, tmp_path):
    with pytest.raises(ConfigError, match="Drop one"):
        delineate_site(site, RUN, lpsam=lpsam[0], labels=tmp_path)


def test_clips_must_be_prepared_first(tmp_path):
    write_png(tmp_path / "raw" / "a.png")
    index_folders(tmp_path / "site", [tmp_path / "raw"])
    with pytest.raises(CacheError, match="agssd-site prepare"):
        delineate_site(tmp_path / "site", RUN)
