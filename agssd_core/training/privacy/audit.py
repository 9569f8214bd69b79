"""What a mechanism really gives away, measured from a single run of it.

Many canaries take part or not, each by the toss of a coin; whoever sees the result guesses which
did. The more guesses are right, the larger epsilon must be, whatever was promised.

Source: Steinke, Nasr & Jagielski 2023, arXiv:2305.08846, Algorithm 1 and Theorem 5.2.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import binom

Included = NDArray[np.bool_]
Scores = NDArray[np.float64]


@dataclass(frozen=True)
class Audit:
    """What one run showed.

    Attributes:
        guesses, correct: how many canaries were guessed at, and rightly.
        epsilon: lower bound that holds with the confidence asked for.
    """

    guesses: int
    correct: int
    epsilon: float


def audit(
    release: Callable[[Included], Scores],
    *,
    canaries: int,
    guesses: int,
    delta: float,
    rng: np.random.Generator,
    confidence: float = 0.95,
) -> Audit:
    """Run a mechanism once and bound its epsilon from below.

    Args:
        release: which canaries take part -> a score of each from the result alone, larger where
            it seems to have taken part.
        canaries: m.
        guesses: made about the most extreme scores, half of them "took part"; at most m.
        delta: of the (epsilon, delta) that is tested.
        rng: of the coins.
        confidence: that the bound is one.
    """
    included = rng.random(canaries) < 0.5
    order = np.argsort(release(included))
    half = guesses // 2
    correct = int(included[order[-half:]].sum() + (~included[order[:half]]).sum())
    bound = lower_bound(2 * half, correct, canaries=canaries, delta=delta, failure=1 - confidence)
    return Audit(2 * half, correct, bound)


def lower_bound(
    guesses: int, correct: int, *, canaries: int, delta: float, failure: float
) -> float:
    """Largest epsilon under which so many right guesses are still this unlikely; 0 for none.

    Args:
        guesses: r, not abstained from.
        correct: v, those of them that were right.
        canaries: m.
        delta: of the (epsilon, delta) that is tested.
        failure: probability that the bound may be wrong.
    """
    low, high = 0.0, 40.0
    for _ in range(60):
        middle = (low + high) / 2
        if _chance(guesses, correct, canaries=canaries, epsilon=middle, delta=delta) < failure:
            low = middle
        else:
            high = middle
    return low


def _chance(guesses: int, correct: int, *, canaries: int, epsilon: float, delta: float) -> float:
    """Most that the probability of ``correct`` right guesses can be under (epsilon, delta)."""
    right = 1 / (1 + np.exp(-epsilon))
    tail = float(binom.sf(correct - 1, guesses, right))
    # P[correct - i <= right guesses < correct] / i, for every i.
    steps = np.arange(1, correct + 1)
    between = binom.cdf(correct - 1, guesses, right) - binom.cdf(
        correct - 1 - steps, guesses, right
    )
    worst = float((between / steps).max()) if correct else 0.0
    return min(1.0, tail + 2 * canaries * delta * worst)
