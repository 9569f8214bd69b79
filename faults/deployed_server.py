"""Row 2 over the real deployment: ServerApp, SuperLink or all of the coordinator killed with -9.

Two enrolled sites stay on line while the coordinator is killed at a random moment of a run and
the same command is given again. The final weights and the server's moments are those of a run
that was left alone, bit for bit. All runs share the sites; each has a folder and an id of its own.
"""

import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from agssd_core.weights import weights_digest
from faults.deployed import START_S, Deployment, deployment, killed, random_moment, wait_for
from faults.suite import Fault, Try

PLAN = {
    "rounds": 3,
    "steps_per_round": 2,
    "expected_sites": 2,
    "min_sites": 2,
    "deadline_s": START_S,
    "discovery_timeout_s": START_S,
    "merge": {"student": "fedadam"},
}
PARTS = ("flwr-serverapp", "flower-superlink", "all")
MOST_STARTS = 4


def digests(found: Deployment) -> tuple[str, str]:
    """Of the final weights, and of the server's moments."""
    last = found.store.load(int(PLAN["rounds"]))  # type: ignore[call-overload]
    if not last.state:
        raise AssertionError("the server keeps no moments, so nothing was compared")
    return weights_digest(last.weights), weights_digest(last.state)


def killed_coordinator(folder: Path, tries: int) -> Iterator[Try]:
    """A part in turn; how long an undisturbed run takes bounds the random moment."""
    chance = random.Random(22)
    with deployment(folder, sites={"north": "CT", "south": "MR"}, federation=PLAN) as found:
        found.begin_run("whole")
        server = found.serve()
        for site in found.links:
            found.connect(site)
        _finish(found, server)
        # The first round is that of sites which have just been started.
        rows = [row for row in found.store.metrics.rows() if row["kind"] == "merge"]
        longest = len(rows) * min(row["seconds"] for row in rows)
        expected, number, begun = digests(found), 0, 0
        while number < tries:
            one = _one(found, begun, chance, longest=longest, expected=expected)
            begun += 1
            if one is None:  # over before the kill
                longest *= 0.8
                continue
            number += 1
            yield one


def _one(
    found: Deployment,
    number: int,
    chance: random.Random,
    *,
    longest: float,
    expected: tuple[str, str],
) -> Try | None:
    """One run that is killed once and resumed; None when it ended before."""
    found.begin_run(f"killed-{number}")
    server = found.serve()
    wait_for(lambda: found.live().get("stage") == "collecting", START_S, "the first round")
    random_moment(chance, longest)
    part = PARTS[number % len(PARTS)]
    if _complete(found) or server.poll() is not None:
        server.wait(START_S)
        return None
    done_before = found.store.rounds()[-1]
    struck = _kill(server, part)
    starts, began = 1, time.monotonic()
    while not _complete(found) and starts < MOST_STARTS:
        code = server.wait(START_S)
        if not _complete(found):
            server = found.serve()
            starts += 1
            wait_for(lambda s=server: s.poll() is not None, START_S, "the end of the run")
        elif code:
            break
    same = _complete(found) and digests(found) == expected
    figures = {"killed_after_round": done_before, "rest_s": time.monotonic() - began}
    return Try(same and struck, f"{part} killed: {struck}; {starts} starts; same: {same}", figures)


def _complete(found: Deployment) -> bool:
    return found.store.rounds()[-1] == PLAN["rounds"]


def _finish(found: Deployment, server: subprocess.Popen[bytes]) -> None:
    if server.wait(START_S) or not _complete(found):
        raise AssertionError("the run that was left alone did not end well")


def _kill(server: subprocess.Popen[bytes], part: str) -> bool:
    """Whether there was such a process."""
    if part == "all":
        killed(server)
        return True
    family = psutil.Process(server.pid).children(recursive=True)
    found = [each for each in family if any(part in word for word in each.cmdline()[:3])]
    for each in found:
        each.kill()
    return bool(found)


FAULTS = [
    Fault(
        2,
        "kill -9 of ServerApp, SuperLink or all, then resumed",
        killed_coordinator,
        6,
        deploy=True,
    )
]
