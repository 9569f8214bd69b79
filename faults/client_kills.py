"""Row 1 in the small: a process for every message of a site, one of which is killed.

Toy sites sign and keep their state on disk; time is virtual, the processes and ``kill -9`` are
real. Kills of whole sites over the real deployment are in ``deployment.py``.
"""

import contextlib
import os
import random
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from agssd_core.errors import EngineError
from client.relay import receive_frame, send_frame
from faults.suite import Fault, Try
from faults.toys import quick_disk, shares
from simulation.grid import InProcessGrid
from tests.support.signing import SignedHospital
from tests.support.spending import kill_spender

VICTIM, ROUND = "b", "1"
KILLS_A_SITE = 5


class ForkingGrid(InProcessGrid):
    """Answers each message of the victim in a process of its own; one order is fatal to it.

    Attributes:
        moment_s: how long the victim lives after it has the order.
        killed: it had not answered by then.
    """

    moment_s = 1e9
    killed = False
    took_s = 0.0

    def _answer(self, node: Any, order: Any, identifier: str) -> Any:
        if node.name != VICTIM:
            return super()._answer(node, order, identifier)
        near, far = socket.socketpair()
        doomed = order.group == ROUND
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            with contextlib.suppress(BaseException):
                near.close()
                objects = super()._answer(node, order, identifier)
                send_frame(far, {"names": list(objects)}, objects.values())
                os._exit(0)
            os._exit(1)
        far.close()
        with near:
            if doomed and self.moment_s < 1e6:
                time.sleep(self.moment_s)
                os.kill(child, signal.SIGKILL)
            try:
                header, parts = receive_frame(near)
                found = dict(zip(header["names"], parts, strict=True))
            except EngineError:
                found = None
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if doomed:
            self.killed, self.took_s = code == -signal.SIGKILL, time.monotonic() - began
        return None if doomed and self.killed else found

    def _push(self, message: Any) -> str:
        identifier = super()._push(message)
        self._orders[identifier].__dict__["group"] = message.metadata.group_id
        return identifier


def killed_at_random(folder: Path, tries: int) -> Iterator[Try]:
    """A kill that comes after the answer is none and is drawn again."""
    chance, number, longest = random.Random(11), 0, 0.0
    with quick_disk():
        while number < tries:
            moment = chance.uniform(0.0, longest) if longest else 1e9
            run = SignedHospital(folder / f"{number}-{moment:.6f}", rounds=3)
            grid = ForkingGrid(run.app(), run.sites)
            grid.moment_s = moment
            closed: dict[int, float] = {}
            run.run(
                grid=grid,
                on_round=lambda outcome, c=closed: c.update({outcome.round: outcome.seconds}),
            )
            if not longest:
                longest = grid.took_s
            elif grid.killed:
                number += 1
                yield _judged(run, closed)
            else:  # the machine was busier when it was timed
                longest *= 0.8
            shutil.rmtree(run.folder)


def _judged(run: SignedHospital, closed: dict[int, float]) -> Try:
    limit = run.config.federation.deadline_s + 10
    found = [shares(run, number) for number in range(3)]
    everybody = set(run.sites)
    passed = (
        found == [everybody, everybody - {VICTIM}, everybody]
        and closed[1] <= limit
        and run.reasons() == [(1, VICTIM, "no-reply")]
    )
    return Try(passed, f"merged {found}, closed after {closed[1]:.0f} s, {run.reasons()}")


def ledger_holds(folder: Path, tries: int) -> Iterator[Try]:
    """A private site: whatever it trained stands in its ledger as spent."""
    # A new site now and then: one whose budget is spent trains no more, and a kill shows nothing.
    for start in range(0, tries, KILLS_A_SITE):
        times = min(KILLS_A_SITE, tries - start)
        for _ in kill_spender(folder / str(start) / "north", times=times, seed=start):
            yield Try(passed=True)


FAULTS = [
    Fault(1, "kill -9 of a site's process, toy rounds", killed_at_random, 100, short=2),
    Fault(1, "kill -9 of a private site: ledger >= true spend", ledger_holds, 100, short=2),
]
