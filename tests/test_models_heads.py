"""Heads, standardisation, decoders; all in float32 under autocast."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agssd_core.models.decoders import LinearDecoder, TransformerDecoder
from agssd_core.models.heads import AlignPredictor, DistillationHead, NormLinear
from agssd_core.models.standardise import Moments, moments, standardise, updated_moments
from tests.support.models import GRID, randomised


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def head():
    torch.manual_seed(0)
    return DistillationHead(24, hidden=32, bottleneck=12, prototypes=16)


def test_prototype_rows_have_norm_one_whatever_the_weight():
    layer = randomised(NormLinear(12, 16), std=7.0)
    torch.testing.assert_close(layer(torch.eye(12)).norm(dim=0), torch.ones(16))
    assert list(dict(layer.named_parameters())) == ["weight"]


def test_logits_are_cosines_with_the_prototypes():
    module, x = randomised(head()), torch.randn(5, 7, 24)
    unit = module.mlp(x)
    unit = unit / unit.norm(dim=-1, keepdim=True)
    rows = module.prototypes.weight
    expected = unit @ (rows / rows.norm(dim=1, keepdim=True)).T
    torch.testing.assert_close(module(x), expected)
    assert module(x).abs().max() <= 1 + 1e-6


def test_the_mean_logit_is_the_score_of_the_mean_embedding():
    module, x = randomised(head()), torch.randn(50, 24)
    embedded = module.embed(x)
    torch.testing.assert_close(module.score(embedded.mean(0)), module(x).mean(0))


@pytest.mark.parametrize(
    "build",
    [
        head,
        lambda: AlignPredictor(24),
        lambda: LinearDecoder(24, 4),
        lambda: TransformerDecoder(24, 4, GRID),
    ],
)
def test_results_are_float32_under_autocast(build):
    module, x = build(), torch.randn(2, 64, 24)
    arguments = (x, GRID) if hasattr(module, "out") else (x,)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(arguments[0].bfloat16(), *arguments[1:])
    assert out.dtype == torch.float32
    if not isinstance(module, TransformerDecoder):  # its blocks follow the encoder's precision
        torch.testing.assert_close(out, module(x.bfloat16().float(), *arguments[1:]))


@pytest.mark.parametrize("decoder", [LinearDecoder(24, 4), TransformerDecoder(24, 4, GRID)])
def test_decoding_some_tokens_is_decoding_all_and_taking_some(decoder):
    tokens, mask = torch.randn(2, 64, 24), torch.rand(2, 64) < 0.5
    everything = decoder(tokens, GRID)
    assert everything.shape == (2, 64, 64)
    by_mask = decoder(tokens, GRID, mask.flatten())
    by_number = decoder(tokens, GRID, mask.flatten().nonzero()[:, 0])
    torch.testing.assert_close(by_mask, everything[mask])
    assert torch.equal(by_mask, by_number)


def test_batch_moments_are_those_of_torch():
    x = torch.randn(3, 4, 5, dtype=torch.float64) * 3 + 100
    found = moments(x, dims=(0, 1))
    var, mean = torch.var_mean(x, dim=(0, 1), correction=0)
    torch.testing.assert_close(found.mean.flatten(), mean)
    torch.testing.assert_close(found.var.flatten(), var)
    out = standardise(x, found)
    torch.testing.assert_close(out.mean((0, 1)), torch.zeros(5).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(
        out.var((0, 1), correction=0), torch.ones(5).double(), atol=1e-3, rtol=0
    )


def test_a_large_mean_costs_no_digits():
    x = torch.randn(4096, 1) * 0.01 + 1000
    x64 = x.double()
    torch.testing.assert_close(
        moments(x, dims=(0,)).var.double(), x64.var(0, correction=0)[None], rtol=1e-2, atol=0
    )


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**20), scale=st.floats(0.1, 50), shift=st.floats(-20, 20))
def test_volume_standardisation_knows_no_other_volume(seed, scale, shift):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, 16, 5, generator=generator)  # (T, B, N, E)
    other = x.clone()
    other[:, 1:] = other[:, 1:] * scale + shift
    one, two = (standardise(v, moments(v, dims=(0, 2))) for v in (x, other))
    assert torch.equal(one[:, 0], two[:, 0])
    # And it forgets a volume's own gain and offset.
    torch.testing.assert_close(one, two, atol=2e-2, rtol=2e-2)


def test_padding_does_not_count():
    x = torch.randn(2, 16, 5)
    valid = torch.rand(2, 16) < 0.6
    padded = torch.where(valid[..., None], x, torch.full_like(x, 1e4))
    found = moments(padded, dims=(0, 1), valid=valid)
    var, mean = torch.var_mean(x[valid], dim=0, correction=0)
    torch.testing.assert_close(found.mean.flatten(), mean, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found.var.flatten(), var, atol=1e-5, rtol=1e-5)
    nothing = moments(x, dims=(0, 1), valid=torch.zeros_like(valid))
    assert torch.isfinite(standardise(x, nothing)).all()


def test_two_processes_see_the_moments_and_gradients_of_one():
    """Unequal halves; the sum over processes is imitated in one graph, as autograd would."""
    whole = torch.randn(10, 5, requires_grad=True)
    parts = whole[:3], whole[3:]
    # Each half needs the other's count, sum, then squares: computed from the whole.
    mean = whole.mean(0, keepdim=True)
    others = {
        id(parts[0]): iter([7.0, parts[1].sum(0, keepdim=True), (parts[1] - mean).square().sum(0)]),
        id(parts[1]): iter([3.0, parts[0].sum(0, keepdim=True), (parts[0] - mean).square().sum(0)]),
    }
    together = moments(whole, dims=(0,))
    loss = standardise(whole, together).pow(3).sum()
    (expected,) = torch.autograd.grad(loss, whole)
    halves = []
    for part in parts:
        rest = others[id(part)]
        halves.append(
            standardise(part, moments(part, dims=(0,), all_sum=lambda x, rest=rest: x + next(rest)))
        )
    (found,) = torch.autograd.grad(sum(half.pow(3).sum() for half in halves), whole)
    torch.testing.assert_close(torch.cat(halves), standardise(whole, together))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_running_moments_are_those_of_the_mixture():
    old, new = torch.randn(3000, 4), torch.randn(1000, 4) * 2 + 3
    described = [
        Moments(*(torch.var_mean(x, dim=0, correction=0)[i] for i in (1, 0))) for x in (old, new)
    ]
    mixed = updated_moments(*described, momentum=0.75)
    var, mean = torch.var_mean(torch.cat([old, new]), dim=0, correction=0)
    torch.testing.assert_close(mixed.mean, mean)
    torch.testing.assert_close(mixed.var, var)
    kept = updated_moments(*described, momentum=1.0)
    assert torch.equal(kept.mean, described[0].mean)
    assert torch.equal(kept.var, described[0].var)


def test_no_standardisation_only_casts():
    x = torch.randn(4, 5).bfloat16()
    assert torch.equal(standardise(x, None), x.float())
