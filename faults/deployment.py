"""Sites killed and lines gone bad over the real deployment, which is started once for all of it.

Three enrolled sites answer round after round of a tiny model behind nginx; one of them, ``valley``,
has all the bad luck. Each try is a round of its own. A round must close within its deadline and
10 s, with the work of the other two.
"""

import atexit
import contextlib
import random
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

from agssd_core.journal import Entry, entries_of
from faults.crowds import half_open, slow_loris
from faults.deployed import (
    START_S,
    Deployment,
    NotInTimeError,
    deployment,
    killed,
    random_moment,
    wait_for,
)
from faults.suite import Fault, Try

VICTIM = "valley"
GRACE_S = 10.0
LEAST_DEADLINE_S = 30.0
REJOIN_S = 15.0
SLOW_LINE = 1024
MOST_MISSED = 3
CUT_S = 0.5
PLAN = {
    "rounds": 400,
    "steps_per_round": 16,
    "expected_sites": 3,
    "min_sites": 2,
    "deadline_s": START_S,
    "discovery_timeout_s": START_S,
    "keep": 2,
}
_OPEN = contextlib.ExitStack()
_HELD: list[Deployment] = []


def shared() -> Deployment:
    """The deployment that all of these faults are injected into, on line."""
    if not _HELD:
        folder = Path(_OPEN.enter_context(tempfile.TemporaryDirectory(prefix="agssd-faults-")))
        found = _OPEN.enter_context(deployment(folder, federation=PLAN))
        found.begin_run("faults")
        found.serve()
        for site in found.links:
            found.connect(site)
        wait_for(lambda: found.merged(0) is not None, START_S, "the first round")
        _fit_deadline(found)
        _HELD.append(found)
    return _HELD[0]


def _fit_deadline(found: Deployment) -> None:
    """A deadline that sites which have just been started meet on this machine, busy as it is."""
    cold = max(row["seconds"] for row in found.rows("site", 0))
    found.set_deadline(round(max(LEAST_DEADLINE_S, 2.5 * cold)))
    wait_for(lambda: found.merged(2) is not None, START_S, "rounds after the restart")


def close_shared() -> None:
    """End all of its processes."""
    _HELD.clear()
    _OPEN.close()


atexit.register(close_shared)


def others(found: Deployment) -> set[str]:
    """Everybody but the victim."""
    return set(found.links) - {VICTIM}


def judged(found: Deployment, number: int, began: datetime) -> Try:
    """Whether a round closed in time with the others' work."""
    sites, seconds = found.closed(number, began)
    lacking = others(found) - sites
    late = seconds > found.deadline_s + GRACE_S
    detail = f"round {number} closed after {seconds:.1f} s without {sorted(lacking)}"
    return Try(not lacking and not late, detail, {"round_s": seconds})


def killed_in_training(_folder: Path, tries: int) -> Iterator[Try]:
    """A random moment after the site took the order up."""
    chance = random.Random(1)

    def strike() -> tuple[bool, Try]:
        found = shared()
        began = _order_taken_up(found)
        random_moment(chance, 1.0)
        killed(found.processes[VICTIM])
        last = _last_entry(found)
        return last.kind == "order", _back_again(found, int(last.facts["round"]), began)

    return _while_under_way(strike, tries)


def killed_in_upload(_folder: Path, tries: int) -> Iterator[Try]:
    """When a part of the update is on a slow line, which is cut: what it still held is lost."""

    def strike() -> tuple[bool, Try]:
        found = shared()
        link = found.links[VICTIM]
        began = _order_taken_up(found)
        size, before = _update_bytes(found), link.sent
        link.rate = size / 3  # seconds for the rest
        # Calls that ask for orders are a few hundred bytes each; an update is far more.
        wait_for(lambda: link.sent - before > size / 4, found.deadline_s, "an upload")
        killed(found.processes[VICTIM])
        link.rate, link.cut = 0.0, 1.0
        time.sleep(CUT_S)
        lacking = size - (link.sent - before)
        link.clear()
        last = _last_entry(found)
        met = last.kind == "update" and lacking > size / 10
        return met, _back_again(found, int(last.facts["round"]), began)

    return _while_under_way(strike, tries)


def _order_taken_up(found: Deployment) -> datetime:
    """Wait until the victim has journalled an order, which it does before it trains; when."""
    before = _last_entry(found)

    def taken_up() -> bool:
        last = _last_entry(found)
        return last.kind == "order" and last != before

    wait_for(taken_up, START_S, f"an order of {VICTIM}")
    return datetime.now(UTC)


def _last_entry(found: Deployment) -> Entry:
    """Of the victim's journal: ``order`` while it trains, ``update`` from then on."""
    *_, last = entries_of(found.sites[VICTIM])
    return last


def _while_under_way(strike: Callable[[], tuple[bool, Try]], tries: int) -> Iterator[Try]:
    """Strike until so many kills met the victim at what they were to meet it at.

    A kill that came later is another fault, so it is not counted, unless it did harm.
    """
    struck, missed = 0, 0
    while struck < tries:
        met, one = strike()
        if met or not one.passed:
            struck += 1
            yield one
        elif (missed := missed + 1) > MOST_MISSED * tries:
            struck += 1
            yield Try(passed=False, detail="no kill came in time")


def _update_bytes(found: Deployment) -> int:
    live = found.live()["sites"].values()
    return max(int(site["bytes_up"] / site["rounds"]) for site in live if site["rounds"])


def _back_again(found: Deployment, number: int, began: datetime) -> Try:
    """Start the victim that was killed in this round at once, and look at this and the next."""
    back = _back(found)
    one = judged(found, number, began)
    figures = one.figures | {"deadline_s": found.deadline_s, "rejoin_s": back}
    # It is ordered again when it is back before the deadline, else from the next round on.
    both = [found.closed(each, began)[0] for each in (number, number + 1)]
    works = any(VICTIM in sites for sites in both)
    detail = one.detail if works else f"the victim is in neither round: {both}"
    return Try(one.passed and works, detail, figures)


def restarted_at_once(_folder: Path, tries: int) -> Iterator[Try]:
    """Killed at any moment; on line again when the coordinator answers its call for orders."""
    chance, found = random.Random(3), shared()
    for number in range(tries):
        random_moment(chance, 6.0)
        killed(found.processes[VICTIM])
        seconds = _back(found)
        detail = f"back after {seconds:.1f} s"
        works = True
        if number == tries - 1:  # and it takes part in rounds again
            after = int(found.live().get("round", 0))
            rounds = range(after, after + 3)
            works = bool(wait_for(lambda r=rounds: _in_one_of(found, r), START_S, "its return"))
        yield Try(seconds <= REJOIN_S and works, detail, {"rejoin_s": seconds})


def _in_one_of(found: Deployment, rounds: range) -> bool:
    return any(VICTIM in (found.merged(number) or ()) for number in rounds)


def _back(found: Deployment) -> float:
    """Start the victim; seconds until it has called for orders and was answered."""
    answered, began = found.pulls(VICTIM), time.monotonic()
    found.connect(VICTIM)
    wait_for(lambda: found.pulls(VICTIM) > answered, 240, "the return of the victim")
    return time.monotonic() - began


def slow_line(_folder: Path, tries: int) -> Iterator[Try]:
    """1 KB/s in both directions for a round; the victim itself need not finish."""
    for _ in range(tries):
        found = shared()
        found.links[VICTIM].rate = SLOW_LINE
        try:
            number, began = found.next_order(VICTIM)
            one = judged(found, number, began)
        finally:
            found.links[VICTIM].clear()
        yield one
        _until_all_are_back(found)


def _until_all_are_back(found: Deployment) -> None:
    def all_there() -> bool:
        live = found.live()
        number = int(live.get("round", 1)) - 1
        return found.merged(number) == set(found.links)

    with contextlib.suppress(NotInTimeError):
        wait_for(all_there, START_S, "a round with all")


def crowd(
    opener: Callable[..., contextlib.AbstractContextManager[int]],
) -> Callable[..., Iterable[Try]]:
    """Rounds while somebody holds connections open: all sites must be in them."""

    def run(_folder: Path, tries: int) -> Iterator[Try]:
        for _ in range(tries):
            found = shared()
            _until_all_are_back(found)
            before = found.memory()
            with opener(found.port, found.federation / "ca.crt") as count:
                number, began = found.next_order(VICTIM)
                one = judged(found, number, began)
                grown = (found.memory() - before) / 1e6
            whole = found.merged(number) == set(found.links)
            figures = one.figures | {"connections": count, "grown_MB": grown}
            detail = f"{one.detail}; sites {found.merged(number)}; {grown:.0f} MB more"
            yield Try(one.passed and whole and grown < MOST_GROWN_MB, detail, figures)

    return run


MOST_GROWN_MB = 200.0

FAULTS = [
    Fault(row, name, run, tries, short, deploy=True, shared=True)
    for row, name, run, tries, short in (
        (1, "kill -9 of a site in training, restarted", killed_in_training, 5, 0),
        (1, "kill -9 of a site in its upload, restarted", killed_in_upload, 5, 1),
        (1, "kill -9 at any moment: back within 15 s", restarted_at_once, 5, 0),
        (10, "slow-loris, 60 connections", crowd(slow_loris), 5, 0),
        (10, "1000 half-open connections", crowd(half_open), 5, 1),
        (10, "a site's line at 1 KB/s: the others finish", slow_line, 5, 1),
    )
]
