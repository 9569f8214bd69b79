"""A policy in words, and the file that `agssd-site policy init` writes."""

from agssd_core.config.policy import SitePolicy

DEFAULT_POLICY = """\
# What this site allows. The coordinator can neither read nor change this file; it is read anew
# for every order. `agssd-site policy check SITE` says whether it can be used.
# What is left out stands at the values given here.

# Cohorts that the site takes part in.
cohorts: [ct-mr, us]

# Windows of local time in which orders are taken; none is any time. An end before the begin lies
# on the next day. A round that has begun is finished.
#   hours:
#     - {days: [mon, tue, wed, thu, fri], begin: '19:00', end: '06:00'}
#     - {days: [sat, sun]}
hours: []

code:
  # SHA-256 of applications that are answered. None listed: only the one that the installed
  # version makes, so a coordinator cannot run anything else here.
  applications: []

work:
  # Most that a plan may hold.
  rounds: 1000
  steps_per_round: 5000
  # Gradients of one step on one image give the image away. Least of a round:
  least_steps: 2
  least_batch: 2
  least_images: 16
  # Most MB that an order may bring; a larger one is refused before its weights are fetched.
  order_megabytes: 4096

plans:
  # SHA-256 of plans as `agssd-site policy check SITE --config FILE` prints them; none listed:
  # every plan within the bounds.
  digests: []
  # Bounds of single settings.
  #   bounds:
  #     - {key: training.batch_size, least: 4, most: 64}
  #     - {key: training.precision, among: [fp32, bf16]}
  bounds: []

leaves:
  # Groups of arrays that may leave, patterns of their names, most MB of one update. An order that
  # needs more is refused.
  groups: [student, teacher, state]
  arrays: ['*']
  megabytes: 2048
  # Patterns of metrics; one that fits none stays here.
  metrics: ['*']

# true: plans without differential privacy are refused.
require_privacy: false
# Most that private training may spend on this site's patients, over all runs.
privacy:
  epsilon_budget: 8.0
  delta: 1.0e-05

lpsam:
  # SHA-256 of files of LP-SAM that `agssd-site delineate` takes.
  digests: []
"""


def in_words(policy: SitePolicy) -> list[tuple[str, str]]:
    """Each part of a policy as (heading, sentence)."""
    work, leaves, privacy = policy.work, policy.leaves, policy.privacy
    spend = f"epsilon up to {privacy.epsilon_budget:g} at delta {privacy.delta:g}"
    private = f"{'required' if policy.require_privacy else 'not required'}; {spend}"
    bounds = "; ".join(_bound(b.key, b.least, b.most, b.among) for b in policy.plans.bounds)
    listed = f"{len(policy.plans.digests)} listed" if policy.plans.digests else "any"
    return [
        ("cohorts", ", ".join(policy.cohorts) or "none"),
        ("hours", "; ".join(window.in_words() for window in policy.hours) or "any time"),
        ("code", ", ".join(policy.code.applications) or "the installed version's application only"),
        (
            "work",
            f"up to {work.rounds} rounds of {work.steps_per_round} steps; at least "
            f"{work.least_steps} steps of {work.least_batch} images, {work.least_images} images a "
            f"round; orders up to {work.order_megabytes:g} MB",
        ),
        ("plans", f"{listed}{', with ' + bounds if bounds else ''}"),
        (
            "leaves",
            f"{', '.join(leaves.groups) or 'no group'}; arrays {' '.join(leaves.arrays) or 'none'};"
            f" up to {leaves.megabytes:g} MB; metrics {' '.join(leaves.metrics) or 'none'}",
        ),
        ("privacy", private),
    ]


def _bound(key: str, least: float | None, most: float | None, among: tuple[object, ...]) -> str:
    parts = [f"one of {', '.join(map(str, among))}"] if among else []
    parts += [f"{least:g} or more"] if least is not None else []
    parts += [f"{most:g} or less"] if most is not None else []
    return f"{key} {' and '.join(parts)}"
