"""Through real rounds: a site that is always late, and one of five that is hostile."""

import os

import numpy as np
import pytest

from agssd_core.protocol import SiteUpdate
from agssd_core.weights import weights_digest
from server import wire
from simulation.grid import Fault
from tests.support.hostile import forged
from tests.support.sealing import weights_in
from tests.support.toy import Hospital, toy_weights

FIVE = tuple((name, 3) for name in "abcde")
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


def _poison(groups):
    """Reply with the base minus ten times the honest step, in these groups, properly sealed."""
    base = toy_weights()

    def tamper(message):
        update = wire.decode_reply(message, max_bytes=1 << 20)
        weights = {name: array.copy() for name, array in weights_in(update).items()}
        for name in weights:
            if name.split("/")[0] in groups:
                weights[name] = base[name] - 10 * (weights[name] - base[name])
        header = {**update.header.__dict__, "weights_digest": weights_digest(weights)}
        return forged(SiteUpdate(type(update.header)(**header), weights), message)

    return lambda name, group: Fault(tamper=tamper if (name, group) == ("b", "0") else None)


def _excess(folder, merge, groups):
    """Merged distance from the honest mean over the largest honest distance, by group."""
    run = Hospital(folder / "x", FIVE, rounds=1, min_sites=5, merge=merge)
    run.run(_poison(groups))
    assert run.reasons() == []
    merged, base = run.weights(), toy_weights()
    keep = run.config.agssd.teacher.momentum_product(0, 4, 4)
    honest = [trainer.shared_weights() for trainer in run.bench.trainers if trainer.site != "b"]
    assert len(honest) == 4
    if run.config.federation.merge.teacher_rule != "average":
        for weights in honest:
            for name in [name for name in weights if name.startswith("teacher/")]:
                student = weights["student/" + name.removeprefix("teacher/")]
                weights[name] = keep * base[name] + (1 - keep) * student
    found = {}
    for kind in ("student", "teacher"):
        flat = [_flat(weights, kind) for weights in honest]
        middle = np.mean(flat, axis=0)
        reach = max(np.linalg.norm(vector - middle) for vector in flat)
        found[kind] = float(np.linalg.norm(_flat(merged, kind) - middle) / reach)
    return found


def _flat(weights, kind):
    names = sorted(name for name in weights if name.startswith(f"{kind}/"))
    return np.concatenate([weights[name].ravel().astype(np.float64) for name in names])


@pytest.mark.parametrize("groups", [("student",), ("teacher",), ("student", "teacher")], ids=str)
@pytest.mark.parametrize("student", ["trimmed-mean", "median", "krum"])
def test_robust_rules_hold_one_hostile_site_of_five(tmp_path, student, groups):
    excess = _excess(tmp_path, {"student": student}, groups)
    assert max(excess.values()) <= 1 + 1e-5, excess


@pytest.mark.parametrize("groups", [("student",), ("teacher",), ("student", "teacher")], ids=str)
def test_plain_averaging_is_led_away(tmp_path, groups):
    excess = _excess(tmp_path, {"student": "fedavg"}, groups)
    assert all(excess[group] > 1 for group in groups), excess
