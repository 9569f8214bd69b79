"""Merging rules as plain functions over arrays: float64 in the middle, one array at a time."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from agssd_core.errors import RoundError
from agssd_core.weights import Array

Float64 = NDArray[np.float64]


def site_weights(
    counts: Mapping[str, float],
    *,
    weighting: Literal["patients", "steps", "uniform"],
    cap: float,
    decay: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Shares p_k = min(c, lambda * n_k) with c = max(cap, 1/K) and lambda such that they sum to 1.

    Clipping and then renormalising would not keep the cap: counts (100, 1, 1) would give 0.953.

    Args:
        counts: n_k of the admitted sites: enrolled patients or optimiser steps; ``uniform``
            only uses the names.
        weighting: what the counts are.
        cap: p_max, the greatest share of one site, in (0, 1].
        decay: factors for sites whose update is late (decay ** age); others count fully.

    Returns:
        Site to share, sorted by site; the order of ``counts`` changes no bit.

    Raises:
        RoundError: no site, or a count that is not positive and finite.

    Source:
        docs/merging.md; water filling as in the projection onto a capped simplex.
    """
    factors = decay or {}
    raw = {
        site: (1.0 if weighting == "uniform" else float(counts[site])) * factors.get(site, 1.0)
        for site in sorted(counts)
    }
    if not raw or not all(math.isfinite(n) and n > 0 for n in raw.values()):
        raise RoundError(
            f"{len(raw)} site(s) cannot be weighted; every count must be positive and finite. "
            "Mend the enrolled patient counts."
        )
    limit = max(cap, 1 / len(raw))
    falling = sorted(raw, key=lambda site: -raw[site])  # stable: ties stay in site order
    capped, scale = 0, 1 / math.fsum(raw.values())
    # The last site is never held back: its share is what the others leave.
    while capped < len(falling) - 1 and scale * raw[falling[capped]] > limit:
        capped += 1
        scale = (1 - capped * limit) / math.fsum(raw[site] for site in falling[capped:])
    held = set(falling[:capped])
    return {site: limit if site in held else scale * raw[site] for site in raw}


def weighted_mean(arrays: Iterable[Array], shares: Iterable[float]) -> Float64:
    """Sum of p_k x_k in the order given, in float64.

    The first product starts the sum: beginning at 0.0 would turn -0.0 into 0.0, and one site
    alone would no longer come back bit for bit.
    """
    total: Float64 | None = None
    for array, share in zip(arrays, shares, strict=True):
        part = np.asarray(np.multiply(array, share, dtype=np.float64))
        total = part if total is None else np.add(total, part, out=total)
    if total is None:
        raise RoundError("there is no update to average. Lower the quorum's demands or wait.")
    return total


def l_dawa_mean(arrays: Sequence[Array], shares: Sequence[float], base: Array) -> Float64:
    """Mean of one layer weighted by its agreement with the merged weights of the round before.

    w = sum p_k c_k w_k / sum p_k c_k with c_k = max(cos(w_k, base), 0). One-dimensional layers
    (biases, norms), layers of zero norm and layers that nobody agrees on get the plain mean.

    Source:
        Rehman et al. 2023, arXiv:2307.07393, layer-wise divergence aware aggregation. The
        original does not renormalise, which shrinks weights by the mean cosine every round, and
        divides by zero on zero-initialised layers.
    """
    if base.ndim < 2:
        return weighted_mean(arrays, shares)
    reference = base.astype(np.float64).ravel()
    agreement = []
    for array in arrays:
        layer = array.astype(np.float64).ravel()
        norms = float(np.linalg.norm(layer)) * float(np.linalg.norm(reference))
        if norms == 0:
            return weighted_mean(arrays, shares)
        agreement.append(max(float(layer @ reference) / norms, 0.0))
    raw = [share * cosine for share, cosine in zip(shares, agreement, strict=True)]
    total = math.fsum(raw)
    if total == 0:
        return weighted_mean(arrays, shares)
    return weighted_mean(arrays, [value / total for value in raw])


def momentum(previous: Array, delta: Float64, *, beta: float) -> Float64:
    """FedAvgM: m <- beta m + delta. Source: Hsu et al. 2019, arXiv:1909.06335."""
    return np.asarray(beta * previous.astype(np.float64) + delta)


def first_moment(previous: Array, delta: Float64, *, beta: float) -> Float64:
    """FedAdam and FedYogi: m <- beta m + (1 - beta) delta. Source: as ``second_moment``."""
    return np.asarray(beta * previous.astype(np.float64) + (1 - beta) * delta)


def second_moment(previous: Array, delta: Float64, *, beta: float, yogi: bool) -> Float64:
    """FedAdam: v <- beta v + (1 - beta) delta^2; FedYogi: v <- v - (1 - beta) d^2 sign(v - d^2).

    Source:
        Reddi et al. 2021, arXiv:2003.00295, Algorithm 2 (no bias correction; v starts at
        epsilon^2).
    """
    square, before = delta * delta, previous.astype(np.float64)
    if yogi:
        return np.asarray(before - (1 - beta) * square * np.sign(before - square))
    return np.asarray(beta * before + (1 - beta) * square)


def step_from(base: Array, mean: Float64, *, learning_rate: float) -> Float64:
    """Move from the base towards the merged mean.

    At a rate of 1 the mean itself is returned: base + (mean - base) reproduced single-site
    weights bit for bit only for two in three random float32 pairs.
    """
    if learning_rate == 1:
        return mean
    before = base.astype(np.float64)
    return np.asarray(before + learning_rate * (mean - before))


def server_ema(teacher: Array, student: Array, *, ema_product: float) -> Float64:
    """T2: phi <- M phi + (1 - M) theta, M the product of the round's EMA momenta."""
    before, now = teacher.astype(np.float64), student.astype(np.float64)
    return np.asarray(ema_product * before + (1 - ema_product) * now)
