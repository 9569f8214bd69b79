"""One round's merge: student, teacher and state, array by array in sorted site order.

Linear rules hold one model and one array of a site; trimmed mean, median and Krum hold all
sites' copies of one array. A site that was refused is simply not in the spool, so the merged
weights are those of a round in which it was absent.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from agssd_core.config.federation import STALE_RULES, MergeConfig
from agssd_core.errors import RoundError, WeightsError
from agssd_core.weights import Array, Weights
from server import merge_rules
from server.aggregation import Cohort, MergeState, StaleUpdate, Updates, aggregator, linear
from server.merge_rules import Float64, site_weights

__all__ = ["MergeResult", "MergeState", "StaleUpdate", "Updates", "merge_round", "site_weights"]


@dataclass(frozen=True)
class MergeResult:
    """Merged weights (schema of the base), the server's next state, and a plain report."""

    weights: Weights = field(repr=False)
    state: MergeState
    report: dict[str, Any]


def merge_round(
    base: Weights,
    spool: Updates,
    *,
    merge: MergeConfig,
    shares: Mapping[str, float],
    ema_product: float,
    state: MergeState,
    stale: Mapping[str, StaleUpdate] | None = None,
) -> MergeResult:
    """Merge the admitted updates of a round.

    T1 averages the teachers with the student's shares. T2 and T3 move the server's teacher by
    EMA towards the merged student; under T3 that copy is for export and for sites that join
    late, since the sites keep their own. T4 copies the student.

    Args:
        base: weights that the round started from (student, teacher, state), floating point.
        spool: the admitted updates; under T1 they hold teachers.
        merge: the rules.
        shares: p_k of every site, from ``site_weights``; robust rules give one vote each.
        ema_product: M_r, product of the teacher's EMA momenta over the round's steps.
        state: server state that the round before returned.
        stale: late updates by site, T2 with a linear or server-optimiser rule only.

    Raises:
        RoundError: too few sites for the rule, shares that do not fit, a non-finite result.
        WeightsError: an array is missing or has another shape.
    """
    cohort = Cohort(base, spool, dict(sorted(shares.items())), stale or {})
    _check(cohort, merge)
    aggregate, arrays, report = aggregator(cohort, merge, state)
    # State is linear in the sites under every rule that weighs sites; a robust rule guards it
    # too, and noise covers all that comes from sites.
    guarded = merge.is_robust or merge.central_privacy.enabled
    for_state = aggregate if guarded else linear(cohort, cohort.shares)
    merged: Weights = {}
    for name in cohort.names("student"):
        moved, moments = _student(name, base[name], aggregate(name), merge=merge, state=state)
        merged[name] = _settle(name, moved, base[name])
        arrays |= moments
    for name in cohort.names("state"):
        merged[name] = _settle(name, for_state(name), base[name])
    for name in cohort.names("teacher"):
        if merge.teacher_rule == "average":
            value = aggregate(name)
        else:
            keep = 0.0 if merge.teacher_rule == "copy" else ema_product
            value = _from_student(name, base[name], merged, ema_product=keep)
        merged[name] = _settle(name, value, base[name])
    report = {"student_rule": merge.student, "teacher_rule": merge.teacher_rule, **report}
    return MergeResult({name: merged[name] for name in base}, MergeState(arrays), report)


def _check(cohort: Cohort, merge: MergeConfig) -> None:
    fresh, shares = cohort.fresh(), cohort.shares
    if fresh != sorted(cohort.spool.sites()) or not set(cohort.stale) <= set(shares):
        raise RoundError(
            f"{len(shares)} shares do not belong to the {len(cohort.spool.sites())} spooled and "
            f"{len(cohort.stale)} late updates. Compute the shares from the admitted sites."
        )
    if len(fresh) < merge.required_sites:
        raise RoundError(
            f"{len(fresh)} usable update(s), merge.student = {merge.student} needs at least "
            f"{merge.required_sites}. Raise federation.min_sites or take another rule."
        )
    if any(share <= 0 for share in shares.values()) or abs(math.fsum(shares.values()) - 1) > 1e-9:
        raise RoundError("the shares are not positive or do not sum to 1. Use site_weights.")
    uneven = max(shares.values()) - min(shares.values()) > 1e-9
    if merge.central_privacy.enabled and (uneven or cohort.stale):
        raise RoundError(
            "late updates or unequal shares would move the merged weights by more than "
            "merge.central_privacy counts. Set merge.weighting = uniform and federation.late = "
            "discard."
        )
    late_ok = merge.student in STALE_RULES and merge.teacher_rule == "server-ema"
    if cohort.stale and not late_ok:
        raise RoundError(
            f"late updates cannot be merged by {merge.student} with teacher "
            f"{merge.teacher_rule}. Set federation.late = discard."
        )
    if any(array.dtype.kind != "f" for array in cohort.base.values()):
        raise RoundError("an array is not floating point; an average of it would mean nothing.")


def _student(
    name: str, base: Array, mean: Float64, *, merge: MergeConfig, state: MergeState
) -> tuple[Float64, Weights]:
    """The student's array after the server's step, and the moments to carry on."""
    if merge.student not in ("fedavgm", "fedadam", "fedyogi"):
        return merge_rules.step_from(base, mean, learning_rate=merge.server_learning_rate), {}
    before, rate = base.astype(np.float64), merge.server_learning_rate
    delta, zero = np.asarray(mean - before), np.zeros(base.shape, np.float32)
    last = state.arrays.get(f"momentum/{name}", zero)
    # Steps use the moments as they are stored, so a resumed run takes the same ones.
    if merge.student == "fedavgm":
        first = merge_rules.momentum(last, delta, beta=merge.server_momentum).astype(np.float32)
        return np.asarray(before + rate * first.astype(np.float64)), {f"momentum/{name}": first}
    epsilon, (beta, slow) = merge.server_epsilon, merge.server_betas
    spread: Array = state.arrays.get(f"second/{name}", zero + np.float32(epsilon**2))
    yogi = merge.student == "fedyogi"
    first = merge_rules.first_moment(last, delta, beta=beta).astype(np.float32)
    second = merge_rules.second_moment(spread, delta, beta=slow, yogi=yogi).astype(np.float32)
    moved = first.astype(np.float64) / (np.sqrt(second.astype(np.float64)) + epsilon)
    kept: Weights = {f"momentum/{name}": first, f"second/{name}": second}
    return np.asarray(before + rate * moved), kept


def _from_student(name: str, teacher: Array, merged: Weights, *, ema_product: float) -> Float64:
    """The teacher's array moved towards the merged student; a product of 0 copies it (T4)."""
    student = merged.get("student/" + name.split("/", 1)[1])
    if student is None or student.shape != teacher.shape:
        raise WeightsError(
            f"array {name} has no student array of its shape. Use the same model for both."
        )
    if ema_product == 0:
        return student.astype(np.float64)
    return merge_rules.server_ema(teacher, student, ema_product=ema_product)


def _settle(name: str, value: Float64, like: Array) -> Array:
    """Round once to the base's type; fail closed on anything that is not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        settled = np.asarray(value, dtype=like.dtype)
    if not np.isfinite(settled).all():
        raise RoundError(
            f"array {name} is not finite after merging; the weights stay as they were. Lower "
            "merge.server_learning_rate or set federation.max_update_norm."
        )
    return settled
