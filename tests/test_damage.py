"""Damage of the overlap: shuffled blocks, intensity curves, holes of noise."""

import numpy as np
import pytest
import torch

from agssd_core.config.anaus import OverlapConfig
from agssd_core.views.damage import Damage, apply_damage, draw_damage
from agssd_core.views.seeds import rng_for

ONLY = {"shuffle_p": 0.0, "intensity_p": 0.0, "inpaint_p": 0.0}


def _draw(count=8, *, size=224, **overlap):
    rngs = [rng_for(0, "damage", number) for number in range(count)]
    return draw_damage(rngs, OverlapConfig(**overlap), size=size)


def _images(count=8, size=224):
    return torch.rand(count, 1, size, size, generator=torch.Generator().manual_seed(0))


def test_no_damage_changes_nothing():
    images = _images()
    torch.testing.assert_close(apply_damage(images, _draw(**ONLY)), images, atol=1e-6, rtol=0)


def test_the_input_stays_as_it_was_and_the_result_is_memory_of_its_own():
    for overlap in ({}, ONLY, {**ONLY, "inpaint_p": 1.0}, {**ONLY, "intensity_p": 1.0}):
        images = _images()
        before = images.clone()
        damaged = apply_damage(images, _draw(**overlap))
        damaged.zero_()
        assert torch.equal(images, before)


def test_damage_is_a_plain_loop_over_pixels():
    size = 32
    images, drawn = _images(6, size), _draw(6, size=size)
    found = apply_damage(images, drawn)
    for n in range(6):
        flat = images[n].flatten().double()
        for pixel in range(size * size):
            row, column = divmod(pixel, size)
            if drawn.holes[n, row, column]:
                expected = drawn.noise[n, row, column]
            else:
                value = flat[drawn.source[n, pixel]]
                grid = np.linspace(0, 1, 257)
                expected = np.interp(float(value), grid, drawn.curve[n].double().numpy())
            assert float(found[n, 0, row, column]) == pytest.approx(float(expected), abs=1e-5)


def test_a_pixel_moves_within_one_block_and_most_pixels_move():
    size, block = 224, 11
    drawn = _draw(**{**ONLY, "shuffle_p": 1.0})
    here = torch.arange(size * size)
    rows = (drawn.source // size - here // size).abs()
    columns = (drawn.source % size - here % size).abs()
    assert rows.max() == columns.max() == block - 1
    # Blocks together as large as the image leave 1 / e of it, and 1 / 121 of the rest, in place.
    moved = (drawn.source != here).float().mean().item()
    assert moved == pytest.approx((1 - np.exp(-1)) * (1 - 1 / 121), abs=0.02)


def test_a_block_keeps_its_pixels():
    drawn = _draw(4, size=32, **{**ONLY, "shuffle_p": 1.0, "shuffle_block": 224})
    for source in drawn.source:  # one block, as large as the image
        assert source.sort().values.tolist() == list(range(32 * 32))
        assert source.tolist() != list(range(32 * 32))


@pytest.mark.parametrize(("size", "block"), [(224, 11), (112, 6), (64, 3), (448, 22)])
def test_blocks_follow_the_size_and_cover_as_much(size, block):
    drawn = _draw(4, size=size, **{**ONLY, "shuffle_p": 1.0})
    here = torch.arange(size * size)
    assert (drawn.source // size - here // size).abs().max() == block - 1
    expected = (1 - np.exp(-1)) * (1 - 1 / block**2)
    assert (drawn.source != here).float().mean().item() == pytest.approx(expected, abs=0.03)


def test_curves_are_monotone_from_end_to_end_in_both_directions():
    curves = _draw(400, size=32, **{**ONLY, "intensity_p": 1.0}).curve
    steps = curves.diff(dim=1)
    rising = (steps >= 0).all(dim=1)
    falling = (steps <= 0).all(dim=1)
    assert (rising ^ falling).all()
    assert rising.float().mean().item() == pytest.approx(0.5, abs=0.08)
    ends = torch.stack([curves[:, 0], curves[:, -1]], dim=1)
    assert torch.equal(ends, torch.stack([(~rising).float(), rising.float()], dim=1))
    assert curves[rising].std(dim=0)[128] > 0.1, "curves differ"


def test_holes_have_the_published_sizes_and_hold_uniform_noise():
    one = _draw(300, **{**ONLY, "inpaint_p": 1.0, "inpaint_boxes": 1})
    heights = one.holes.any(dim=2).sum(dim=1)
    widths = one.holes.any(dim=1).sum(dim=1)
    assert torch.equal(heights * widths, one.holes.sum(dim=(1, 2)))
    for edges in (heights, widths):
        assert edges.min() == 22
        assert edges.max() == 43
    assert (heights != widths).any()
    centre = one.holes.float().mean(dim=0)
    assert centre[:112].sum().item() == pytest.approx(centre[112:].sum().item(), rel=0.2)
    assert one.noise.mean().item() == pytest.approx(0.5, abs=0.01)
    assert one.noise.std().item() == pytest.approx(12**-0.5, abs=0.01)
    images = torch.zeros(300, 1, 224, 224)
    assert torch.equal(apply_damage(images, one)[:, 0], one.noise * one.holes)


@pytest.mark.parametrize(("size", "least", "greatest"), [(112, 11, 22), (32, 3, 6)])
def test_holes_follow_the_size(size, least, greatest):
    drawn = _draw(400, size=size, **{**ONLY, "inpaint_p": 1.0, "inpaint_boxes": 1})
    heights = drawn.holes.any(dim=2).sum(dim=1)
    assert (int(heights.min()), int(heights.max())) == (least, greatest)


def test_probabilities_are_those_of_the_settings():
    drawn = _draw(600, size=32)
    identity = torch.arange(32 * 32)
    line = torch.linspace(0, 1, 257)
    shuffled = (drawn.source != identity).any(dim=1).float().mean().item()
    curved = ((drawn.curve - line).abs().amax(dim=1) > 1e-6).float().mean().item()
    assert shuffled == pytest.approx(0.8, abs=0.05)
    assert curved == pytest.approx(0.9, abs=0.04)
    once = _draw(600, size=32, inpaint_boxes=1)
    assert once.holes.any(dim=2).any(dim=1).float().mean().item() == pytest.approx(0.95, abs=0.03)
    assert not _draw(20, size=32, inpaint_boxes=0).holes.any()


def test_one_damage_does_not_depend_on_another():
    rngs = [[rng_for(0, n) for n in range(3)] for _ in range(2)]
    full = draw_damage(rngs[0], OverlapConfig(), size=64)
    bare = draw_damage(rngs[1], OverlapConfig(**{**ONLY, "inpaint_p": 1.0}), size=64)
    assert torch.equal(full.noise, bare.noise)
    assert all(a.random() == b.random() for a, b in zip(*rngs, strict=True))


def test_values_at_the_ends_of_the_range_stay_within_it():
    images = torch.tensor([0.0, 1.0, 1 - 1e-7, 1e-9]).repeat(256).view(1, 1, 32, 32)
    for n in range(20):
        drawn = draw_damage([rng_for(1, n)], OverlapConfig(), size=32)
        damaged = apply_damage(images, drawn)
        assert damaged.min() >= 0
        assert damaged.max() <= 1
    assert isinstance(drawn, Damage)
