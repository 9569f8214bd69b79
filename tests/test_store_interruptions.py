"""Kills and failing disks leave whole checkpoints."""

import os
import random
import resource
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from agssd_core.errors import CheckpointError
from server.store import RunStore
from tests.support.checkpoints import (
    FILES,
    fail_at,
    in_child,
    record_of,
    require_whole,
    steps_of_a_save,
    store_in,
)
from tests.support.merging import model


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
