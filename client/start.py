"""What a site starts a round from: the merged weights, its own teacher, FedEMA's mixture."""

import re
from collections import defaultdict
from dataclasses import dataclass

import numpy as np

from agssd_core.config import MergeConfig
from agssd_core.weights import Weights, group

_BLOCK = re.compile(r"student/(?:.*?\.\d+(?=\.)|[^.]+(?:\.[^.]+)?)")
_EPSILON = 1e-12


@dataclass(frozen=True)
class Start:
    """Weights to train from, and FedEMA's bookkeeping (0 while unknown).

    Attributes:
        mixing: mu_k, the share of the site's own student.
        divergence: d_k of this round.
        first_divergence: d_k of the first round that had one.
    """

    weights: Weights
    mixing: float = 0.0
    divergence: float = 0.0
    first_divergence: float = 0.0

    def metrics(self, rule: str) -> dict[str, float]:
        """What a site tells of its mixture."""
        if rule != "fedema":
            return {}
        return {"fedema_mixing": self.mixing, "fedema_divergence": self.divergence}


def start_of_round(
    base: Weights, merge: MergeConfig, *, own: Weights | None, first_divergence: float
) -> Start:
    """Compose the start of a round.

    Args:
        base: merged weights of the order.
        merge: the rules; only teacher ``local`` and student ``fedema`` keep anything.
        own: the site's arrays after the round before; None when it has none or missed it, and
            then everything comes from ``base`` (EasyFL's selective EMA).
        first_divergence: d_k of the first round that had one, 0 when none had.
    """
    if own is None:
        return Start(base, first_divergence=first_divergence)
    weights = dict(base)
    if merge.teacher_rule == "local":
        weights |= {name: own[name] for name in group(base, "teacher")}
    if merge.student != "fedema":
        return Start(weights, first_divergence=first_divergence)
    distance = divergence(own, base)
    first = first_divergence or distance
    mixing = min(merge.ema_tau * distance / first, 1.0) if first > 0 else 0.0
    for name, merged in group(base, "student").items():
        mixed = mixing * own[name].astype(np.float64) + (1 - mixing) * merged.astype(np.float64)
        weights[name] = np.asarray(mixed, dtype=merged.dtype)
    return Start(weights, mixing, distance, first)


def divergence(own: Weights, merged: Weights) -> float:
    """Mean over blocks of |own - merged| / (|merged| + eps) of the student, dimensionless.

    A block is a numbered layer or else a module, with all its arrays together, so neither
    zero-initialised biases nor parameter names of one architecture decide the measure.

    Source:
        Zhuang et al. 2022, arXiv:2204.04385 (FedEMA), with a relative distance for each block.
    """
    apart: dict[str, float] = defaultdict(float)
    size: dict[str, float] = defaultdict(float)
    for name, array in sorted(group(merged, "student").items()):
        block = _block(name)
        difference = own[name].astype(np.float64) - array.astype(np.float64)
        apart[block] += float(np.sum(difference * difference))
        size[block] += float(np.sum(np.square(array, dtype=np.float64)))
    ratios = [np.sqrt(apart[name]) / (np.sqrt(size[name]) + _EPSILON) for name in apart]
    return float(np.mean(ratios)) if ratios else 0.0


def _block(name: str) -> str:
    found = _BLOCK.match(name)
    return found.group(0) if found else name
