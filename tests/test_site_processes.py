"""A site that trains in several processes, through its real client: as one process would."""

import shutil
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch

from agssd_core.config import parse_config
from agssd_core.data.cache import SiteVolumes
from agssd_core.errors import CollapseError, ConfigError, OrderRefusedError, TrainingError
from agssd_core.training.checkpoint import StateStamp, read_site_state
from agssd_core.training.process_trainer import ProcessTrainer
from agssd_core.training.site_round import SiteTrainer
from agssd_core.training.worker import visible_processes
from client.site import Site, close_sites
from client.workbench import AgssdWorkbench
from simulation.engines import federate
from tests.support.federated import federated_config, started_run
from tests.support.orders import order_for
from tests.support.sites import make_site
from tests.support.training import merged, small_config

ROUNDS, STEPS = 2, 2


class Killed(BaseException):
    """The end of a process."""


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    return make_site(tmp_path_factory.mktemp("processes") / "north", "CT", seed=1)


def config_with(folder, processes, **changes):
    plain = {
        "training": {"batch_size": 4, "processes": processes, "device": "cpu"},
        "federation": {"rounds": ROUNDS, "steps_per_round": STEPS, "expected_sites": 1},
    }
    return federated_config(folder, **merged(plain, changes))


def site_of(prepared, folder):
    shutil.copytree(prepared, folder, ignore=shutil.ignore_patterns("federation"))
    return folder


def assert_close(found, expected, *, steps=ROUNDS * STEPS):
    """Summing a batch in another order changes last bits, which Adam scales up in few places."""
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        apart = np.abs(found[name] - array)
        if name.startswith("state/"):
            assert apart.max() <= 1e-5, name
        # Where a gradient is rounding alone (a key's bias has no influence) its sign is chance.
        elif not name.endswith(("qkv.bias", "key_value.bias")):
            assert np.mean(apart > 1e-5) < 0.005, name
        assert apart.max() < 1e-3 * steps, name


@pytest.mark.federation
def test_a_federation_with_two_processes_a_site_resumes_and_equals_one(tmp_path, prepared):
    ends, rows = {}, {}
    for processes in (1, 2):
        place = tmp_path / str(processes)
        site = site_of(prepared, place / "north")
        config = config_with(place, processes)
        store = started_run(config, place / "run")

        def die(_, processes=processes):
            if processes == 2:
                raise Killed

        with pytest.raises(Killed) if processes == 2 else nullcontext():
            federate(config, {"north": site}, place / "run", on_round=die)
        close_sites()
        federate(config, {"north": site}, place / "run")
        close_sites()
        ends[processes] = store.load(ROUNDS).weights
        rows[processes] = [r["metrics"] for r in store.metrics.rows() if r["kind"] == "site"]
        assert not list((site / "federation").glob(".job-*"))
    assert_close(ends[2], ends[1])
    start = started_run(config_with(tmp_path, 1), tmp_path / "start").load(0).weights
    moved = [np.abs(ends[1][n] - start[n]).max() for n in start if n.startswith("student/")]
    assert np.median(moved) > 1e-4  # far beyond the tolerance
    for one, two in zip(rows[1], rows[2], strict=True):
        assert two["optimiser_reset"] == 0
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-4)
        assert two["monitor_volumes"] == one["monitor_volumes"]


@pytest.mark.federation
def test_a_site_may_change_from_several_processes_to_one(tmp_path, prepared):
    """A state that several processes left is one that a single process goes on from."""
    config = config_with(tmp_path, 2, federation={"merge": {"teacher": "local"}})
    site = site_of(prepared, tmp_path / "north")
    trainer = AgssdWorkbench().trainer(site, config, site="north")
    assert isinstance(trainer, ProcessTrainer)
    alone = SiteTrainer(config, SiteVolumes.open(site, config.data), site="north")
    trainer.load(alone.shared_weights())
    with pytest.raises(TrainingError, match="Train first"):
        trainer.save_state(tmp_path / "state", StateStamp("r", 0, "p"))
    stamp = StateStamp("r", 0, "p")
    trainer.train_steps(0, STEPS, 8)
    trainer.save_state(tmp_path / "state", stamp)

    alone.train_steps(0, STEPS, 8)
    alone.save_state(tmp_path / "other", stamp)
    found, expected = (read_site_state(tmp_path / n, stamp) for n in ("state", "other"))
    assert found.numbers == expected.numbers
    assert {n: a.shape for n, a in found.arrays.items()} == {
        n: a.shape for n, a in expected.arrays.items()
    }
    assert any(name.startswith("teacher/") for name in found.arrays)

    student = {n: a for n, a in alone.shared_weights().items() if not n.startswith("teacher/")}
    fresh = ProcessTrainer(config, site, site="north", processes=2)
    fresh.load(student)
    assert not fresh.load_state(tmp_path / "state", StateStamp("r", 1, "p"))
    assert fresh.load_state(tmp_path / "state", stamp)
    assert fresh.shared_weights().keys() == alone.shared_weights().keys()
    single = SiteTrainer(config, SiteVolumes.open(site, config.data), site="north")
    single.load(student)
    assert single.load_state(tmp_path / "state", stamp)
    assert single.train_steps(STEPS, STEPS, 8)["optimiser_reset"] == 0
    alone.train_steps(STEPS, STEPS, 8)
    assert_close(single.shared_weights(), alone.shared_weights())


@pytest.mark.federation
def test_a_collapse_in_the_processes_declines_the_order(tmp_path, prepared):
    changes = {
        "monitor": {"stop_on_collapse": True, "gate_nat": 10.0, "window": 16},
        "federation": {"rounds": 1, "steps_per_round": 4},
    }
    config = config_with(tmp_path, 2, **changes)
    site = site_of(prepared, tmp_path / "north")
    base = started_run(config, tmp_path / "run").load(0).weights
    with pytest.raises(OrderRefusedError, match="collapsed") as refused:
        Site(site, "north", AgssdWorkbench()).train_round(order_for(base, 0, config), base)
    assert refused.value.reason == "collapsed"
    assert issubclass(CollapseError, TrainingError)


def test_a_process_for_each_gpu_that_the_batch_divides_by(monkeypatch):
    assert visible_processes(small_config()) == 1
    assert visible_processes(small_config(training={"batch_size": 4, "processes": 2})) == 2
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    asked = partial(small_config, training={"batch_size": 8})
    assert visible_processes(asked()) == 2
    assert visible_processes(small_config(training={"batch_size": 9})) == 3
    assert visible_processes(small_config(training={"batch_size": 9, "accumulate": 3})) == 3
    assert visible_processes(small_config(training={"batch_size": 8, "accumulate": 8})) == 1
    assert visible_processes(small_config(training={"batch_size": 9, "device": "cpu"})) == 1
    four = {"batch_size": 8, "processes": 4}
    with pytest.raises(TrainingError, match=r"Use training\.processes = 0"):
        visible_processes(small_config(training=four))
    assert visible_processes(small_config(training={**four, "device": "cpu"})) == 4


def test_processes_that_cannot_share_the_batch_are_refused_when_the_config_is_read():
    for training in ({"batch_size": 8, "processes": 3}, {"accumulate": 4, "processes": 4}):
        with pytest.raises(ConfigError, match=r"a multiple of processes \* accumulate"):
            parse_config({"training": training})
