"""How the sites' copies of one array become one: every student rule as a function of a name."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from agssd_core.config.federation import MergeConfig
from agssd_core.errors import WeightsError
from agssd_core.noise import NoiseStream
from agssd_core.weights import Array, Weights
from server import merge_rules, robust
from server.central_privacy import NoisedMean, update_norms
from server.merge_rules import Float64


class Updates(Protocol):
    """Where a round's admitted updates are read from: ``server.spool.RoundSpool``."""

    def sites(self) -> tuple[str, ...]:
        """Names of the sites whose updates are held."""
        ...

    def read(self, site: str, name: str) -> Array:
        """One array of one site."""
        ...


@dataclass(frozen=True)
class StaleUpdate:
    """A late update: readers of its arrays and of the base that it started from."""

    update: Callable[[str], Array]
    base: Callable[[str], Array]


@dataclass(frozen=True)
class MergeState:
    """What the server carries from round to round; part of every checkpoint.

    Attributes:
        arrays: ``momentum/<name>``, ``second/<name>`` (float32) and ``norms/<group>`` (float64).
    """

    arrays: Weights = field(default_factory=dict, repr=False)


@dataclass(frozen=True)
class Cohort:
    """The updates of a round beside the base that they started from."""

    base: Weights
    spool: Updates
    shares: dict[str, float]
    stale: Mapping[str, StaleUpdate]

    def fresh(self) -> list[str]:
        """Sites of this round, sorted; late ones are not among them."""
        return [site for site in self.shares if site not in self.stale]

    def arrays(self, name: str, sites: Sequence[str]) -> Iterator[Array]:
        """Arrays one at a time; a late one as the base plus its own difference."""
        for site in sites:
            late = self.stale.get(site)
            if late is None:
                array = self.spool.read(site, name)
            else:
                moved = late.update(name).astype(np.float64) - late.base(name).astype(np.float64)
                array = np.asarray(self.base[name].astype(np.float64) + moved)
            if array.shape != self.base[name].shape:
                raise WeightsError(
                    f"array {name} of site {site} is {array.shape}, expected "
                    f"{self.base[name].shape}. Admit updates before merging them."
                )
            yield array

    def differences(self, name: str) -> Iterator[Float64]:
        """What each fresh site changed, one at a time."""
        before = self.base[name].astype(np.float64)
        for array in self.arrays(name, self.fresh()):
            yield np.asarray(array.astype(np.float64) - before)

    def names(self, group: str) -> list[str]:
        """The base's array names of one group, sorted."""
        return [name for name in sorted(self.base) if name.startswith(f"{group}/")]


Aggregate = Callable[[str], Float64]


def aggregator(
    cohort: Cohort, merge: MergeConfig, state: MergeState
) -> tuple[Aggregate, Weights, dict[str, Any]]:
    """The rule as a function of an array's name, what it adds to the state, its report."""
    votes = dict.fromkeys(cohort.fresh(), 1 / len(cohort.fresh()))
    if merge.central_privacy.enabled:
        # How far a site was clipped tells of it without noise, so it is in no report.
        settings, groups = merge.central_privacy, merge.uploaded_groups
        noised = NoisedMean(cohort, groups, settings, NoiseStream.from_system())
        return noised, {}, {"shares": votes}
    match merge.student:
        case "trimmed-mean" | "median":
            return _coordinate_wise(cohort, merge), {}, {"shares": votes}
        case "krum":
            selected, scores = _krum(cohort, merge)
            return linear(cohort, selected), {}, {"shares": selected, "scores": scores}
        case "norm-clip":
            return _clipped(cohort, merge, state)
        case "l-dawa":
            return _l_dawa(cohort), {}, {"shares": cohort.shares}
        case _:
            return linear(cohort, cohort.shares), {}, {"shares": cohort.shares}


def linear(cohort: Cohort, shares: Mapping[str, float]) -> Aggregate:
    """The plain mean with given shares, holding one site's array at a time."""
    sites, factors = list(shares), list(shares.values())
    return lambda name: merge_rules.weighted_mean(cohort.arrays(name, sites), factors)


def _coordinate_wise(cohort: Cohort, merge: MergeConfig) -> Aggregate:
    def aggregate(name: str) -> Float64:
        arrays = list(cohort.arrays(name, cohort.fresh()))
        if merge.student == "median":
            return robust.coordinate_median(arrays)
        return robust.trimmed_mean(arrays, trim=merge.trim)

    return aggregate


def _l_dawa(cohort: Cohort) -> Aggregate:
    sites, factors = list(cohort.shares), list(cohort.shares.values())

    def aggregate(name: str) -> Float64:
        arrays = list(cohort.arrays(name, sites))
        return merge_rules.l_dawa_mean(arrays, factors, cohort.base[name])

    return aggregate


def _krum(cohort: Cohort, merge: MergeConfig) -> tuple[dict[str, float], dict[str, float]]:
    sites = cohort.fresh()
    groups = ["student", "state", *(["teacher"] if merge.teacher_rule == "average" else [])]
    distances: dict[str, Float64] = {}
    for group in groups:
        for name in cohort.names(group):
            part = robust.squared_distances(list(cohort.differences(name)))
            distances[group] = distances[group] + part if group in distances else part
    scores = robust.krum_scores(distances, hostile=merge.krum_f)
    best = sorted(int(index) for index in np.argsort(scores, kind="stable")[: merge.krum_keep])
    selected = {sites[index]: 1 / len(best) for index in best}
    return selected, dict(zip(sites, (float(score) for score in scores), strict=True))


def _clipped(
    cohort: Cohort, merge: MergeConfig, state: MergeState
) -> tuple[Aggregate, Weights, dict[str, Any]]:
    sites, history = cohort.fresh(), {}
    factors: dict[str, list[float]] = {}
    for group in ("student", "state"):
        norms = update_norms(cohort, [group])
        before = state.arrays.get(f"norms/{group}", np.zeros(0))
        reference, kept = robust.clip_reference(norms, before.tolist())
        history[f"norms/{group}"] = np.asarray(kept, dtype=np.float64)
        factors[group] = robust.clip_scales(norms, limit=merge.clip_factor * reference)

    def aggregate(name: str) -> Float64:
        scales = factors[name.split("/", 1)[0]]
        before = cohort.base[name].astype(np.float64)
        near = (
            before + scale * difference
            for scale, difference in zip(scales, cohort.differences(name), strict=True)
        )
        return merge_rules.weighted_mean(near, cohort.shares.values())

    scales = dict(zip(sites, factors["student"], strict=True))
    return aggregate, dict(history), {"shares": cohort.shares, "clip": scales}
