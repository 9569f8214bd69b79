import math

import pytest
import torch

from agssd_core.errors import ShapeError
from agssd_core.losses.delineation import CODE, PAPER, delineation_loss, match_prompts, pair_costs


@pytest.mark.parametrize("weights", [PAPER, CODE], ids=["paper", "code"])
def test_pair_costs_equal_a_plain_loop(weights):
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 5, generator=draw, dtype=torch.float64)
    masks = torch.rand(2, 4, 5, generator=draw) > 0.5
    costs = pair_costs(logits, masks, weights)
    for r in range(3):
        for k in range(2):
            bce = both = squares = 0.0
            for value, inside in zip(
                logits[r].flatten().tolist(), masks[k].flatten().tolist(), strict=True
            ):
                p = 1 / (1 + math.exp(-value))
                bce -= weights.positive * math.log(p) if inside else math.log(1 - p)
                both += p * inside
                squares += p * p + inside
            dice = 1 - (2 * both + 1e-5) / (squares + 1e-5)
            expected = (1 - weights.alpha) * bce / 20 + weights.alpha * dice
            assert costs[r, k].item() == pytest.approx(expected, abs=1e-9)


def _two_structures():
    masks = torch.zeros(2, 8, 8)
    masks[0, :4], masks[1, 6:] = 1, 1
    return masks


def test_each_structure_gets_its_own_prompt():
    masks = _two_structures()
    logits = torch.stack([-torch.ones(8, 8), masks[1] * 2 - 1, masks[0] * 2 - 1]) * 9
    prompts, chosen = match_prompts(pair_costs(logits, masks))
    assert dict(zip(prompts.tolist(), chosen.tolist(), strict=True)) == {1: 1, 2: 0}


def test_unmatched_prompts_learn_through_their_iou_alone():
    masks = _two_structures()
    start = torch.stack([-torch.ones(8, 8), masks[1] * 2 - 1, masks[0] * 2 - 1])[None] * 9
    logits, iou = start.requires_grad_(), torch.full((1, 3), 0.5, requires_grad=True)
    delineation_loss(logits, iou, [masks]).backward()
    assert logits.grad[0, 0].abs().max() == 0
    assert logits.grad[0, 1:].abs().sum() > 0
    assert iou.grad[0, 0] > 0 > iou.grad[0, 1]


def test_a_frame_without_structures_gives_the_iou_term_alone():
    iou = torch.tensor([[0.5, 0.1]])
    loss = delineation_loss(torch.randn(1, 2, 8, 8), iou, [torch.zeros(0, 8, 8)])
    assert loss.item() == pytest.approx((0.25 + 0.01) / 2)


def test_masks_of_another_size_are_refused():
    with pytest.raises(ShapeError, match="Resize the masks by nearest neighbour"):
        pair_costs(torch.zeros(1, 8, 8), torch.zeros(1, 4, 4))
    with pytest.raises(ShapeError, match="Pass one set a frame"):
        delineation_loss(torch.zeros(2, 1, 8, 8), torch.zeros(2, 1), [torch.zeros(1, 8, 8)])


@pytest.mark.parametrize("surest", range(3))
def test_of_prompts_that_fit_equally_the_surest_keeps_the_structure(surest):
    masks = _two_structures()[:1]
    same = (masks[0] * 2 - 1) * 3
    iou = torch.full((1, 3), 0.2)
    iou[0, surest] = 0.6
    delineation_loss(torch.stack([same] * 3)[None], iou.requires_grad_(), [masks]).backward()
    # Only the surest is told that it fits; the others learn to leave the structure to it.
    assert [value < 0 for value in iou.grad[0]] == [index == surest for index in range(3)]


def test_a_better_mask_beats_a_surer_prompt():
    masks = _two_structures()[:1]
    good, bad = (masks[0] * 2 - 1) * 6, -(masks[0] * 2 - 1) * 6
    iou = torch.tensor([[0.95, 0.05]], requires_grad=True)
    delineation_loss(torch.stack([bad, good])[None], iou, [masks]).backward()
    assert iou.grad[0, 0] > 0 > iou.grad[0, 1]


def test_costs_that_are_not_finite_give_a_loss_that_is_not_finite():
    logits = torch.full((1, 2, 8, 8), float("nan"))
    loss = delineation_loss(logits, torch.zeros(1, 2), [_two_structures()])
    assert not torch.isfinite(loss)
