"""Two cohorts in one federation: side by side, each by itself, neither in the other's way."""

import os
import threading
import time

import pytest

from agssd_core.errors import CheckpointError
from server.store import RunStore
from simulation.grid import VirtualTime
from tests.support.pairs import down, merged_rounds, trained_in
from tests.support.toy import BATCH, BOTH, Consortium, Hospital

CT = tuple((name, has["ct-mr"]) for name, has in BOTH.items() if "ct-mr" in has)

US = tuple((name, has["us"]) for name, has in BOTH.items() if "us" in has)


class RealTime(VirtualTime):
    """Seconds as they pass."""

    def clock(self):
        return time.monotonic()

    def sleep(self, seconds):
        time.sleep(seconds)


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch):
    """Nobody pulls a plug here: waiting for the disk is most of a toy round's time."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def test_each_cohort_ends_with_the_bits_of_a_run_of_its_own(tmp_path):
    both = Consortium(tmp_path / "both")
    summaries = both.run()
    alone = {
        "ct-mr": Hospital(tmp_path / "ct", CT),
        "us": Hospital(tmp_path / "us", US, anaus=BATCH),
    }
    for name, one in alone.items():
        one.run()
        assert both.of(name).digest() == one.digest() == summaries[name].weights_digest
        assert summaries[name].merged_rounds == 3
        assert one.digest() != one.store.load(0).manifest.weights_digest
    assert {site for _, site in trained_in(both, "us")} == {"a", "d"}
    assert {site for _, site in trained_in(both, "ct-mr")} == {"a", "b", "c"}


def test_rounds_take_turns_on_a_grid_in_this_process(tmp_path):
    told = []
    Consortium(tmp_path, rounds=2, us_plan={"rounds": 4}).run(on_round=told.append)
    assert [(outcome.cohort, outcome.round) for outcome in told] == [
        ("ct-mr", 0),
        ("us", 0),
        ("ct-mr", 1),
        ("us", 1),
        ("us", 2),
        ("us", 3),
    ]


def test_threads_and_turns_end_with_the_same_bits(tmp_path):
    turns, threads = Consortium(tmp_path / "turns"), Consortium(tmp_path / "threads", poll_s=0.01)
    told = []
    turns.run()
    threads.run(
        grid=threads.grid(timer=RealTime()),
        threads=True,
        on_round=lambda outcome: told.append((outcome.cohort, threading.current_thread())),
    )
    for name in ("ct-mr", "us"):
        assert turns.of(name).digest() == threads.of(name).digest()
    assert sorted(cohort for cohort, _ in told) == ["ct-mr"] * 3 + ["us"] * 3
    assert {thread for _, thread in told} == {threading.main_thread()}


def test_a_cohort_that_waits_holds_nobody_up(tmp_path):
    """Ultrasound needs two sites and has one; its rounds wait 4 s each for the other."""
    slow = Consortium(
        tmp_path,
        patients={"a": {"ct-mr": 3, "us": 5}, "b": {"ct-mr": 2}},
        poll_s=0.01,
        us_plan={
            "expected_sites": 0,
            "min_sites": 2,
            "rounds": 2,
            "discovery_timeout_s": 4.0,
        },
    )
    began, closed = time.monotonic(), []
    grid = slow.grid(timer=RealTime())
    slow.run(
        grid=grid,
        threads=True,
        on_round=lambda outcome: closed.append((outcome.cohort, time.monotonic() - began)),
    )
    assert [cohort for cohort, _ in closed] == ["ct-mr"] * 3 + ["us"] * 2
    assert closed[2][1] < 4.0 < closed[3][1]
    assert merged_rounds(slow, "us") == [False, False]


def test_a_lost_quorum_leaves_the_other_cohort_as_it_is(tmp_path):
    few = Consortium(tmp_path / "few", us_plan={"min_sites": 2})
    few.run(down("d", rounds=[1]))
    whole = Consortium(tmp_path / "whole")
    whole.run()
    assert merged_rounds(few, "us") == [True, False, True]
    store = few.stores["us"]
    assert store.load(1).manifest.weights_digest == store.load(2).manifest.weights_digest
    assert few.of("ct-mr").digest() == whole.of("ct-mr").digest()
    assert few.of("ct-mr").reasons() == []


@pytest.mark.parametrize("threads", [False, True])
def test_a_cohort_that_fails_does_not_end_the_other(tmp_path, threads):
    broken = Consortium(tmp_path, poll_s=0.01)
    (broken.stores["us"].checkpoints / "round-0000" / "weights.safetensors").write_bytes(b"")
    grid = broken.grid(timer=RealTime() if threads else None)
    with pytest.raises(CheckpointError, match=r"Cohort us: .*Restore"):
        broken.run(grid=grid, threads=threads)
    assert merged_rounds(broken, "ct-mr") == [True] * 3


def test_failures_are_told_together_and_a_bug_keeps_its_own_class(tmp_path):
    broken = Consortium(tmp_path)
    for store in broken.stores.values():
        (store.checkpoints / "round-0000" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"Cohort ct-mr: .*Cohort us: "):
        broken.run()


def test_an_unknown_error_of_one_cohort_is_raised_when_the_other_is_done(tmp_path, monkeypatch):
    run = Consortium(tmp_path)
    save = RunStore.save_round

    def fail(self, record, *args, **kwargs):
        if record.cohort == "us" and record.round == 2:
            raise ZeroDivisionError
        return save(self, record, *args, **kwargs)

    monkeypatch.setattr(RunStore, "save_round", fail)
    with pytest.raises(ZeroDivisionError):
        run.run()
    assert merged_rounds(run, "ct-mr") == [True] * 3
    monkeypatch.undo()
    run.run()
    assert merged_rounds(run, "us") == [True] * 3


@pytest.mark.parametrize("threads", [False, True])
def test_an_interrupt_ends_all_and_frees_their_folders(tmp_path, threads):
    run = Consortium(tmp_path / "run", rounds=8, poll_s=0.05)

    def interrupt(outcome):
        if outcome.round == 1:
            raise KeyboardInterrupt

    grid = run.grid(timer=RealTime() if threads else None)
    with pytest.raises(KeyboardInterrupt):
        run.run(grid=grid, threads=threads, on_round=interrupt)
    assert not [t for t in threading.enumerate() if t.name in ("ct-mr", "us")]
    for store in run.stores.values():
        assert 1 <= store.rounds()[-1] < 8
        with store.writing():  # nobody holds it
            pass
    run.run()
    whole = Consortium(tmp_path / "whole", rounds=8)
    whole.run()
    for name in ("ct-mr", "us"):
        assert run.of(name).digest() == whole.of(name).digest()
