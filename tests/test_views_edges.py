"""Edge maps, their noise floor, and the density that sets the ratio of a mask."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage

from agssd_core.config import EaamConfig
from agssd_core.errors import ShapeError
from agssd_core.views.edges import gaussian_magnitude, sobel_magnitude
from agssd_core.views.masking import (
    alpha_at,
    edge_density,
    edge_map,
    mask_ratio,
    patch_foreground,
    patch_scores,
    token_voxels,
    updated_density,
)
from agssd_core.views.seeds import torch_generator_for

EAAM = EaamConfig()

GRID = (4, 4, 4)

N = 64


@pytest.mark.parametrize("sigma", [1.0, 2.0])
def test_gaussian_edges_are_those_of_scipy(sigma):
    crop = np.random.default_rng(0).random((20, 24, 28), dtype=np.float32)
    expected = sigma * ndimage.gaussian_gradient_magnitude(
        crop.astype(np.float64), sigma, mode="nearest", truncate=3.0
    )
    ours = gaussian_magnitude(torch.from_numpy(crop)[None, None], sigma)[0, 0]
    np.testing.assert_allclose(ours, expected, atol=1e-5)


def test_sobel_edges_are_those_of_scipy():
    crop = np.random.default_rng(0).random((20, 24, 28), dtype=np.float32)
    parts = [ndimage.sobel(crop.astype(np.float64), axis, mode="nearest") for axis in range(3)]
    expected = np.sqrt(sum(part**2 for part in parts)) / 32
    ours = sobel_magnitude(torch.from_numpy(crop)[None, None])[0, 0]
    np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_the_edge_map_is_scaled_per_crop_and_ignores_padding():
    rng = np.random.default_rng(0)
    crops = torch.from_numpy(
        ndimage.gaussian_filter(rng.random((3, 1, 32, 32, 32)), (0, 0, 1, 1, 1))
    )
    crops[1] *= 0.1
    edges = edge_map(crops, eaam=EAAM)
    assert edges.dtype == torch.float32
    for edge in edges:
        assert edge.max() == 1
        assert (edge == 1).float().mean() == pytest.approx(0.01, abs=1e-3)
    torch.testing.assert_close(edge_map(crops[1:2], eaam=EAAM), edges[1:2], rtol=0, atol=0)
    tokens = torch.ones(3, N, dtype=torch.bool)
    tokens[:, 32:] = False
    padded = crops.clone()
    padded[:, :, 16:] = 0.5
    voxels = token_voxels(tokens, grid=GRID, patch_size=8)
    assert voxels.shape == crops.shape
    kept = edge_map(padded, eaam=EAAM, valid=voxels)[voxels].view(3, -1)
    assert ((kept == 1).float().mean(1) - 0.01).abs().max() < 1e-3


def test_edges_are_float32_under_autocast():
    crops = torch.rand(1, 1, 16, 16, 16)
    expected = edge_map(crops, eaam=EAAM)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(edge_map(crops, eaam=EAAM), expected)


def test_the_noise_floor_takes_scanner_noise_out_of_air():
    crops = torch.zeros(1, 1, 32, 32, 32)
    crops[..., 10:22, 10:22, 10:22] = 0.8
    crops += 0.004 * torch.rand(crops.shape, generator=torch_generator_for(0))
    plain, floored = (
        edge_map(crops, eaam=EaamConfig(noise_floor=floor)) for floor in (False, True)
    )
    air = (..., slice(0, 4), slice(None), slice(None))
    assert floored[air].mean() < 0.6 * plain[air].mean()
    assert floored.max() > 0.9


def test_patch_scores_pool_each_cube_and_mark_padding():
    edge = torch.rand(2, 1, 16, 16, 16)
    valid = torch.ones(2, 8, dtype=torch.bool)
    valid[1, 3] = False
    mean = patch_scores(edge, valid, patch_size=8)
    torch.testing.assert_close(mean[0], F.avg_pool3d(edge[:1], 8).flatten())
    assert mean[1, 3] == -1
    p90 = patch_scores(edge, valid, patch_size=8, pool="p90")
    torch.testing.assert_close(
        p90[0, 1], edge[0, 0, :8, :8, 8:].flatten().quantile(0.9), atol=0.01, rtol=0
    )
    with pytest.raises(ShapeError, match="one flag per token"):
        patch_scores(edge, valid[:1], patch_size=8)


def test_edge_density_counts_the_foreground_only():
    crops = torch.zeros(1, 1, 16, 16, 16)
    crops[..., :8] = 0.5
    foreground = patch_foreground(crops, patch_size=8)
    scores = torch.tensor([[0.2, 0.9, 0.4, 0.9, 0.6, 0.9, -1.0, 0.9]])
    assert foreground[0].tolist() == [True, False] * 4
    assert edge_density(scores, foreground).item() == pytest.approx(0.4)
    nothing = torch.zeros_like(foreground)
    assert edge_density(scores, nothing).item() == pytest.approx(4.8 / 7)


@pytest.mark.parametrize("kappa", [-0.05, 0.0, 0.05])
def test_the_ratio_follows_density_within_its_range(kappa):
    eaam = EaamConfig(kappa=kappa)
    density = torch.tensor([0.0, 0.4, 0.5, 0.6, 5.0])
    ratio = mask_ratio(density, torch.tensor(0.5), torch.tensor(0.1), eaam)
    middle = [0.6 - kappa, 0.6, 0.6 + kappa]
    assert ratio[1:4].tolist() == pytest.approx(middle, abs=1e-5)
    assert ratio[0] == pytest.approx({-0.05: 0.75, 0.0: 0.6, 0.05: 0.5}[kappa])
    unseen = mask_ratio(density, torch.tensor(0.0), torch.tensor(0.0), eaam)
    assert unseen.tolist() == [0.6] * 5


def test_running_density_finds_mean_and_spread():
    generator = torch_generator_for(0)
    mean, std = torch.tensor(0.0), torch.tensor(0.0)
    for _ in range(1500):
        density = 0.3 + 0.05 * torch.randn(8, generator=generator)
        mean, std = updated_density(mean, std, density, 0.99)
    assert mean.item() == pytest.approx(0.3, abs=0.01)
    assert std.item() == pytest.approx(0.05, abs=0.01)
    one = updated_density(torch.tensor(0.0), torch.tensor(0.0), torch.tensor([0.4]), 0.99)
    assert one[0].item() == pytest.approx(0.4)
    assert one[1].item() > 0


def test_alpha_rises_over_the_warm_up_and_stays():
    for schedule in ("linear", "cosine"):
        eaam = EaamConfig(schedule=schedule)
        rise = [alpha_at(eaam, step, 100) for step in range(101)]
        assert rise[0] == 0
        assert rise == sorted(rise)
        assert rise[30:] == [4.0] * 71
        assert rise[15] == pytest.approx(2.0)
    assert alpha_at(EaamConfig(schedule="const"), 0, 100) == 4.0
    assert alpha_at(EaamConfig(warm=0.0), 0, 100) == 4.0
