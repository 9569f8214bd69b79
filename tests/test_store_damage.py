"""A damaged checkpoint says so, and nobody goes on from before it unasked."""

import pickle
import random

import pytest

from agssd_core.errors import CheckpointError
from tests.support.checkpoints import (
    CONFIG,
    FILES,
    Bomb,
    record_of,
    require_whole,
    store_in,
)
from tests.support.merging import model


@pytest.mark.parametrize("file", FILES)
def test_a_flipped_byte_is_found_wherever_it_is(file, tmp_path):
    store = store_in(tmp_path)
    path = store.checkpoints / "round-0001" / file
    good = path.read_bytes()
    rng = random.Random(0)
    for position in [0, 1, len(good) - 2, *(rng.randrange(len(good)) for _ in range(25))]:
        damaged = bytearray(good)
        damaged[position] ^= 0x10
        path.write_bytes(bytes(damaged))
        with pytest.raises(CheckpointError, match="Restore it from a backup"):
            store.load(1)
        assert store.latest().passed_over == (1,)
    path.write_bytes(good)
    assert store.latest().round == 1


@pytest.mark.parametrize("file", FILES)
def test_a_missing_or_short_file_is_found(file, tmp_path):
    store = store_in(tmp_path)
    path = store.checkpoints / "round-0001" / file
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CheckpointError, match="round 1 is damaged"):
        store.load(1)
    path.unlink()
    with pytest.raises(CheckpointError, match="round 1 is damaged"):
        store.load(1)
    with pytest.raises(CheckpointError, match="round 1 is damaged"):
        store.reader(1)


def test_nobody_goes_on_from_before_a_damaged_checkpoint_unasked(tmp_path, caplog):
    store = store_in(tmp_path, rounds=3)
    path = store.checkpoints / "round-0002/weights.safetensors"
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="move it out of checkpoints/ to go on from round 1"):
        store.resume(CONFIG)
    assert "round 2 is damaged" in caplog.text
    assert store.rounds() == [0, 1, 2]
    path.parent.rename(tmp_path / "away")
    assert store.resume(CONFIG).round == 1
    store.save_round(record_of(2), model(2))
    assert require_whole(tmp_path, {2}) == 2
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    store.save_round(record_of(2), model(2))
    assert require_whole(tmp_path, {2}) == 2


def test_all_damaged_is_an_error(tmp_path):
    store = store_in(tmp_path)
    for folder in store.checkpoints.glob("round-*"):
        (folder / "manifest.json").write_text("[]")
    with pytest.raises(CheckpointError, match="all 2 checkpoints"):
        store.latest()


def test_a_checkpoint_under_another_rounds_name_is_refused(tmp_path):
    store = store_in(tmp_path)
    (store.checkpoints / "round-0001").rename(store.checkpoints / "round-0009")
    with pytest.raises(CheckpointError, match="that of round 1"):
        store.load(9)


def test_another_format_is_refused(tmp_path, monkeypatch):
    store = store_in(tmp_path)
    monkeypatch.setattr("server.store.FORMAT", 2)
    with pytest.raises(CheckpointError, match="Use the version that wrote it"):
        store.load(1)


@pytest.mark.parametrize("file", FILES)
def test_pickle_is_refused_even_with_a_matching_digest(file, tmp_path):
    """Reliability row 13."""
    store = store_in(tmp_path)
    folder = store.checkpoints / "round-0001"
    (folder / file).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match="damaged"):
        store.load(1)
    if file != "manifest.json":
        with pytest.raises(CheckpointError, match="cannot be read"):
            store.load(1, verify=False)
