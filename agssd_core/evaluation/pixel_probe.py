"""A 1x1 convolution on feature maps, fitted as a convex problem and judged at full resolution.

Soft targets: of each cell, the share of every class. The fit is L-BFGS in float64 on a regular
sample of cells, so it is deterministic. One threshold for each structure makes up for the balance
of the classes: the one with the best mean Dice on training scans at full resolution.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import log_softmax

from agssd_core.evaluation.cells import cell_means, upsampled

Reals = NDArray[np.float64]
Maps = NDArray[np.float32]
Mask = NDArray[np.uint8]

CELLS = 20_000
STRENGTHS = (1e-1, 1e-2, 1e-3)
THRESHOLDS = np.linspace(-12, 12, 241)
THRESHOLD_SCANS = 24


@dataclass(frozen=True)
class PixelCase:
    """One training scan: maps (C, *cells), mask (full resolution) and whose it is."""

    maps: Maps
    mask: Mask
    patient: str


@dataclass(frozen=True)
class PixelProbe:
    """A fitted probe.

    Attributes:
        mean, scale: (C,) of the training cells: features are (x - mean) * scale.
        weights: (C, S + 1), and ``bias`` (S + 1,), background first.
        thresholds: (S,) by which a structure's logit must exceed the background's.
    """

    mean: Reals
    scale: Reals
    weights: Reals
    bias: Reals
    thresholds: Reals

    @classmethod
    def fit(cls, cases: Sequence[Callable[[], PixelCase]], structures: int) -> "PixelProbe":
        """Fit on training scans, which are read one at a time.

        Args:
            cases: read a scan each.
            structures: S; masks hold 0 to S.
        """
        rows, shares, people = _sample(cases, structures)
        mean, spread = rows.mean(axis=0), rows.std(axis=0)
        varies = spread > 1e-6 * np.maximum(1e-6, np.abs(mean))
        scale = np.where(varies, 1 / np.where(varies, spread, 1), 0)
        rows = (rows - mean) * scale
        strength = _chosen_strength(rows, shares, people)
        weights, bias = fit_softmax(rows, shares, strength=strength)
        probe = cls(mean, scale, weights, bias, np.zeros(structures))
        return cls(mean, scale, weights, bias, _thresholds(probe, cases))

    def scores(self, maps: Maps, shape: tuple[int, ...]) -> Maps:
        """(S, *shape): logits less the background's, at full resolution, before thresholds."""
        flat = maps.reshape(len(maps), -1).T
        logits = (flat - self.mean) * self.scale @ self.weights + self.bias
        margins = (logits[:, 1:] - logits[:, :1]).T.reshape(-1, *maps.shape[1:])
        return upsampled(margins.astype(np.float32), shape)

    def predict(self, maps: Maps, shape: tuple[int, ...]) -> Mask:
        """Structure of every voxel, 0 for none."""
        places = (slice(None), *(None,) * len(shape))
        scores = self.scores(maps, shape) - self.thresholds.astype(np.float32)[places]
        best = scores.argmax(axis=0).astype(np.uint8) + 1
        return np.where(scores.max(axis=0) > 0, best, 0).astype(np.uint8)


def fit_softmax(rows: Reals, shares: Reals, *, strength: float) -> tuple[Reals, Reals]:
    """Minimise class-balanced cross-entropy plus ``strength`` / 2 times the squared weights.

    Args:
        rows: (N, C) standardised features.
        shares: (N, K) soft targets, rows sum to 1.
        strength: of the L2 term, dimensionless; the bias is free.

    Returns:
        Weights (C, K) and bias (K,).
    """
    balanced = shares * _balance(shares)
    mass = balanced.sum(axis=1, keepdims=True)
    features, classes = rows.shape[1], shares.shape[1]

    def cost(flat: Reals) -> tuple[float, Reals]:
        weights, bias = flat[:-classes].reshape(features, classes), flat[-classes:]
        logs = log_softmax(rows @ weights + bias, axis=1)
        away = np.exp(logs) * mass - balanced
        value = -(balanced * logs).sum() + strength / 2 * (weights**2).sum()
        slope = rows.T @ away + strength * weights
        return float(value), np.concatenate([slope.ravel(), away.sum(axis=0)])

    start = np.zeros((features + 1) * classes)
    options = {"maxiter": 500, "ftol": 1e-10, "gtol": 1e-7}
    found: Reals = minimize(cost, start, jac=True, method="L-BFGS-B", options=options).x
    return found[:-classes].reshape(features, classes), found[-classes:]


def _balance(shares: Reals) -> Reals:
    """(K,) weights under which every class that occurs has the same mass; all sum to 1."""
    mass = shares.sum(axis=0)
    present = mass > 0
    return np.where(present, 1 / np.where(present, mass, 1), 0) / max(1, int(present.sum()))


def _sample(
    cases: Sequence[Callable[[], PixelCase]], structures: int
) -> tuple[Reals, Reals, list[str]]:
    """Features, class shares and patient of evenly spaced cells, as many of every scan.

    Half of them, where there are as many, hold part of a structure.
    """
    budget = max(2, CELLS // len(cases))
    rows, shares, people = [], [], []
    for read in cases:
        case = read()
        cells = case.maps.shape[1:]
        layers = [cell_means(case.mask == value, cells) for value in range(structures + 1)]
        share = np.stack(layers).reshape(structures + 1, -1).T.astype(np.float64)
        share /= share.sum(axis=1, keepdims=True)
        outlined = np.flatnonzero(share[:, 0] < 1)
        empty = np.flatnonzero(share[:, 0] >= 1)
        some = _spaced(outlined, max(budget // 2, budget - len(empty)))
        chosen = np.concatenate([some, _spaced(empty, budget - len(some))])
        rows.append(case.maps.reshape(len(case.maps), -1).T[chosen].astype(np.float64))
        shares.append(share[chosen])
        people += [case.patient] * len(chosen)
    return np.concatenate(rows), np.concatenate(shares), people


def _spaced(places: NDArray[np.intp], count: int) -> NDArray[np.intp]:
    if len(places) <= count:
        return places
    return places[np.linspace(0, len(places) - 1, count).round().astype(np.intp)]


def _chosen_strength(rows: Reals, shares: Reals, people: Sequence[str]) -> float:
    """Least cross-entropy on the other half of the patients; the middle one for one patient."""
    names = {name: number for number, name in enumerate(sorted(set(people)))}
    half = np.array([names[name] % 2 for name in people])
    if len(names) < 2:
        return STRENGTHS[1]
    costs = dict.fromkeys(STRENGTHS, 0.0)
    for side in (0, 1):
        mine, other = half == side, half != side
        balanced = shares[other] * _balance(shares[other])
        for strength in STRENGTHS:
            weights, bias = fit_softmax(rows[mine], shares[mine], strength=strength)
            logs = log_softmax(rows[other] @ weights + bias, axis=1)
            costs[strength] -= float((balanced * logs).sum())
    return min(STRENGTHS, key=lambda strength: costs[strength])


def _thresholds(probe: PixelProbe, cases: Sequence[Callable[[], PixelCase]]) -> Reals:
    """(S,) best mean Dice over at most ``THRESHOLD_SCANS`` training scans, evenly chosen."""
    structures = len(probe.thresholds)
    total = np.zeros((structures, len(THRESHOLDS)))
    for place in _spaced(np.arange(len(cases)), THRESHOLD_SCANS):
        case = cases[place]()
        scores = probe.scores(case.maps, case.mask.shape)
        for number in range(structures):
            truth = case.mask == number + 1
            if truth.any():
                total[number] += _dice_curve(scores[number], truth)
    # The middle of the best, so that a plateau does not put the threshold at its edge.
    best = [np.flatnonzero(row >= row.max() - 1e-12) for row in total]
    return np.array([THRESHOLDS[places[len(places) // 2]] for places in best])


def _dice_curve(scores: Maps, truth: NDArray[np.bool_]) -> Reals:
    """Dice of ``scores > t`` for every threshold t."""
    bins = np.searchsorted(THRESHOLDS, scores.ravel(), side="left")
    size = len(THRESHOLDS) + 1
    # Bin b holds scores that exceed the first b thresholds.
    everything = np.bincount(bins, minlength=size)[::-1].cumsum()[::-1][1:]
    hits = np.bincount(bins[truth.ravel()], minlength=size)[::-1].cumsum()[::-1][1:]
    return np.asarray(2 * hits / (everything + truth.sum()), dtype=np.float64)
