"""Photometric augmentation of what the network sees; targets and edge maps stay clean.

Random numbers are drawn by one function and applied by another, so a draw can be logged,
repeated or tested by itself.

Source: the kinds of change follow Chen et al. 2019 (Models Genesis) and common 3D practice;
the CT window jitter follows Goncharov et al. 2023, arXiv:2307.14725 (vox2vec).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from agssd_core.config import AugmentConfig
from agssd_core.views.edges import gaussian_taps, replicate, smooth_axis

LEAST_WINDOW = 0.1  # share of the configured window
BIAS_TERMS = 9  # monomials of degree 1 and 2 in three coordinates


@dataclass(frozen=True)
class Photometric:
    """Parameters of one augmentation; the default changes nothing. ``None`` means "not drawn".

    Attributes:
        window: (low, high) intensities that map to 0 and 1 (CT).
        bias: monomial coefficients of the log bias field (MR).
        bias_amplitude: greatest absolute log gain of that field.
        gamma: exponent.
        blur_sigma: standard deviation of the blur, voxels of the view.
        noise_sigma: standard deviation of the noise, share of the window.
        noise_seed: of the noise.
        scale: factor on the intensities.
        shift: added after the factor.
    """

    window: tuple[float, float] | None = None
    bias: tuple[float, ...] | None = None
    bias_amplitude: float = 0.0
    gamma: float | None = None
    blur_sigma: float | None = None
    noise_sigma: float | None = None
    noise_seed: int = 0
    scale: float = 1.0
    shift: float = 0.0


def draw_photometric(
    modality: str, augment: AugmentConfig, rng: np.random.Generator
) -> Photometric:
    """Draw the parameters for one view; every call uses the same number of random numbers."""
    hit = rng.uniform(size=4)
    low, high = rng.uniform(-augment.ct_window_jitter, augment.ct_window_jitter, size=2)
    bias = tuple(float(value) for value in rng.uniform(-1, 1, size=BIAS_TERMS))
    amplitude = float(rng.uniform(0, augment.mr_bias))
    gamma = float(rng.uniform(*augment.gamma))
    blur = float(rng.uniform(*augment.blur_sigma))
    noise = float(rng.uniform(0, augment.noise_sigma))
    scale = 1 + float(rng.uniform(-augment.scale, augment.scale))
    shift = float(rng.uniform(-augment.shift, augment.shift))
    noise_seed = int(rng.integers(2**62))
    if not augment.enabled:
        return Photometric()
    has_bias = modality == "MR" and hit[0] < augment.mr_bias_probability
    return Photometric(
        # A strong jitter must not fold the window.
        window=(float(low), float(max(1 + high, low + LEAST_WINDOW))) if modality == "CT" else None,
        bias=bias if has_bias else None,
        bias_amplitude=amplitude if has_bias else 0.0,
        gamma=gamma if hit[1] < augment.gamma_probability else None,
        blur_sigma=blur if hit[2] < augment.blur_probability else None,
        noise_sigma=noise if hit[3] < augment.noise_probability else None,
        noise_seed=noise_seed,
        scale=scale,
        shift=shift,
    )


def apply_photometric(crop: Tensor, drawn: Photometric) -> Tensor:
    """Apply a draw to a clean crop (D, H, W) in [0, 1]; the crop itself is never changed.

    Window, bias field and gamma come first, as in the scanner and its display; the result is
    not clipped after scale, shift and noise.
    """
    seen = crop.clone()
    if drawn.window is not None:
        low, high = drawn.window
        seen.sub_(low).div_(high - low).clamp_(0, 1)
    if drawn.bias is not None:
        seen.mul_(bias_field(seen.shape, drawn.bias, drawn.bias_amplitude))
    if drawn.gamma is not None:
        seen.clamp_(min=0).pow_(drawn.gamma)
    if drawn.blur_sigma is not None:
        taps, _ = gaussian_taps(drawn.blur_sigma)
        seen = replicate(seen, len(taps) - 1)
        for axis in range(3):
            seen = smooth_axis(seen, taps, axis)
    if drawn.noise_sigma is not None:
        generator = torch.Generator().manual_seed(drawn.noise_seed)
        seen.add_(torch.randn(seen.shape, generator=generator), alpha=drawn.noise_sigma)
    return seen.mul_(drawn.scale).add_(drawn.shift)


def bias_field(shape: torch.Size, coefficients: tuple[float, ...], amplitude: float) -> Tensor:
    """A smooth gain (D, H, W) within ``exp(-amplitude)`` and ``exp(amplitude)``: a quadratic."""
    a = coefficients
    d, h, w = (torch.linspace(-1, 1, count) for count in shape)
    x, y, z = d[:, None, None], h[:, None], w
    plane = (a[3] * y + a[4] * y**2) + (a[5] * z + a[6] * z**2 + a[2] * y * z)
    log_gain = (a[0] * x + a[1] * x**2) + plane + x * (a[7] * y + a[8] * z)
    peak = log_gain.abs().max().clamp_min(1e-6)
    return log_gain.mul_(amplitude / peak).exp_()
