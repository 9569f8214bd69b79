"""Rounds whose weights travel as bf16 or int8 differences."""

import json
import os

import numpy as np
import pytest

from agssd_core.weights import load_weights, weights_digest
from client.bases import KeptBase
from server import wire as server_wire
from server.downlink import Downlink, next_base
from server.merge import MergeResult, MergeState
from simulation.grid import Fault
from tests.support.hostile import forged
from tests.support.killing import Killed, Killer, watch_rounds
from tests.support.sealing import weights_in
from tests.support.toy import BATCH, Hospital, toy_weights

CODED = pytest.mark.parametrize("wire", ["bf16", "int8"])
NEAR = 0.005
"""Distance from the float32 run, as a share of what that run moved."""


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch):
    """Nobody pulls a plug here: waiting for the disk is most of a toy round's time."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def hospital(tmp_path):
    return lambda name="x", **kwargs: Hospital(tmp_path / name, **kwargs)


def only(site, number, fault):
    """The fault strikes this site's message of this round."""
    return lambda name, group: fault if (name, group) == (site, str(number)) else Fault()


class Ordered:
    """A grid's pushes, by (site, round): the order as it went out."""

    def __init__(self, run, faults=None):
        self.grid = run.grid(faults)
        self.seen = {}
        push, names = self.grid.push_messages, {101 + i: n for i, n in enumerate(sorted(run.sites))}

        def watched(messages):
            (message,) = messages
            if message.metadata.message_type == "train":
                body = json.loads(message.content["header"]["body"])
                key = (names[message.metadata.dst_node_id], message.metadata.group_id)
                self.seen.setdefault(key, []).append(body["wire"])
            return push([message])

        self.grid.push_messages = watched


def distance(one, two):
    """L2 over all arrays."""
    squares = [float(np.sum((one[n].astype(np.float64) - two[n]) ** 2)) for n in one]
    return float(np.sqrt(sum(squares)))


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


@CODED
@pytest.mark.parametrize(
    "merge",
    [
        {"student": "fedavgm"},
        {"student": "fedadam"},
        {"student": "fedema"},
        {"teacher": "local"},
        {"teacher": "copy"},
        {"teacher": "server-ema"},
        {"student": "norm-clip"},
        {"student": "median"},
    ],
    ids=str,
)
def test_every_rule_ends_near_its_float32_run(hospital, wire, merge):
    plain = hospital("plain", merge=merge, min_sites=3)
    coded = hospital("coded", merge=merge, min_sites=3, wire=wire)
    plain.run(), coded.run()
    assert coded.reasons() == []
    moved = distance(plain.weights(), plain.store.load(0).weights)
    assert distance(coded.weights(), plain.weights()) < 4 * NEAR * moved


@CODED
def test_a_late_reply_is_a_difference_to_its_own_base(hospital, wire):
    settings = {"late": "stale", "merge": {"teacher": "server-ema"}, "rounds": 4}
    delays = {("b", "1"): 150.0, ("a", "2"): 90.0}

    def faults(name, group):
        return Fault(delay_s=delays.get((name, group), 0.0), offline=(name, group) == ("b", "2"))

    plain, coded = hospital("plain", **settings), hospital("coded", wire=wire, **settings)
    plain.run(faults), coded.run(faults)
    assert (2, "b", "late-merged") in coded.reasons()
    moved = distance(plain.weights(), plain.store.load(0).weights)
    assert distance(coded.weights(), plain.weights()) < 4 * NEAR * moved


@CODED
def test_what_the_coding_of_a_reply_left_over_is_added_once(hospital, wire):
    """The site's files after two rounds: decoded + residual = trained + residual before."""
    run = hospital(wire=wire, patients=(("a", 3),), rounds=2)
    left = {}

    def note(outcome):
        (folder,) = (run.sites["a"] / "federation" / "run-1").glob("round-*")
        left[outcome.round] = {
            "residual": load_weights(folder / "residual.safetensors"),
            "trained": load_weights(folder / "local.safetensors"),
        }

    sent = []
    grid = run.grid()
    pull = grid.pull_messages
    grid.pull_messages = lambda ids: [sent.append(m) or m for m in pull(ids)]
    run.run(grid=grid, on_round=note)
    update = server_wire.decode_reply(sent[-1], max_bytes=1 << 20)
    base = run.store.load(1).weights
    decoded = weights_in(update, base)
    assert weights_digest(decoded) == update.header.weights_digest
    for name, array in decoded.items():
        total = array.astype(np.float64) + left[1]["residual"][name]
        wanted = left[1]["trained"][name].astype(np.float64) + left[0]["residual"][name]
        np.testing.assert_allclose(total, wanted, rtol=1e-7, atol=1e-9)
    assert any(array.any() for array in left[0]["residual"].values())


def test_a_site_is_told_to_upgrade_when_it_cannot_read_the_form(hospital, monkeypatch, caplog):
    monkeypatch.setattr("client.site.WIRES", ("float32", "bf16"))
    run = hospital(wire="int8", rounds=1)
    run.run()
    assert "cannot read federation.wire = int8. Upgrade the site" in caplog.text
    assert [row["merged"] for row in run.rows("merge")] == [False]


@pytest.mark.parametrize("wire", ["float32", "bf16"])
def test_an_update_in_another_form_than_ordered_is_refused(hospital, wire):
    other = hospital("other", wire=wire, rounds=1)
    kept = []
    other.run(only("b", 0, Fault(tamper=lambda m: kept.append(m) or m)))
    foreign = server_wire.decode_reply(kept[0], max_bytes=1 << 20)
    struck = hospital("struck", wire="int8", rounds=1)

    def swap(message):
        own = server_wire.decode_reply(message, max_bytes=1 << 20)
        header = {**foreign.header.__dict__, "nonce": own.header.nonce}
        return forged(type(foreign)(type(own.header)(**header), foreign.payload), message)

    struck.run(only("b", 0, Fault(tamper=swap)))
    assert struck.reasons()[0][:2] == (0, "b")
    assert struck.reasons()[0][2] in ("wire", "size")


def test_float32_sends_whole_weights_and_keeps_nothing_more(hospital):
    run = hospital()
    ordered = Ordered(run)
    run.run(grid=ordered.grid)
    assert {form for forms in ordered.seen.values() for form in forms} == {"float32"}
    names = {path.name for path in (run.sites["a"] / "federation").rglob("*") if path.is_file()}
    assert not names & {"base-ct-mr.safetensors", "residual.safetensors", "local.safetensors"}
    assert run.store.latest().state == {}


def test_a_base_is_sent_whole_to_whoever_holds_another(hospital):
    run = hospital(wire="int8")
    run.run()
    down = Downlink(run.store.load(2))
    previous = run.store.load(1).manifest.weights_digest
    forms = {held: down.parcel(held).wire for held in ("", "0" * 64, previous)}
    assert list(forms.values()) == ["float32", "float32", "int8"]
    assert down.parcel(run.store.load(2).manifest.weights_digest).wire == "held"
    assert weights_digest(toy_weights()) == run.store.load(0).manifest.weights_digest


@CODED
def test_what_the_coding_of_a_merge_left_over_is_added_to_the_next(hospital, wire):
    run = hospital(wire=wire, rounds=1)
    run.run()
    base = run.store.load(1)
    before = {n: a for n, a in base.state.items() if n.startswith("residual/")}
    assert any(array.any() for array in before.values())
    merged = {n: a + np.float32(0.01) for n, a in base.weights.items()}
    after = next_base(base, MergeResult(merged, MergeState(), {}), wire=wire)
    for name, array in merged.items():
        wanted = array.astype(np.float64) + before[f"residual/{name}"]
        reached = after.weights[name].astype(np.float64) + after.state[f"residual/{name}"]
        np.testing.assert_allclose(reached, wanted, rtol=1e-7, atol=1e-10)
    assert after.extra["downlink"]["previous"] == base.manifest.weights_digest
