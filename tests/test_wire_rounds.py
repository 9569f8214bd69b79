"""Rounds whose weights travel as bf16 or int8 differences."""

import os

import numpy as np
import pytest

from agssd_core.weights import weights_digest
from client.bases import KeptBase
from simulation.grid import Fault
from tests.support.coded import CODED, NEAR, Ordered, distance, only
from tests.support.killing import Killed, Killer, watch_rounds
from tests.support.toy import BATCH, Hospital

"""Distance from the float32 run, as a share of what that run moved."""


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch):
    """Nobody pulls a plug here: waiting for the disk is most of a toy round's time."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def hospital(tmp_path):
    return lambda name="x", **kwargs: Hospital(tmp_path / name, **kwargs)


@CODED
@pytest.mark.parametrize("anaus", [None, BATCH], ids=["ct-mr", "us"])
def test_it_ends_near_float32_and_two_runs_agree_in_every_bit(hospital, wire, anaus):
    plain = hospital("plain", rounds=8, anaus=anaus)
    one, two = (hospital(name, rounds=8, anaus=anaus, wire=wire) for name in ("one", "two"))
    plain.run(), one.run()
    delays = {"a": 30.0, "b": 20.0, "c": 1.0}
    two.run(lambda name, group: Fault(delay_s=delays[name] if group != "hello" else 0))
    assert one.digest() == two.digest() != plain.digest()
    moved = distance(plain.weights(), plain.store.load(0).weights)
    assert distance(one.weights(), plain.weights()) < NEAR * moved
    assert one.reasons() == []


@CODED
def test_a_first_order_is_whole_and_later_ones_are_differences(hospital, wire):
    run = hospital(wire=wire)
    ordered = Ordered(run)
    run.run(grid=ordered.grid)
    assert ordered.seen == {
        (site, str(number)): [wire if number else "float32"]
        for site in run.sites
        for number in range(3)
    }


@CODED
def test_a_site_that_missed_a_round_gets_the_weights_whole_and_ends_on_the_same_bits(
    hospital, wire
):
    run = hospital(wire=wire, rounds=4)
    ordered = Ordered(run, only("b", 1, Fault(offline=True)))
    run.run(grid=ordered.grid)
    assert ordered.seen["b", "2"] == ["float32"]
    assert ordered.seen["a", "2"] == ordered.seen["b", "3"] == [wire]
    assert [site for number, site, _ in run.reasons()] == ["b"]
    kept = {name: KeptBase.of(folder, "ct-mr").digest() for name, folder in run.sites.items()}
    assert set(kept.values()) == {run.store.load(3).manifest.weights_digest}


@CODED
def test_without_a_merge_nothing_travels_down_and_the_residual_stays(hospital, wire):
    run = hospital(wire=wire, rounds=4, min_sites=3)
    ordered = Ordered(run, only("b", 1, Fault(offline=True)))
    run.run(grid=ordered.grid)
    assert [row["merged"] for row in run.rows("merge")] == [True, False, True, True]
    assert ordered.seen["a", "2"] == ["held"]
    assert ordered.seen["b", "2"] == ["float32"]
    before, after = run.store.load(1).state, run.store.load(2).state
    residual = {n: a for n, a in before.items() if n.startswith("residual/")}
    assert residual
    assert weights_digest(residual) == weights_digest(after)


@CODED
def test_a_lost_reply_is_ordered_again_whole_and_answered_with_the_saved_payload(hospital, wire):
    struck, healthy = hospital("struck", wire=wire), hospital("healthy", wire=wire)
    strikes = iter([True])

    def once(name, group):
        return Fault(upload_fails=(name, group) == ("b", "1") and next(strikes, False))

    ordered = Ordered(struck, once)
    struck.run(grid=ordered.grid)
    healthy.run()
    assert ordered.seen["b", "1"] == [wire, "float32"]
    assert struck.digest() == healthy.digest()
    assert [trainer.steps_taken for trainer in struck.bench.trainers] == [12, 12, 12]


@CODED
def test_a_duplicated_order_is_trained_once(hospital, wire):
    twice, healthy = hospital("twice", wire=wire), hospital("healthy", wire=wire)
    twice.run(lambda _name, _group: Fault(twice=True))
    healthy.run()
    assert twice.digest() == healthy.digest()
    assert twice.reasons() == []
    assert [trainer.steps_taken for trainer in twice.bench.trainers] == [12, 12, 12]


@CODED
@pytest.mark.parametrize("damage", ["missing", "flipped"])
def test_a_lost_base_costs_the_site_nothing_but_bytes(hospital, wire, damage):
    struck, healthy = hospital("struck", wire=wire), hospital("healthy", wire=wire)

    def spoil(outcome):
        if outcome.round == 0:
            file = KeptBase.of(struck.sites["b"], "ct-mr").file
            content = bytearray(file.read_bytes())
            content[-2] ^= 4
            file.write_bytes(content) if damage == "flipped" else file.unlink()

    ordered = Ordered(struck)
    struck.run(grid=ordered.grid, on_round=spoil)
    healthy.run()
    assert ordered.seen["b", "1"] == [wire, "float32"]
    assert ordered.seen["b", "2"] == [wire]
    assert struck.reasons() == []
    assert struck.digest() == healthy.digest()


@CODED
def test_a_resumed_run_still_sends_differences(hospital, wire):
    class StopError(Exception):
        pass

    def stop(_outcome):
        raise StopError

    whole, stopped = hospital("whole", wire=wire), hospital("stopped", wire=wire)
    whole.run()
    for number in range(3):
        ordered = Ordered(stopped)
        with pytest.raises(StopError):
            stopped.run(grid=ordered.grid, on_round=stop)
        assert ordered.seen["a", str(number)] == [wire if number else "float32"]
    assert stopped.digest() == whole.digest()


@CODED
def test_killed_anywhere_and_resumed_ends_with_the_same_bits(hospital, monkeypatch, wire):
    killer = Killer(0)
    watch_rounds(monkeypatch, killer)
    whole = hospital("whole", wire=wire)
    killer.seen = 0
    whole.run()
    points = killer.seen
    assert points > 100
    for at in np.random.default_rng(7).choice(points, size=12, replace=False) + 1:
        run = hospital(f"at-{at}", wire=wire)
        killer.at, killer.seen = int(at), 0
        with pytest.raises(Killed):
            run.run()
        killer.at = -1
        run.run()
        assert run.digest() == whole.digest(), f"killed at point {at} of {points}"
        final, expected = run.store.latest().state, whole.store.latest().state
        assert weights_digest(final) == weights_digest(expected)
