"""Checkpoints appear whole or not at all, and say so when they are damaged."""

import json
import os
import pickle
import random
import resource
import signal
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from agssd_core.config import dump_config, parse_config
from agssd_core.errors import CheckpointError
from agssd_core.weights import weights_digest
from server.manifest import package_versions
from server.store import RunStore
from tests.support.checkpoints import (
    CONFIG,
    FILES,
    Bomb,
    fail_at,
    in_child,
    record_of,
    require_whole,
    steps_of_a_save,
    store_in,
)
from tests.support.merging import model

# --- what is saved


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


# --- damage


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


# --- interruptions


def test_a_server_killed_at_any_step_leaves_whole_checkpoints(tmp_path):
    """Reliability row 3: the process vanishes at each boundary, no clean-up runs."""
    steps = steps_of_a_save(tmp_path)
    assert steps >= 15
    ends = set()
    for step in range(steps):
        folder = tmp_path / str(step)
        store = store_in(folder, keep=1)

        def save_and_vanish(store=store, step=step):
            patch = pytest.MonkeyPatch()
            fail_at(patch, step, lambda: os._exit(9))
            store.save_round(record_of(2), model(2))

        assert in_child(save_and_vanish) == 9
        ends.add(require_whole(folder, {1, 2}))
        # The next server is not hindered by what the dead one left.
        RunStore(folder, keep=1).save_round(record_of(2), model(2))
        assert require_whole(folder, {2}) == 2
        assert not list((folder / "checkpoints").glob(".*"))
    assert ends == {1, 2}


def test_replacing_a_round_survives_a_kill_at_any_step(tmp_path):
    for step in range(steps_of_a_save(tmp_path) + 2):
        store = store_in(tmp_path / str(step))

        def save_and_vanish(store=store, step=step):
            patch = pytest.MonkeyPatch()
            fail_at(patch, step, lambda: os._exit(9))
            store.save_round(record_of(1), model(1))

        assert in_child(save_and_vanish) in (0, 9)
        require_whole(tmp_path / str(step), {0, 1})


def test_a_failing_disk_at_any_step_is_a_typed_error(tmp_path):
    def fail():
        raise OSError(28, "No space left on device", "/secret/path")

    said = []
    for step in range(steps_of_a_save(tmp_path)):
        folder = tmp_path / str(step)
        store = store_in(folder, keep=1)
        with pytest.MonkeyPatch.context() as patch:
            fail_at(patch, step, fail)
            try:
                store.save_round(record_of(2), model(2))
            except CheckpointError as error:
                said.append(str(error))
        assert not list((folder / "checkpoints").glob("*.tmp"))
        require_whole(folder, {1, 2})
    assert len(said) >= 12
    assert all("Free disk space" in text and "secret" not in text for text in said)


def test_nothing_is_renamed_before_it_is_on_the_disk(tmp_path, monkeypatch):
    """A power cut cannot be staged, so the order of the calls is what is checked."""
    store, trail = store_in(tmp_path), []
    fsync, replace = os.fsync, Path.replace

    def named_fsync(descriptor):
        trail.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink().name))
        fsync(descriptor)

    def named_replace(path, target):
        trail.append(("rename", path.name, target.name))
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", named_fsync)
    monkeypatch.setattr(Path, "replace", named_replace)
    store.save_round(record_of(2), model(2))
    published = trail.index(("rename", ".round-0002.tmp", "round-0002"))
    assert trail[published + 1 :] == [("sync", "checkpoints")]
    for file in FILES:
        renamed = next(i for i, call in enumerate(trail) if call[-1] == file)
        assert renamed < published
        assert trail[renamed - 1] == ("sync", trail[renamed][1])
        assert trail[renamed + 1] == ("sync", ".round-0002.tmp")


def test_kill_9_at_random_moments(tmp_path):
    store = store_in(tmp_path, rounds=1)
    rng = random.Random(1)
    for _ in range(12):
        before = store.rounds()[-1]
        child = os.fork()
        if child == 0:  # pragma: no cover
            with suppress(BaseException):
                for index in range(before + 1, 10_000):
                    store.save_round(record_of(index), model(index))
            os._exit(1)
        patience = time.monotonic() + 30
        while store.rounds()[-1] == before and time.monotonic() < patience:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert store.latest().passed_over == ()
    require_whole(tmp_path, set(range(12, 10_000)))


def test_a_full_disk_leaves_no_partial_checkpoint(tmp_path):
    """Reliability row 4, by a limit on file size that the kernel enforces."""
    store = store_in(tmp_path)

    def save_on_a_full_disk():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, 512))
        try:
            store.save_round(record_of(2), model(2))
        except CheckpointError as error:
            return 7 if "Free disk space" in str(error) else 8
        return 0

    assert in_child(save_on_a_full_disk) == 7
    assert require_whole(tmp_path, {1}) == 1
    assert sorted(p.name for p in store.checkpoints.iterdir()) == ["round-0000", "round-0001"]


# --- one writer


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


# --- resuming


@pytest.mark.parametrize(
    "override",
    [
        "seed=1",
        "threads=2",
        "federation.rounds=21",
        "federation.merge.max_weight=0.5",
        "agssd.cvac.n_local=3",
        "training.batch_size=4",
        "preset=base",
    ],
)
def test_a_config_that_changes_the_result_cannot_resume(override, tmp_path):
    store = store_in(tmp_path)
    other = dump_config(parse_config({}, [override]))
    with pytest.raises(CheckpointError, match=override.split("=")[0].replace(".", r"\.")) as caught:
        store.resume(other)
    assert "Resume with the run's own configuration" in str(caught.value)
    assert store.rounds() == [0, 1]


@pytest.mark.parametrize(
    "override",
    ["name=other", "tracking.mlflow=true", "federation.deadline_s=5", "federation.keep=3"],
)
def test_a_config_that_changes_no_bit_may_resume(override, tmp_path):
    store = store_in(tmp_path)
    assert store.resume(dump_config(parse_config({}, [override]))).round == 1


# --- metrics


def _rows(log, rounds):
    for index in rounds:
        for site in ("a", "b"):
            log.append({"round": index, "kind": "site", "site": site, "metrics": {"loss": 0.5}})


@pytest.mark.parametrize(
    "torn", [b"", b'{"round": 2, "ki', b'{"round": 0, "kind": "merge"}', b"\x00\xff\n", b"7\n"]
)
def test_a_resumed_runs_metrics_equal_an_uninterrupted_ones(torn, tmp_path):
    straight = RunStore(tmp_path / "straight")
    _rows(straight.metrics, range(4))
    store = store_in(tmp_path / "resumed", rounds=3)
    _rows(store.metrics, range(3))  # round 2 was written, its checkpoint was not
    with store.metrics.path.open("ab") as stream:
        stream.write(torn)
    assert len(store.metrics.rows()) >= 6
    checkpoint = store.resume(CONFIG)
    _rows(store.metrics, range(checkpoint.round, 4))
    kept = store.metrics.path.read_bytes()
    if torn.endswith(b"}"):
        assert kept.replace(torn + b"\n", b"") == straight.metrics.path.read_bytes()
    else:
        assert kept == straight.metrics.path.read_bytes()


def test_recovering_a_sound_file_leaves_it_alone(tmp_path):
    log = RunStore(tmp_path).metrics
    assert log.recover(0) == 0
    assert log.rows() == []
    _rows(log, range(2))
    before = log.path.stat().st_mtime_ns
    assert log.recover(2) == 0
    assert log.path.stat().st_mtime_ns == before
    assert log.recover(1) == 2


def test_a_metric_that_is_not_finite_is_refused(tmp_path):
    log = RunStore(tmp_path).metrics
    with pytest.raises(CheckpointError, match="could not be written"):
        log.append({"round": 0, "metrics": {"loss": float("nan")}})
    assert log.rows() == []
