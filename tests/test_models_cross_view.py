"""Cross-view attention: identity at first, deaf outside the overlap, never NaN."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agssd_core.models.cross_view import CrossViewAttention, token_offsets
from agssd_core.views.geometry import token_centres
from tests.support.models import GRID, randomised


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


BIASES = ["soft", "none", "hard"]


def fusion(geom_bias="soft", *, seed=0, fresh=False):
    torch.manual_seed(seed)
    module = CrossViewAttention(24, 4, geom_bias=geom_bias)
    return module if fresh else randomised(module, seed)


def scene(seed=0, batch=2):
    generator = torch.Generator().manual_seed(seed)
    tokens, other = torch.randn(2, batch, 64, 24, generator=generator)
    coords = torch.rand(batch, 64, 3, generator=generator) * 3 - 1.5
    centre_in = (coords.abs() <= 1).all(-1)
    key_mask = torch.rand(batch, 64, generator=generator) < 0.5
    return tokens, other, coords, centre_in, key_mask, GRID


@pytest.mark.parametrize("geom_bias", BIASES)
def test_m5_identity_at_the_start_bit_for_bit(geom_bias):
    arguments = scene()
    assert torch.equal(fusion(geom_bias, fresh=True)(*arguments), arguments[0])


@pytest.mark.parametrize("geom_bias", BIASES)
def test_m5_tokens_outside_the_overlap_are_never_altered(geom_bias):
    tokens, *rest = scene()
    fused = fusion(geom_bias)(tokens, *rest)
    centre_in = rest[2]
    assert torch.equal(fused[~centre_in], tokens[~centre_in])
    assert (fused[centre_in] != tokens[centre_in]).any()


@pytest.mark.parametrize("geom_bias", ["soft", "none"])
@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**20), visible=st.floats(0, 1))
def test_m5_never_nan_whatever_the_overlap(geom_bias, seed, visible):
    tokens, other, coords, centre_in, _, grid = scene(seed)
    tokens.requires_grad_()
    key_mask = torch.rand(2, 64, generator=torch.Generator().manual_seed(seed)) < visible
    module = fusion(geom_bias)
    fused = module(tokens, other, coords, centre_in, key_mask, grid)
    fused.square().sum().backward()
    gradients = [tokens.grad, *(p.grad for p in module.parameters())]
    assert all(torch.isfinite(t).all() for t in (fused, *gradients))


@pytest.mark.parametrize("geom_bias", BIASES)
def test_m5_without_keys_nothing_changes_and_gradients_are_finite(geom_bias):
    tokens, other, coords, centre_in, key_mask, grid = scene()
    key_mask[0] = False
    module = fusion(geom_bias)
    tokens.requires_grad_()
    fused = module(tokens, other, coords, centre_in, key_mask, grid)
    assert torch.equal(fused[0], tokens[0])
    assert not torch.equal(fused[1], tokens[1])
    fused.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())
    assert torch.isfinite(tokens.grad).all()


def test_m5_masked_keys_are_not_looked_at():
    tokens, other, coords, centre_in, key_mask, grid = scene()
    changed = torch.where(key_mask[..., None], other, torch.randn_like(other))
    module = fusion()
    one = module(tokens, other, coords, centre_in, key_mask, grid)
    assert torch.equal(one, module(tokens, changed, coords, centre_in, key_mask, grid))


def test_m5_permuting_keys_with_their_places_changes_nothing():
    """Flipping the other view turns its tokens, its key mask and our coordinates together."""
    tokens, other, coords, centre_in, key_mask, grid = scene()
    module = fusion()

    def flipped(x, axis):
        return x.reshape(2, *grid, -1).flip(axis + 1).reshape(2, 64, -1)

    for axis in range(3):
        turned = coords.clone()
        turned[..., axis] *= -1
        again = module(
            tokens,
            flipped(other, axis),
            turned,
            centre_in,
            flipped(key_mask[..., None], axis)[..., 0],
            grid,
        )
        expected = module(tokens, other, coords, centre_in, key_mask, grid)
        torch.testing.assert_close(again, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("geom_bias", BIASES)
def test_fusion_is_the_formula_written_as_a_loop(geom_bias):
    module = fusion(geom_bias).double()
    tokens, other, coords, centre_in, key_mask, grid = (
        x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in scene()
    )
    coords = (coords * 0.5).float().double()
    fused = module(tokens, other, coords, centre_in, key_mask, grid)
    attention, places = module.attention, torch.from_numpy(token_centres(grid))
    with torch.no_grad():
        q = attention.query(module.norm_query(tokens))
        key, value = attention.key_value(module.norm_context(other)).split(24, dim=-1)
        for b, i in [(0, 0), (0, 17), (1, 30), (1, 63)]:
            keys = key_mask[b].clone()
            apart = (coords[b, i] - places).abs() * torch.tensor(grid) / 2  # pitches
            if geom_bias == "hard":
                keys &= (apart <= 1).all(-1)
            if not (centre_in[b, i] and keys.any()):
                assert torch.equal(fused[b, i], tokens[b, i])
                continue
            mixed = []
            for h in range(4):
                part = slice(6 * h, 6 * h + 6)
                score = key[b, :, part] @ q[b, i, part] / 6**0.5
                if geom_bias == "soft":
                    precision = torch.log1p(module.geometry.weight[h].exp())
                    score = score - precision * (apart**2).sum(-1)
                weight = torch.where(keys, score, -torch.inf).softmax(0)
                mixed.append(weight @ value[b, :, part])
            out = attention.out(torch.cat(mixed)) * module.gate.weight
            torch.testing.assert_close(fused[b, i], tokens[b, i] + out, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("geom_bias", BIASES)
def test_rows_sum_to_one_and_come_with_the_same_tokens(geom_bias):
    arguments = scene()
    module = fusion(geom_bias)
    fused, rows = module.forward_with_rows(*arguments)
    torch.testing.assert_close(fused, module(*arguments), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(rows.sum(-1), torch.ones(2, 4, 64))
    key_mask = arguments[4]
    with_keys = rows.transpose(1, 3)[~key_mask]  # (hidden keys, N, h)
    if geom_bias != "hard":
        assert (with_keys == 0).all()


def test_heads_begin_with_reaches_of_one_two_four_and_nearly_no_limit():
    module = fusion(fresh=True)
    # The last query factor goes with the squared distance of a key from the midpoint.
    bias = module.geometry(torch.zeros(1, 1, 3))[0, :, 0, 3]
    assert bias.tolist() == pytest.approx([-1 / 2, -1 / 8, -1 / 32, 0], abs=1e-3)
    # The widest head still learns to narrow.
    bias[3].backward()
    assert module.geometry.weight.grad[3] != 0


def test_offsets_are_pitches_to_every_token():
    places = torch.from_numpy(token_centres(GRID)).float()[None]
    offsets = token_offsets(places, GRID)
    torch.testing.assert_close(offsets.diagonal(dim1=1, dim2=2), torch.zeros(1, 3, 64))
    assert offsets[0, 1, 0].tolist() == pytest.approx([0, 0, 1])
    assert offsets[0, 16, 0].tolist() == pytest.approx([1, 0, 0])


def test_m7_gradient_reaches_queries_and_the_gate_but_a_detached_other_view_stays_still():
    tokens, other, *rest = scene()
    tokens.requires_grad_()
    other.requires_grad_()
    module = fusion(fresh=True)
    module(tokens, other.detach(), *rest).square().sum().backward()
    assert tokens.grad.abs().sum() > 0
    assert module.gate.weight.grad.abs().sum() > 0
    assert other.grad is None


def test_it_stays_finite_in_bfloat16():
    arguments = scene()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused = fusion()(*arguments)
    assert torch.isfinite(fused).all()
    torch.testing.assert_close(fused, fusion()(*arguments), atol=0.3, rtol=0.1)
