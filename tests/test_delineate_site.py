import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from agssd_core.config import RunConfig
from agssd_core.data.catalogue import open_catalogue
from agssd_core.data.clip_cache import read_clip_entry
from agssd_core.data.frames import SiteFrames
from agssd_core.data.index import index_folders
from agssd_core.data.prepare import prepare_site
from agssd_core.errors import CacheError, ConfigError, DataError, WeightsError
from agssd_core.training.lpsam_file import open_key, write_lpsam
from agssd_core.training.lpsam_fit import FitRecord, build_lpsam
from client.cli import app
from client.delineate import delineate_site
from tests.support.lpsam import SHORT
from tests.support.raw_clips import SMALL, make_clip_site, write_gif, write_png

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


# --- label maps from disk -------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    """Two stills, one of them in a folder, and a clip of 4 frames."""
    raw = tmp_path / "raw"
    write_png(raw / "p1" / "still.png")
    write_png(raw / "p2.x" / "other.a.png", seed=3)
    write_gif(raw / "loop.gif", seed=1)
    index_folders(tmp_path / "site", [raw])
    prepare_site(tmp_path / "site", SMALL)
    return tmp_path / "site"


def _halves(shape=(120, 160)):
    """Label 5 in the upper rows of the speckle, 9 from row 40 on."""
    labels = np.full(shape, 5, dtype=np.uint8)
    labels[40:] = 9
    return labels


def _by_shape(site):
    frames = SiteFrames.open(site, SMALL, labels="disk", need_labels=False)
    return frames, {record.clip: record for record in open_catalogue(site).clips}


def _save(folder, name, labels):
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".npy":
        np.save(file, labels)
    else:
        Image.fromarray(labels).save(file)


def test_label_maps_go_through_the_same_cut_as_their_clip(pictures, tmp_path):
    labels = tmp_path / "labels"
    _save(labels, "p1/still.png", _halves())
    _save(labels, "other.a.npy", _halves())
    stack = np.stack([_halves()] * 4)
    stack[2] = 3
    _save(labels, "loop.npy", stack)
    report = delineate_site(pictures, RUN, labels=labels)
    assert (report.done, report.source, report.skipped) == (3, "disk", ())
    frames = SiteFrames.open(pictures, SMALL, labels="disk")
    for index, info in enumerate(frames.infos):
        found, sector = frames.read_labels(index), frames.read_sector(index)
        entry = read_clip_entry(pictures, info.clip)
        if entry.numbers[info.number] == 2:
            assert set(np.unique(found[sector])) == {3}
            continue
        # Row 40 lies where the cut-out box and the shrinking put it.
        top, _, height, _ = entry.box
        border = (40 - top) * info.shape[0] / height
        rows = np.flatnonzero((found == 9).any(1))
        assert rows[0] == pytest.approx(border, abs=1)
        np.testing.assert_array_equal(found > 0, sector)
    assert delineate_site(pictures, RUN, labels=labels).done == 0
    _save(labels, "p1/still.png", _halves() + 1)
    assert delineate_site(pictures, RUN, labels=labels).done == 3


BAD = {
    "no map": (None, "no label map has this clip's name"),
    "wrong size": (np.zeros((60, 80), np.uint8), "Draw it on the source file"),
    "300 labels": ((np.arange(120 * 160) % 301).reshape(120, 160).astype(np.uint16), "Merge lab"),
    "colours": (
        np.random.default_rng(0).integers(0, 255, (120, 160, 3), dtype=np.uint8),
        "colours are no labels",
    ),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_label_map_leaves_that_clip_out_and_says_why(pictures, tmp_path, kind):
    labels, (array, remedy) = tmp_path / "labels", BAD[kind]
    if array is not None:
        _save(labels, "still.png", array)
    _save(labels, "other.a.png", _halves())
    _save(labels, "loop.npy", np.stack([_halves()] * 4))
    report = delineate_site(pictures, RUN, labels=labels)
    assert report.done == 2
    assert len(report.skipped) == 1
    assert remedy in report.skipped[0].reason
    assert "still" not in report.skipped[0].reason
    # Training goes on without it, and the list of what was left out holds it.
    frames = SiteFrames.open(pictures, SMALL)
    assert {info.clip for info in frames.infos}.isdisjoint({report.skipped[0].reference})
    assert len({info.clip for info in frames.infos}) == 2
    assert remedy in CliRunner().invoke(app, ["skipped", str(pictures)]).output
    # It can be given superpixels, and is then no longer listed; preparing again changes nothing.
    prepare_site(pictures, SMALL)
    assert len({info.clip for info in SiteFrames.open(pictures, SMALL).infos}) == 2
    assert delineate_site(pictures, RUN).done == 3
    assert SiteFrames.open(pictures, SMALL).label_source == "disk+superpixels"
    assert remedy not in CliRunner().invoke(app, ["skipped", str(pictures)]).output


def test_a_site_of_which_no_clip_could_be_delineated_says_so(pictures, tmp_path):
    _save(tmp_path / "labels", "of-another-site.png", _halves())
    assert len(delineate_site(pictures, RUN, labels=tmp_path / "labels").skipped) == 3
    with pytest.raises(CacheError, match="3 of 3 clip"):
        SiteFrames.open(pictures, SMALL)


@pytest.mark.parametrize("frames", [1, 3, 5])
def test_a_clip_needs_one_map_for_each_frame(pictures, tmp_path, frames):
    _save(tmp_path / "labels", "loop.npy", np.stack([_halves()] * frames))
    report = delineate_site(pictures, RUN, labels=tmp_path / "labels")
    assert any("Save one map for each frame" in item.reason for item in report.skipped)


def test_pickles_and_other_files_are_no_label_maps(pictures, tmp_path):
    labels = tmp_path / "labels"
    labels.mkdir()
    with pytest.raises(DataError, match=r"no \.png or \.npy"):
        delineate_site(pictures, RUN, labels=labels)
    np.save(labels / "still.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (labels / "loop.npy").write_bytes(b"\x93NUMPY")
    (labels / "other.a.npy").write_bytes(b"")
    report = delineate_site(pictures, RUN, labels=labels)
    assert (report.done, len(report.skipped)) == (0, 3)


def test_a_name_that_two_clips_share_needs_its_folder(tmp_path):
    write_png(tmp_path / "raw" / "a" / "image.png")
    write_png(tmp_path / "raw" / "b" / "image.png", seed=1)
    index_folders(tmp_path / "site", [tmp_path / "raw"])
    prepare_site(tmp_path / "site", SMALL)
    _save(tmp_path / "labels", "image.png", _halves())
    report = delineate_site(tmp_path / "site", RUN, labels=tmp_path / "labels")
    assert (report.done, len(report.skipped)) == (0, 2)
    _save(tmp_path / "labels", "a/image.png", _halves())
    assert delineate_site(tmp_path / "site", RUN, labels=tmp_path / "labels").done == 1


# --- the command ----------------------------------------------------------------------------


def test_the_command_says_what_it_did_and_shows_paths_only_when_asked(pictures, tmp_path):
    _save(tmp_path / "labels", "loop.npy", np.stack([_halves()] * 4))
    config = tmp_path / "run.yaml"
    config.write_text(json.dumps({"data": SMALL.model_dump(mode="json")}))
    words = ["delineate", str(pictures), "--labels", str(tmp_path / "labels"), "-c", str(config)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "1 clip(s) have label maps from disk: 1 drawn now, 0 before; 2 skipped" in result.output
    assert "still" not in result.output
    assert "still.png" in CliRunner().invoke(app, [*words, "--paths"]).output
    result = CliRunner().invoke(app, [*words, "--lpsam", str(config)])
    assert result.exit_code == 2


def test_commands_and_apps_start_without_transformers():
    code = (
        "import sys, client.app, client.cli, client.delineate, server.app, simulation.cli\n"
        "import agssd_core.evaluation.superpixels\n"
        "assert 'transformers' not in sys.modules\n"
        "assert 'torchvision' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
