"""The real ANAUS trainer in rounds: one site equals plain training, identical sites equal one."""

import os
from functools import partial

import numpy as np
import pytest

from agssd_core.config import dump_config
from agssd_core.training.anaus_build import build_pair, lars_tensors
from agssd_core.training.anaus_round import AnausTrainer
from agssd_core.weights import load_weights, weights_digest
from client import site as site_module
from client.app import make_app
from client.site import Site, SiteFacts
from server.manifest import RoundRecord
from server.rounds import run_rounds
from server.store import RunStore
from simulation.grid import Fault, InProcessGrid
from tests.support.killing import Killed
from tests.support.us import MemoryFrames, us_config

pytestmark = pytest.mark.federation

ROUNDS, STEPS = 3, 2
GROUP = {"backbone": {"norm": "group"}}
NORMS = {"group": GROUP, "batch": {}, "batch-shared": {"share_statistics": True}}


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch):
    """Nobody pulls a plug here: waiting for the disk is most of a tiny round's time."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


class FrameBench:
    """ANAUS on frames in memory; ``seeds`` draws a site's frames, ``named`` its random numbers."""

    def __init__(self, named=None):
        self.named, self.trainers = named, []

    def facts(self, _folder, cohort):
        return SiteFacts(3 if cohort == "us" else 0, 6)

    def trainer(self, _folder, config, *, site):
        site = self.named or site
        frames = MemoryFrames(seed=sum(site.encode()))
        self.trainers.append(AnausTrainer(config, frames, site=site, sites=1))
        return self.trainers[-1]


def configured(norm, **federation):
    plan = {"rounds": ROUNDS, "steps_per_round": STEPS, "expected_sites": 1, **federation}
    small = {"batch_size": 2, "regions": {"scales": [2, 8], "per_view": 2}}
    return us_config(anaus=small | NORMS[norm], federation=plan)


def started(config, folder):
    store = RunStore(folder / "run")
    record = RoundRecord("run-1", 0, "us", dump_config(config))
    store.save_round(record, build_pair(config.anaus, seed=config.seed).shared_weights())
    return store


def run(config, store, folder, *, names=("north",), bench=None, faults=None):
    """All rounds by a fresh process at every site."""
    sites = {name: folder / "sites" / name for name in names}
    for place in sites.values():
        place.mkdir(parents=True, exist_ok=True)
    opened = {name: Site(place, name, bench or FrameBench()) for name, place in sites.items()}
    grid = InProcessGrid(make_app(lambda node: opened[node["name"]]), sites, faults=faults)
    return run_rounds(
        grid, config, store, clock=grid.time.clock, sleep=grid.time.sleep, threads=False
    )


@pytest.fixture(scope="module", params=list(NORMS))
def plain(request):
    """Norm, weights and what stays at the site after all steps in one go."""
    config = configured(request.param)
    trainer = AnausTrainer(config, MemoryFrames(seed=sum(b"north")), site="north", sites=1)
    trainer.load(build_pair(config.anaus, seed=config.seed).shared_weights())
    trainer.train_steps(0, ROUNDS * STEPS, ROUNDS * STEPS)
    return request.param, trainer.shared_weights(), _kept(trainer)


def _kept(trainer):
    pair, optimiser = trainer.learner.pair, trainer.learner.optimiser
    found = {f"optimiser/{name}": tensor for name, tensor in lars_tensors(pair, optimiser).items()}
    found |= {f"statistics/{name}": buffer for name, buffer in pair.norm_buffers().items()}
    return {name: np.atleast_1d(tensor.detach().numpy().copy()) for name, tensor in found.items()}


def _on_disk(folder):
    (manifest,) = folder.glob("sites/north/federation/run-1/round-*/state/manifest.json")
    (file,) = manifest.parent.glob("state-*.safetensors")
    held = load_weights(file)
    return {n: a for n, a in held.items() if n.startswith(("optimiser/", "statistics/"))}


def test_one_site_equals_plain_training_across_kills_and_resumes(tmp_path, plain, monkeypatch):
    norm, weights, kept = plain
    config = configured(norm)
    store = started(config, tmp_path)
    first = store.load(0).weights
    commit, calls = site_module.RunMemory.commit, []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) in (1, 3, 4):  # twice in round 1: trained, and then not kept
            raise Killed
        return commit(*args, **kwargs)

    monkeypatch.setattr(site_module.RunMemory, "commit", dying)
    kills = 0
    while store.latest().round < ROUNDS:
        try:
            run(config, store, tmp_path)
        except Killed:
            kills += 1
    assert kills == 3
    assert weights_digest(store.load(ROUNDS).weights) == weights_digest(weights)
    assert weights_digest(_on_disk(tmp_path)) == weights_digest(kept)
    assert not any(row["metrics"]["optimiser_reset"] for row in store.metrics.rows() if row["site"])
    moved = {n.split("/")[0] for n in first if first[n].tobytes() != weights[n].tobytes()}
    assert moved == {"student", "teacher"} | ({"state"} if norm == "batch-shared" else set())
    assert any(n.startswith("statistics/") for n in kept) == (norm != "group")


def test_identical_sites_equal_one(tmp_path, plain):
    norm, weights, _ = plain
    config = configured(norm)
    store = started(config, tmp_path)
    run(config, store, tmp_path, names=("one", "two"), bench=FrameBench("north"))
    for name, array in store.load(ROUNDS).weights.items():
        np.testing.assert_allclose(array, weights[name], rtol=1e-5, atol=1e-6)


def test_order_of_arrival_changes_no_bit(tmp_path):
    digests = set()
    for place, delays in (("one", {}), ("two", {"east": 30.0})):
        config = configured("batch-shared", rounds=2, steps_per_round=1)
        store = started(config, tmp_path / place)
        run(
            config,
            store,
            tmp_path / place,
            names=("north", "east"),
            faults=partial(_delayed, delays),
        )
        digests.add(store.load(2).manifest.weights_digest)
    assert len(digests) == 1


def _delayed(delays, name, group):
    return Fault(delay_s=0.0 if group == "hello" else delays.get(name, 0.0))


@pytest.mark.parametrize(
    ("student", "names"), [("krum", "abcde"), ("norm-clip", "ab"), ("fedema", "a")], ids=str
)
def test_rules_that_look_at_groups_run_without_any_state(tmp_path, student, names):
    plan = {"rounds": 2, "steps_per_round": 1, "expected_sites": len(names)}
    merge = {"student": student}
    config = configured("group", **plan, min_sites=len(names), merge=merge)
    store = started(config, tmp_path)
    assert run(config, store, tmp_path, names=names).merged_rounds == 2
    weights = store.load(2).weights
    assert not [name for name in weights if name.startswith("state/")]
    assert all(np.isfinite(array).all() for array in weights.values())


def test_merged_statistics_of_two_sites_are_their_moments(tmp_path):
    config = configured("batch-shared", rounds=1)
    store, bench = started(config, tmp_path), FrameBench()
    run(config, store, tmp_path, names=("north", "south"), bench=bench)
    merged = store.load(1).weights
    for name in [name for name in merged if name.startswith("state/")]:
        own = [trainer.shared_weights()[name] for trainer in bench.trainers]
        assert own[0].tobytes() != own[1].tobytes()
        np.testing.assert_allclose(merged[name], np.mean(own, axis=0), rtol=1e-5, atol=1e-6)
    names = [name for name in merged if name.endswith(".mean")]
    assert len(names) > 20
    for name in names:  # a variance from merged moments is never negative
        square = merged[name.removesuffix("mean") + "square"].astype(np.float64)
        assert (square - merged[name].astype(np.float64) ** 2 > -1e-5).all()
