"""Photometric change of grey views, many at a time: brightness, contrast, blur, solarisation.

Random numbers are drawn by one function and applied by another, so a draw can be logged,
repeated or tested by itself.

Source: the asymmetric pair of Grill et al. 2020, arXiv:2006.07733, Table 6; a grey image has no
saturation and no hue.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from agssd_core.config.anaus import UsAugmentConfig

JITTER_P = 0.8
BLUR_SIGMA = (0.1, 2.0)  # pixels of a view of REFERENCE_SIZE
BLUR_RADIUS = 11  # likewise; 23 taps
REFERENCE_SIZE = 224
SOLARIZE_FROM = 0.5
DARK = 0.5 / 255  # below half a grey level: outside the sector
AT_A_TIME = 8  # views whose intermediate results fit a core's cache


@dataclass(frozen=True)
class UsPhotometric:
    """Parameters of N views.

    Attributes:
        brightness: (N,) float32 factor on the grey values; 1 changes nothing.
        contrast: (N,) float32 factor on their distance from the mean; 1 changes nothing.
        blur_sigma: (N,) float32, pixels of the view; 0 leaves it sharp.
        solarize: (N,) bool.
    """

    brightness: Tensor
    contrast: Tensor
    blur_sigma: Tensor
    solarize: Tensor


def draw_us_photometric(
    rngs: Sequence[np.random.Generator], augment: UsAugmentConfig, *, view: int
) -> UsPhotometric:
    """Draw for one view of each frame; always six numbers of every generator.

    Args:
        rngs: one a frame.
        augment: strengths and probabilities.
        view: 0 or 1; the two have their own probabilities of blur and solarisation.
    """
    drawn = np.stack([rng.uniform(size=6) for rng in rngs])
    jittered, low = drawn[:, 0] < JITTER_P, 1 - augment.jitter
    brightness = np.where(jittered, low + 2 * augment.jitter * drawn[:, 1], 1)
    contrast = np.where(jittered, low + 2 * augment.jitter * drawn[:, 2], 1)
    sigma = BLUR_SIGMA[0] + (BLUR_SIGMA[1] - BLUR_SIGMA[0]) * drawn[:, 4]
    sigma *= (drawn[:, 3] < augment.blur_p[view]) * augment.size / REFERENCE_SIZE
    return UsPhotometric(
        brightness=torch.from_numpy(brightness).float(),
        contrast=torch.from_numpy(contrast).float(),
        blur_sigma=torch.from_numpy(sigma).float(),
        solarize=torch.from_numpy(drawn[:, 5] < augment.solarize_p[view]),
    )


def apply_us_photometric(views: Tensor, drawn: UsPhotometric) -> Tensor:
    """Apply a draw to views (N, 1, S, S) in [0, 1] on any device; the views are not changed.

    Returns:
        (N, 1, S, S) in [0, 1], new memory.
    """
    held = len(views) if views.is_cuda else AT_A_TIME
    parts = [slice(first, first + held) for first in range(0, len(views), held)]
    return torch.cat([_applied(views[part], _part(drawn, part)) for part in parts])


def _applied(views: Tensor, drawn: UsPhotometric) -> Tensor:
    brightness, contrast = (_rows(each, views) for each in (drawn.brightness, drawn.contrast))
    # Brightness scales the mean too, so both orders of the two changes are this one line.
    seen = contrast * views + (1 - contrast) * _tissue_mean(views)
    seen = (brightness * seen).clamp_(0, 1)
    blurred = drawn.blur_sigma > 0
    if bool(blurred.any()):
        rows = blurred.nonzero()[:, 0].to(views.device)
        seen[rows] = _blurred(seen[rows], drawn.blur_sigma[blurred])
    flip = _rows(drawn.solarize, views) & (seen >= SOLARIZE_FROM)
    return torch.where(flip, 1 - seen, seen)


def _tissue_mean(views: Tensor) -> Tensor:
    """(N, 1, 1, 1) mean grey value of what is not black.

    A corner outside the sector would otherwise decide how dark the tissue becomes.
    """
    tissue = views > DARK
    # Row sums first: the order of a sum must not depend on the number of threads.
    total = torch.where(tissue, views, 0).sum(dim=3).sum(dim=2)
    return (total / tissue.sum(dim=(2, 3)).clamp_min(1))[..., None, None]


def _blurred(views: Tensor, sigma: Tensor) -> Tensor:
    """Blur each view (N, 1, S, S) with its own Gaussian, reflected at the borders."""
    size = views.shape[-1]
    radius = max(1, round(BLUR_RADIUS * size / REFERENCE_SIZE))
    offsets = torch.arange(radius + 1, dtype=torch.float64)
    taps = torch.exp(-0.5 * (offsets / sigma.double()[:, None]) ** 2)  # (N, radius + 1)
    taps = (taps / (2 * taps.sum(dim=1, keepdim=True) - 1)).to(views)
    for axis, pad in ((3, (radius, radius, 0, 0)), (2, (0, 0, radius, radius))):
        padded = functional.pad(views, pad, mode="reflect")
        views = padded.narrow(axis, radius, size) * _rows(taps[:, 0], views)
        for offset in range(1, radius + 1):
            both = padded.narrow(axis, radius - offset, size)
            both = both + padded.narrow(axis, radius + offset, size)
            views.addcmul_(both, _rows(taps[:, offset], views))
    return views


def _rows(values: Tensor, views: Tensor) -> Tensor:
    return values.to(views.device)[:, None, None, None]


def _part(drawn: UsPhotometric, part: slice) -> UsPhotometric:
    return UsPhotometric(
        drawn.brightness[part],
        drawn.contrast[part],
        drawn.blur_sigma[part],
        drawn.solarize[part],
    )
