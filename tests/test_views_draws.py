"""Draws of the augmentation: their limits, and what each change does."""

import pytest
import torch

from agssd_core.config import AugmentConfig
from agssd_core.views.augment import (
    Photometric,
    apply_photometric,
    bias_field,
    draw_photometric,
)
from agssd_core.views.batch import token_grid
from agssd_core.views.seeds import rng_for
from tests.support.volumes import tiny_agssd

TINY = tiny_agssd()


def test_a_draw_depends_on_modality_and_always_uses_the_same_numbers():
    rngs = [rng_for(0) for _ in range(3)]
    augment = AugmentConfig(mr_bias_probability=1.0)
    ct = draw_photometric("CT", augment, rngs[0])
    mr = draw_photometric("MR", augment, rngs[1])
    off = draw_photometric("MR", AugmentConfig(enabled=False), rngs[2])
    assert ct.window is not None
    assert ct.bias is None
    assert mr.bias is not None
    assert mr.window is None
    assert off == Photometric()
    assert len({rng.random() for rng in rngs}) == 1


def test_draws_stay_within_their_limits():
    augment, rng = AugmentConfig(), rng_for(0)
    drawn = [draw_photometric(("CT", "MR")[n % 2], augment, rng) for n in range(2000)]
    assert all(abs(d.scale - 1) <= 0.15 and abs(d.shift) <= 0.1 for d in drawn)
    gammas = [d.gamma for d in drawn if d.gamma is not None]
    assert 0.7 <= min(gammas) < max(gammas) <= 1.5
    assert len(gammas) / 2000 == pytest.approx(0.3, abs=0.04)
    noises = [d.noise_sigma for d in drawn if d.noise_sigma is not None]
    assert max(noises) <= 0.03
    assert len(noises) / 2000 == pytest.approx(0.1, abs=0.03)
    blurs = [d.blur_sigma for d in drawn if d.blur_sigma is not None]
    assert 0.5 <= min(blurs) < max(blurs) <= 1
    wild = AugmentConfig(ct_window_jitter=0.9)
    windows = [draw_photometric("CT", wild, rng).window for _ in range(300)]
    assert all(high - low > 0.09 for low, high in windows)


@pytest.mark.parametrize(
    ("drawn", "expected"),
    [
        (Photometric(), lambda x: x),
        (Photometric(gamma=1.5), lambda x: x**1.5),
        (Photometric(scale=1.1, shift=-0.05), lambda x: x * 1.1 - 0.05),
        (Photometric(window=(-0.1, 0.9)), lambda x: ((x + 0.1) / 1.0).clamp(0, 1)),
    ],
    ids=["nothing", "gamma", "scale", "window"],
)
def test_each_change_does_what_it_says_and_never_to_its_input(drawn, expected):
    crop = torch.rand(8, 9, 10)
    before = crop.clone()
    torch.testing.assert_close(apply_photometric(crop, drawn), expected(before))
    assert torch.equal(crop, before)


def test_noise_blur_and_bias_are_deterministic_and_leave_their_input():
    crop = torch.rand(16, 16, 16)
    before = crop.clone()
    noisy = Photometric(noise_sigma=0.03, noise_seed=5)
    assert torch.equal(apply_photometric(crop, noisy), apply_photometric(crop, noisy))
    assert (apply_photometric(crop, noisy) - crop).std().item() == pytest.approx(0.03, rel=0.1)
    blurred = apply_photometric(crop, Photometric(blur_sigma=1.0))
    assert blurred.std() < 0.5 * crop.std()
    assert blurred.mean().item() == pytest.approx(crop.mean().item(), abs=0.01)
    field = bias_field(crop.shape, (0.5, -1, 0.3, 0.2, 0.9, -0.4, 0.1, 0.6, -0.7), 0.3)
    assert field.log().abs().max().item() == pytest.approx(0.3, abs=1e-5)
    drawn = Photometric(bias=(0.5, -1, 0.3, 0.2, 0.9, -0.4, 0.1, 0.6, -0.7), bias_amplitude=0.3)
    torch.testing.assert_close(apply_photometric(crop, drawn), crop * field)
    assert torch.equal(crop, before)


def test_the_grid_follows_the_patch_size():
    assert token_grid(TINY) == (4, 4, 4)
