"""Both cohorts killed at any point and started again, and ultrasound by itself."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from simulation.grid import Fault
from tests.support.killing import Killed, Killer, watch_rounds
from tests.support.toy import BATCH, SHARED, Consortium, Hospital

GROUP = {"backbone": {"norm": "group", "width": 16}}
COHORTS = ("ct-mr", "us")


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch):
    """Nobody pulls a plug here: waiting for the disk is most of a toy round's time."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def few(name, cohort, group):
    """Site d never gets ultrasound's orders of round 1, so that cohort loses its quorum then."""
    return Fault(offline=(name, cohort, group) == ("d", "us", "1"))


def state(run):
    return {name: (run.of(name).digest(), rows(run.of(name))) for name in COHORTS}


def rows(run):
    facts = ("kind", "round", "site", "metrics", "share", "merged")
    return [{name: row.get(name) for name in facts} for row in run.store.metrics.rows()]


def test_both_killed_anywhere_while_one_loses_its_quorum(tmp_path, monkeypatch):
    settings = {"rounds": 2, "us_plan": {"min_sites": 2, "rounds": 3}}
    killer = Killer(0)
    watch_rounds(monkeypatch, killer)
    whole = Consortium(tmp_path / "whole", **settings)
    killer.seen = 0
    whole.run(few)
    points, expected = killer.seen, state(whole)
    assert points > 150
    assert [row["merged"] for row in whole.of("us").rows("merge")] == [True, False, True]
    for at in np.random.default_rng(5).choice(points, size=8, replace=False) + 1:
        run = Consortium(tmp_path / f"at-{at}", **settings)
        killer.at, killer.seen = int(at), 0
        with pytest.raises(Killed):
            run.run(few)
        killer.at = -1
        run.run(few)  # new grid, new app: no trainer is warm
        assert state(run) == expected, f"killed at point {at} of {points}"


def test_both_killed_again_and_again(tmp_path, monkeypatch):
    whole = Consortium(tmp_path / "whole")
    whole.run()
    killer = Killer(0)
    watch_rounds(monkeypatch, killer)
    run, kills = Consortium(tmp_path / "x"), 0
    for _ in range(40):
        killer.at, killer.seen = 41, 0
        try:
            run.run()
            break
        except Killed:
            kills += 1
    assert kills >= 3
    assert state(run) == state(whole)


@pytest.mark.parametrize("anaus", [GROUP, BATCH, SHARED], ids=["group", "batch", "batch-shared"])
def test_ultrasound_killed_anywhere_ends_with_the_same_bits(tmp_path, monkeypatch, anaus):
    killer = Killer(0)
    watch_rounds(monkeypatch, killer)
    whole = Hospital(tmp_path / "whole", anaus=anaus)
    killer.seen = 0
    whole.run()
    points = killer.seen
    assert points > 100
    for at in np.random.default_rng(6).choice(points, size=5, replace=False) + 1:
        run = Hospital(tmp_path / f"at-{at}", anaus=anaus)
        killer.at, killer.seen = int(at), 0
        with pytest.raises(Killed):
            run.run()
        killer.at = -1
        run.run()
        assert (run.digest(), rows(run)) == (whole.digest(), rows(whole)), f"killed at {at}"


SCRIPT = """
import sys, time
from pathlib import Path
from tests.support import toy

class RealTime(toy.VirtualTime):
    clock = staticmethod(time.monotonic)
    sleep = staticmethod(time.sleep)

run = toy.Consortium.opened(Path(sys.argv[1]), rounds=8, poll_s=0.01)
run.bench = toy.ToyBench(lambda site, step: time.sleep(0.03))
run.run(grid=run.grid(timer=RealTime()), threads=True)
"""


@pytest.mark.federation
def test_kill_9_of_the_process_with_a_thread_for_each_cohort(tmp_path):
    whole = Consortium(tmp_path / "whole", rounds=8, poll_s=0.01)
    whole.run()
    killed = Consortium(tmp_path / "killed", rounds=8, poll_s=0.01)
    command = [sys.executable, "-c", SCRIPT, str(killed.folder)]
    for wanted in (2, 5):
        process = subprocess.Popen(command, cwd=Path(__file__).parents[1])
        deadline = time.monotonic() + 60
        while len(killed.stores["us"].rounds()) <= wanted and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert wanted < len(killed.stores["us"].rounds()) < 9
    subprocess.run(command, cwd=Path(__file__).parents[1], check=True, timeout=120)
    assert state(killed) == state(whole)
