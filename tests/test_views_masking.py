"""Edge-aware masks: properties E1 to E7 of the method."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from agssd_core.config import EaamConfig
from agssd_core.errors import ShapeError
from agssd_core.views.geometry import token_centres
from agssd_core.views.masking import (
    alpha_at,
    draw_masks,
    edge_map,
    mask_ratio,
    patch_scores,
    rank_scores,
)
from agssd_core.views.seeds import torch_generator_for

EAAM = EaamConfig()

PLAIN = EaamConfig(reveal=0.0, kappa=0.0)

GRID = (4, 4, 4)

N = 64


def _masks(scores, *, alpha=4.0, ratio=0.6, eaam=EAAM, valid=None, grid=GRID, seed=0, **options):
    valid = torch.ones_like(scores, dtype=torch.bool) if valid is None else valid
    return draw_masks(
        scores.masked_fill(~valid, -1.0),
        valid,
        alpha=alpha,
        ratio=torch.as_tensor(ratio, dtype=torch.float64),
        eaam=eaam,
        grid=grid,
        generator=torch_generator_for(seed, "masks"),
        **options,
    )


def _many(scores_row, views=4000, **options):
    """How often each token of one view is hidden."""
    return _masks(scores_row.expand(2, views // 2, -1), **options).float().mean((0, 1))


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    unit=st.sampled_from([1, 2]),
    ratio=st.floats(0.05, 0.95),
    padded=st.floats(0, 0.9),
)
def test_e1_count_is_exact_in_mask_units_and_e4_padding_is_never_hidden(seed, unit, ratio, padded):
    generator = torch_generator_for(seed)
    scores = torch.rand(2, 3, N, generator=generator)
    units = torch.rand(2, 3, (4 // unit) ** 3, generator=generator) >= padded
    units[..., 0] = True
    spread = units.view(-1, *(4 // unit,) * 3)
    for axis in (1, 2, 3):
        spread = spread.repeat_interleave(unit, axis)
    valid = spread.reshape(2, 3, N)
    masks = _masks(scores, ratio=ratio, eaam=EaamConfig(unit=unit), valid=valid, seed=seed)
    assert not (masks & ~valid).any()
    for v in range(2):
        for b in range(3):
            real = int(units[v, b].sum())
            expected = max(1, min(round(ratio * real), real - 1))
            assert int(masks[v, b].sum()) == expected * unit**3


def test_units_are_hidden_as_a_whole():
    masks = _masks(torch.rand(2, 4, N), eaam=EaamConfig(unit=2))
    blocks = masks.view(2, 4, 2, 2, 2, 2, 2, 2).permute(0, 1, 2, 4, 6, 3, 5, 7).flatten(5)
    assert (blocks.all(-1) == blocks.any(-1)).all()


def test_e2_probability_rises_with_the_edge_quartile_and_is_flat_without_alpha():
    scores = torch.rand(N, generator=torch_generator_for(3))
    order = scores.argsort()
    steep, flat = (
        _many(scores, alpha=alpha, eaam=PLAIN)[order].view(4, 16).mean(1) for alpha in (4.0, 0.0)
    )
    assert (steep.diff() > 0.05).all()
    assert steep[-1] / steep[0] > 3
    torch.testing.assert_close(flat, torch.full((4,), 38 / 64), atol=0.02, rtol=0)


def test_t5_strong_edges_are_hidden_more_often_than_at_random():
    scores = torch.rand(N, generator=torch_generator_for(3))
    top = scores >= scores.quantile(0.75)
    share = [_many(scores, alpha=alpha)[top].mean() for alpha in (4.0, 0.0)]
    assert share[0] / share[1] >= 1.3


def _scaled_ranks(factor, edge, seed):
    crops = torch.rand(2, 1, 24, 24, 24, generator=torch_generator_for(seed))
    eaam, valid = EaamConfig(edge=edge), torch.ones(2, 27, dtype=torch.bool)
    scores = [
        patch_scores(edge_map(x, eaam=eaam), valid, patch_size=8) for x in (crops, crops * factor)
    ]
    return scores, [rank_scores(score, valid, torch_generator_for(seed)) for score in scores]


@settings(max_examples=20, deadline=None)
@given(
    st.sampled_from([0.5, 0.25, 0.0625]), st.sampled_from(["gaussian", "sobel"]), st.integers(0, 99)
)
def test_e3_scaling_the_intensities_changes_no_mask(factor, edge, seed):
    # A power of two scales without rounding, so equality is exact.
    scores, ranks = _scaled_ranks(factor, edge, seed)
    assert torch.equal(*ranks)
    masks = [_masks(score[:, None], grid=(3, 3, 3), seed=seed) for score in scores]
    assert torch.equal(*masks)


@settings(max_examples=20, deadline=None)
@given(st.floats(0.05, 1.0), st.sampled_from(["gaussian", "sobel"]), st.integers(0, 99))
def test_e3_other_factors_swap_only_what_rounding_makes_equal(factor, edge, seed):
    (plain, scaled), (before, after) = _scaled_ranks(factor, edge, seed)
    torch.testing.assert_close(plain, scaled, atol=1e-5, rtol=0)
    clear = (plain[:, :, None] - plain[:, None, :]) > 1e-5
    assert ((after[:, :, None] > after[:, None, :]) | ~clear).all()
    assert (before != after).sum() <= 4


def test_e5_hints_stay_visible_among_the_strongest_edges():
    scores = torch.rand(2, 400, N, generator=torch_generator_for(0))
    top = scores.argsort(-1, descending=True)[..., :13]
    for reveal, least in ((0.1, 1), (0.3, 3), (0.5, 6)):
        masks = _masks(scores, alpha=50.0, eaam=EaamConfig(reveal=reveal))
        visible = (~masks).gather(-1, top).sum(-1)
        assert int(visible.min()) >= least
    without = _masks(scores, alpha=50.0, eaam=PLAIN)
    assert int((~without).gather(-1, top).sum(-1).min()) == 0, "then hints would not be needed"


def test_e6_one_generator_one_mask():
    scores = torch.rand(2, 3, N)
    assert torch.equal(_masks(scores, seed=1), _masks(scores, seed=1))
    assert not torch.equal(_masks(scores, seed=1), _masks(scores, seed=2))


@pytest.mark.parametrize("edge", ["gaussian", "sobel"])
@pytest.mark.parametrize("level", [0.0, 0.37, 1.0])
def test_e7_a_constant_volume_has_no_edges_and_is_masked_uniformly(edge, level):
    crops = torch.full((1, 1, 32, 32, 32), level)
    edges = edge_map(crops, eaam=EaamConfig(edge=edge))
    assert (edges == 0).all()
    scores = patch_scores(edges, torch.ones(1, N, dtype=torch.bool), patch_size=8)
    hidden = _many(scores[0], alpha=8.0)
    torch.testing.assert_close(hidden, torch.full((N,), 38 / 64), atol=0.05, rtol=0)


def test_without_eaam_masks_are_uniform_whatever_the_edges():
    scores = torch.linspace(0, 1, N)
    off = EaamConfig(enabled=False, co_mask=0.5)
    hidden = _many(scores, alpha=8.0, eaam=off)
    torch.testing.assert_close(hidden, torch.full((N,), 38 / 64), atol=0.05, rtol=0)
    assert alpha_at(off, 10, 10) == 0.0
    density = torch.tensor([0.1, 0.9])
    ratio = mask_ratio(density, torch.tensor(0.5), torch.tensor(0.1), off)
    assert ratio.tolist() == [0.6, 0.6]


@pytest.mark.parametrize("ratio", [0.05, 0.95])
def test_something_is_hidden_and_something_is_visible_in_tiny_grids(ratio):
    for grid in ((1, 1, 2), (1, 2, 2)):
        count = int(np.prod(grid))
        masks = _masks(torch.rand(2, 5, count), ratio=ratio, grid=grid)
        assert (masks.sum(-1) >= 1).all()
        assert (masks.sum(-1) <= count - 1).all()


def test_a_body_thinner_than_a_mask_unit_is_still_masked_and_padding_is_not():
    valid = torch.zeros(1, 1, *GRID, dtype=torch.bool)
    valid[:, :, 1] = True
    valid = valid.view(1, 1, N)
    # The layer crosses four units of 2 x 2 x 2 tokens and fills half of each.
    masks = _masks(torch.rand(1, 1, N), valid=valid, eaam=EaamConfig(unit=2))
    assert int(masks.sum()) == round(0.6 * 4) * 4
    assert not (masks & ~valid).any()
    nothing = torch.zeros_like(valid)
    assert not _masks(torch.rand(1, 1, N), valid=nothing).any()


def test_equal_counts_hide_the_same_number_everywhere():
    valid = torch.ones(2, 3, N, dtype=torch.bool)
    valid[1, 2, :40] = False
    ratio = torch.tensor([0.5, 0.6, 0.75])
    masks = _masks(torch.rand(2, 3, N), ratio=ratio, valid=valid, equal_counts=True)
    assert masks.sum(-1).unique().tolist() == [15]
    unequal = _masks(torch.rand(2, 3, N), ratio=ratio)
    assert unequal.sum(-1)[0].tolist() == [32, 38, 48]


def test_mask_prob_spares_whole_views():
    masks = _masks(torch.rand(2, 500, N), eaam=EaamConfig(mask_prob=0.5))
    counts = masks.sum(-1)
    assert set(counts.unique().tolist()) == {0, 38}
    assert 0.4 < (counts > 0).float().mean() < 0.6


def test_co_masking_hides_in_the_second_view_what_the_first_hides():
    first_hidden = {}
    co = torch.from_numpy(token_centres(GRID)).expand(200, -1, -1)
    for share in (0.0, 0.5, 1.0):
        eaam = EaamConfig(co_mask=share, reveal=0.0)
        masks = _masks(torch.rand(2, 200, N), alpha=0.0, eaam=eaam, co=co)
        first_hidden[share] = float((masks[0] & masks[1]).sum() / masks[0].sum())
    assert first_hidden[0.0] == pytest.approx(38 / 64, abs=0.03)
    assert first_hidden[0.0] + 0.1 < first_hidden[0.5] < first_hidden[1.0]
    away = _masks(torch.rand(2, 200, N), eaam=EaamConfig(co_mask=1.0), co=co + 9, seed=4)
    assert (away.sum(-1) == 38).all()
    with pytest.raises(ShapeError, match="Pass co=q21"):
        _masks(torch.rand(2, 2, N), eaam=EaamConfig(co_mask=0.5))


def test_masks_refuse_arguments_that_do_not_fit():
    with pytest.raises(ShapeError, match="a unit that divides it"):
        _masks(torch.rand(2, 2, 27), grid=(3, 3, 3), eaam=EaamConfig(unit=2))
    with pytest.raises(ShapeError, match="N the product of the grid"):
        _masks(torch.rand(2, 2, 27))


def test_log_scores_prefer_edges_too():
    scores = torch.linspace(0, 1, N) ** 3
    hidden = _many(scores, eaam=EaamConfig(score="log", reveal=0.0))
    assert hidden[-16:].mean() > hidden[:16].mean() + 0.3
