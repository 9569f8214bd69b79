"""Differential privacy of a whole site: every difference clipped, the sum noised, by the server.

Neighbouring runs differ in what one site sent: its difference, or nothing in its place. That it
took part is no secret, since manifests name the sites; so the number of sites divides the sum and
no noise is saved by drawing them. Server momentum, the server's EMA of the teacher and the form in
which weights travel come after the noise and cost nothing.

Source:
    McMahan et al. 2018, arXiv:1710.06963, Algorithm 1; zero-out neighbours as Kairouz et al.
    2021, arXiv:2103.00039, Definition 1.1.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from agssd_core.config import CentralPrivacyConfig
from agssd_core.noise import NoiseStream
from agssd_core.weights import Weights
from server import merge_rules, robust
from server.merge_rules import Float64

# A norm in float64 is off by less; with it a clipped difference never exceeds the limit.
_SLACK = 1e-9


class Differences(Protocol):
    """What each site of a round changed: ``server.aggregation.Cohort``."""

    @property
    def base(self) -> Weights:
        """What they all started from."""
        ...

    def fresh(self) -> list[str]:
        """Sites, sorted."""
        ...

    def names(self, group: str) -> list[str]:
        """Names of a group's arrays."""
        ...

    def differences(self, name: str) -> Iterator[Float64]:
        """Each site's difference of one array, in the order of ``fresh``."""
        ...


class NoisedMean:
    """The merged arrays, each of which may be asked for once.

    Args:
        cohort: the admitted updates.
        groups: of arrays that sites send; all of them are clipped as one vector.
        settings: clipping and noise.
        stream: of the noise.
    """

    def __init__(
        self,
        cohort: Differences,
        groups: Sequence[str],
        settings: CentralPrivacyConfig,
        stream: NoiseStream,
    ) -> None:
        self._cohort, self._stream = cohort, stream
        self._limit = settings.clip_norm
        self._deviation = settings.noise_multiplier * settings.clip_norm
        self.factors = robust.clip_scales(
            update_norms(cohort, groups), limit=self._limit * (1 - _SLACK)
        )
        self._given: set[str] = set()

    def clipped_sum(self, name: str) -> Float64:
        """Sum of the sites' clipped differences of one array; no noise."""
        return merge_rules.weighted_mean(self._cohort.differences(name), self.factors)

    def __call__(self, name: str) -> Float64:
        """The base plus the noised mean of the clipped differences."""
        if name in self._given:
            # A second draw for the same sum would be a second release that nobody counts.
            raise RuntimeError(f"array {name} was noised before")
        self._given.add(name)
        total = self.clipped_sum(name)
        noise = self._stream.normal(total.size).reshape(total.shape)
        before = self._cohort.base[name].astype(np.float64)
        return np.asarray(before + (total + self._deviation * noise) / len(self.factors))


def update_norms(cohort: Differences, groups: Sequence[str]) -> list[float]:
    """L2 norm of every site's difference over all arrays of some groups together."""
    squares = [0.0] * len(cohort.fresh())
    for group in groups:
        for name in cohort.names(group):
            for index, difference in enumerate(cohort.differences(name)):
                squares[index] += float(np.sum(difference * difference))
    return [math.sqrt(square) for square in squares]


def count_numbers(weights: Weights, groups: Sequence[str]) -> int:
    """How many numbers a site sends."""
    return sum(array.size for name, array in weights.items() if name.split("/", 1)[0] in groups)
