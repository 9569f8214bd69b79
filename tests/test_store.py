"""What a checkpoint holds, how many are kept, and that one server writes."""

import json
import os

import numpy as np
import pytest

from agssd_core.errors import CheckpointError
from agssd_core.weights import weights_digest
from server.manifest import package_versions
from server.store import RunStore
from tests.support.checkpoints import (
    CONFIG,
    FILES,
    in_child,
    record_of,
    store_in,
)
from tests.support.merging import model


def test_a_checkpoint_comes_back_with_its_manifest(tmp_path):
    store = RunStore(tmp_path)
    record = record_of(4, sites=("a", "b"), shares={"a": 0.6, "b": 0.4}, extra={"nonce": [1]})
    state = {"momentum/student/x": np.arange(3, dtype="f4")}
    manifest = store.save_round(record, model(1), state=state)
    found = store.load(4)
    assert found.manifest == manifest
    assert found.round == 4
    assert found.manifest.shares == {"a": 0.6, "b": 0.4}
    assert found.manifest.weights_digest == weights_digest(model(1))
    assert weights_digest(found.weights) == weights_digest(model(1))
    assert found.weights["state/density_mean"].shape == ()
    assert weights_digest(found.state) == weights_digest(state)
    assert {"numpy", "agssd-federation", "torch", "flwr"} <= found.manifest.versions.keys()
    assert sorted(p.name for p in (store.checkpoints / "round-0004").iterdir()) == sorted(FILES)
    on_disk = json.loads((store.checkpoints / "round-0004/manifest.json").read_text())
    assert on_disk["config"] == CONFIG


def test_a_package_that_is_missing_is_left_out(monkeypatch):
    monkeypatch.setattr("server.manifest.PACKAGES", ("numpy", "no-such-package"))
    assert list(package_versions()) == ["numpy"]


def test_one_array_at_a_time(tmp_path):
    read = store_in(tmp_path).reader(1)
    np.testing.assert_array_equal(read("student/encoder.bias"), model(1)["student/encoder.bias"])


def test_an_empty_run_has_no_checkpoint(tmp_path):
    store = RunStore(tmp_path / "none")
    assert store.rounds() == []
    assert store.latest() is None
    assert store.resume(CONFIG) is None
    with pytest.raises(CheckpointError, match="start the run"):
        store.load(0)


def test_only_the_newest_are_kept(tmp_path):
    store = store_in(tmp_path, rounds=6, keep=2)
    assert store.rounds() == [3, 4, 5]
    assert store_in(tmp_path / "all", rounds=6).rounds() == list(range(6))
    assert not list(store.checkpoints.glob(".*"))


def test_saving_a_round_again_replaces_it(tmp_path):
    store = store_in(tmp_path)
    store.save_round(record_of(1), model(7))
    assert weights_digest(store.load(1).weights) == weights_digest(model(7))
    assert not list(store.checkpoints.glob(".*"))


def test_two_servers_cannot_write_one_run(tmp_path):
    first, second = store_in(tmp_path), RunStore(tmp_path)
    with first.writing():
        first.save_round(record_of(2), model(2))
        with pytest.raises(CheckpointError, match="another server is writing"), second.writing():
            pass
        with pytest.raises(CheckpointError, match="another server is writing"):
            second.save_round(record_of(2), model(2))
        assert second.latest().round == 2
    second.save_round(record_of(3), model(3))


def test_the_lock_of_a_killed_server_is_gone(tmp_path):
    store = RunStore(tmp_path)

    def hold_and_vanish():
        with store.writing():
            os._exit(5)

    assert in_child(hold_and_vanish) == 5
    with store.writing():
        pass
