"""Federated AG-SSD with the real trainer, against plain training, bit for bit."""

from functools import partial

import numpy as np
import pytest

from agssd_core.data.cache import SiteVolumes
from agssd_core.training.build import optimiser_tensors
from agssd_core.training.site_round import SiteTrainer
from agssd_core.weights import load_weights, weights_digest
from client import site as site_module
from client.app import make_app
from client.site import Site, close_sites, named_site
from client.workbench import AgssdWorkbench
from server.rounds import run_rounds
from simulation.engines import federate
from simulation.grid import InProcessGrid
from tests.support.federated import federated_config, started_run
from tests.support.orders import order_for
from tests.support.sites import make_site

pytestmark = pytest.mark.federation

ROUNDS, STEPS = 3, 2


class Killed(BaseException):
    """The end of a process."""


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Weights and optimiser of ROUNDS * STEPS steps in one go, and the site."""
    folder = tmp_path_factory.mktemp("plain")
    site = make_site(folder / "north", "CT", seed=1)
    config = _config(folder)
    trainer = SiteTrainer(config, SiteVolumes.open(site, config.data), site="north")
    trainer.load(started_run(config, folder / "run").load(0).weights)
    trainer.train_steps(0, ROUNDS * STEPS, ROUNDS * STEPS)
    optimiser = {
        f"optimiser/{name}": np.atleast_1d(tensor.numpy())
        for name, tensor in optimiser_tensors(
            trainer.learner.model, trainer.learner.optimiser
        ).items()
    }
    return trainer.shared_weights(), optimiser, site, weights_digest(optimiser)


def _config(folder, **federation):
    federation = {"rounds": ROUNDS, "steps_per_round": STEPS, "expected_sites": 1} | federation
    return federated_config(folder, federation=federation)


def _optimiser_at(site, run="run-1"):
    (manifest,) = (site / "federation" / run).glob("round-*/state/manifest.json")
    (arrays,) = manifest.parent.glob("state-*.safetensors")
    found = load_weights(arrays)
    return {name: array for name, array in found.items() if name.startswith("optimiser/")}


def _own_copy(site, folder):
    """The same prepared scans in a site of its own, so that runs do not share federation/."""
    target = folder / site.name
    target.mkdir(parents=True)
    for entry in site.iterdir():
        if entry.name != "federation":
            (target / entry.name).symlink_to(entry)
    return target


@pytest.mark.parametrize("rule", ["average", "local"])
def test_one_site_equals_plain_training_with_its_optimiser(tmp_path, plain, rule):
    weights, optimiser, prepared, _ = plain
    site = _own_copy(prepared, tmp_path)
    config = _config(tmp_path, merge={"teacher": rule})
    store = started_run(config, tmp_path / "run")
    federate(config, {"north": site}, tmp_path / "run")
    _assert_equal_to_plain(store, site, weights, optimiser, rule=rule)


def _assert_equal_to_plain(store, site, weights, optimiser, *, rule):
    assert {name.split("/")[0] for name in weights} == {"student", "teacher", "state"}
    assert len(optimiser) > 10
    first = store.load(0).weights
    moved = [name for name in weights if weights[name].tobytes() != first[name].tobytes()]
    assert {name.split("/")[0] for name in moved} == {"student", "teacher", "state"}
    student = {n: a for n, a in weights.items() if not n.startswith("teacher/")}
    final = store.load(ROUNDS).weights
    assert weights_digest({n: final[n] for n in student}) == weights_digest(student)
    assert weights_digest(_optimiser_at(site)) == weights_digest(optimiser)
    if rule == "average":
        assert weights_digest(final) == weights_digest(weights)
    else:
        (local,) = (site / "federation" / "run-1").glob("round-*/local.safetensors")
        teacher = {n: a for n, a in weights.items() if n.startswith("teacher/")}
        assert weights_digest(load_weights(local)) == weights_digest(teacher)


@pytest.mark.parametrize(
    ("rule", "dies_at"),
    [
        ("average", (0, "train")),
        ("average", (1, "saved")),
        ("local", (1, "saved")),
        ("local", (1, "train")),
        ("average", (2, "saved")),
        ("local", (2, "train")),
    ],
    ids=str,
)
def test_it_also_does_across_a_kill_and_a_resume(tmp_path, plain, monkeypatch, rule, dies_at):
    weights, optimiser, prepared, _ = plain
    site = _own_copy(prepared, tmp_path)
    config = _config(tmp_path, merge={"teacher": rule})
    store = started_run(config, tmp_path / "run")
    monkeypatch.setattr(site_module, "leaving", _dying(site_module.leaving, dies_at, "train"))
    commit = site_module.RunMemory.commit
    monkeypatch.setattr(site_module.RunMemory, "commit", _dying(commit, dies_at, "saved"))
    with pytest.raises(Killed):
        federate(config, {"north": site}, tmp_path / "run")
    monkeypatch.undo()
    close_sites()
    federate(config, {"north": site}, tmp_path / "run")
    _assert_equal_to_plain(store, site, weights, optimiser, rule=rule)
    assert not any(row["metrics"]["optimiser_reset"] for row in store.metrics.rows() if row["site"])


def _dying(original, dies_at, place):
    calls = []

    def call(*args, **kwargs):
        calls.append(1)
        # ``leaving`` is called twice in a round, ``commit`` once.
        number = (len(calls) - 1) // (2 if place == "train" else 1)
        if (number, place) == dies_at:
            raise Killed
        return original(*args, **kwargs)

    return call


def test_identical_sites_equal_one(tmp_path, plain):
    """Three folders with one site's scans, whose trainers draw from one site's seed."""

    class OneSeed(AgssdWorkbench):
        def trainer(self, folder, config, *, site):
            assert site in ("one", "two", "three")
            return super().trainer(folder, config, site="north")

    weights, _, prepared, _ = plain
    names = ("one", "two", "three")
    sites = {name: _own_copy(prepared, tmp_path / name) for name in names}
    config = _config(tmp_path)
    store = started_run(config, tmp_path / "run")
    bench = OneSeed()
    app = make_app(partial(named_site, workbench=bench))
    grid = InProcessGrid(app, sites)
    run_rounds(grid, config, store, clock=grid.time.clock, sleep=grid.time.sleep, threads=False)
    assert {row["site"] for row in store.metrics.rows() if row["kind"] == "site"} == set(names)
    for name, array in store.load(ROUNDS).weights.items():
        np.testing.assert_allclose(array, weights[name], rtol=1e-6, atol=1e-7)


def test_a_local_teacher_is_replaced_after_a_missed_round(tmp_path, plain):
    """Round 1 is missed; round 2 starts from the server's teacher, round 3 from its own."""
    started = {}

    class Watched(AgssdWorkbench):
        def trainer(self, folder, config, *, site):
            trainer = super().trainer(folder, config, site=site)
            train = trainer.train_steps

            def train_steps(first_step, steps, total_steps):
                started[first_step // steps] = _teacher(trainer.shared_weights())
                return train(first_step, steps, total_steps)

            trainer.train_steps = train_steps
            return trainer

    folder = _own_copy(plain[2], tmp_path)
    config = _config(tmp_path, rounds=4, merge={"teacher": "local"})
    base = started_run(config, tmp_path / "run").load(0).weights
    for number in (0, 2, 3):
        # A new process each time: state and teacher come from disk.
        order = order_for(base, number, config)
        Site(folder, "north", Watched()).train_round(order, base)
    server = weights_digest(_teacher(base))
    assert weights_digest(started[0]) == weights_digest(started[2]) == server
    assert weights_digest(started[3]) != server


def _teacher(weights):
    return {name: array for name, array in weights.items() if name.startswith("teacher/")}


def test_a_site_that_was_rolled_back_resets_its_optimiser_and_says_so(tmp_path, plain):
    site = _own_copy(plain[2], tmp_path)
    config = _config(tmp_path)
    store = started_run(config, tmp_path / "run")
    federate(config, {"north": site}, tmp_path / "run")
    for number in (2, 3):
        (store.checkpoints / f"round-{number:04d}").rename(store.folder / f"old-{number}")
    federate(config, {"north": site}, tmp_path / "run")
    flags = [row["metrics"]["optimiser_reset"] for row in store.metrics.rows() if row["site"]]
    # The site no longer has the state of round 0 that round 1 needs.
    assert flags == [0.0, 1.0, 0.0]
