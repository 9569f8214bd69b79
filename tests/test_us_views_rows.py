"""Where the released ANAUS code and the paper differ in their data: the paper is followed.

Each test names the finding as the method page counts them.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from agssd_core.config.anaus import AnausConfig
from agssd_core.views.seeds import rng_for
from agssd_core.views.us_batch import make_us_batch
from agssd_core.views.us_crops import FrameBox, cut_shared, draw_pair, shared_box
from tests.support.us import MemoryFrames
from tests.support.us_frames import SHARP, UNDAMAGED, GivenFrames, views_config

FRAMES = MemoryFrames(6, shape=(120, 150))
PAPER = AnausConfig()


def _batch(anaus, frames=FRAMES, *, step=0, batch_size=6):
    return make_us_batch(frames, anaus, seed=0, site="a", step=step, batch_size=batch_size)


def _pairs(count, shape=(120, 150), anaus=PAPER):
    rngs = [rng_for(0, "pairs", number) for number in range(count)]
    return [draw_pair(shape, anaus.augment, anaus.overlap, rng) for rng in rngs]


def test_row_9_boxes_meet_where_their_pixels_meet():
    for pair in _pairs(200):
        shown = []
        for box in pair.boxes:
            mask = np.zeros((120, 150), bool)
            mask[box.top : box.top + box.height, box.left : box.left + box.width] = True
            shown.append(mask)
        both = shown[0] & shown[1]
        smaller = min(mask.sum() for mask in shown)
        assert pair.overlap == pytest.approx(both.sum() / smaller)
        if pair.shared is not None:
            box = pair.shared
            assert box.area == both.sum()
            assert both[box.top : box.top + box.height, box.left : box.left + box.width].all()
    # Read as corners, as the released code reads them, these two would share a 40 x 30 box.
    assert shared_box(FrameBox(0, 0, 40, 30), FrameBox(50, 0, 40, 30)) is None


def test_row_10_a_flip_of_either_view_does_not_move_the_overlap():
    crops = {}
    for flip_p in (0.0, 1.0):
        anaus = views_config(augment=SHARP | {"flip_p": flip_p}, overlap=UNDAMAGED)
        crops[flip_p] = _batch(anaus)
    plain, flipped = crops[0.0], crops[1.0]
    assert flipped.flipped.all()
    assert torch.equal(plain.boxes, flipped.boxes)
    torch.testing.assert_close(plain.views, flipped.views.flip(-1))
    for name in ("clean", "damaged"):
        torch.testing.assert_close(getattr(plain, name), getattr(flipped, name), atol=1e-4, rtol=0)
    assert torch.equal(plain.overlap_labels, flipped.overlap_labels)


def test_row_11_views_without_enough_overlap_are_drawn_again_and_then_left_out():
    tries = views_config(overlap={"min_share": 0.6})
    once = views_config(overlap={"min_share": 0.6, "tries": 1})
    found, hasty = (_pairs(300, anaus=each) for each in (tries, once))
    assert all(pair.overlap >= 0.6 for pair in found if pair.valid)
    assert sum(pair.valid for pair in found) > sum(pair.valid for pair in hasty) > 150
    small = {"min_scale": 0.02, "max_scale": 0.05}
    batch = _batch(
        views_config(augment=small, overlap={"min_share": 0.9, "tries": 1}), batch_size=24
    )
    dead = ~batch.valid
    assert dead.any()
    assert (batch.overlap_labels[dead] == 0).all()
    assert (batch.overlap_ids[dead] <= 0).all()
    # BatchNorm sees these rows too: they hold the whole view, not a blank or a blurred image.
    assert (batch.overlap[dead] > 0).any()
    for row in torch.nonzero(dead)[:, 0].tolist():
        view = batch.views[1, row]
        view = view.flip(-1) if batch.flipped[1, row] else view
        torch.testing.assert_close(batch.clean[row], view, atol=1e-4, rtol=0)
    assert (batch.damaged[dead].flatten(1).std(dim=1) > 0.01).all()


def test_row_11_the_settings_of_the_paper_seldom_fail():
    pairs = _pairs(500)
    assert all(pair.valid for pair in pairs)
    assert min(pair.overlap for pair in pairs) >= 0.2


def test_row_12_each_branch_sees_the_overlap_of_its_own_augmented_view():
    anaus = views_config(augment={"solarize_p": (0.0, 1.0)}, overlap=UNDAMAGED)
    batch = _batch(anaus)
    for row in torch.nonzero(batch.valid)[:, 0].tolist():
        boxes = [FrameBox(*(int(v) for v in batch.boxes[view, row])) for view in range(2)]
        shared = shared_box(*boxes)
        for view, shown in ((0, batch.damaged), (1, batch.clean)):
            box, image = boxes[view], batch.views[view, row, 0]
            image = image.flip(-1) if batch.flipped[view, row] else image
            unit = 64 / box.height, 64 / box.width
            top = round((shared.top - box.top) * unit[0])
            left = round((shared.left - box.left) * unit[1])
            height, width = round(shared.height * unit[0]), round(shared.width * unit[1])
            part = image[top : top + height, left : left + width]
            assert shown[row].mean().item() == pytest.approx(part.mean().item(), abs=0.03)
    assert batch.views[1].max() <= 0.5 < batch.views[0].max(), "only the second is solarised"
    assert batch.clean.max() <= 0.5 < batch.damaged.max()


def test_row_12_from_the_frame_there_is_one_draw_for_both_branches():
    undamaged = _batch(views_config(overlap=UNDAMAGED | {"source": "image"}))
    torch.testing.assert_close(undamaged.clean, undamaged.damaged, atol=1e-6, rtol=0)
    solar = {"solarize_p": (0.0, 1.0)}
    same = _batch(views_config(augment=solar, overlap=UNDAMAGED | {"source": "image"}))
    assert torch.equal(same.clean, undamaged.clean)


def test_row_13_damage_is_done_to_grey_levels_in_the_unit_interval():
    anaus = views_config(overlap={"source": "image", "shuffle_p": 0.0, "inpaint_p": 0.0})
    curved = _batch(anaus)
    assert curved.damaged.min() >= 0
    assert curved.damaged.max() <= 1
    # np.interp on normalised values would make all below the mean, 0.485, one value.
    for row in range(len(curved)):
        dark = curved.clean[row] < 0.4
        assert len(curved.damaged[row][dark].unique()) > 100


@pytest.mark.parametrize("source", ["view", "image"])
def test_row_14_the_teachers_overlap_is_never_damaged(source):
    holes = {"source": source, "shuffle_p": 0.0, "intensity_p": 0.0, "inpaint_p": 1.0}
    clean = _batch(views_config(overlap=UNDAMAGED | {"source": source})).clean
    for overlap in (holes, {"source": source}):
        batch = _batch(views_config(overlap=overlap))
        assert torch.equal(batch.clean, clean)
        assert ((batch.damaged - clean).abs().amax(dim=(1, 2, 3)) > 0.1).all()


@pytest.mark.parametrize("names", [(0, 1), (0, 1, 2), (0, 128, 255), (7, 8, 9)], ids=str)
def test_row_15_ids_stay_the_whole_numbers_they_were(names):
    rng = np.random.default_rng(0)
    maps = [np.repeat(rng.choice(names, (30, 40)), 4, axis=1).astype(np.uint8) for _ in range(2)]
    batch = _batch(views_config(), GivenFrames(maps, maps))
    assert batch.view_labels.unique().tolist() == list(names)
    assert batch.overlap_labels[batch.valid].unique().tolist() == list(names)
    assert batch.view_ids.tolist() == [list(names)] * 12


def test_row_18_a_view_covers_a_fifth_to_the_whole_of_the_frame():
    assert (PAPER.augment.min_scale, PAPER.augment.max_scale) == (0.2, 1.0)
    boxes = [box for pair in _pairs(1500) for box in pair.boxes]
    shares = np.array([box.area / (120 * 150) for box in boxes])
    ratios = np.array([box.width / box.height for box in boxes])
    assert shares.min() >= 0.19
    assert shares.max() <= 1
    assert np.quantile(shares, [0.02, 0.5]) == pytest.approx([0.21, 0.51], abs=0.04)
    assert (ratios > 0.73).all()
    assert (ratios < 1.36).all()
    assert abs(np.median(np.log(ratios))) < 0.08  # a wide frame holds more wide boxes
    tops = np.array([box.top / (120 - box.height) for box in boxes if box.height < 100])
    assert tops.mean() == pytest.approx(0.5, abs=0.03)
    assert tops.std() == pytest.approx(12**-0.5, abs=0.03)


def test_the_cut_of_a_view_is_exact_where_pixels_coincide():
    view = torch.rand(1, 1, 64, 64)
    whole, quarter = FrameBox(0, 0, 64, 64), FrameBox(16, 32, 32, 32)
    for flipped in (False, True):
        pair = draw_pair((64, 64), PAPER.augment, PAPER.overlap, rng_for(0))
        pair = type(pair)(
            (whole, quarter), (flipped, False), shared_box(whole, quarter), valid=True
        )
        shown = view.flip(-1) if flipped else view
        found = cut_shared(shown, [pair], view=0)
        expected = torch.nn.functional.interpolate(
            view[..., 16:48, 32:64], (64, 64), mode="bilinear", align_corners=False
        )
        inside = (..., slice(2, -2), slice(2, -2))
        torch.testing.assert_close(found[inside], expected[inside], atol=1e-5, rtol=0)


@pytest.mark.realdata
def test_real_frames_keep_their_lesions_in_place():
    data = os.environ.get("AGSSD_REAL_DATA")
    if not data:
        pytest.skip("AGSSD_REAL_DATA does not name a folder of real images")
    folder = Path(data) / "us2d" / "busi" / "benign"
    names = sorted(folder.glob("*[0-9)].png"))[:6]
    images, maps = [], []
    for name in names:
        images.append(np.array(Image.open(name).convert("L")))
        lesion = Image.open(name.with_name(f"{name.stem}_mask.png")).convert("L")
        maps.append((np.array(lesion) > 127).astype(np.uint8) + 1)
    anaus = views_config(size=224, augment=SHARP, overlap=UNDAMAGED)
    for step in range(3):
        batch = _batch(anaus, GivenFrames(images, maps), step=step)
        assert batch.valid.all()
        assert set(batch.overlap_labels.unique().tolist()) <= {1, 2}
        for row in range(6):
            both = torch.stack([batch.clean[row].flatten(), batch.damaged[row].flatten()])
            assert torch.corrcoef(both)[0, 1] > 0.9
            lesion, shown = batch.overlap_labels[row] == 2, batch.clean[row, 0]
            if lesion.float().mean() > 0.02:  # benign lesions of the breast are dark
                assert shown[lesion].mean() < shown[~lesion].mean()
