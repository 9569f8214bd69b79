"""What travels as a difference and what whole, and what coding left over."""

import os

import numpy as np
import pytest

from agssd_core.weights import load_weights, weights_digest
from server import wire as server_wire
from server.downlink import Downlink, next_base
from server.merge import MergeResult, MergeState
from simulation.grid import Fault
from tests.support.coded import CODED, NEAR, Ordered, distance, only
from tests.support.hostile import forged
from tests.support.sealing import weights_in
from tests.support.toy import Hospital, toy_weights

"""Distance from the float32 run, as a share of what that run moved."""


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch):
    """Nobody pulls a plug here: waiting for the disk is most of a toy round's time."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def hospital(tmp_path):
    return lambda name="x", **kwargs: Hospital(tmp_path / name, **kwargs)


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
