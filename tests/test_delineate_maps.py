"""Label maps from disk at a site, and the command."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from agssd_core.config import RunConfig
from agssd_core.data.clip_cache import read_clip_entry
from agssd_core.data.frames import SiteFrames
from agssd_core.data.index import index_folders
from agssd_core.data.prepare import prepare_site
from agssd_core.errors import CacheError, DataError
from client.cli import app
from client.delineate import delineate_site
from tests.support.raw_clips import SMALL, write_gif, write_png

RUN = RunConfig(data=SMALL)


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
