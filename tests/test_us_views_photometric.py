"""Brightness, contrast, blur and solarisation of grey views."""

import numpy as np
import pytest
import torch

from agssd_core.config.anaus import UsAugmentConfig
from agssd_core.views.seeds import rng_for
from agssd_core.views.us_photometric import (
    UsPhotometric,
    apply_us_photometric,
    draw_us_photometric,
)

SIZE = 64


def _drawn(count, *, brightness=1.0, contrast=1.0, sigma=0.0, solarize=False):
    values = [np.broadcast_to(v, count).copy() for v in (brightness, contrast, sigma, solarize)]
    b, c, s = (torch.from_numpy(v).float() for v in values[:3])
    return UsPhotometric(b, c, s, torch.from_numpy(values[3]))


def _views(count=3, seed=0):
    return torch.rand(count, 1, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))


def test_nothing_drawn_changes_nothing():
    views = _views()
    assert torch.equal(apply_us_photometric(views, _drawn(3)), views)


def test_each_view_is_changed_as_one_alone_would_be():
    views, rngs = _views(20), [rng_for(0, n) for n in range(20)]
    before = views.clone()
    drawn = draw_us_photometric(rngs, UsAugmentConfig(size=SIZE, solarize_p=(0.5, 0.5)), view=1)
    found = apply_us_photometric(views, drawn)
    assert torch.equal(views, before)
    for n in range(20):
        one = _drawn(
            1,
            brightness=float(drawn.brightness[n]),
            contrast=float(drawn.contrast[n]),
            sigma=float(drawn.blur_sigma[n]),
            solarize=bool(drawn.solarize[n]),
        )
        torch.testing.assert_close(apply_us_photometric(views[n : n + 1], one)[0], found[n])


def test_brightness_and_contrast_in_either_order_are_one_change():
    views = _views() * 0.4 + 0.3
    mean = views.mean(dim=(1, 2, 3), keepdim=True)
    found = apply_us_photometric(views, _drawn(3, brightness=1.1, contrast=0.7))
    torch.testing.assert_close(found, ((views - mean) * 0.7 + mean) * 1.1)
    bright = views * 1.1
    mean = bright.mean(dim=(1, 2, 3), keepdim=True)
    torch.testing.assert_close(found, (bright - mean) * 0.7 + mean)


def test_black_outside_the_sector_does_not_darken_the_tissue():
    tissue = _views() * 0.4 + 0.3
    framed = tissue.clone()
    framed[..., :40] = 0
    drawn = _drawn(3, contrast=0.6)
    mean = tissue[..., 40:].mean(dim=(2, 3), keepdim=True)
    found = apply_us_photometric(framed, drawn)[..., 40:]
    torch.testing.assert_close(found, (tissue[..., 40:] - mean) * 0.6 + mean)


def test_blur_is_each_views_own_gaussian_reflected_at_the_border():
    views, sigmas = _views(4, seed=1), [0.3, 0.0, 0.57, 0.2]
    found = apply_us_photometric(views, _drawn(4, sigma=np.array(sigmas)))
    radius = 3  # 11 pixels at 224
    for n, sigma in enumerate(sigmas):
        if sigma == 0:
            assert torch.equal(found[n], views[n])
            continue
        taps = np.exp(-0.5 * (np.arange(-radius, radius + 1) / np.float32(sigma)) ** 2)
        taps /= taps.sum()
        padded = np.pad(views[n, 0].numpy().astype(np.float64), radius, mode="reflect")
        expected = sum(
            taps[i] * taps[j] * padded[i : i + SIZE, j : j + SIZE]
            for i in range(7)
            for j in range(7)
        )
        np.testing.assert_allclose(found[n, 0], expected, atol=1e-6)


def test_solarisation_turns_round_what_is_bright():
    views = _views()
    found = apply_us_photometric(views, _drawn(3, solarize=np.array([True, False, True])))
    assert torch.equal(found[1], views[1])
    assert found[0].max() <= 0.5
    torch.testing.assert_close(found[2], torch.where(views[2] >= 0.5, 1 - views[2], views[2]))


@pytest.mark.parametrize(("view", "blur_p", "solarize_p"), [(0, 1.0, 0.0), (1, 0.1, 0.2)])
def test_draws_are_those_of_the_asymmetric_pair(view, blur_p, solarize_p):
    rngs = [rng_for(0, "draws", n) for n in range(4000)]
    drawn = draw_us_photometric(rngs, UsAugmentConfig(), view=view)
    for factor in (drawn.brightness, drawn.contrast):
        changed = factor[factor != 1]
        assert len(changed) / 4000 == pytest.approx(0.8, abs=0.03)
        assert 0.6 <= changed.min() < 0.61
        assert 1.39 < changed.max() <= 1.4
    both = (drawn.brightness != 1) == (drawn.contrast != 1)
    assert both.all(), "a view is jittered as a whole or not at all"
    blurred = drawn.blur_sigma[drawn.blur_sigma > 0]
    assert len(blurred) / 4000 == pytest.approx(blur_p, abs=0.03)
    assert blurred.min() >= 0.1
    assert 1.9 < blurred.max() <= 2.0
    assert drawn.solarize.float().mean().item() == pytest.approx(solarize_p, abs=0.03)


def test_blur_follows_the_size_of_the_view():
    rngs = [[rng_for(0, n) for n in range(50)] for _ in range(2)]
    large = draw_us_photometric(rngs[0], UsAugmentConfig(size=224), view=0)
    small = draw_us_photometric(rngs[1], UsAugmentConfig(size=32), view=0)
    torch.testing.assert_close(small.blur_sigma * 7, large.blur_sigma)


def test_every_draw_takes_the_same_numbers():
    rngs = [rng_for(0), rng_for(0)]
    draw_us_photometric(rngs[:1], UsAugmentConfig(), view=0)
    draw_us_photometric(rngs[1:], UsAugmentConfig(jitter=0.0, blur_p=(0, 0)), view=1)
    assert rngs[0].random() == rngs[1].random()
