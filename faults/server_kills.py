"""Row 2 in the small: server and sites in one process, killed again and again at any moment.

The run ends with the bits of one that was left alone: student, teacher, centre and the moments of
the server's optimiser.
"""

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from agssd_core.weights import weights_digest
from faults.suite import Fault, Try
from tests.support.toy import Hospital, ToyBench

ROUNDS = 4


def hospital(folder: Path) -> Hospital:
    """A toy run whose server keeps moments too."""
    run = Hospital(folder, rounds=ROUNDS, merge={"student": "fedadam"})
    run.bench = ToyBench(lambda _site, _step: time.sleep(0.01))
    return run


def digests(run: Hospital) -> tuple[str, str]:
    """Of the shared weights, and of the server's moments."""
    last = run.store.latest()
    return weights_digest(last.weights), weights_digest(last.state)


def killed_server(folder: Path, tries: int) -> Iterator[Try]:
    """Each run is killed once or twice; a kill after its end is drawn again."""
    whole = hospital(folder / "whole")
    began = time.monotonic()
    whole.run()
    longest, expected, chance = time.monotonic() - began, digests(whole), random.Random(12)
    if not whole.store.latest().state:
        raise AssertionError("the server keeps no moments, so nothing was compared")
    number = begun = 0
    while number < tries:
        begun += 1
        run = hospital(folder / str(begun))
        kills = [_killed(run, chance.uniform(0.0, longest)) for _ in range(chance.choice([1, 2]))]
        if not any(kills):  # the machine was busier when it was timed
            longest *= 0.8
            continue
        run.run()
        number += 1
        rounds = run.store.latest().round
        yield Try(
            digests(run) == expected and rounds == ROUNDS,
            f"other bits after {sum(kills)} kill(s), {rounds} rounds",
        )


def _killed(run: Hospital, moment_s: float) -> bool:
    """Run in a child and kill it; False when it was done before."""
    child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            run.run()
            os._exit(0)
        os._exit(1)
    time.sleep(moment_s)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


FAULTS = [Fault(2, "kill -9 of the server's process, toy rounds", killed_server, 50, short=2)]
