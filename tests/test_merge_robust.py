"""One of five sites is hostile: robust rules stay among the honest, plain averaging does not."""

import numpy as np
import pytest

from agssd_core.config import MergeConfig
from agssd_core.errors import RoundError
from server.merge import MergeState, merge_round, site_weights
from server.robust import clip_reference, coordinate_median, krum_scores, trimmed_mean
from tests.support.merging import MemoryUpdates, model, moved

ROBUST = ("trimmed-mean", "median", "krum")
HONEST = ("a", "c", "d", "e")
TARGETS = {
    "student": ("student",),
    "teacher": ("teacher",),
    "both": ("student", "teacher"),
    "state": ("state",),
    "all": ("student", "teacher", "state"),
}
EMA_PRODUCT = 0.9


def _flip(base, honest):
    return base - 10 * (honest - base)


def _noise(base, honest):
    rng = np.random.default_rng(99)
    return base + 3 * np.std(honest - base) * rng.standard_normal(base.shape)


def _jump(base, honest):
    return np.full(base.shape, 1e5)


ATTACKS = {"sign flip x10": _flip, "noise": _noise, "jump": _jump}


def _cohort(seed, *, groups, attack):
    """Five sites' updates; site b replaces the named groups. Its patients outnumber the rest."""
    base = model(seed)
    updates = {s: moved(base, [seed, i]) for i, s in enumerate((*HONEST, "b"), start=1)}
    for name, array in updates["b"].items():
        if name.split("/")[0] in groups:
            poison = attack(base[name].astype(np.float64), array.astype(np.float64))
            updates["b"][name] = np.asarray(poison, np.float32)
    return base, updates


def _merge(base, updates, **settings):
    sizes = dict.fromkeys(updates, 10) | {"b": 500}
    return merge_round(
        base,
        MemoryUpdates(updates),
        merge=MergeConfig(**settings),
        shares=site_weights(sizes, weighting="patients", cap=0.4),
        ema_product=EMA_PRODUCT,
        state=MergeState(),
    )


def _flat(weights, group):
    return np.concatenate(
        [weights[n].ravel().astype(np.float64) for n in sorted(weights) if n.startswith(group)]
    )


def _excess(base, updates, merged, group, *, server_teacher):
    """Distance of the merged group from the honest mean over the largest honest distance."""
    honest = [dict(updates[site]) for site in HONEST]
    if group == "teacher" and server_teacher:
        # T2: what a site's teacher would be is the server's EMA towards that site's student.
        for update in honest:
            for name in [n for n in base if n.startswith("teacher/")]:
                student = update["student/" + name.split("/")[1]].astype(np.float64)
                update[name] = EMA_PRODUCT * base[name] + (1 - EMA_PRODUCT) * student
    vectors = np.stack([_flat(update, group) for update in honest])
    middle = vectors.mean(axis=0)
    reach = np.linalg.norm(vectors - middle, axis=1).max()
    return float(np.linalg.norm(_flat(merged, group) - middle) / reach)


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("student", ROBUST)
def test_robust_rules_stay_among_the_honest(student, target, attack):
    for seed in range(10):
        base, updates = _cohort(seed, groups=TARGETS[target], attack=ATTACKS[attack])
        result = _merge(base, updates, student=student)
        server_teacher = result.report["teacher_rule"] != "average"
        for group in ("student", "teacher", "state"):
            excess = _excess(base, updates, result.weights, group, server_teacher=server_teacher)
            assert excess <= 1 + 1e-6, (seed, group, excess)


@pytest.mark.parametrize("target", TARGETS)
def test_plain_averaging_leaves_them(target):
    for seed in range(10):
        base, updates = _cohort(seed, groups=TARGETS[target], attack=_flip)
        merged = _merge(base, updates, student="fedavg").weights
        for group in TARGETS[target]:
            assert _excess(base, updates, merged, group, server_teacher=False) > 1.5


def test_krum_sees_a_teacher_poison_as_large_as_an_honest_student():
    """The teacher's differences are a hundredth of the student's: one sum would not see it."""
    for seed in range(20):
        base, updates = _cohort(seed, groups=("teacher",), attack=_flip)
        report = _merge(base, updates, student="krum").report
        assert "b" not in report["shares"]
        assert max(report["scores"], key=report["scores"].get) == "b"


def test_multi_krum_averages_its_selection_with_one_vote_each():
    base, updates = _cohort(0, groups=("student",), attack=_flip)
    result = _merge(base, updates, student="krum", krum_keep=2)
    assert list(result.report["shares"].values()) == [0.5, 0.5]
    chosen = [updates[site]["student/encoder.bias"] for site in result.report["shares"]]
    np.testing.assert_allclose(
        result.weights["student/encoder.bias"], np.mean(chosen, axis=0), rtol=1e-6
    )


def test_krum_scores_against_the_plainest_loop():
    rng = np.random.default_rng(0)
    points = rng.standard_normal((7, 4))
    squares = ((points[:, None] - points[None]) ** 2).sum(axis=-1)
    expected = []
    for i in range(7):
        others = sorted(squares[i][j] for j in range(7) if j != i)
        expected.append(sum(others[: 7 - 2 - 2]))
    scores = krum_scores({"student": squares}, hostile=2)
    np.testing.assert_allclose(scores, np.array(expected) / np.median(expected))


def test_krum_of_equal_sites_suspects_only_the_one_that_differs():
    squares = np.zeros((5, 5))
    squares[2, :] = squares[:, 2] = 4.0
    squares[2, 2] = 0.0
    assert krum_scores({"state": squares}, hostile=1).tolist() == [0, 0, 1e12, 0, 0]


def test_coordinate_rules_by_hand():
    values = [np.array([v, -v]) for v in (1.0, 2.0, 3.0, 4.0, 100.0)]
    np.testing.assert_array_equal(trimmed_mean(values, trim=1), [3.0, -3.0])
    np.testing.assert_array_equal(coordinate_median(values), [3.0, -3.0])
    np.testing.assert_array_equal(coordinate_median(values[:4]), [2.5, -2.5])
    np.testing.assert_array_equal(coordinate_median(values[:1]), [1.0, -1.0])


@pytest.mark.parametrize("student", [*ROBUST, "norm-clip"])
def test_too_few_updates_are_refused(student):
    base = model(0)
    merge = MergeConfig(student=student)
    few = {f"s{i}": moved(base, i) for i in range(merge.required_sites - 1)}
    shares = dict.fromkeys(few, 1 / len(few))
    with pytest.raises(RoundError, match=f"needs at least {merge.required_sites}"):
        merge_round(
            base,
            MemoryUpdates(few),
            merge=merge,
            shares=shares,
            ema_product=0.9,
            state=MergeState(),
        )


# --- norm clipping


def _step(weights, base, group="student"):
    return np.linalg.norm(_flat(weights, group) - _flat(base, group))


@pytest.mark.parametrize("sites", ["ab", "abcd"])
def test_norm_clip_bounds_a_giant_at_few_sites(sites):
    base = model(0)
    updates = {site: moved(base, i) for i, site in enumerate(sites)}
    honest = max(_step(updates[site], base) for site in sites)
    updates["b"] = {n: base[n] + 1000 * (a - base[n]) for n, a in updates["b"].items()}
    result = _merge(base, updates, student="norm-clip")
    for group in ("student", "state"):
        assert _step(result.weights, base, group) <= honest
    assert result.report["clip"]["b"] < 0.01
    assert _step(_merge(base, updates, student="fedavg").weights, base) > 100 * honest


def test_norm_clip_leaves_equal_norms_alone_but_for_the_factor():
    base = model(0)
    updates = dict.fromkeys("abc", moved(base, 1))
    same = _merge(base, updates, student="norm-clip").weights
    np.testing.assert_allclose(
        same["student/encoder.weight"], updates["a"]["student/encoder.weight"], rtol=1e-6
    )
    half = _merge(base, updates, student="norm-clip", clip_factor=0.5).weights
    assert _step(half, base) == pytest.approx(0.5 * _step(same, base), rel=1e-4)


def test_the_clip_reference_runs_over_rounds():
    reference, history = clip_reference([1.0, 50.0], [])
    assert (reference, history) == (1.0, [1.0])
    reference, history = clip_reference([0.0, 1.1], [1.0, 1.2, 0.9])
    assert reference == pytest.approx(0.95)  # a silent site does not stop a cohort of two
    assert len(clip_reference([1.0], [1.0] * 5)[1]) == 5
