"""Killed at any point and started again, a run ends with the bits of one that was not."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from simulation.grid import Fault
from tests.support.killing import Killed, Killer, watch_rounds, watched
from tests.support.toy import Hospital

ROUNDS = 3


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch):
    """Nobody pulls a plug here: waiting for the disk is most of a toy round's time."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Digest and rows of an uninterrupted run."""
    run = Hospital(tmp_path_factory.mktemp("whole") / "x", rounds=ROUNDS)
    run.run()
    return run.digest(), _rows(run)


def _rows(run):
    facts = ("kind", "round", "site", "metrics", "share")
    return [{name: row.get(name) for name in facts} for row in run.store.metrics.rows()]


def test_killed_anywhere_and_resumed_ends_with_the_same_bits(tmp_path, monkeypatch, whole):
    killer = Killer(0)
    watch_rounds(monkeypatch, killer)
    counted = Hospital(tmp_path / "counted", rounds=ROUNDS)
    counted.run()
    points = killer.seen
    assert points > 100
    for at in np.random.default_rng(4).choice(points, size=8, replace=False) + 1:
        killer.at, killer.seen = int(at), 0
        run = Hospital(tmp_path / f"at-{at}", rounds=ROUNDS)
        with pytest.raises(Killed):
            run.run()
        killer.at = -1
        run.run()  # new grid, new app: no trainer is warm
        assert run.digest() == whole[0], f"killed at point {at} of {points}"
        assert _rows(run) == whole[1]


def test_killed_again_and_again(tmp_path, monkeypatch, whole):
    killer = Killer(0)
    watch_rounds(monkeypatch, killer)
    run = Hospital(tmp_path / "x", rounds=ROUNDS)
    kills = 0
    for _ in range(40):
        killer.at, killer.seen = 37, 0
        try:
            run.run()
            break
        except Killed:
            kills += 1
    assert kills >= 3
    assert run.digest() == whole[0]


def test_admitted_updates_are_not_ordered_again(tmp_path, monkeypatch):
    run = Hospital(tmp_path / "x", rounds=1)
    monkeypatch.setattr("server.rounds.merge_round", watched(lambda: None, Killer(1)))
    with pytest.raises(Killed):
        run.run()
    monkeypatch.undo()
    ordered = []
    run.run(lambda name, group: ordered.append((name, group)) or Fault())
    assert [group for _, group in ordered] == ["hello"] * 3
    assert run.rows("merge")[0]["metrics"]["sites"] == 3


SCRIPT = """
import sys, time
from pathlib import Path
from server.store import RunStore
from tests.support import toy

folder = Path(sys.argv[1])
run = toy.Hospital.__new__(toy.Hospital)
run.folder, run.bench = folder, toy.ToyBench(lambda site, step: time.sleep(0.05))
run.sites = {path.name: path for path in sorted((folder / "sites").iterdir())}
run.store = RunStore(folder / "run")
run.config = toy.config_from_json(run.store.load(0).manifest.config)
run.run()
"""


@pytest.mark.federation
def test_kill_9_of_the_process_and_the_same_command_again(tmp_path):
    whole = Hospital(tmp_path / "whole", rounds=8)
    whole.run()
    killed = Hospital(tmp_path / "killed", rounds=8)
    command = [sys.executable, "-c", SCRIPT, str(killed.folder)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[1])
    deadline = time.monotonic() + 60
    while len(killed.store.rounds()) < 4 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 4 <= len(killed.store.rounds()) < 9
    subprocess.run(command, cwd=Path(__file__).parents[1], check=True, timeout=120)
    assert killed.digest() == whole.digest()
