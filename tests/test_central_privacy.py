"""Privacy of whole sites at the server: what one site can do, and what is noised."""

import numpy as np
import pytest

from agssd_core.config import CentralPrivacyConfig, MergeConfig
from agssd_core.errors import RoundError
from agssd_core.noise import NoiseStream
from server import central_privacy, robust
from server.aggregation import Cohort
from server.central_privacy import NoisedMean
from server.merge import MergeState, StaleUpdate, merge_round
from tests.support.merging import MemoryUpdates, model, moved

GROUPS = ("student", "teacher", "state")
CLIP = 0.5


class Silence(NoiseStream):
    """Noise of 0, and a count of what was asked for."""

    asked = 0

    def normal(self, count):
        type(self).asked += count
        return np.zeros(count)


def cohort_of(base, updates):
    shares = dict.fromkeys(sorted(updates), 1 / len(updates))
    return Cohort(base, MemoryUpdates(updates), shares, {})


def clipped_sum(base, updates, groups=GROUPS):
    """All numbers of the sum that is noised."""
    found = NoisedMean(
        cohort_of(base, updates),
        groups,
        CentralPrivacyConfig(enabled=True, clip_norm=CLIP),
        NoiseStream.from_system(),
    )
    names = [name for name in sorted(base) if name.split("/")[0] in groups]
    return np.concatenate([found.clipped_sum(name).ravel() for name in names])


def worst_change(cases):
    """How far the sum moves, in units of C, when one site sends nothing instead."""
    worst = 0.0
    for number in range(cases):
        rng = np.random.default_rng(number)
        base = model(number)
        scale = 10.0 ** rng.uniform(-3, 4)
        updates = {name: moved(base, 100 * number + k) for k, name in enumerate("abc")}
        updates["b"] = moved(base, number + 7, scale=scale)
        if number % 3 == 1:  # all of it in one group
            group = GROUPS[number // 3 % 3]
            updates["b"] = {
                n: a if n.startswith(group) else base[n] for n, a in updates["b"].items()
            }
        silent = {**updates, "b": base}
        change = clipped_sum(base, updates) - clipped_sum(base, silent)
        worst = max(worst, float(np.linalg.norm(change)) / CLIP)
    return worst


def test_one_site_moves_the_sum_by_c_at_most():
    assert 0.999 < worst_change(300) <= 1.0


@pytest.mark.parametrize("mutant", ["no clipping", "group by group"])
def test_without_joint_clipping_one_site_moves_it_further(monkeypatch, mutant):
    if mutant == "no clipping":
        monkeypatch.setattr(robust, "clip_scales", lambda norms, **_: [1.0 for _ in norms])
    else:  # each group clipped by itself, which a plain reading of "clip the update" may mean
        plain = central_privacy.update_norms
        monkeypatch.setattr(
            central_privacy,
            "update_norms",
            lambda cohort, groups: np.max([plain(cohort, [g]) for g in groups], axis=0),
        )
    assert worst_change(60) > 1.02


def merged(updates, base, *, central=None, state=None, **rule):
    terms = {"enabled": True, "clip_norm": CLIP, "noise_multiplier": 1.0} | (central or {})
    return merge_round(
        base,
        MemoryUpdates(updates),
        merge=MergeConfig(weighting="uniform", central_privacy=terms, **rule),
        shares=dict.fromkeys(sorted(updates), 1 / len(updates)),
        ema_product=0.9,
        state=state or MergeState(),
    )


def three(base, **changes):
    return {name: moved(base, k, **changes) for k, name in enumerate("abc")}


def test_without_noise_and_far_limits_the_merge_is_the_plain_mean(monkeypatch):
    monkeypatch.setattr(NoiseStream, "from_system", lambda: Silence(bytes(32), private=True))
    Silence.asked = 0
    base = model(1)
    found = merged(three(base), base, central={"clip_norm": 1e6})
    plain = merge_round(
        base,
        MemoryUpdates(three(base)),
        merge=MergeConfig(weighting="uniform"),
        shares=dict.fromkeys("abc", 1 / 3),
        ema_product=0.9,
        state=MergeState(),
    )
    for name, array in plain.weights.items():
        np.testing.assert_allclose(found.weights[name], array, rtol=1e-5, atol=1e-6)
    assert Silence.asked == sum(array.size for array in base.values())  # each number once
    assert "clip" not in found.report


@pytest.mark.parametrize("rule", ["fedavg", "fedprox", "fedavgm", "fedadam", "fedyogi"])
def test_all_that_comes_from_sites_is_noised_by_the_promised_amount(rule):
    """Sites that changed nothing: what is left is noise of sigma C / n."""
    base = {name: np.zeros((200, 50), np.float32) for name in ("student/w", "state/c", "teacher/w")}
    found = merged(dict.fromkeys("abc", base), base, student=rule, server_learning_rate=1.0)
    sent = ["student/w", "state/c", *(["teacher/w"] if rule in ("fedavg", "fedprox") else [])]
    expected = CLIP / 3
    for name in sent:
        array = found.weights[name]
        if rule in ("fedadam", "fedyogi") and name == "student/w":
            array = found.state.arrays["momentum/student/w"] / 0.1  # what the moments were fed
        assert np.std(array) == pytest.approx(expected, rel=0.03)
    if "teacher/w" not in sent:  # the server's EMA of what was noised
        moved_by = found.weights["student/w"] * np.float32(0.1)
        np.testing.assert_allclose(found.weights["teacher/w"], moved_by, rtol=1e-4, atol=1e-7)


def test_every_merge_has_noise_of_its_own_and_no_array_is_noised_twice():
    base = model(3)
    one, two = (merged(three(base), base).weights for _ in range(2))
    assert all(not np.array_equal(one[name], two[name]) for name in base)
    mean = NoisedMean(
        cohort_of(base, three(base)),
        GROUPS,
        CentralPrivacyConfig(enabled=True),
        NoiseStream.from_system(),
    )
    mean("student/encoder.bias")
    with pytest.raises(RuntimeError, match="noised before"):
        mean("student/encoder.bias")


def test_late_updates_and_unequal_shares_are_not_merged():
    base = model(4)
    updates, rule = three(base), MergeConfig(weighting="uniform", central_privacy={"enabled": True})
    late = {"z": StaleUpdate(lambda name: base[name], lambda name: base[name])}
    for shares, stale in (
        ({"a": 0.5, "b": 0.25, "c": 0.25}, {}),
        (dict.fromkeys("abcz", 0.25), late),
    ):
        with pytest.raises(RoundError, match=r"merge\.weighting = uniform"):
            merge_round(
                base,
                MemoryUpdates(updates),
                merge=rule,
                shares=shares,
                ema_product=0.9,
                state=MergeState(),
                stale=stale,
            )
