"""EAAM: which tokens the student does not see.

Tokens with strong edges are masked more often, by sampling without replacement with weights
``exp(alpha * u)``, u being the rank of a token's edge strength: ranks do not depend on modality
or scanner.

Source: after Yu & Dai 2026, doi 10.1109/TMI.2026.3680920 (abstract); the sampler is ours. The
revealed hints follow Kakogeorgiou et al. 2022, arXiv:2203.12719 (AttMask-hint); Gumbel top-k is
Kool et al. 2019, arXiv:1903.06059, Eq. 5.
"""

import math

import torch
from torch import Tensor

from agssd_core.config import EaamConfig
from agssd_core.config.node import Size3
from agssd_core.errors import ShapeError
from agssd_core.views.edges import (
    edge_density,
    edge_map,
    patch_foreground,
    patch_scores,
    token_voxels,
)
from agssd_core.views.geometry import sample_tokens

__all__ = [
    "alpha_at",
    "draw_masks",
    "edge_density",
    "edge_map",
    "mask_ratio",
    "patch_foreground",
    "patch_scores",
    "rank_scores",
    "token_voxels",
    "updated_density",
]

LOG_FLOOR = 1e-3  # strength below which the log score no longer tells tokens apart
LEAST_SPREAD = 0.01  # of edge density; keeps a young estimate from swinging the ratio


def alpha_at(eaam: EaamConfig, step: int, total_steps: int) -> float:
    """Preference for edges at a global step: 0 at the start, ``alpha_max`` from ``warm`` on."""
    if not eaam.enabled:
        return 0.0
    warm_steps = eaam.warm * total_steps
    if eaam.schedule == "const" or step >= warm_steps:
        return eaam.alpha_max
    share = step / warm_steps
    if eaam.schedule == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    return eaam.alpha_max * share


def mask_ratio(density: Tensor, mean: Tensor, std: Tensor, eaam: EaamConfig) -> Tensor:
    """Share of tokens to mask, from how dense a view's edges are.

    Args:
        density: (...) mean edge strength over the foreground of each view.
        mean: () running mean of it over the site's views.
        std: () running standard deviation; 0 while nothing has been seen.
        eaam: ``r0``, ``kappa``, ``ratio_range``.

    Returns:
        (...) float64 within ``ratio_range``; ``r0`` everywhere when EAAM is off.
    """
    fixed = torch.full_like(density, eaam.r0, dtype=torch.float64)
    if not eaam.enabled or eaam.kappa == 0:
        return fixed
    deviation = (density - mean).double() / std.double().clamp_min(LEAST_SPREAD)
    low, high = eaam.ratio_range
    return torch.where(std > 0, (fixed + eaam.kappa * deviation).clamp(low, high), fixed)


def updated_density(
    mean: Tensor, std: Tensor, density: Tensor, momentum: float
) -> tuple[Tensor, Tensor]:
    """Move the running mean and standard deviation of edge density towards a batch.

    A standard deviation of 0 means "nothing seen": the batch's own statistics are taken.
    """
    seen = density.detach().to(mean).flatten()
    variance = ((seen - mean) ** 2).mean()
    next_mean = momentum * mean + (1 - momentum) * seen.mean()
    next_std = (momentum * std**2 + (1 - momentum) * variance).sqrt()
    own_std = seen.std(correction=0).clamp_min(LEAST_SPREAD)
    young = std <= 0
    return torch.where(young, seen.mean(), next_mean), torch.where(young, own_std, next_std)


def rank_scores(scores: Tensor, valid: Tensor, generator: torch.Generator) -> Tensor:
    """Rank of each score among the valid ones of its row, from 0 to 1; ties are broken at random.

    Args:
        scores: (..., N) edge strengths.
        valid: (..., N) bool; the others get 0.
        generator: on the CPU.
    """
    places = _places(scores, valid, generator).clamp_min(0)
    return places / (valid.sum(dim=-1, keepdim=True) - 1).clamp_min(1)


def draw_masks(  # noqa: PLR0913 - the step knows these as separate things
    scores: Tensor,
    valid: Tensor,
    *,
    alpha: float,
    ratio: Tensor,
    eaam: EaamConfig,
    grid: Size3,
    generator: torch.Generator,
    co: Tensor | None = None,
    equal_counts: bool = False,
) -> Tensor:
    """Choose the tokens that the student does not see.

    Every masked view hides exactly ``round(ratio * units)`` of its mask units, at least one and
    not all; a unit counts only when all its tokens are real, so padding is never hidden. A share
    of the strongest edges stays visible as a hint, as far as that count allows.

    Args:
        scores: (T, B, N) edge strength of every token, -1 for padding.
        valid: (T, B, N) bool, tokens that are not padding.
        alpha: preference for edges; 0 is uniform.
        ratio: (B,) or (T, B) share of units to hide.
        eaam: units, hints, ``mask_prob``, ``co_mask``, score; off means uniform.
        grid: token grid of the views.
        generator: on the CPU; the result depends on nothing else that is random.
        co: (B, N, 3) centres of the second view's tokens in the first view's frame; needed
            when ``eaam.co_mask`` is above 0.
        equal_counts: hide the same number in every view, as dropping tokens needs.

    Returns:
        (T, B, N) bool, True where hidden. A view that ``mask_prob`` spares is all False.

    Raises:
        ShapeError: the arguments do not fit each other.
    """
    _require_fit(scores, valid, grid, eaam.unit)
    cover = _to_units(valid.float(), grid, eaam.unit)
    whole = cover == 1
    # Where no whole unit is real (a body thinner than a unit) a part of one has to do.
    real = torch.where(whole.any(dim=-1, keepdim=True), whole, cover > 0)
    strength = _to_units(scores.float(), grid, eaam.unit)
    wanted = _unit_counts(real, ratio.to(scores.device), equal_counts=equal_counts)

    places = _places(strength, real, generator)
    gumbel = -torch.log(-torch.log(_uniform(places, generator).clamp(1e-12, 1 - 1e-7)))
    blocked = ~real | _hints(places, real, wanted, eaam=eaam, generator=generator)
    spared = _uniform(places[..., :1], generator) >= eaam.mask_prob

    preference = alpha * _unit_scores(strength, places, real, eaam)
    masked = _largest((preference + gumbel).masked_fill(blocked, -torch.inf), wanted)
    if eaam.enabled and eaam.co_mask > 0:
        first = _to_tokens(masked[0], grid, eaam.unit)
        preference[1] = _co_preference(preference[1], first, co=co, eaam=eaam, grid=grid)
        masked = _largest((preference + gumbel).masked_fill(blocked, -torch.inf), wanted)
    return _to_tokens(masked, grid, eaam.unit) & valid & ~spared


def _require_fit(scores: Tensor, valid: Tensor, grid: Size3, unit: int) -> None:
    fits = scores.ndim == 3 and scores.shape == valid.shape and scores.shape[-1] == math.prod(grid)
    if not fits or any(side % unit for side in grid):
        raise ShapeError(
            f"scores {tuple(scores.shape)}, flags {tuple(valid.shape)}, token grid {grid} and "
            f"mask units of {unit} do not fit. Pass (T, B, N) with N the product of the grid, and "
            "a unit that divides it."
        )


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    # Always drawn on the CPU, so that a GPU run hides the same tokens.
    return torch.rand(like.shape, generator=generator).to(like.device)


def _places(scores: Tensor, valid: Tensor, generator: torch.Generator) -> Tensor:
    """Place of each valid score in its row, 0 the weakest; negative where not valid."""
    count = scores.shape[-1]
    # Sorting stably after a shuffle breaks ties at random, not by index.
    shuffle = _uniform(scores, generator).argsort(dim=-1)
    held = scores.masked_fill(~valid, -torch.inf).gather(-1, shuffle)
    order = shuffle.gather(-1, held.argsort(dim=-1, stable=True))
    rising = torch.arange(count, device=scores.device).expand_as(order)
    places = torch.empty_like(order).scatter_(-1, order, rising)
    return places - (count - valid.sum(dim=-1, keepdim=True))


def _unit_counts(real: Tensor, ratio: Tensor, *, equal_counts: bool) -> Tensor:
    """Units to hide in every view: (T, B) integers."""
    units = real.sum(dim=-1)
    share = ratio.double().expand(units.shape)
    if equal_counts:
        units = units.amin().expand(units.shape)
        share = share.mean().expand(units.shape)
    wanted = (share * units).round().long()
    return torch.minimum(wanted, units - 1).clamp_min(1)


def _hints(
    places: Tensor, real: Tensor, wanted: Tensor, *, eaam: EaamConfig, generator: torch.Generator
) -> Tensor:
    """Units among the strongest edges that stay visible: (T, B, U) bool."""
    lot = _uniform(places, generator)
    if not eaam.enabled or eaam.reveal * eaam.reveal_top == 0:
        return torch.zeros_like(real)
    units = real.sum(dim=-1)
    top = (eaam.reveal_top * units).round().long().clamp_min(1)
    shown = (eaam.reveal * top + 1e-9).floor().long().clamp_min(1)
    strongest = places >= (units - top)[..., None]
    return _largest(lot.masked_fill(~strongest, -1.0), torch.minimum(shown, units - wanted))


def _unit_scores(strength: Tensor, places: Tensor, real: Tensor, eaam: EaamConfig) -> Tensor:
    """Edge preference of each unit before the curriculum, 0 to 1; 0 when EAAM is off."""
    if not eaam.enabled:
        return torch.zeros_like(strength)
    if eaam.score == "rank":
        return places.clamp_min(0) / (real.sum(dim=-1, keepdim=True) - 1).clamp_min(1)
    low, high = math.log(LOG_FLOOR), math.log1p(LOG_FLOOR)
    return ((strength.clamp(0, 1) + LOG_FLOOR).log() - low) / (high - low)


def _co_preference(
    preference: Tensor, first: Tensor, *, co: Tensor | None, eaam: EaamConfig, grid: Size3
) -> Tensor:
    """Pull the second view's preference towards the anatomy that the first view hides.

    Without it the answer to a hidden token may lie open in the other view. ``alpha_max`` sets
    the scale, so that co-masking acts from the first step. Tokens outside the first view keep
    their own score.
    """
    if co is None:
        raise ShapeError("eaam.co_mask needs the second view's tokens in the first. Pass co=q21.")
    centres = co.to(preference.device)
    hidden = sample_tokens(first.float()[..., None], centres, grid)[..., 0]
    inside = (centres.abs() <= 1).all(dim=-1)
    share = eaam.co_mask * _to_units(inside.float()[None], grid, eaam.unit)[0]
    pull = _to_units(hidden[None], grid, eaam.unit)[0]
    return (1 - share) * preference + share * eaam.alpha_max * pull


def _largest(keys: Tensor, counts: Tensor) -> Tensor:
    """True at the ``counts`` (T, B) largest keys (T, B, U) of each row."""
    order = keys.argsort(dim=-1, descending=True, stable=True)
    rising = torch.arange(keys.shape[-1], device=keys.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, rising) < counts[..., None]


def _to_units(tokens: Tensor, grid: Size3, unit: int) -> Tensor:
    """Mean over mask units: (T, B, N) to (T, B, U)."""
    d, h, w = (side // unit for side in grid)
    split = tokens.reshape(*tokens.shape[:2], d, unit, h, unit, w, unit)
    return split.mean(dim=(3, 5, 7)).flatten(2)


def _to_tokens(units: Tensor, grid: Size3, unit: int) -> Tensor:
    """Spread mask units to their tokens: (..., U) to (..., N)."""
    lead = units.shape[:-1]
    spread = units.reshape(-1, *(side // unit for side in grid))
    for axis in (1, 2, 3):
        spread = spread.repeat_interleave(unit, dim=axis)
    return spread.reshape(*lead, -1)
