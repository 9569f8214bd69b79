"""Through real rounds: a site that is always late, and one of five that is hostile."""

import os

import pytest

from simulation.grid import Fault
from tests.support.poison import excess_of, poisoned
from tests.support.toy import Hospital

T2 = {"teacher": "server-ema"}


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch):
    """Nobody pulls a plug here: waiting for the disk is most of a toy round's time."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def slow_b(name, group):
    """b needs 150 s for an order whose deadline is 100 s, and a needs 60 s."""
    trains = group != "hello"
    return Fault(delay_s={"a": 60.0, "b": 150.0}.get(name, 0.0) if trains else 0.0)


@pytest.mark.parametrize("late", ["discard", "stale"])
def test_a_site_that_is_always_late_stalls_no_round(tmp_path, late):
    run = Hospital(tmp_path / "x", rounds=6, late=late, merge=T2)
    grid = run.grid(slow_b)
    run.run(grid=grid)
    assert [row["merged"] for row in run.rows("merge")] == [True] * 6
    # Every round closes at the deadline, none later.
    assert grid.time.clock() <= 6 * 101 + 35
    missed = [number for number, site, why in run.reasons() if (site, why) == ("b", "no-reply")]
    assert missed == list(range(6))
    word = "late" if late == "discard" else "late-merged"
    came = [number for number, site, why in run.reasons() if (site, why) == ("b", word)]
    assert came == list(range(1, 6))
    shares = [row["shares"].get("b", 0.0) for row in run.rows("merge")]
    assert [share > 0 for share in shares] == [late == "stale" and n > 0 for n in range(6)]


def test_discarding_the_late_leaves_the_weights_of_a_run_without_them(tmp_path):
    late = Hospital(tmp_path / "late", rounds=4)
    absent = Hospital(tmp_path / "absent", rounds=4, patients=(("a", 3), ("c", 4)))
    late.run(slow_b)
    absent.run()
    assert late.digest() == absent.digest()


@pytest.mark.parametrize("groups", [("student",), ("teacher",), ("student", "teacher")], ids=str)
@pytest.mark.parametrize("student", ["trimmed-mean", "median", "krum"])
def test_robust_rules_hold_one_hostile_site_of_five(tmp_path, student, groups):
    excess = excess_of(poisoned(tmp_path, {"student": student}, groups))
    assert max(excess.values()) <= 1 + 1e-5, excess


@pytest.mark.parametrize("groups", [("student",), ("teacher",), ("student", "teacher")], ids=str)
def test_plain_averaging_is_led_away(tmp_path, groups):
    excess = excess_of(poisoned(tmp_path, {"student": "fedavg"}, groups))
    assert all(excess[group] > 1 for group in groups), excess
