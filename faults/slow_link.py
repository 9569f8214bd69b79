"""Row 17: an update of 40 MB over a line of 5 Mbit/s that loses 5 % of what it carries.

Two of three sites have such a line, in both directions; ``faults/link.py`` says what stands in for
the loss. In every round each slow site's update is in, or it is refused as ``no-reply`` and the
round closes in time without it; either way the next round goes on, which is what shows that nothing
is wedged.
"""

import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from faults.deployed import START_S, Deployment, deployment, wait_for
from faults.suite import Fault, Try

RATE = 5e6 / 8
LOSS = 0.05
CUT = 1 / 4000
SLOW = ("south", "valley")
MEGABYTES = float(os.environ.get("AGSSD_FAULTS_MB", "40"))
DEADLINE_S = 480.0
GRACE_S = 10.0
PLAN = {
    "rounds": 400,
    "steps_per_round": 2,
    "expected_sites": 3,
    "min_sites": 1,
    "deadline_s": DEADLINE_S,
    "discovery_timeout_s": START_S,
    "keep": 2,
}
BOTTLENECK = 128


def large(megabytes: float) -> dict[str, object]:
    """A model whose update weighs so much in float32: many prototypes on a small body."""
    # The last layers of two heads, of student and teacher each: bottleneck x prototypes numbers.
    prototypes = int(megabytes * 1e6 / 4 / 4 / BOTTLENECK)
    return {"head": {"prototypes": prototypes, "hidden": 32, "bottleneck": BOTTLENECK}}


def slow_lines(folder: Path, tries: int) -> Iterator[Try]:
    """Two tries a round: one for each slow site."""
    with deployment(folder, agssd=large(MEGABYTES), federation=PLAN) as found:
        found.begin_run("slow")
        found.serve()
        for site in SLOW:
            link = found.links[site]
            link.rate, link.loss, link.cut = RATE, LOSS, CUT
        for site in found.links:
            found.connect(site)
        number = 0
        while number < tries:
            index = number // len(SLOW)
            sites, seconds = found.closed(index, _began(found, index))
            rows = {row["site"]: row["reason"] for row in found.rows("refusal", index)}
            up = {row["site"]: row["bytes_up"] / 1e6 for row in found.rows("site", index)}
            for site in SLOW[: tries - number]:
                yield _judged(site, sites, rows, seconds, up)
                number += 1


def _began(found: Deployment, index: int) -> datetime:
    """When the last of the orders was on its way."""

    def ordered() -> datetime | None:
        live = found.live()
        last = live.get("sites", {}).get(SLOW[-1], {})
        if live.get("round") != index or last.get("step") != "ordered":
            return None
        return datetime.fromisoformat(last["since"])

    moment: datetime = wait_for(ordered, START_S, f"round {index}")
    return moment


def _judged(
    site: str, sites: set[str], refused: dict[str, str], seconds: float, up: dict[str, float]
) -> Try:
    completed = site in sites
    timed_out = refused.get(site) == "no-reply" and seconds <= DEADLINE_S + GRACE_S
    figures = {"round_s": seconds, "completed": float(completed)}
    figures |= {"update_MB": up[site]} if site in up else {}
    fine = "north" in sites and (completed or timed_out)
    return Try(fine, f"after {seconds:.0f} s merged {sites}, refused {refused}", figures)


FAULTS = [
    Fault(17, "update of 40 MB at 5 Mbit/s and 5 % loss", slow_lines, 6, short=0, deploy=True),
]
