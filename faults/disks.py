"""Rows 3 and 4: ends in the middle of writing a checkpoint, and disks that are full.

The full disk is a tmpfs of half a megabyte where we may mount one, else a limit on the size of
files, which the kernel enforces in the same calls.
"""

import contextlib
import os
import random
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from agssd_core.errors import AgssdError, CheckpointError
from client.memory import RunMemory
from client.site import Site
from faults.suite import Fault, Try
from server.store import RunStore
from tests.support.checkpoints import (
    fail_at,
    in_child,
    record_of,
    require_whole,
    steps_of_a_save,
    store_in,
)
from tests.support.merging import model
from tests.support.orders import config_for, order_for
from tests.support.toy import ToyBench, toy_weights

SIZE = 512 * 1024
PAGE = 4096
FULL = "Free disk space"


def killed_while_writing(folder: Path, tries: int) -> Iterator[Try]:
    """SIGKILL at each call that touches the disk, in a new checkpoint and a replaced one."""
    steps = steps_of_a_save(folder)
    for number in range(tries):
        step, again = number % steps, (number // steps) % 2 == 1
        place = folder / str(number)
        store = store_in(place, keep=2 if again else 1)
        index = 1 if again else 2

        def save_and_die(store: RunStore = store, step: int = step, index: int = index) -> None:
            fail_at(pytest.MonkeyPatch(), step, lambda: os.kill(os.getpid(), signal.SIGKILL))
            store.save_round(record_of(index), model(index))

        code = in_child(save_and_die)
        require_whole(place, {0, 1} if again else {1, 2})
        RunStore(place, keep=1).save_round(record_of(index), model(index))
        require_whole(place, {index})
        left = list((place / "checkpoints").glob(".*"))
        yield Try(code in (-signal.SIGKILL, 0) and not left, f"step {step}: {code}, left {left}")
        shutil.rmtree(place)


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Callable[[int], None] | None]:
    """A disk of half a megabyte; what is yielded leaves so many bytes free. None without one."""
    folder.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        yield None
        return

    def leave(free: int) -> None:
        filler = folder / "filler"
        filler.unlink(missing_ok=True)
        if free < SIZE:
            room = shutil.disk_usage(folder).free - free
            filler.write_bytes(bytes(max(0, room // PAGE * PAGE)))

    try:
        yield leave
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def _limited(free: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, free))


def full_at_server(folder: Path, tries: int) -> Iterator[Try]:
    """As many bytes free as some part of the checkpoint needs."""
    chance = random.Random(4)
    for number in range(tries):
        with small_disk(folder / str(number)) as leave:
            place = folder / str(number) / "run"
            store = store_in(place)
            free = PAGE * chance.randrange(4) if leave else chance.randrange(700)
            said = _in_full(leave, free, lambda s=store: s.save_round(record_of(2), model(2)))
            names = sorted(path.name for path in store.checkpoints.iterdir())
            good = names == ["round-0000", "round-0001"]
            require_whole(place, {1, 2})
            if leave:
                leave(SIZE)
            store.save_round(record_of(2), model(2))
            require_whole(place, {2})
        yield Try(good and said == FULL, f"{free} bytes free: {said}; {names}")


def full_at_site(folder: Path, tries: int) -> Iterator[Try]:
    """In the first round or the second: it says what is wrong, keeps the round before, goes on."""
    chance, weights = random.Random(5), toy_weights()
    config = config_for(rounds=3, steps_per_round=2)
    for number in range(tries):
        with small_disk(folder / str(number)) as leave:
            place = folder / str(number) / "north"
            place.mkdir()
            (place / "facts.json").write_text('{"patients": 7}')
            first, full = Site(place, "north", ToyBench()), number % 2
            if full == 1:
                first.train_round(order_for(weights, 0, config), weights)
            free = PAGE * chance.randrange(4) if leave else chance.randrange(500)
            order = order_for(weights, full, config)
            said = _in_full(leave, free, lambda s=first, o=order: s.train_round(o, weights))
            last = RunMemory.of(place, "run-1").last()
            if leave:
                leave(SIZE)
            fresh = Site(place, "north", ToyBench())
            again = fresh.train_round(order_for(weights, full, config), weights)
            resets = again.header.metrics["optimiser_reset"]
        kept = -1 if last is None else last.round
        good = said == FULL and kept == full - 1 and resets == 0
        yield Try(good, f"round {full}, {free} bytes free: {said}; kept {kept}, resets {resets}")


def _in_full(leave: Callable[[int], None] | None, free: int, work: Callable[[], object]) -> str:
    """What work says on a full disk: our typed error's remedy, or the class of anything else."""

    def said() -> str:
        try:
            work()
        except (CheckpointError, AgssdError) as error:
            return FULL if FULL in str(error) else str(error)
        except OSError as error:
            return type(error).__name__
        return "nothing"

    if leave is not None:
        leave(free)
        return said()

    def limited() -> int:
        _limited(free)
        return 7 if said() == FULL else 8

    return FULL if in_child(limited) == 7 else "something else"


FAULTS = [
    Fault(3, "kill -9 at each step of writing a checkpoint", killed_while_writing, 200, short=8),
    Fault(4, "disk full at the server", full_at_server, 20, short=2),
    Fault(4, "disk full at a site", full_at_site, 20, short=2),
]
