"""Bad updates are refused by name, and the merge is that of a round without the site."""

import os

import numpy as np
import pytest

from agssd_core.protocol import PROTOCOL_VERSION
from server import wire
from simulation.grid import Fault
from tests.support.hostile import forged, hostile
from tests.support.toy import Hospital

NAME = "student/head.w"


def put(value):
    def change(weights):
        weights[NAME][1, 2] = value

    return change


def with_array(name, array):
    return lambda weights: {**weights, name: array}


def nothing(_weights):
    return None


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch):
    """Nobody pulls a plug here: waiting for the disk is most of a toy round's time."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


BAD = {
    "nan": (hostile(put(np.nan)), "non-finite"),
    "inf": (hostile(put(-np.inf)), "non-finite"),
    "huge": (hostile(put(1e30)), "magnitude"),
    "shape": (hostile(with_array(NAME, np.zeros((5, 3), np.float32))), "schema"),
    "broadcast": (hostile(with_array("state/density", np.zeros((1,), np.float32))), "schema"),
    "dtype": (hostile(with_array(NAME, np.zeros((3, 5), np.float64))), "schema"),
    "missing": (hostile(lambda w: {n: a for n, a in w.items() if n != NAME}), "schema"),
    "extra": (hostile(with_array("student/extra", np.zeros(2, np.float32))), "schema"),
    "negative-weight": (hostile(nothing, patient_count=-4), "weight"),
    "no-weight": (hostile(nothing, patient_count=0), "weight"),
    "great-weight": (hostile(nothing, patient_count=10**12), "weight"),
    "other-run": (hostile(nothing, run="run-2"), "run"),
    "other-round": (hostile(nothing, round=0), "round"),
    "other-base": (hostile(nothing, base_digest="0" * 64), "base"),
    "other-nonce": (hostile(nothing, nonce="0" * 32), "nonce"),
    "other-site": (hostile(nothing, site="a"), "site"),
    "fewer-steps": (hostile(nothing, steps=1), "steps"),
    "version": (hostile(nothing, protocol=PROTOCOL_VERSION + 1), "protocol"),
    "altered": (hostile(put(0.5), sealed=False), "digest"),
    "far": (hostile(lambda w: {n: a + (n == NAME) * 900 for n, a in w.items()}), "norm"),
}


@pytest.fixture(scope="module")
def without_b(tmp_path_factory):
    """The same two rounds, of which b takes part in the first only."""
    absent = _hospital(tmp_path_factory.mktemp("absent"))
    absent.run(lambda name, group: Fault(offline=(name, group) == ("b", "1")))
    return absent.digest()


def _hospital(folder):
    return Hospital(folder / "x", rounds=2, max_update_norm=5.0)


@pytest.mark.parametrize("case", BAD)
def test_a_bad_update_is_refused_by_name(tmp_path, without_b, case):
    tamper, reason = BAD[case]
    struck = _hospital(tmp_path)
    struck.run(lambda name, group: Fault(tamper=tamper if (name, group) == ("b", "1") else None))
    assert struck.reasons() == [(1, "b", reason)]
    assert struck.digest() == without_b


def test_an_honest_update_through_the_same_hands_is_admitted(tmp_path, without_b):
    honest = _hospital(tmp_path)
    tamper = hostile(nothing)
    honest.run(lambda name, group: Fault(tamper=tamper if (name, group) == ("b", "1") else None))
    assert honest.reasons() == []
    assert honest.digest() != without_b


def test_flipped_bits_on_the_way_never_reach_the_merge(tmp_path, without_b):
    """Every chunk of the serialised arrays in turn; Flower itself checks no hash here."""
    rng = np.random.default_rng(0)

    def flip(objects):
        chunks = [name for name, data in objects.items() if data.startswith(b"ArrayChunk")]
        name = chunks[int(rng.integers(len(chunks)))]
        data = bytearray(objects[name])
        start = data.index(b"\0") + 1
        data[int(rng.integers(start, len(data)))] ^= 1 << int(rng.integers(8))
        return {**objects, name: bytes(data)}

    for number in range(24):
        struck = _hospital(tmp_path / str(number))
        struck.run(lambda name, group: Fault(corrupt=flip if (name, group) == ("b", "1") else None))
        (reason,) = [reason for _, _, reason in struck.reasons()]
        assert reason in ("digest", "malformed", "non-finite", "magnitude", "schema", "norm")
        assert struck.digest() == without_b


def test_a_replay_of_the_round_before_is_refused(tmp_path, without_b):
    kept = []

    def replay(message):
        return forged(kept[0], message)

    def keep(message):
        kept.append(wire.decode_reply(message, max_bytes=1 << 20))
        return message

    tampers = {("b", "0"): keep, ("b", "1"): replay}
    struck = _hospital(tmp_path)
    struck.run(lambda name, group: Fault(tamper=tampers.get((name, group))))
    assert struck.reasons() == [(1, "b", "round")]
    assert struck.digest() == without_b
