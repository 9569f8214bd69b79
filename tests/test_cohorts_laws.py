"""Laws of merging for the ultrasound cohort: GroupNorm, BatchNorm, and BatchNorm shared."""

import os

import numpy as np
import pytest

from agssd_core.config import MergeConfig
from agssd_core.weights import weights_digest
from server.merge import MergeState, merge_round, site_weights
from simulation.grid import Fault
from tests.support.merging import MemoryUpdates, model, moved, without
from tests.support.toy import BATCH, SHARED, Hospital, ToyTrainer, toy_weights

GROUP = {"backbone": {"norm": "group", "width": 16}}
NORMS = pytest.mark.parametrize(
    "anaus", [GROUP, BATCH, SHARED], ids=["group", "batch", "batch-shared"]
)
EVERY = (
    "fedavg",
    "fedprox",
    "fedema",
    "fedavgm",
    "fedadam",
    "fedyogi",
    "l-dawa",
    "trimmed-mean",
    "median",
    "krum",
    "norm-clip",
)
FIVE = tuple((name, 3) for name in "abcde")


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch):
    """Nobody pulls a plug here: waiting for the disk is most of a toy round's time."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@NORMS
def test_order_of_arrival_changes_no_bit(tmp_path, anaus):
    one, two = Hospital(tmp_path / "one", anaus=anaus), Hospital(tmp_path / "two", anaus=anaus)
    one.run()
    delays = {"a": 30.0, "b": 20.0, "c": 1.0}
    two.run(lambda name, group: Fault(delay_s=delays[name] if group != "hello" else 0))
    waited = {row["site"]: row["seconds"] for row in two.rows("site")}
    assert sorted(waited, key=waited.get) == ["c", "b", "a"]
    assert one.digest() == two.digest()


@NORMS
def test_one_site_equals_plain_training_bit_for_bit(tmp_path, anaus):
    """Every round starts a new process at the site: nothing is warm, all comes from its disk."""
    alone = Hospital(tmp_path, patients=(("a", 3),), rounds=5, anaus=anaus)

    class StopError(Exception):
        pass

    def stop(_outcome):
        raise StopError

    for _ in range(5):
        with pytest.raises(StopError):
            alone.run(on_round=stop)
    plain = ToyTrainer(alone.config, site="a")
    plain.load(toy_weights(cohort="us", shared="share_statistics" in anaus))
    plain.train_steps(0, 20, 20)
    assert weights_digest(alone.weights()) == weights_digest(plain.shared_weights())
    assert len(alone.bench.trainers) == 5
    assert [row["metrics"]["optimiser_reset"] for row in alone.rows("site")] == [0.0] * 5


@NORMS
def test_identical_sites_equal_one(tmp_path, anaus):
    many = Hospital(tmp_path / "many", tuple((name, 3) for name in "abcd"), anaus=anaus)
    many.bench.trainer = lambda _folder, config, **_: ToyTrainer(config, site="a")
    one = Hospital(tmp_path / "one", (("a", 3),), anaus=anaus)
    many.run(), one.run()
    for name, array in one.weights().items():
        np.testing.assert_allclose(many.weights()[name], array, rtol=1e-6, atol=1e-7)


@NORMS
def test_only_the_proportion_of_patients_counts(tmp_path, anaus):
    few = Hospital(tmp_path / "few", (("a", 3), ("b", 2), ("c", 4)), anaus=anaus)
    many = Hospital(tmp_path / "many", (("a", 96), ("b", 64), ("c", 128)), anaus=anaus)
    other = Hospital(tmp_path / "other", (("a", 2), ("b", 4), ("c", 3)), anaus=anaus)
    few.run(), many.run(), other.run()
    assert few.rows("merge")[0]["shares"] == many.rows("merge")[0]["shares"]
    assert few.digest() == many.digest() != other.digest()


def test_statistics_stay_at_the_site_unless_they_are_shared(tmp_path):
    runs = {
        name: Hospital(tmp_path / name, anaus=a) for name, a in (("own", BATCH), ("all", SHARED))
    }
    for run in runs.values():
        run.run()
    assert not [name for name in runs["own"].weights() if "statistics" in name]
    shared = {n: a for n, a in runs["all"].weights().items() if n.startswith("state/statistics.")}
    assert sorted(name.rsplit(".", 1)[1] for name in shared) == ["mean", "square"]
    shares = runs["all"].rows("merge")[-1]["shares"]
    for name, merged in shared.items():
        own = {trainer.site: trainer.statistics[name] for trainer in runs["all"].bench.trainers}
        expected = sum(shares[site] * own[site].astype(np.float64) for site in own)
        np.testing.assert_allclose(merged, expected, rtol=1e-6)
        assert len({array.tobytes() for array in own.values()}) == 3  # each keeps its own


@pytest.mark.parametrize("student", EVERY)
def test_every_rule_merges_without_any_state(student):
    base = without(model(0), "state")
    updates = {site: moved(base, i) for i, site in enumerate("abcde")}
    shares = site_weights(
        {site: i + 1 for i, site in enumerate(updates)}, weighting="patients", cap=0.4
    )
    merge, state = MergeConfig(student=student), MergeState()
    for _ in range(2):  # moments and norms of the first round are there in the second
        result = merge_round(
            base, MemoryUpdates(updates), merge=merge, shares=shares, ema_product=0.9, state=state
        )
        state = result.state
        assert result.weights.keys() == base.keys()
        assert all(np.isfinite(array).all() for array in result.weights.values())
        assert all(np.isfinite(array).all() for array in state.arrays.values())
        name = "student/encoder.weight"
        assert result.weights[name].tobytes() != base[name].tobytes()
    with_state = {s: {**u, **_state(i)} for i, (s, u) in enumerate(updates.items())}
    beside = merge_round(
        {**base, **_state(9)},
        MemoryUpdates(with_state),
        merge=merge,
        shares=shares,
        ema_product=0.9,
        state=MergeState(),
    )
    alone = merge_round(
        base,
        MemoryUpdates(updates),
        merge=merge,
        shares=shares,
        ema_product=0.9,
        state=MergeState(),
    )
    if student == "krum":  # who is selected may depend on the state as well
        return
    for name, array in alone.weights.items():
        assert beside.weights[name].tobytes() == array.tobytes()


def _state(seed):
    return {n: a for n, a in model([seed, 77]).items() if n.startswith("state/")}


@pytest.mark.parametrize("student", EVERY)
@pytest.mark.parametrize("anaus", [GROUP, SHARED], ids=["group", "batch-shared"])
def test_every_rule_runs_through_real_rounds(tmp_path, student, anaus):
    run = Hospital(tmp_path, FIVE, anaus=anaus, rounds=2, min_sites=5, merge={"student": student})
    assert run.run().merged_rounds == 2
    assert run.reasons() == []
    assert all(np.isfinite(array).all() for array in run.weights().values())


def test_the_servers_teacher_moves_by_the_momentum_of_anaus(tmp_path):
    """T2: M_r is of ``anaus.teacher``, whatever AG-SSD's teacher does."""
    anaus = {**GROUP, "teacher": {"ema_momentum": 0.5}}
    run = Hospital(tmp_path, (("a", 3),), anaus=anaus, rounds=1, merge={"teacher": "server-ema"})
    run.run()
    before, after = run.store.load(0).weights, run.weights()
    keep = run.config.anaus.teacher.momentum_product(0, 4, 4)
    assert 0.05 < keep < 0.5 < run.config.agssd.teacher.momentum_product(0, 4, 4)
    for name in [name for name in after if name.startswith("teacher/")]:
        student = after["student/" + name.removeprefix("teacher/")].astype(np.float64)
        expected = keep * before[name].astype(np.float64) + (1 - keep) * student
        np.testing.assert_array_equal(after[name], expected.astype(np.float32))
