"""Rounds: sampling, what sites learn, and a pull that hangs."""

import os
import threading
import time

import numpy as np
import pytest

from agssd_core.config import dump_config, parse_config
from agssd_core.errors import CheckpointError
from server.collect import ThreadedPuller, collect
from server.rounds import sample_sites, site_config
from server.store import RunStore
from tests.support.toy import Hospital, ToyTrainer


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch):
    """Nobody pulls a plug here: waiting for the disk is most of a toy round's time."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def hospital(tmp_path):
    return lambda name="x", **kwargs: Hospital(tmp_path / name, **kwargs)


def test_identical_sites_equal_one(hospital):
    # The same seed for data and noise: two folders, one name for the trainer.
    class SameName(ToyTrainer):
        def __init__(self, config, *, site):
            assert site in "abcd"
            super().__init__(config, site="a")

    many = hospital("many", patients=(("a", 3), ("b", 3), ("c", 3), ("d", 3)))
    many.bench.trainer = lambda _folder, config, *, site: SameName(config, site=site)
    one = hospital("one", patients=(("a", 3),))
    many.run(), one.run()
    for name, array in one.weights().items():
        np.testing.assert_allclose(many.weights()[name], array, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    "merge",
    [
        {"student": "fedavgm"},
        {"student": "fedadam"},
        {"student": "fedema"},
        {"student": "fedprox"},
        {"teacher": "local"},
        {"teacher": "copy"},
        {"teacher": "server-ema"},
        {"student": "l-dawa"},
        {"student": "median"},
    ],
    ids=str,
)
def test_every_rule_runs_and_uploads_only_what_it_needs(hospital, merge):
    ruled = hospital(merge=merge, min_sites=3)
    summary = ruled.run()
    assert summary.merged_rounds == 3
    up = {row["bytes_up"] for row in ruled.rows("site")}
    assert (min(up) > 1500) == (ruled.config.federation.merge.teacher_rule == "average")
    assert all(np.isfinite(array).all() for array in ruled.weights().values())


def test_sampling_is_seeded_and_ignores_the_order_of_names():
    federation = parse_config({"federation": {"sites_per_round": 2}}).federation
    names = {name: index for index, name in enumerate("abcde")}
    turned = dict(reversed(names.items()))
    draws = [sample_sites(names, federation, seed=1, number=n) for n in range(40)]
    assert draws == [sample_sites(turned, federation, seed=1, number=n) for n in range(40)]
    assert {name for draw in draws for name in draw} == set(names)
    assert draws != [sample_sites(names, federation, seed=2, number=n) for n in range(40)]


def test_sites_learn_nothing_of_where_the_run_lives():
    config = parse_config(
        {"name": "secret-study", "output": "/srv/trial", "data": {"sites": ["/x"]}}
    )
    text = dump_config(site_config(config))
    assert not [word for word in ("secret-study", "/srv", "/x") if word in text]


def test_a_run_without_round_0_says_how_to_make_one(hospital, tmp_path):
    empty = hospital()
    empty.store = RunStore(tmp_path / "empty")
    with pytest.raises(CheckpointError, match="agssd-sim init"):
        empty.run()


def test_a_changed_configuration_is_refused(hospital):
    changed = hospital()
    changed.run()
    before = changed.config
    changed.config = before.model_copy(update={"seed": 5})
    with pytest.raises(CheckpointError, match="own configuration"):
        changed.run()
    # Sites take their learning rate from this number.
    fewer = before.federation.model_copy(update={"expected_sites": 2})
    changed.config = before.model_copy(update={"federation": fewer})
    with pytest.raises(CheckpointError, match=r"federation\.expected_sites = 2, was 3"):
        changed.run()
    longer = before.federation.model_copy(update={"deadline_s": 7.0})
    changed.config = before.model_copy(update={"federation": longer})
    changed.run()


class _HangingGrid:
    """Pulls of ``bad`` block until the test ends; others answer at once."""

    def __init__(self):
        self.release = threading.Event()

    def pull_messages(self, ids):
        if ids == ["bad"]:
            self.release.wait(20)
            return []
        return [f"reply to {ids[0]}"]


def test_a_hanging_pull_stalls_nobody_else():
    grid = _HangingGrid()
    wanted = dict.fromkeys(["bad", "one", "two", "three"], time.monotonic() + 0.6)
    started = time.monotonic()
    found = collect(
        wanted,
        ThreadedPuller(grid),
        max_bytes=1 << 20,
        poll_s=0.01,
        clock=time.monotonic,
        sleep=time.sleep,
    )
    try:
        assert {identifier for identifier, _ in found} == {"one", "two", "three"}
        assert time.monotonic() - started < 2.0
    finally:
        grid.release.set()
