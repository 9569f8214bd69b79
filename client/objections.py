"""What a site's policy has against an order, and what it lets leave: plain functions, no file."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from fnmatch import fnmatchcase
from typing import Any

from pydantic import ValidationError

from agssd_core.config import MergeConfig
from agssd_core.config.federation import WAITING
from agssd_core.config.policy import LeavesPolicy, SitePolicy
from agssd_core.delivery import FinalOrder
from agssd_core.errors import OrderRefusedError
from agssd_core.protocol import RoundOrder, uplink_groups
from agssd_core.weights import Schema

POLICY_FILE = "policy.yaml"
_NOT_TRAINING = ("name", "output", "simulation", "tracking")


@dataclass(frozen=True)
class Objection:
    """Why an order is not carried out: the class that the server learns, and words for the site."""

    reason: str
    text: str


def plan_digest(plan: Mapping[str, Any]) -> str:
    """SHA-256 of what decides a site's training in an order's configuration.

    Names, folders and the coordinator's waiting times have no part in it, so the digest of a
    configuration file is that of the orders which follow from it.
    """
    part = {name: value for name, value in plan.items() if name not in _NOT_TRAINING}
    if isinstance(rules := part.get("federation"), dict):
        part["federation"] = {name: rules[name] for name in rules if name not in WAITING}
    text = json.dumps(part, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def objections(policy: SitePolicy, order: RoundOrder, *, now: datetime) -> Iterator[Objection]:
    """All that a policy has against an order; nothing when it may be carried out.

    Args:
        policy: of the site's owner.
        order: as it came; settings are read from its JSON and nothing about it is trusted.
        now: local time.
    """
    yield from objections_to_final(policy, order, now=now)
    plan = _settings(order.config)
    if plan is None:
        yield Objection("policy-config", "the order's configuration cannot be read")
        return
    yield from _against_work(policy, order, plan)
    yield from _against_plan(policy, plan)
    yield from _against_groups(policy.leaves, plan)
    yield from _against_privacy(policy, plan)


def objections_to_final(
    policy: SitePolicy, order: RoundOrder | FinalOrder, *, now: datetime
) -> Iterator[Objection]:
    """What a policy has against a final checkpoint: nothing is trained, so cohort and hours."""
    if order.cohort not in policy.cohorts:
        yield Objection("policy-cohort", "the site does not take part in this cohort")
    if policy.hours and not any(window.holds(now) for window in policy.hours):
        windows = "; ".join(window.in_words() for window in policy.hours)
        yield Objection("policy-hours", f"it is {now:%a %H:%M} here, orders are taken {windows}")


def require_may_leave(schema: Schema, leaves: LeavesPolicy | None) -> None:
    """Hold arrays that shall leave against the policy.

    Args:
        schema: of the arrays; their shapes are those of the order's own weights.
        leaves: None sets no limit.

    Raises:
        OrderRefusedError: one of them must stay, or all are too much.
    """
    if leaves is None:
        return
    kept = [spec.name for spec in schema if not _may_leave(spec.name, leaves)]
    values = sum(_count(spec.shape) for spec in schema)
    if kept:
        message = f"{len(kept)} array(s) that the order asks for stay at the site"
    elif 4 * values > leaves.megabytes * 1e6:
        message = f"the update is {4 * values / 1e6:.0f} MB, limit {leaves.megabytes:g}"
    else:
        return
    raise OrderRefusedError(
        f"{message}. The site's owner decides this in {POLICY_FILE}.", reason="policy-leaves"
    )


def metrics_that_leave(
    metrics: Mapping[str, float], leaves: LeavesPolicy | None
) -> dict[str, float]:
    """Those that fit a pattern of the policy."""
    patterns = ("*",) if leaves is None else leaves.metrics
    return {name: value for name, value in metrics.items() if _fits(name, patterns)}


def _against_work(
    policy: SitePolicy, order: RoundOrder, plan: Mapping[str, Any]
) -> Iterator[Objection]:
    work = policy.work
    rounds = _number(plan, "federation.rounds")
    if rounds is None or rounds > work.rounds or order.round >= work.rounds:
        yield Objection("policy-rounds", f"the plan is longer than {work.rounds} rounds")
    if order.steps > work.steps_per_round:
        steps = f"{order.steps} steps a round, at most {work.steps_per_round}"
        yield Objection("policy-steps", f"the order asks for {steps}")
    batch = _batch(plan, order.cohort)
    asked = f"{order.steps} step(s) of {batch or 0:g} image(s)"
    if batch is None or order.steps < work.least_steps or batch < work.least_batch:
        least = f"{work.least_steps} steps of {work.least_batch}"
        yield Objection("policy-minimum", f"{asked} could give images away; at least {least}")
    elif order.steps * batch < work.least_images:
        least = f"{work.least_images} images a round"
        yield Objection("policy-minimum", f"{asked} could give images away; at least {least}")


def _against_plan(policy: SitePolicy, plan: Mapping[str, Any]) -> Iterator[Objection]:
    plans = policy.plans
    if plans.digests and plan_digest(plan) not in plans.digests:
        yield Objection("policy-config", "the plan is not one of those that the owner listed")
    for bound in plans.bounds:
        if not bound.holds(_setting(plan, bound.key)):
            yield Objection("policy-config", f"{bound.key} is not as the owner allows")


def _against_groups(leaves: LeavesPolicy, plan: Mapping[str, Any]) -> Iterator[Objection]:
    """What the merge rule will ask for; the arrays themselves are looked at before they leave."""
    try:
        merge = MergeConfig.model_validate(_setting(plan, "federation.merge"))
    except ValidationError:
        yield Objection("policy-config", "the plan's merging rule cannot be read")
        return
    kept = [name for name in uplink_groups(merge.teacher_rule) if name not in leaves.groups]
    if kept:
        yield Objection("policy-leaves", f"{', '.join(kept)} may not leave the site")


def _against_privacy(policy: SitePolicy, plan: Mapping[str, Any]) -> Iterator[Objection]:
    required, most = policy.require_privacy, policy.privacy
    if _setting(plan, "privacy.enabled") is not True:
        if required:
            yield Objection("policy-privacy", "the plan is not differentially private")
        return
    if required and _setting(plan, "privacy.secure_noise") is not True:
        yield Objection("policy-privacy", "the plan's noise can be undone (secure_noise is off)")
    budget = _number(plan, "privacy.epsilon_budget")
    limited = budget is not None and 0 < budget <= most.epsilon_budget
    if not limited and (required or budget):
        limit = f"{most.epsilon_budget:g}"
        yield Objection("policy-privacy", f"the plan may spend more than epsilon = {limit}")
    delta = _number(plan, "privacy.delta")
    if delta is None or not 0 < delta <= most.delta:
        yield Objection("policy-privacy", f"the plan's delta is not within {most.delta:g}")


def _batch(plan: Mapping[str, Any], cohort: str) -> float | None:
    """Images of one step; patients that a private step draws on average where those are fewer."""
    key = "anaus.batch_size" if cohort == "us" else "training.batch_size"
    batch = _number(plan, key)
    drawn = _number(plan, "privacy.expected_batch")
    private = _setting(plan, "privacy.enabled") is True
    return min(batch, drawn) if private and batch is not None and drawn is not None else batch


def _settings(config: str) -> Mapping[str, Any] | None:
    try:
        plan = json.loads(config)
    except (ValueError, RecursionError):
        return None
    return plan if isinstance(plan, dict) else None


def _setting(plan: Mapping[str, Any], key: str) -> Any:
    """The value under a dotted key; None where there is none."""
    found: Any = plan
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def _number(plan: Mapping[str, Any], key: str) -> float | None:
    value = _setting(plan, key)
    plain = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if plain else None


def _may_leave(name: str, leaves: LeavesPolicy) -> bool:
    return name.split("/")[0] in leaves.groups and _fits(name, leaves.arrays)


def _fits(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for side in shape:
        total *= side
    return total
