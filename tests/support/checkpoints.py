"""Small checkpoints of a server, and processes that end or fail in the middle of writing one."""

import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

import agssd_core.weights
import server.store
from agssd_core.config import RunConfig, dump_config
from agssd_core.weights import weights_digest
from server.store import RoundRecord, RunStore
from tests.support.merging import model

CONFIG = dump_config(RunConfig())
FILES = ("weights.safetensors", "server_state.safetensors", "manifest.json")


def record_of(index, **changes):
    facts = {"run": "run-1", "round": index, "cohort": "ct-mr", "config": CONFIG}
    return RoundRecord(**(facts | changes))


def store_in(folder, rounds=2, **settings):
    store = RunStore(folder, **settings)
    for index in range(rounds):
        store.save_round(record_of(index), model(index), state={"momentum/x": np.ones(3, "f4")})
    return store


def in_child(action):
    """Exit code of a forked child that runs ``action``; -9 when it was killed."""
    child = os.fork()
    if child == 0:  # pragma: no cover - the child leaves no coverage behind
        with suppress(BaseException):
            os._exit(action() or 0)
        os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def require_whole(folder, allowed):
    """Every checkpoint that exists is whole; the newest is one of ``allowed``."""
    store = RunStore(folder)
    for index in store.rounds():
        found = store.load(index)
        assert weights_digest(found.weights) == weights_digest(model(index))
    newest = store.latest()
    assert newest.round in allowed
    assert newest.passed_over == ()
    return newest.round


def fail_at(monkeypatch_target, step, action):
    """Wrap every call that touches the disk; the ``step``-th one performs ``action`` instead."""
    seen = {"count": -1}

    def counted(function):
        def call(*args, **kwargs):
            seen["count"] += 1
            if seen["count"] == step:
                action()
            return function(*args, **kwargs)

        return call

    monkeypatch_target.setattr(os, "fsync", counted(os.fsync))
    monkeypatch_target.setattr(Path, "replace", counted(Path.replace))
    monkeypatch_target.setattr(Path, "mkdir", counted(Path.mkdir))
    monkeypatch_target.setattr(
        agssd_core.weights, "save_file", counted(agssd_core.weights.save_file)
    )
    monkeypatch_target.setattr(server.store.shutil, "rmtree", counted(server.store.shutil.rmtree))
    return seen


class Bomb:
    def __reduce__(self):
        return os.abort, ()


def steps_of_a_save(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        store = store_in(tmp_path / "count", keep=1)
        seen = fail_at(patch, -2, lambda: None)
        store.save_round(record_of(2), model(2))
        return seen["count"] + 1
