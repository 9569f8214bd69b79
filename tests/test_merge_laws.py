"""Laws of merging: what must hold for every cohort, whatever the numbers."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agssd_core.config import MergeConfig
from agssd_core.errors import RoundError
from server.merge import MergeState, merge_round, site_weights
from tests.support.merging import SHAPES, MemoryUpdates, model, moved

LINEAR = ("fedavg", "fedprox", "fedema")
ROBUST = ("trimmed-mean", "median", "krum", "norm-clip")
EVERY = (*LINEAR, "fedavgm", "fedadam", "fedyogi", "l-dawa", *ROBUST)

counts = st.dictionaries(
    st.text("abcdefgh", min_size=1, max_size=3), st.integers(1, 10**6), min_size=1, max_size=9
)
caps = st.floats(0.05, 1.0)


def _merge(updates, base, *, shares=None, ema_product=0.9, state=None, **settings_):
    given_shares = shares or dict.fromkeys(updates, 1 / len(updates))
    return merge_round(
        base,
        MemoryUpdates(updates),
        merge=MergeConfig(**settings_),
        shares=given_shares,
        ema_product=ema_product,
        state=state or MergeState(),
    )


def _same_bits(a, b):
    return a.keys() == b.keys() and all(a[n].tobytes() == b[n].tobytes() for n in a)


# --- shares


@given(counts, caps)
def test_shares_sum_to_one_and_keep_the_cap(sizes, cap):
    shares = site_weights(sizes, weighting="patients", cap=cap)
    limit = max(cap, 1 / len(sizes))
    assert math.fsum(shares.values()) == pytest.approx(1, abs=1e-12)
    assert max(shares.values()) <= limit * (1 + 1e-12)
    assert min(shares.values()) > 0
    # One lambda for all: below the cap shares are proportional, at the cap lambda n exceeds it.
    free = {s: shares[s] / sizes[s] for s in sizes if shares[s] < limit * (1 - 1e-9)}
    if free:
        scale = max(free.values())
        assert min(free.values()) == pytest.approx(scale, rel=1e-9)
        assert all(scale * sizes[s] >= limit * (1 - 1e-9) for s in sizes if s not in free)


@given(counts, caps, st.randoms(use_true_random=False), st.integers(1, 1000))
def test_shares_know_neither_order_nor_unit(sizes, cap, order, factor):
    shuffled = dict(order.sample(sorted(sizes.items()), len(sizes)))
    shares = site_weights(sizes, weighting="patients", cap=cap)
    assert list(site_weights(shuffled, weighting="patients", cap=cap).items()) == list(
        shares.items()
    )
    scaled = {site: n * factor for site, n in sizes.items()}
    assert site_weights(scaled, weighting="steps", cap=cap) == pytest.approx(shares, rel=1e-12)


def test_shares_by_hand():
    assert site_weights({"a": 100, "b": 1, "c": 1}, weighting="patients", cap=0.4) == (
        pytest.approx({"a": 0.4, "b": 0.3, "c": 0.3})
    )
    assert site_weights({"a": 7}, weighting="patients", cap=0.4) == {"a": 1.0}
    assert site_weights({"a": 1, "b": 9}, weighting="patients", cap=0.4) == {"a": 0.5, "b": 0.5}
    uniform = site_weights({"a": 1, "b": 9, "c": 90}, weighting="uniform", cap=0.4)
    assert uniform == pytest.approx(dict.fromkeys("abc", 1 / 3))
    exact = Fraction(6, 10) * Fraction(3, 5)
    assert site_weights({"a": 90, "b": 3, "c": 2}, weighting="patients", cap=0.4)["b"] == (
        pytest.approx(float(exact))
    )


def test_a_late_site_counts_less():
    late = site_weights({"a": 4, "b": 4}, weighting="uniform", cap=1.0, decay={"b": 0.25})
    assert late == pytest.approx({"a": 0.8, "b": 0.2})


@pytest.mark.parametrize("bad", [{}, {"a": 0}, {"a": -1, "b": 2}, {"a": float("nan")}], ids=str)
def test_counts_that_cannot_weigh_are_refused(bad):
    with pytest.raises(RoundError, match="enrolled patient counts"):
        site_weights(bad, weighting="patients", cap=0.4)


# --- merging


@pytest.mark.parametrize("student", EVERY)
def test_the_order_of_arrival_changes_no_bit(student):
    base = model(0)
    updates = {site: moved(base, i) for i, site in enumerate("abcde")}
    sizes = {site: 3 * i + 1 for i, site in enumerate("abcde")}
    shares = site_weights(sizes, weighting="patients", cap=0.4)
    first = _merge(updates, base, student=student, shares=shares)
    for order in ("edcba", "caebd"):
        again = {site: updates[site] for site in order}
        renamed = {site: shares[site] for site in order}
        result = _merge(again, base, student=student, shares=renamed)
        assert _same_bits(result.weights, first.weights)
        assert _same_bits(result.state.arrays, first.state.arrays)


@given(st.integers(0, 2**31), st.lists(st.integers(1, 500), min_size=1, max_size=7))
@settings(max_examples=40)
def test_linear_merging_is_convex(seed, sizes):
    base = model(seed)
    updates = {f"s{i}": model([seed, i]) for i in range(len(sizes))}
    shares = site_weights({f"s{i}": n for i, n in enumerate(sizes)}, weighting="patients", cap=0.4)
    merged = _merge(updates, base, shares=shares).weights
    for name in SHAPES:
        stack = np.stack([update[name] for update in updates.values()])
        assert (merged[name] >= stack.min(axis=0)).all()
        assert (merged[name] <= stack.max(axis=0)).all()
        assert merged[name].shape == SHAPES[name]


@pytest.mark.parametrize("teacher", ["average", "local"])
@pytest.mark.parametrize("student", ["fedavg", "fedprox"])
def test_one_site_alone_comes_back_bit_for_bit(student, teacher):
    base = model(0)
    update = {n: a.copy() for n, a in moved(base, 1).items()}
    odd = np.array([-0.0, 0.0, 1e-45, -3e38], np.float32)  # signed zeros, a denormal, the edge
    update["student/encoder.bias"] = update["teacher/encoder.bias"] = odd
    merged = _merge({"a": update}, base, student=student, teacher=teacher).weights
    for name in update:
        if name.startswith("teacher/") and teacher == "local":
            continue
        assert merged[name].tobytes() == update[name].tobytes()


@given(st.integers(1, 8), st.integers(0, 2**31))
@settings(max_examples=40)
def test_identical_sites_equal_one(count, seed):
    base, update = model([seed, 1]), model([seed, 2])
    sizes = {f"s{i}": 1 + (seed * i) % 97 for i in range(count)}
    shares = site_weights(sizes, weighting="patients", cap=0.4)
    many = _merge(dict.fromkeys(sizes, update), base, shares=shares).weights
    assert _same_bits(many, update)


@pytest.mark.parametrize("student", EVERY)
def test_nobody_moved_nothing_moves(student):
    base = {n: a if not n.startswith("teacher/") else None for n, a in model(0).items()}
    for name in [n for n in base if base[n] is None]:
        base[name] = base["student/" + name.split("/", 1)[1]]
    merged = _merge(dict.fromkeys("abcde", base), base, student=student).weights
    for name in base:
        np.testing.assert_allclose(merged[name], base[name], rtol=1e-6, atol=1e-7)


# --- teachers


def _trained(start, teacher, momenta, rng):
    """A site's recursion: any student trajectory, its EMA alongside, in float64."""
    for momentum in momenta:
        start = start + rng.standard_normal(start.shape)
        teacher = momentum * teacher + (1 - momentum) * start
        yield start, teacher


def test_average_teachers_are_the_ema_of_the_averaged_student():
    """T1, in float64 over three rounds, with unequal shares."""
    rng, shape = np.random.default_rng(0), (7, 3)
    shares = site_weights({"a": 5, "b": 2, "c": 1}, weighting="patients", cap=0.4)
    base = {"student/w": rng.standard_normal(shape), "teacher/w": rng.standard_normal(shape)}
    reference = base["teacher/w"]
    for round_index in range(3):
        momenta = 0.9 + 0.01 * np.arange(4) + 0.02 * round_index
        runs = {
            site: list(_trained(base["student/w"], base["teacher/w"], momenta, rng))
            for site in shares
        }
        for step, momentum in enumerate(momenta):
            average = sum(shares[site] * runs[site][step][0] for site in shares)
            reference = momentum * reference + (1 - momentum) * average
        updates = {
            site: {"student/w": run[-1][0], "teacher/w": run[-1][1]} for site, run in runs.items()
        }
        base = _merge(updates, base, shares=shares).weights
        np.testing.assert_allclose(base["teacher/w"], reference, rtol=1e-13, atol=1e-13)

    # The negative control: with other momenta at one site the identity is gone.
    runs["a"] = list(_trained(base["student/w"], base["teacher/w"], momenta - 0.3, rng))
    updates = {s: {"student/w": r[-1][0], "teacher/w": r[-1][1]} for s, r in runs.items()}
    broken = _merge(updates, base, shares=shares).weights["teacher/w"]
    assert np.abs(broken - reference).max() > 1e-2


@pytest.mark.parametrize("teacher", ["server-ema", "local"])
def test_the_servers_teacher_follows_the_merged_student(teacher):
    base = model(0)
    updates = {site: moved(base, i) for i, site in enumerate("abc")}
    merged = _merge(updates, base, teacher=teacher, student="fedavg", ema_product=0.7).weights
    for name in ("encoder.bias", "encoder.weight"):
        student = merged[f"student/{name}"].astype(np.float64)
        expected = 0.7 * base[f"teacher/{name}"].astype(np.float64) + 0.3 * student
        np.testing.assert_array_equal(merged[f"teacher/{name}"], expected.astype(np.float32))
    assert (
        _merge(updates, base, ema_product=1.0, teacher=teacher)
        .weights["teacher/encoder.bias"]
        .tobytes()
        == base["teacher/encoder.bias"].tobytes()
    )


def test_copied_teachers_are_the_student():
    base = model(0)
    merged = _merge({"a": moved(base, 1)}, base, teacher="copy").weights
    assert merged["teacher/encoder.weight"].tobytes() == merged["student/encoder.weight"].tobytes()
