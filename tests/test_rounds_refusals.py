"""Bad updates are refused by name, and the merge is that of a round without the site."""

import os

import numpy as np
import pytest

from server import wire
from simulation.grid import Fault
from tests.support.hostile import BAD, forged, hostile, nothing
from tests.support.toy import Hospital


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch):
    """Nobody pulls a plug here: waiting for the disk is most of a toy round's time."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


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
