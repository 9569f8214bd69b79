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
