"""Each rule against its formula written as the plainest loop, and what is refused."""

import numpy as np
import pytest

from agssd_core.config import FederationConfig, MergeConfig, parse_config
from agssd_core.errors import ConfigError, RoundError, WeightsError
from agssd_core.weights import load_weights, save_weights
from server.merge import MergeState, StaleUpdate, merge_round, site_weights
from server.merge_rules import l_dawa_mean, weighted_mean
from tests.support.merging import MemoryUpdates, model, moved, without

NAME = "student/encoder.weight"
SHARES = {"a": 0.4, "b": 0.35, "c": 0.25}


def _merge(updates, base, *, merge, shares=None, state=None, stale=None, ema_product=0.9):
    return merge_round(
        base,
        MemoryUpdates(updates),
        merge=merge,
        shares=shares or SHARES,
        ema_product=ema_product,
        state=state or MergeState(),
        stale=stale,
    )


def _rounds(merge, folder, *, resume_at=None, rounds=4):
    """Weights after some rounds; the server's state goes through a file at ``resume_at``."""
    weights, state = model(0), MergeState()
    trail = []
    for index in range(rounds):
        if index == resume_at:
            save_weights(folder / "state.safetensors", state.arrays)
            state = MergeState(load_weights(folder / "state.safetensors"))
        updates = {site: moved(weights, [index, i]) for i, site in enumerate("abc")}
        result = _merge(updates, weights, merge=merge, state=state)
        trail.append((weights, updates, result.weights))
        weights, state = result.weights, result.state
    return trail


def _mean_step(base, updates):
    return sum(SHARES[s] * (updates[s][NAME].astype(np.float64) - base[NAME]) for s in SHARES)


@pytest.mark.parametrize("student", ["fedavgm", "fedadam", "fedyogi"])
def test_server_optimisers_follow_their_papers_loop(student, tmp_path):
    merge = MergeConfig(
        student=student, server_learning_rate=0.05, server_momentum=0.8, server_betas=(0.7, 0.9)
    )
    m = np.zeros((4, 5))
    v = np.full((4, 5), 1e-3**2)
    for base, updates, merged in _rounds(merge, tmp_path):
        delta = _mean_step(base, updates)
        if student == "fedavgm":
            m = 0.8 * m + delta
            expected = base[NAME] + 0.05 * m
        else:
            m = 0.7 * m + 0.3 * delta
            if student == "fedadam":
                v = 0.9 * v + 0.1 * delta**2
            else:
                v = v - 0.1 * delta**2 * np.sign(v - delta**2)
            expected = base[NAME] + 0.05 * m / (np.sqrt(v) + 1e-3)
        np.testing.assert_allclose(merged[NAME], expected, rtol=2e-6, atol=2e-7)


@pytest.mark.parametrize("student", ["fedavgm", "fedadam", "fedyogi", "norm-clip"])
def test_a_resumed_server_takes_the_same_steps(student, tmp_path):
    merge = MergeConfig(student=student, server_learning_rate=0.5)
    straight = _rounds(merge, tmp_path)[-1][2]
    resumed = _rounds(merge, tmp_path, resume_at=2)[-1][2]
    assert all(straight[n].tobytes() == resumed[n].tobytes() for n in straight)
    if student != "norm-clip":
        forgetful = _rounds(merge, tmp_path, rounds=1)[-1][2]
        assert forgetful[NAME].tobytes() != straight[NAME].tobytes()


def test_a_server_learning_rate_scales_the_student_only():
    base = model(0)
    updates = {site: moved(base, i) for i, site in enumerate("abc")}
    half = _merge(updates, base, merge=MergeConfig(server_learning_rate=0.5)).weights
    expected = base[NAME] + 0.5 * _mean_step(base, updates)
    np.testing.assert_allclose(half[NAME], expected, rtol=1e-6, atol=1e-7)
    centre = sum(SHARES[s] * updates[s]["state/centre_cls"].astype(np.float64) for s in SHARES)
    np.testing.assert_allclose(half["state/centre_cls"], centre, rtol=1e-6)


def test_moments_are_kept_for_students_only():
    base = model(0)
    updates = {site: moved(base, i) for i, site in enumerate("abc")}
    state = _merge(updates, base, merge=MergeConfig(student="fedadam")).state
    kinds = {name.split("/")[1] for name in state.arrays}
    assert kinds == {"student"}


# --- L-DAWA


def test_l_dawa_against_its_formula():
    rng = np.random.default_rng(0)
    base = rng.standard_normal((3, 4)).astype(np.float32)
    arrays = [base + 0.5 * rng.standard_normal((3, 4)).astype(np.float32) for _ in range(3)]
    shares = list(SHARES.values())
    cosines = [
        max(float((a * base).sum() / np.linalg.norm(a) / np.linalg.norm(base)), 0) for a in arrays
    ]
    raw = np.array(shares) * cosines
    expected = sum(r * a for r, a in zip(raw / raw.sum(), arrays, strict=True))
    np.testing.assert_allclose(l_dawa_mean(arrays, shares, base), expected, rtol=1e-5, atol=1e-7)


def test_l_dawa_does_not_shrink_and_leaves_out_an_opponent():
    base = model(0)[NAME]
    shares = list(SHARES.values())
    np.testing.assert_allclose(l_dawa_mean([base] * 3, shares, base), base, rtol=1e-12)
    with_opponent = l_dawa_mean([base, base, -base], shares, base)
    np.testing.assert_allclose(with_opponent, base, rtol=1e-12)


@pytest.mark.parametrize(
    ("arrays", "base"),
    [
        ([np.ones(4), -np.ones(4), np.ones(4)], np.ones(4)),
        ([np.ones((2, 2)), np.ones((2, 2)), np.ones((2, 2))], np.zeros((2, 2))),
        ([np.zeros((2, 2)), np.ones((2, 2)), np.ones((2, 2))], np.ones((2, 2))),
        ([-np.ones((2, 2))] * 3, np.ones((2, 2))),
    ],
    ids=["one dimension", "zero base", "zero site", "nobody agrees"],
)
def test_l_dawa_falls_back_to_the_plain_mean(arrays, base):
    shares = list(SHARES.values())
    np.testing.assert_array_equal(l_dawa_mean(arrays, shares, base), weighted_mean(arrays, shares))


# --- late updates


def test_a_late_update_moves_by_its_own_difference():
    old, base = model(0), model(1)
    late, fresh = moved(old, 2), {site: moved(base, i) for i, site in enumerate("ab")}
    shares = site_weights(
        {"a": 5, "b": 5, "c": 5}, weighting="patients", cap=1.0, decay={"c": 0.5**2}
    )
    merge = MergeConfig(teacher="server-ema")
    stale = {"c": StaleUpdate(late.__getitem__, old.__getitem__)}
    merged = _merge(fresh, base, merge=merge, shares=shares, stale=stale).weights
    step = sum(shares[s] * (fresh[s][NAME].astype(np.float64) - base[NAME]) for s in "ab")
    step = step + shares["c"] * (late[NAME].astype(np.float64) - old[NAME])
    np.testing.assert_allclose(merged[NAME], base[NAME] + step, rtol=1e-6, atol=1e-7)
    assert shares["c"] == pytest.approx(0.25 / 2.25)
    # A late site that learnt nothing only holds the others back; its old base never returns.
    idle = {"c": StaleUpdate(old.__getitem__, old.__getitem__)}
    held = _merge(fresh, base, merge=merge, shares=shares, stale=idle).weights
    expected = base[NAME] + sum(shares[s] * (fresh[s][NAME] - base[NAME]) for s in "ab")
    np.testing.assert_allclose(held[NAME], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "settings", [{}, {"student": "median"}, {"student": "l-dawa"}], ids=["T1", "median", "l-dawa"]
)
def test_late_updates_need_t2_and_a_rule_that_they_cannot_pass_by(settings):
    base = model(0)
    fresh = {site: moved(base, i) for i, site in enumerate("abd")}
    shares = dict.fromkeys("abcd", 0.25)
    stale = {"c": StaleUpdate(base.__getitem__, base.__getitem__)}
    with pytest.raises(RoundError, match="late = discard"):
        _merge(fresh, base, merge=MergeConfig(**settings), shares=shares, stale=stale)


# --- what is refused


def test_shares_must_belong_to_the_updates():
    base = model(0)
    updates = {site: moved(base, i) for i, site in enumerate("abc")}
    for shares in ({"a": 0.5, "b": 0.5}, {"a": 0.5, "b": 0.25, "d": 0.25}):
        with pytest.raises(RoundError, match="from the admitted sites"):
            _merge(updates, base, merge=MergeConfig(), shares=shares)
    for shares in ({"a": 0.5, "b": 0.5, "c": 0.5}, {"a": 1.5, "b": 0.5, "c": -1.0}):
        with pytest.raises(RoundError, match="Use site_weights"):
            _merge(updates, base, merge=MergeConfig(), shares=shares)


def test_an_array_that_numpy_would_broadcast_is_refused():
    base = model(0)
    updates = {site: moved(base, i) for i, site in enumerate("abc")}
    updates["b"]["student/encoder.bias"] = np.zeros(1, np.float32)
    with pytest.raises(WeightsError, match=r"is \(1,\), expected \(4,\)"):
        _merge(updates, base, merge=MergeConfig())


def test_integers_are_not_averaged():
    base = model(0) | {"state/count": np.zeros(1, np.int64)}
    with pytest.raises(RoundError, match="not floating point"):
        _merge(dict.fromkeys("abc", base), base, merge=MergeConfig())


def test_a_result_that_is_not_finite_is_refused():
    base = model(0)
    updates = {site: moved(base, i, scale=3e37) for i, site in enumerate("abc")}
    with pytest.raises(RoundError, match="weights stay as they were"):
        _merge(updates, base, merge=MergeConfig(server_learning_rate=100.0))


def test_a_teacher_needs_a_student_of_its_shape():
    base = without(model(0), "student") | {"student/other": np.zeros(3, np.float32)}
    with pytest.raises(WeightsError, match="no student array of its shape"):
        _merge(dict.fromkeys("abc", base), base, merge=MergeConfig(teacher="server-ema"))


def test_nothing_to_average_is_said():
    with pytest.raises(RoundError, match="no update"):
        weighted_mean([], [])


@pytest.mark.parametrize(
    ("overrides", "problem"),
    [
        (["merge.student=median", "merge.teacher=average", "min_sites=5"], "past a robust rule"),
        (["merge.student=fedadam", "merge.teacher=average"], "server-ema"),
        (["merge.server_learning_rate=0.5", "merge.teacher=average"], "server-ema"),
        (["merge.student=fedema", "merge.teacher=average"], "teacher = local"),
        (["merge.student=trimmed-mean", "merge.trim=2", "min_sites=4"], "at least 5 sites"),
        (["merge.student=krum", "min_sites=4"], "at least 5 sites"),
        (["merge.student=krum", "merge.krum_keep=4", "min_sites=5"], "at least 7 sites"),
        (["merge.student=median", "min_sites=2"], "at least 3 sites"),
        (["merge.student=norm-clip", "min_sites=1"], "at least 2 sites"),
        (["late=stale"], "teacher that is not averaged"),
        (["late=stale", "merge.student=median", "min_sites=3"], "pass it by"),
        (["late=stale", "merge.student=l-dawa"], "pass it by"),
        (["min_sites=4", "sites_per_round=3"], "can never reach"),
        (["merge.max_weight=0"], "max_weight"),
        (["merge.server_learning_rate=.nan"], "server_learning_rate"),
    ],
    ids=str,
)
def test_impossible_combinations_are_refused_when_read(overrides, problem):
    with pytest.raises(ConfigError, match=problem):
        parse_config({}, [f"federation.{text}" for text in overrides])


def test_possible_combinations_are_read():
    late = {"late": "stale", "merge": {"teacher": "server-ema"}}
    assert FederationConfig(**late).merge.teacher_rule == "server-ema"
    assert MergeConfig(student="fedyogi").teacher_rule == "server-ema"
    assert MergeConfig(student="krum").teacher_rule == "average"
    assert MergeConfig(student="norm-clip").is_robust
