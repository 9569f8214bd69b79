"""Label maps of prepared clips: whole or absent, tied to the clip, refused if they do not fit."""

import concurrent.futures
import os
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agssd_core.data import array_file as array_file_module
from agssd_core.data.cache_file import cache_folder
from agssd_core.data.catalogue import open_catalogue
from agssd_core.data.clip_cache import read_clip_entry
from agssd_core.data.frames import SiteFrames
from agssd_core.data.index import index_folders
from agssd_core.data.label_cache import (
    ClipLabels,
    missing_labels,
    read_labels,
    read_labels_entry,
    write_labels,
)
from agssd_core.data.prepare import prepare_site
from agssd_core.errors import CacheError, ShapeError
from tests.support.raw_clips import SMALL, label_clip, make_clip_site, write_gif


@pytest.fixture
def site(tmp_path):
    return make_clip_site(tmp_path / "site", patients=1)


@pytest.fixture(scope="module")
def shared_site(tmp_path_factory):
    return make_clip_site(tmp_path_factory.mktemp("labels") / "site", patients=1)


def _clips(site):
    return [record.clip for record in open_catalogue(site).clips]


def _missing(site, source="lpsam", digest="d", config=SMALL):
    return list(missing_labels(site, config, source=source, digest=digest))


def _labels(site, clip, **changes):
    entry = read_clip_entry(site, clip)
    given = {
        "maps": np.ones(entry.shape, np.uint8),
        "confidence": ({},) * entry.shape[0],
        "source": "lpsam",
        "digest": "d",
    }
    return ClipLabels(clip, **{**given, **changes})


def test_label_maps_come_back_as_they_were_written(site):
    clips = _clips(site)
    rng = np.random.default_rng(0)
    written = {}
    for clip in clips:
        entry = read_clip_entry(site, clip)
        maps = rng.integers(0, 256, entry.shape, dtype=np.uint8) * entry.sector()
        sure = tuple({1: 0.5, 255: frame / 8} for frame in range(entry.shape[0]))
        assert write_labels(site, ClipLabels(clip, maps, sure, "disk", "abc"), config=SMALL) == 0
        written[clip] = (maps, sure)
        found = read_labels(site, read_labels_entry(site, entry, "disk"))
        np.testing.assert_array_equal(found.maps, maps)
        assert (found.clip, found.confidence) == (clip, sure)
        assert (found.source, found.digest) == ("disk", "abc")
    frames = SiteFrames.open(site, SMALL)
    for index, info in enumerate(frames.infos):
        maps, sure = written[info.clip]
        np.testing.assert_array_equal(frames.read_labels(index), maps[info.number])
        assert frames.read_confidence(index) == sure[info.number]
        assert frames.indices_of(info.clip)[info.number] == index
    assert not frames.indices_of("nobody's")


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), most=st.integers(1, 256))
def test_labels_outside_the_sector_are_counted_and_stored_as_none(shared_site, seed, most):
    clip = _clips(shared_site)[0]
    entry = read_clip_entry(shared_site, clip)
    maps = np.random.default_rng(seed).integers(0, most, entry.shape, dtype=np.uint8)
    labels = _labels(shared_site, clip, maps=maps, source="disk")
    zeroed = write_labels(shared_site, labels, config=SMALL)
    found = read_labels(shared_site, read_labels_entry(shared_site, entry, "disk")).maps
    inside = np.broadcast_to(entry.sector(), entry.shape)
    np.testing.assert_array_equal(found[inside], maps[inside])
    assert not found[~inside].any()
    assert zeroed == np.count_nonzero(maps[~inside])


def test_a_site_is_delineated_clip_by_clip(site):
    clips = _clips(site)
    assert _missing(site) == clips
    with pytest.raises(CacheError, match=r"3 of 3 clip.* Run `agssd-site delineate SITE`"):
        SiteFrames.open(site, SMALL)
    for done, clip in enumerate(clips, start=1):
        label_clip(site, clip)
        assert _missing(site) == clips[done:]
    assert SiteFrames.open(site, SMALL).label_source == "lpsam"
    # Other weights or settings: all again. Their maps replace the old ones.
    assert _missing(site, digest="e") == clips
    label_clip(site, clips[0], digest="e", value=9)
    assert _missing(site, digest="e") == clips[1:]
    assert SiteFrames.open(site, SMALL).read_labels(0).max() == 9
    # Nothing is prepared with these settings, so there is nothing to delineate either.
    other = SMALL.model_copy(update={"frames": SMALL.frames.model_copy(update={"max_side": 64})})
    assert _missing(site, config=other) == []


def test_label_maps_of_a_clip_that_was_prepared_again_count_as_missing(site, tmp_path):
    clips = _clips(site)
    for clip in clips:
        label_clip(site, clip)
    raw = tmp_path / "site-raw"
    write_gif(raw / "patient0_loop.gif", seed=80)
    index_folders(site, [raw])
    prepare_site(site, SMALL)
    (changed,) = _missing(site)
    with pytest.raises(CacheError, match="1 of 3 clip"):
        SiteFrames.open(site, SMALL)
    frames = SiteFrames.open(site, SMALL, need_labels=False)
    index = next(i for i, info in enumerate(frames.infos) if info.clip == changed)
    with pytest.raises(CacheError, match="agssd-site delineate SITE"):
        frames.read_labels(index)
    with pytest.raises(CacheError, match="agssd-site delineate SITE"):
        frames.read_confidence(index)
    # Other settings make another clip of the same file.
    other = SMALL.model_copy(update={"frames": SMALL.frames.model_copy(update={"max_side": 64})})
    prepare_site(site, other)
    assert _missing(site, config=other) == clips
    with pytest.raises(CacheError, match="agssd-site prepare SITE"):
        write_labels(site, _labels(site, clips[0]), config=SMALL)


def test_the_best_source_of_each_clip_is_taken(site):
    clips = _clips(site)
    assert SiteFrames.open(site, SMALL, need_labels=False).label_source == "none"
    for clip in clips:
        label_clip(site, clip, source="superpixels", value=3)
    assert SiteFrames.open(site, SMALL).label_source == "superpixels"
    label_clip(site, clips[0], source="disk", value=2)
    label_clip(site, clips[1], source="disk", value=2)
    label_clip(site, clips[1], source="lpsam", value=1)
    frames = SiteFrames.open(site, SMALL)
    assert frames.label_source == "lpsam+disk+superpixels"
    taken = {info.clip: int(frames.read_labels(i).max()) for i, info in enumerate(frames.infos)}
    assert [taken[clip] for clip in clips] == [2, 1, 3]
    plain = SiteFrames.open(site, SMALL, labels="superpixels")
    assert {int(plain.read_labels(i).max()) for i in range(len(plain))} == {3}
    with pytest.raises(CacheError, match=r"2 of 3 clip.* of source lpsam"):
        SiteFrames.open(site, SMALL, labels="lpsam")
    one = frames.keep(frozenset({"nobody"}))
    assert (len(one), one.label_source) == (0, "none")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"maps": np.ones((1, 8, 8), np.uint8)}, r"do not fit a clip of \(3, 88, 118\)"),
        ({"maps": np.ones((3, 88, 118), np.int64) * 300}, "Draw them on the prepared frames"),
        ({"maps": np.ones((3, 88, 118), bool)}, "one uint8 map a frame with labels up to 255"),
        ({"confidence": ({},)}, "Give one mapping a frame"),
        ({"confidence": ({0: 0.5},) * 3}, "labels go from 1 to 255"),
        ({"confidence": ({256: 0.5},) * 3}, "labels go from 1 to 255"),
        ({"confidence": ({1: float("nan")},) * 3}, "a confidence is a finite number"),
        ({"source": "../elsewhere"}, "come from lpsam, disk, superpixels"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(shared_site, changes, message):
    (clip,) = (r.clip for r in open_catalogue(shared_site).clips if r.kind == "us-dicom")
    before = sorted(path.name for path in shared_site.rglob("*"))
    with pytest.raises(ShapeError, match=message):
        write_labels(shared_site, _labels(shared_site, clip, **changes), config=SMALL)
    assert sorted(path.name for path in shared_site.rglob("*")) == before


def test_a_clip_that_is_not_there_is_refused(site):
    known = _labels(site, _clips(site)[0])
    labels = ClipLabels("0123456789abcdef", known.maps, known.confidence, "lpsam", "d")
    with pytest.raises(CacheError, match="Run `agssd-site prepare SITE`"):
        write_labels(site, labels, config=SMALL)


@pytest.mark.parametrize("moment", ["replace", "write_text"])
def test_a_command_killed_while_it_writes_leaves_whole_label_maps_or_none(site, moment):
    """The old ones until the new ones are on disk; none while the two files do not match."""
    clip = _clips(site)[0]
    label_clip(site, clip, value=1)
    child = os.fork()
    if not child:
        place = array_file_module if moment == "write_text" else array_file_module.Path
        setattr(place, moment, lambda *_: os._exit(0))
        label_clip(site, clip, digest="e", value=2)
        os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
    entry = read_labels_entry(site, read_clip_entry(site, clip), "lpsam")
    assert entry is None
    assert clip in _missing(site)
    prepare_site(site, SMALL)
    assert not list(cache_folder(site).glob("*.tmp"))
    label_clip(site, clip, digest="e", value=2)
    assert clip not in _missing(site, digest="e")


def test_a_full_disk_keeps_the_old_label_maps(site):
    resource = pytest.importorskip("resource")
    signal = pytest.importorskip("signal")
    clip = max(_clips(site), key=lambda name: read_clip_entry(site, name).shape[0])
    label_clip(site, clip, value=1)
    noise = np.random.default_rng(0).integers(0, 256, read_clip_entry(site, clip).shape, np.uint8)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 13, before[1]))
    try:
        with pytest.raises(CacheError, match=r"Free disk space .* `agssd-site delineate SITE`"):
            write_labels(site, _labels(site, clip, maps=noise), config=SMALL)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    entry = read_labels_entry(site, read_clip_entry(site, clip), "lpsam")
    assert set(np.unique(read_labels(site, entry).maps)) == {0, 1}
    assert not list(cache_folder(site).glob(".*"))


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "json"])
def test_damaged_label_maps_are_found_and_drawn_again(site, damage):
    clips = _clips(site)
    for clip in clips:
        label_clip(site, clip)
    file = cache_folder(site) / f"{clips[0]}.lpsam.b2nd"
    if damage == "flip":
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        with pytest.raises(CacheError, match=r"label maps is missing or damaged.*delineate SITE"):
            SiteFrames.open(site, SMALL).read_labels(0)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-9])
    elif damage == "gone":
        file.unlink()
    else:
        file.with_suffix(".json").write_text('{"clip": 3}')
    assert _missing(site) == clips[:1]
    label_clip(site, clips[0])
    assert _missing(site) == []
    assert SiteFrames.open(site, SMALL).read_labels(0).any()


def test_label_maps_are_read_by_threads_and_in_other_processes(site):
    for number, clip in enumerate(_clips(site), start=1):
        label_clip(site, clip, value=number)
    frames = SiteFrames.open(site, SMALL)
    copied = pickle.loads(pickle.dumps(frames))  # noqa: S301 - what a loader's worker does
    assert copied.label_source == "lpsam"
    order = np.random.default_rng(0).integers(len(frames), size=200).tolist()
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        read = list(pool.map(lambda i: (copied.read_labels(i), copied.read_frame(i)), order))
    for index, (labels, frame) in zip(order, read, strict=True):
        np.testing.assert_array_equal(labels, frames.read_labels(index))
        np.testing.assert_array_equal(frame, frames.read_frame(index))
        assert labels.shape == frame.shape
        assert not labels[~frames.read_sector(index)].any()
