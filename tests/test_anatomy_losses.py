"""ANAUS's losses against the published formulas as the plainest loops, in float64."""

import math

import pytest
import torch

from agssd_core.errors import ShapeError
from agssd_core.losses.anatomy import alignment_loss, core_region_loss
from tests.support.anatomy import plain_alignment, unit


def rows(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def some_ids(frames=3, draws=5, *, highest=4, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, highest, (2, frames, draws), generator=generator)


def both(function, *arguments, predictions, **named):
    """Value and gradient."""
    leaf = predictions.clone().requires_grad_()
    value = function(leaf, *arguments, **named)
    value.backward()
    return value.detach(), leaf.grad


@pytest.mark.parametrize("drop_same_id", [False, True])
@pytest.mark.parametrize("missing", [False, True], ids=["all-drawn", "a-frame-without-anatomy"])
def test_alignment_equals_the_plain_loop(drop_same_id, missing):
    predictions, targets, ids = rows(2, 3, 5, 8), rows(2, 3, 5, 8, seed=2), some_ids()
    if missing:
        ids[1, 2] = 0
    ours = both(
        lambda p: alignment_loss(p, targets, ids, temperature=0.1, drop_same_id=drop_same_id),
        predictions=predictions,
    )
    plain = both(
        lambda p: plain_alignment(p, targets, ids, 0.1, drop_same_id=drop_same_id),
        predictions=predictions,
    )
    assert ours[0].item() == pytest.approx(plain[0].item(), abs=1e-6)
    assert (ours[1] - plain[1]).norm() / plain[1].norm() < 1e-5


def test_rows_without_a_positive_add_nothing_but_count_in_the_denominator():
    """Section 4A as released: dead rows stand in the denominator."""
    predictions, targets = rows(2, 1, 2, 4), rows(2, 1, 2, 4, seed=3)
    ids = torch.tensor([[[1, 2]], [[1, 3]]])
    whole = alignment_loss(predictions, targets, ids, temperature=0.5)
    assert whole.item() == pytest.approx(plain_alignment(predictions, targets, ids, 0.5).item())
    alone = alignment_loss(predictions[:, :, :1], targets[:, :, :1], ids[:, :, :1], temperature=0.5)
    assert alone.item() == 0  # one candidate, and it is the positive
    assert whole.item() > 0


def test_row_24_same_anatomy_of_another_frame_repels_unless_it_is_left_out():
    """The released code's default; leaving it out is for ids that mean the same everywhere."""
    shared = rows(1, 1, 1, 6).expand(2, 2, 1, 6)
    ids = torch.ones(2, 2, 1, dtype=torch.long)
    repelled = alignment_loss(shared, shared, ids, temperature=0.1)
    # Each row sees its positive and the same id of the other frame in both views, all alike.
    assert repelled.item() == pytest.approx(2 * math.log(3))
    assert alignment_loss(shared, shared, ids, temperature=0.1, drop_same_id=True).item() == 0


def test_separated_anatomies_cost_less_than_collapsed_ones():
    ids = torch.tensor([[[1, 2, 3]], [[1, 2, 3]]])
    apart = torch.eye(3, dtype=torch.float64).expand(2, 1, 3, 3)
    together = torch.ones(2, 1, 3, 3, dtype=torch.float64)
    low = alignment_loss(apart, apart, ids, temperature=0.1)
    high = alignment_loss(together, together, ids, temperature=0.1)
    assert low.item() < 0.01
    assert high.item() == pytest.approx(2 * math.log(5))


def test_no_gradient_reaches_the_teacher():
    predictions, targets = rows(2, 2, 3, 4).requires_grad_(), rows(2, 2, 3, 4).requires_grad_()
    ids = some_ids(2, 3)
    loss = alignment_loss(predictions, targets, ids, temperature=0.1)
    loss = loss + core_region_loss(predictions[0], targets[0], ids[0] > 1)
    loss.backward()
    assert targets.grad is None
    assert predictions.grad.abs().sum() > 0


def plain_core(predictions, targets, valid, form):
    found = []
    for frame in range(len(valid)):
        for draw in range(valid.shape[1]):
            if not valid[frame, draw]:
                continue
            p, t = predictions[frame, draw], targets[frame, draw]
            if form == "squared":
                found.append(sum((a - b) ** 2 for a, b in zip(p, t, strict=True)) / len(p))
            else:
                found.append(2 - 2 * (unit(p) @ unit(t)))
    return sum(found) / len(found)


@pytest.mark.parametrize("form", ["squared", "cosine"])
def test_row_33_core_region_equals_the_plain_loop(form):
    """Vectors as they are, as the released code has it; ``cosine`` is the option."""
    predictions, targets = rows(4, 5, 8), rows(4, 5, 8, seed=4)
    valid = torch.rand(4, 5, generator=torch.Generator().manual_seed(5)) > 0.4
    ours = both(lambda p: core_region_loss(p, targets, valid, form=form), predictions=predictions)
    plain = both(lambda p: plain_core(p, targets, valid, form), predictions=predictions)
    assert ours[0].item() == pytest.approx(plain[0].item(), abs=1e-6)
    assert (ours[1] - plain[1]).norm() / plain[1].norm() < 1e-5


def test_row_11_frames_without_overlap_weigh_nothing():
    """The paper: they are left out. The released code lets an all-zero crop into the loss."""
    predictions, targets = rows(2, 3, 4), rows(2, 3, 4, seed=6)
    valid = torch.tensor([[True] * 3, [False] * 3])
    expected = core_region_loss(predictions[:1], targets[:1], valid[:1])
    predictions[1] = 1e6
    assert core_region_loss(predictions, targets, valid).item() == pytest.approx(expected.item())
    leaf = predictions.requires_grad_()
    nothing = core_region_loss(leaf, targets, torch.zeros_like(valid))
    nothing.backward()
    assert nothing.item() == 0
    assert leaf.grad.abs().max() == 0


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ShapeError, match="Give two views of"):
        alignment_loss(rows(2, 3, 4, 8), rows(2, 3, 4, 8), some_ids(3, 5), temperature=0.1)
    with pytest.raises(ShapeError, match=r"Give \(B, K, C\) twice and"):
        core_region_loss(rows(3, 4, 8), rows(3, 4, 8), torch.ones(3, 5, dtype=torch.bool))
