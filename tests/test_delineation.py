import numpy as np
import pytest
import torch

from agssd_core.config.lpsam import LpsamRulesConfig
from agssd_core.errors import ShapeError
from agssd_core.evaluation.delineation import label_map, structure_dice
from agssd_core.evaluation.superpixels import superpixels
from tests.support.lpsam import ellipse_frame

RULES = LpsamRulesConfig()


def _logits(*boxes, shape=(40, 50), height=4.0):
    logits = torch.full((len(boxes), *shape), -5.0)
    for index, (top, left, bottom, right) in enumerate(boxes):
        logits[index, top:bottom, left:right] = height
    return logits


def _everywhere(shape=(40, 50)):
    return np.ones(shape, dtype=bool)


def test_the_highest_logit_wins_and_ids_have_no_gap():
    logits = _logits((0, 0, 20, 20), (0, 0, 5, 5), (10, 10, 30, 30))
    logits[2] += 1
    found = label_map(logits, torch.tensor([0.9, 0.1, 0.7]), _everywhere(), RULES)
    # The second prompt's predicted IoU does not pass; the third becomes 2 and covers the first.
    assert set(np.unique(found.labels)) == {0, 1, 2}
    assert found.labels[0, 0] == 1
    assert found.labels[15, 15] == found.labels[25, 25] == 2
    assert found.confidence == {1: pytest.approx(0.9), 2: pytest.approx(0.7)}


def test_a_prompt_that_does_not_pass_punches_no_hole():
    logits = _logits((0, 0, 20, 20), (5, 5, 10, 10))
    logits[1] += 20
    found = label_map(logits, torch.tensor([0.9, 0.5]), _everywhere(), RULES)
    assert (found.labels[:20, :20] == 1).all()


def test_pixels_under_the_threshold_are_background():
    rules = RULES.model_copy(update={"mask": 0.9})
    logits = _logits((0, 0, 20, 20), height=2.0)  # sigmoid 0.88
    assert not label_map(logits, torch.tensor([0.9]), _everywhere(), rules).labels.any()
    assert label_map(logits, torch.tensor([0.9]), _everywhere(), RULES).labels.any()


def test_small_pieces_are_removed_and_a_prompt_without_any_left_gets_no_id():
    logits = _logits((0, 0, 1, 1), (10, 10, 30, 30))
    logits[1, 35, 45] = 4  # one pixel, less than 0.1 % of 2,000 by the rule below
    rules = RULES.model_copy(update={"component": 0.002})
    found = label_map(logits, torch.tensor([0.9, 0.8]), _everywhere(), rules)
    assert found.confidence == {1: pytest.approx(0.8)}
    assert (found.labels > 0).sum() == 400


def test_nothing_is_labelled_outside_the_sector():
    sector = _everywhere()
    sector[:, :15] = False
    found = label_map(_logits((0, 0, 40, 50)), torch.tensor([0.9]), sector, RULES)
    np.testing.assert_array_equal(found.labels > 0, sector)


def test_no_prompt_passes():
    found = label_map(_logits((0, 0, 9, 9)), torch.tensor([0.2]), _everywhere(), RULES)
    assert not found.labels.any()
    assert found.confidence == {}


def test_sizes_that_differ_are_refused():
    with pytest.raises(ShapeError, match="Restore the masks"):
        label_map(_logits((0, 0, 9, 9)), torch.tensor([0.2]), _everywhere((9, 9)), RULES)


def test_dice_of_structures_is_one_to_one():
    structures = np.zeros((2, 10, 10), dtype=bool)
    structures[0, :5], structures[1, 5:] = True, True
    labels = np.zeros((10, 10), dtype=np.uint8)
    labels[:5], labels[5:] = 2, 1
    assert structure_dice(labels, structures) == [1, 1]
    labels[:] = 1
    assert sorted(structure_dice(labels, structures)) == [0, pytest.approx(2 / 3)]
    assert structure_dice(np.zeros_like(labels), structures) == [0, 0]


def test_superpixels_fill_the_sector_with_about_so_many_regions():
    frame = ellipse_frame(1, (96, 128))
    sector = np.zeros((96, 128), dtype=bool)
    sector[10:90, 5:120] = True
    found = superpixels(frame.frame, sector, regions=12)
    np.testing.assert_array_equal(found > 0, sector)
    assert found.dtype == np.uint8
    assert 9 <= found.max() <= 12
    assert set(np.unique(found)) == set(range(found.max() + 1))
    np.testing.assert_array_equal(found, superpixels(frame.frame, sector, regions=12))


def test_superpixels_follow_grey_levels():
    for number in range(3):
        frame = ellipse_frame(number, (96, 128))
        # The bright ellipse is a region, or a few that add up to it.
        found = superpixels(frame.frame, frame.sector, regions=16)
        truth = frame.structures[0]
        inside = [n for n in range(1, 17) if truth[found == n].mean() > 0.5 and (found == n).any()]
        union = np.isin(found, inside)
        dice = 2 * (union & truth).sum() / (union.sum() + truth.sum())
        assert dice > 0.85


def test_superpixels_of_an_empty_or_flat_sector():
    flat = np.full((40, 40), 9, dtype=np.uint8)
    assert not superpixels(flat, np.zeros((40, 40), dtype=bool), regions=5).any()
    assert superpixels(flat, np.ones((40, 40), dtype=bool), regions=5).max() <= 5
    tiny = np.zeros((40, 40), dtype=bool)
    tiny[0, 0] = True
    assert superpixels(flat, tiny, regions=5).max() == 1
    with pytest.raises(ShapeError, match="1 to 255 regions"):
        superpixels(flat, tiny, regions=300)
