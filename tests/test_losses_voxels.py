"""Reconstruction and the optional terms against plain loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agssd_core.errors import ShapeError
from agssd_core.losses.reconstruction import (
    best_constant_l1,
    edge_weights,
    masked_l1,
    normalised_patches,
    patchify,
)
from agssd_core.losses.regularisers import (
    align_loss,
    attention_supervision,
    koleo,
    trilinear_weights,
    variance_hinge,
)
from agssd_core.models.vit3d import VisionTransformer3d
from agssd_core.views.geometry import sample_tokens
from tests.support.models import tiny_vit


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def flat(mask):
    """Rows of the masked tokens of (M, N) masks."""
    return mask.nonzero()[:, 0]


def test_patches_are_the_cubes_in_token_order():
    crops = torch.rand(2, 1, 8, 12, 4)
    patches = patchify(crops, 4)
    assert patches.shape == (2, 6, 64)
    token = 0
    for d in range(2):
        for h in range(3):
            cube = crops[1, 0, 4 * d : 4 * d + 4, 4 * h : 4 * h + 4]
            assert torch.equal(patches[1, token], cube.flatten())
            token += 1


def test_patches_are_in_the_order_of_the_encoders_tokens():
    encoder, crops = VisionTransformer3d(tiny_vit()), torch.rand(2, 1, 16, 16, 16)
    convolved = encoder.patch_embed(crops).flatten(2).transpose(1, 2)
    by_hand = patchify(crops, 4) @ encoder.patch_embed.weight.flatten(1).T
    torch.testing.assert_close(by_hand + encoder.patch_embed.bias, convolved)


@pytest.mark.parametrize("shape", [(1, 1, 9, 8, 8), (1, 2, 8, 8, 8), (1, 8, 8, 8)], ids=str)
def test_crops_that_do_not_cut_are_refused(shape):
    with pytest.raises(ShapeError, match="multiples of the patch size"):
        patchify(torch.zeros(shape), 4)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**20), strength=st.sampled_from([0.0, 2.0]))
def test_masked_l1_is_the_plain_loop(seed, strength):
    generator = torch.Generator().manual_seed(seed)
    prediction, target, edges = torch.rand(3, 3, 10, 8, generator=generator).double()
    mask = torch.rand(3, 10, generator=generator) < 0.4
    weights = edge_weights(edges, strength=strength)
    crops = []
    for crop in range(3):
        total = amount = 0.0
        for token in range(10):
            for voxel in range(8):
                if mask[crop, token]:
                    w = 1 + strength * float(edges[crop, token, voxel])
                    at = (crop, token, voxel)
                    total += w * abs(float(prediction[at]) - float(target[at]))
                    amount += w
        if amount:
            crops.append(total / amount)
    expected = sum(crops) / len(crops) if crops else 0.0
    given_weights = weights[mask] if strength else None
    found = masked_l1(prediction[mask], target[mask], flat(mask), rows=3, weights=given_weights)
    assert float(found) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    # Weight 1 everywhere is no weight at all.
    ones = torch.ones_like(target[mask])
    unweighted = masked_l1(prediction[mask], target[mask], flat(mask), rows=3)
    weighted = masked_l1(prediction[mask], target[mask], flat(mask), rows=3, weights=ones)
    torch.testing.assert_close(unweighted, weighted)


def test_predictions_that_torch_would_broadcast_are_refused():
    with pytest.raises(ShapeError, match="same token index"):
        masked_l1(torch.zeros(1, 8), torch.zeros(3, 8), torch.zeros(3, dtype=torch.long), rows=1)


def test_normalised_patches_forget_gain_and_offset():
    patches = torch.rand(4, 64)
    found = normalised_patches(patches)
    torch.testing.assert_close(found.mean(-1), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.var(-1), torch.ones(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(normalised_patches(3 * patches + 7), found, atol=1e-3, rtol=0)
    assert torch.isfinite(normalised_patches(torch.ones(2, 64))).all()


def test_no_constant_beats_the_best_constant():
    target, row = torch.rand(12, 8) ** 3, torch.arange(12) % 3
    best = float(best_constant_l1(target, row, rows=4))
    for _ in range(20):
        guess = torch.rand(4)[row][:, None].expand(12, 8)
        assert float(masked_l1(guess, target, row, rows=4)) >= best - 1e-6
    medians = torch.stack([target[row == r].median() for r in range(3)])
    found = masked_l1(medians[row][:, None].expand(12, 8), target, row, rows=4)
    assert float(found) == pytest.approx(best, rel=1e-5)
    assert float(best_constant_l1(target[:0], row[:0], rows=4)) == 0


def test_koleo_is_the_plain_loop_and_never_crosses_crop_groups():
    tokens = torch.randn(3, 5, 6, dtype=torch.float64)
    unit = tokens / tokens.norm(dim=-1, keepdim=True)
    logs = [
        math.log(min(float((unit[v, i] - unit[v, j]).norm()) for j in range(5) if j != i))
        for v in range(3)
        for i in range(5)
    ]
    assert float(koleo(tokens)) == pytest.approx(-sum(logs) / len(logs), rel=1e-6)
    same_everywhere = tokens[:1].expand(3, 5, 6)
    torch.testing.assert_close(koleo(same_everywhere), koleo(tokens[:1]))


def test_koleo_pushes_neighbours_apart_and_survives_twins():
    tokens = torch.tensor([[[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0]]], requires_grad=True)
    koleo(tokens).backward()
    assert tokens.grad[0, 1, 1] < 0  # descent moves it up, away from its neighbour
    twins = torch.ones(1, 2, 4, requires_grad=True)
    value = koleo(twins)
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(twins.grad).all()
    assert float(koleo(torch.randn(2, 1, 4))) == 0


def test_variance_hinge_is_the_formula():
    tokens = torch.randn(20, 6).double() * torch.tensor([0.1, 0.5, 0.9, 1.5, 3.0, 0.0])
    expected = [
        max(0.0, 1 - math.sqrt(float(tokens[:, c].double().var()) + 1e-4)) for c in range(6)
    ]
    assert float(variance_hinge(tokens)) == pytest.approx(sum(expected) / 6, rel=1e-9)
    assert float(variance_hinge(torch.randn(1, 6))) == 0


def test_align_loss_is_the_loop_over_inner_tokens():
    predicted, target = torch.randn(2, 3, 5, 6).double()
    inner = torch.tensor([[True] * 3 + [False] * 2, [False] * 5, [True] + [False] * 4])
    volumes = []
    for b in (0, 2):
        costs = []
        for i in range(5):
            if inner[b, i]:
                p, t = predicted[b, i].double(), target[b, i].double()
                costs.append(2 - 2 * float(p @ t / (p.norm() * t.norm())))
        volumes.append(sum(costs) / len(costs))
    found = align_loss(predicted, target, inner)
    assert float(found) == pytest.approx(sum(volumes) / 2, rel=1e-9)
    assert float(align_loss(predicted, target, torch.zeros_like(inner))) == 0


def test_align_loss_does_not_pull_its_target():
    predicted, target = torch.randn(2, 1, 5, 6, requires_grad=True).unbind()
    target.retain_grad()
    align_loss(predicted, target, torch.ones(1, 5, dtype=torch.bool)).backward()
    assert target.grad is None


def test_trilinear_weights_are_those_of_the_sampler():
    grid, tokens = (4, 3, 5), torch.randn(2, 60, 7)
    coords = (torch.rand(2, 9, 3) * 2 - 1) * (1 - 1 / 3)  # inside every axis' outermost centres
    weights = trilinear_weights(coords, grid)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 9))
    torch.testing.assert_close(
        weights @ tokens, sample_tokens(tokens, coords, grid), atol=1e-5, rtol=1e-5
    )


def test_attention_supervision_is_least_when_attention_looks_at_the_right_place():
    weights = trilinear_weights((torch.rand(2, 6, 3) - 0.5), (4, 4, 4))
    inner = torch.ones(2, 6, dtype=torch.bool)
    right = weights[:, None].expand(-1, 4, -1, -1)
    entropy = -torch.special.xlogy(weights, weights).sum(-1).mean()
    best = attention_supervision(right, weights, inner)
    torch.testing.assert_close(best, entropy, atol=1e-4, rtol=1e-4)
    flat_rows = torch.full((2, 4, 6, 64), 1 / 64)
    blind = attention_supervision(flat_rows, weights, inner)
    assert float(blind) == pytest.approx(math.log(64), rel=1e-5)
    # One head that sees suffices: heads are averaged before the logarithm.
    one_sees = flat_rows.clone()
    one_sees[:, 0] = weights
    assert best < attention_supervision(one_sees, weights, inner) < best + math.log(4) + 1e-4
    assert torch.isfinite(attention_supervision(torch.zeros(2, 4, 6, 64), weights, inner))
