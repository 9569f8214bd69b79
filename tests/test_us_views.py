"""Batches of ultrasound views: geometry, labels, determinism, the loader."""

import gc
import threading

import numpy as np
import pytest
import torch

from agssd_core.errors import ShapeError
from agssd_core.views.regions import present_ids
from agssd_core.views.us_batch import make_us_batch
from agssd_core.views.us_crops import FrameBox, cut_image
from agssd_core.views.us_loader import UsLoader
from tests.support.us import MemoryFrames
from tests.support.us_frames import SHARP, UNDAMAGED, GivenFrames, views_config

SIZE = 64
CONFIG = views_config()
FRAMES = MemoryFrames(5)
ROWS, COLUMNS = np.mgrid[:200, :240].astype(np.uint8)
PLACES = GivenFrames([ROWS, COLUMNS], [ROWS // 8, COLUMNS // 8])


def _batch(frames=FRAMES, anaus=CONFIG, *, step=0, batch_size=4, seed=0, site="a"):
    return make_us_batch(frames, anaus, seed=seed, site=site, step=step, batch_size=batch_size)


def _same(a, b):
    return all(torch.equal(x, y) for x, y in zip(vars(a).values(), vars(b).values(), strict=True))


def _plain(**augment):
    return views_config(augment=SHARP | augment, overlap=UNDAMAGED)


def _shared(batch, row):
    """Top, left, height, width that both views of a row show."""
    (t1, l1, h1, w1), (t2, l2, h2, w2) = batch.boxes[:, row].tolist()
    top, left = max(t1, t2), max(l1, l2)
    return top, left, min(t1 + h1, t2 + h2) - top, min(l1 + w1, l2 + w2) - left


def _centres(start, length):
    return start + (np.arange(SIZE) + 0.5) * length / SIZE


def test_a_batch_has_the_shapes_it_promises():
    batch = _batch()
    assert batch.views.shape == (2, 4, 1, SIZE, SIZE)
    assert batch.damaged.shape == batch.clean.shape == (4, 1, SIZE, SIZE)
    assert batch.view_labels.shape == (2, 4, SIZE, SIZE)
    assert batch.overlap_labels.shape == (4, SIZE, SIZE)
    assert batch.view_labels.dtype == batch.overlap_labels.dtype == torch.uint8
    assert {t.dtype for t in (batch.views, batch.damaged, batch.clean, batch.overlap)} == {
        torch.float32
    }
    assert batch.boxes.shape == (2, 4, 4)
    assert batch.boxes.dtype == torch.float64
    assert batch.flipped.shape == (2, 4)
    assert batch.valid.dtype == batch.flipped.dtype == torch.bool
    assert torch.equal(batch.view_ids, present_ids(batch.view_labels.flatten(0, 1)))
    assert torch.equal(batch.overlap_ids, present_ids(batch.overlap_labels))
    assert len(batch) == 4
    assert _same(batch.to("cpu"), batch)


@pytest.mark.parametrize("flip_p", [0.0, 1.0, 0.5])
@pytest.mark.parametrize("source", ["view", "image"])
def test_both_overlap_crops_show_the_same_place_of_the_frame(flip_p, source):
    anaus = views_config(augment=SHARP | {"flip_p": flip_p}, overlap=UNDAMAGED | {"source": source})
    inside = slice(6, -6)  # bicubic resampling bends a ramp at the border of its crop
    for step in range(12):
        batch = _batch(PLACES, anaus, step=step, batch_size=2)
        for row in torch.nonzero(batch.valid)[:, 0].tolist():
            top, left, height, width = _shared(batch, row)
            down = int(batch.frame_index[row]) == 0
            line = _centres(top, height) if down else _centres(left, width)
            expected = np.broadcast_to(line[:, None] if down else line, (SIZE, SIZE)) - 0.5
            for shown in (batch.clean, batch.damaged):
                found = shown[row, 0].numpy() * 255
                np.testing.assert_allclose(
                    found[inside, inside], expected[inside, inside], atol=0.3
                )


def test_views_show_their_boxes_and_run_backwards_when_flipped():
    batch = _batch(PLACES, _plain(), batch_size=16)
    assert batch.flipped.any()
    assert not batch.flipped.all()
    for view in range(2):
        for row in range(16):
            top, left, height, width = batch.boxes[view, row].tolist()
            down = int(batch.frame_index[row]) == 0
            line = _centres(top, height) if down else _centres(left, width)
            if not down and batch.flipped[view, row]:
                line = line[::-1]
            found = batch.views[view, row, 0].numpy()[4:-4, 4:-4] * 255 + 0.5
            expected = line[4:-4, None] if down else line[None, 4:-4]
            np.testing.assert_allclose(found, np.broadcast_to(expected, found.shape), atol=0.3)


def test_labels_are_those_of_a_plain_loop_over_pixels():
    rng = np.random.default_rng(3)
    maps = [rng.integers(0, 256, (90, 70), dtype=np.uint8) for _ in range(3)]
    batch = _batch(GivenFrames(maps, maps), batch_size=6)
    assert batch.flipped.any()
    for row in range(6):
        labels = maps[int(batch.frame_index[row])]
        cuts = [
            (batch.view_labels[v, row], batch.boxes[v, row].tolist(), bool(batch.flipped[v, row]))
            for v in range(2)
        ]
        if batch.valid[row]:
            cuts.append((batch.overlap_labels[row], _shared(batch, row), False))
        for found, (top, left, height, width), flipped in cuts:
            for i in range(SIZE):
                for j in range(SIZE):
                    column = SIZE - 1 - j if flipped else j
                    y = top + (i + 0.5) * height / SIZE
                    x = left + (column + 0.5) * width / SIZE
                    assert found[i, j] == labels[int(y), int(x)]


def test_the_recorded_overlap_is_that_of_the_boxes():
    batch = _batch(batch_size=16)
    for row in range(16):
        _, _, height, width = _shared(batch, row)
        smaller = min(box[2] * box[3] for box in batch.boxes[:, row].tolist())
        expected = max(height, 0) * max(width, 0) / smaller
        assert batch.overlap[row].item() == pytest.approx(expected, abs=1e-6)


def test_a_batch_depends_on_its_arguments_alone():
    assert _same(_batch(), _batch())
    for other in ({"step": 1}, {"seed": 1}, {"site": "b"}):
        assert not torch.equal(_batch().boxes, _batch(**other).boxes)
        assert not torch.equal(_batch().damaged, _batch(**other).damaged)


def test_the_number_of_torch_threads_changes_no_bit():
    before = torch.get_num_threads()
    batches = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        batches.append(_batch(batch_size=1, anaus=views_config(size=224)))
    torch.set_num_threads(before)
    assert _same(*batches)


def test_values_are_grey_levels_and_finite():
    hard = views_config(augment={"jitter": 0.9, "solarize_p": (1.0, 1.0), "blur_p": (1.0, 1.0)})
    for anaus in (CONFIG, hard, views_config(overlap={"source": "image"})):
        batch = _batch(anaus=anaus, batch_size=8)
        for shown in (batch.views, batch.damaged, batch.clean):
            assert torch.isfinite(shown).all()
            assert shown.min() >= 0
            assert shown.max() <= 1


@pytest.mark.parametrize("shape", [(40, 200), (200, 40), (32, 32), (9, 300)], ids=str)
@pytest.mark.parametrize("source", ["view", "image"])
def test_small_and_long_frames_make_finite_batches(shape, source):
    frames = MemoryFrames(2, shape=shape)
    anaus = views_config(overlap={"source": source})
    for step in range(6):
        batch = _batch(frames, anaus, step=step)
        assert torch.isfinite(batch.views).all()
        assert torch.isfinite(batch.damaged).all()
        inside = batch.boxes[..., :2] + batch.boxes[..., 2:] <= torch.tensor(shape)
        assert inside.all()
        assert (batch.boxes[..., 2:] >= 1).all()


def test_frames_without_an_anatomy_make_a_batch():
    batch = _batch(MemoryFrames(2, labels=False))
    assert torch.equal(batch.view_ids, torch.zeros(8, 1, dtype=torch.long))
    assert torch.equal(batch.overlap_ids, torch.zeros(4, 1, dtype=torch.long))


def test_frames_that_may_only_be_read_are_left_as_they_are():
    images = [image.copy() for image in FRAMES.images]
    for image in images:
        image.setflags(write=False)
    whole = _plain(min_scale=1.0)
    assert _same(
        _batch(GivenFrames(images, images), whole), _batch(GivenFrames(images, images), whole)
    )
    assert all((a == b).all() for a, b in zip(images, FRAMES.images, strict=True))


def test_bicubic_overshoot_is_cut_off():
    sharp = np.zeros((64, 64), np.uint8)
    sharp[:, 32:] = 255
    shown = cut_image(sharp, FrameBox(10, 20, 40, 30), size=64)
    assert shown.min() == 0
    assert shown.max() == 1


def test_one_frame_fills_a_batch_with_different_views():
    batch = _batch(MemoryFrames(1))
    assert batch.frame_index.tolist() == [0] * 4
    assert len({tuple(box) for box in batch.boxes.flatten(0, 1).tolist()}) == 8


def test_every_pass_shows_every_frame_once():
    seen = [int(i) for step in range(15) for i in _batch(step=step, batch_size=2).frame_index]
    passes = [seen[low : low + 5] for low in range(0, 30, 5)]
    assert all(sorted(one) == list(range(5)) for one in passes)
    assert len({tuple(one) for one in passes}) > 1


def test_nothing_to_show_and_maps_of_another_shape_are_refused():
    with pytest.raises(ShapeError, match="Index and prepare the site first"):
        _batch(GivenFrames([], []))
    wrong = GivenFrames([ROWS], [ROWS[:100]])
    with pytest.raises(ShapeError, match="Delineate the site's clips again"):
        _batch(wrong)
    with pytest.raises(ShapeError, match="Delineate the site's clips again"):
        _batch(GivenFrames([ROWS], [ROWS / 255]))


def _loader(frames=FRAMES, workers=0):
    return UsLoader(frames, CONFIG, seed=0, site="a", batch_size=2, workers=workers)


def _threads():
    return [t for t in threading.enumerate() if t.name.startswith("agssd-views")]


@pytest.mark.parametrize("workers", [1, 3])
def test_threads_change_no_bit(workers):
    expected = list(_loader().steps(5, 6))
    found = list(_loader(workers=workers).steps(5, 6))
    assert len(expected) == len(found) == 6
    assert all(_same(a, b) for a, b in zip(expected, found, strict=True))
    assert _same(expected[2], next(_loader().steps(7, 1))), "a step depends on where one starts"
    assert not _threads()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_error_in_a_thread_reaches_the_caller_at_its_step(workers):
    healthy = set(_batch(batch_size=2).frame_index.tolist())
    broken = next(index for index in range(5) if index not in healthy)
    frames = GivenFrames(FRAMES.images, FRAMES.maps, broken=[broken])
    steps = _loader(frames, workers).steps(0, 6)
    assert len(next(steps)) == 2
    with pytest.raises(OSError, match="the disk is gone"):
        list(steps)
    assert not _threads()


def test_leaving_early_ends_the_threads():
    for _ in _loader(workers=2).steps(0, 1000):
        assert _threads()
        break
    gc.collect()
    assert not _threads()
