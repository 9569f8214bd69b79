"""Privacy of whole sites at the server: what one site can do, what is noised, what it costs."""

import json
import math
import re
import warnings
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from agssd_core.config import CentralPrivacyConfig, MergeConfig, parse_config
from agssd_core.errors import CheckpointError, ConfigError, RoundError
from agssd_core.noise import NoiseStream
from server import central_privacy, robust
from server.aggregation import Cohort
from server.central_accounts import FILE, CentralAccount, account_of
from server.central_privacy import NoisedMean
from server.merge import MergeState, StaleUpdate, merge_round
from server.privacy_report import write_privacy_report
from tests.support.killing import Killed
from tests.support.merging import MemoryUpdates, model, moved
from tests.support.toy import Hospital

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


# --- What is refused


AGSSD = {"head": {"input_norm_cls": "none"}, "eaam": {"kappa": 0}}


def plan(**changes):
    merge = {"weighting": "uniform", "central_privacy": {"enabled": True}}
    federation = {"min_sites": 3, "merge": merge | changes.pop("merge", {})}
    content = {
        "preset": "tiny",
        "agssd": AGSSD | changes.pop("agssd", {}),
        "federation": federation | changes.pop("federation", {}),
    }
    return parse_config(content | changes)


def test_a_plan_of_equal_shares_and_late_noise_is_taken():
    for rule in ("fedavg", "fedprox", "fedema", "fedavgm", "fedadam", "fedyogi"):
        plan(merge={"student": rule})
    plan(federation={"wire": "int8"})
    plan(privacy={"enabled": True}, agssd={"head": {"input_norm_cls": "auto"}})


def test_the_plan_of_the_documentation_is_taken():
    page = Path(__file__).parents[1] / "docs" / "privacy.md"
    (block,) = re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL)
    assert parse_config(yaml.safe_load(block)).federation.merge.central_privacy.enabled


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"merge": {"student": "median"}}, "merge.student = median"),
        ({"merge": {"student": "trimmed-mean"}}, "merge.student = trimmed-mean"),
        ({"merge": {"student": "norm-clip"}}, "merge.student = norm-clip"),
        ({"merge": {"student": "l-dawa"}}, "merge.student = l-dawa"),
        (
            {"merge": {"student": "krum"}, "federation": {"min_sites": 5}},
            "merge.student = krum",
        ),
        ({"merge": {"weighting": "patients"}}, "merge.weighting = patients"),
        (
            {"merge": {"teacher": "server-ema"}, "federation": {"late": "stale"}},
            "federation.late = stale",
        ),
        ({"federation": {"max_update_norm": 1.0}}, "federation.max_update_norm"),
        ({"agssd": {"head": {"input_norm_cls": "ema"}}}, "agssd.head.input_norm_cls = ema"),
        ({"agssd": {"head": {"input_norm_cls": "auto"}}}, "agssd.head.input_norm_cls = auto"),
        ({"agssd": {"eaam": {"kappa": 0.1}}}, "agssd.eaam.kappa"),
        (
            {
                "cohorts": ["us"],
                "anaus": {"backbone": {"norm": "batch"}, "share_statistics": True},
            },
            "anaus.share_statistics",
        ),
        (
            {"merge": {"central_privacy": {"enabled": True, "delta": 0.4}}},
            "merge.central_privacy.delta",
        ),
        (
            {"merge": {"central_privacy": {"enabled": True, "noise_multiplier": 0}}},
            "merge.central_privacy.noise_multiplier",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_breaks_the_guarantee_is_refused_by_its_name(changes, part):
    merge = changes.get("merge", {})
    federation = changes.get("federation", {}) | {"merge": {"weighting": "uniform"} | merge}
    if "central_privacy" not in merge:
        federation["merge"]["central_privacy"] = {"enabled": True}
    with pytest.raises(ConfigError) as refused:
        plan(**{**changes, "federation": federation})
    assert any(problem.startswith(part) for problem in refused.value.problems)


# --- What it costs


@settings(max_examples=10, deadline=None)
@given(sigma=st.floats(0.5, 20), rounds=st.integers(1, 200))
def test_epsilon_is_that_of_opacus(sigma, rounds):
    from opacus.accountants import RDPAccountant

    from agssd_core.accounting import ORDERS

    accountant = RDPAccountant()
    accountant.history = [(sigma, 1.0, rounds)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = accountant.get_epsilon(0.01, alphas=list(ORDERS))
    account = CentralAccount(1.0, sigma, 0.01, 100, {"a": rounds, "b": rounds - 1})
    assert account.epsilon("a") == pytest.approx(max(expected, 0.0), rel=1e-12)
    assert account.largest == account.epsilon("a") >= account.epsilon("b")


@pytest.mark.parametrize(("delta", "expected"), [(0.1, 68.8), (0.01, 78.0), (1e-5, 96.1)])
def test_a_hundred_merges_at_noise_one_cost_what_was_published(delta, expected):
    account = CentralAccount(1.0, 1.0, delta, 100, {"a": 100})
    assert account.largest == pytest.approx(expected, abs=0.06)


CENTRAL = {"weighting": "uniform", "central_privacy": {"enabled": True, "clip_norm": 5.0}}


class Federation(Hospital):
    """Three toy sites whose merges are noised."""

    method: ClassVar = {"agssd": AGSSD}

    def __init__(self, folder, **plan):
        super().__init__(folder, **{"rounds": 3, "min_sites": 2, "merge": CENTRAL, **plan})


@pytest.fixture
def _fast_disk(monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _: None)


@pytest.mark.usefixtures("_fast_disk")
@pytest.mark.parametrize("wire", ["float32", "int8"])
def test_manifest_rows_and_log_say_what_each_site_has_spent(tmp_path, caplog, wire):
    run = Federation(tmp_path, wire=wire)
    with caplog.at_level("INFO"):
        run.run()
    told = run.store.latest().manifest.extra["central_privacy"]
    assert told["unit"] == "site"
    assert told["rounds"] == {"a": 3, "b": 3, "c": 3}
    assert told["largest_epsilon"] == CentralAccount.read(told).largest
    spent = [row["metrics"]["central_epsilon"] for row in run.rows("merge")]
    assert spent == sorted(spent)
    assert spent[-1] == told["largest_epsilon"]
    warned = [r for r in caplog.records if "central privacy, round" in r.getMessage()]
    assert [record.levelname for record in warned] == ["WARNING", "INFO", "INFO"]
    assert "no site can hide among so few" in warned[0].getMessage()


@pytest.mark.usefixtures("_fast_disk")
def test_a_site_pays_for_the_merges_that_it_is_in(tmp_path):
    run = Federation(tmp_path, sites_per_round=2, rounds=4)
    run.run()
    told = run.store.latest().manifest.extra["central_privacy"]
    taken = [row["site"] for row in run.rows("site")]
    assert told["rounds"] == {site: taken.count(site) for site in sorted(set(taken))}
    assert len(taken) == 8


@pytest.mark.usefixtures("_fast_disk")
def test_a_round_merged_again_after_a_kill_is_noised_anew_and_counted_again(tmp_path, monkeypatch):
    run = Federation(tmp_path)
    seen = []
    real = merge_round

    def killed_after_merging(*args, **kwargs):
        result = real(*args, **kwargs)
        seen.append(result.weights)
        if len(seen) == 2:
            raise Killed
        return result

    monkeypatch.setattr("server.rounds.merge_round", killed_after_merging)
    with pytest.raises(Killed):
        run.run()
    run.run()
    assert len(seen) == 4  # three rounds, one of them merged twice
    assert any(not np.array_equal(seen[1][name], seen[2][name]) for name in seen[1])
    told = run.store.latest().manifest.extra["central_privacy"]
    assert told["rounds"] == {"a": 4, "b": 4, "c": 4}


@pytest.mark.usefixtures("_fast_disk")
def test_an_account_that_is_lost_damaged_or_older_never_lowers_what_was_spent(tmp_path):
    run = Federation(tmp_path)
    file = run.store.folder / FILE

    def stopped(after):
        def on_round(outcome):
            if outcome.round == after:
                raise Killed

        with pytest.raises(Killed):
            run.run(on_round=on_round)

    stopped(0)
    first = file.read_bytes()
    file.unlink()
    stopped(1)
    assert account_of(run.store.folder).rounds == {"a": 2, "b": 2, "c": 2}
    other = json.loads(first) | {"noise_multiplier": 9.0}
    for content in (b'{"rounds": ', json.dumps(other).encode()):
        file.write_bytes(content)
        with pytest.raises(CheckpointError, match="nobody can say"):
            run.run()
    file.write_bytes(first)
    run.run()
    assert account_of(run.store.folder).rounds == {"a": 3, "b": 3, "c": 3}


@pytest.mark.usefixtures("_fast_disk")
def test_the_privacy_report_says_what_noised_merges_protect_and_from_whom(tmp_path):
    run = Federation(tmp_path)
    run.run()
    markdown, page = (file.read_text() for file in write_privacy_report(run.store.folder))
    account = account_of(run.store.folder)
    assert "This run gives no differential privacy to any single patient." in markdown
    assert f"| a | 3 | {account.epsilon('a'):.3f} | 0.01 |" in markdown
    for words in (account.worth(), "Not protected against the coordinator"):
        assert words in markdown
    # Numbers of sites left without noise, and are named.
    assert "reported beside the weights: learning_rate, loss, optimiser_reset." in markdown
    assert "hygiene rather than protection" in page
    (run.store.folder / FILE).unlink()  # the manifest alone says the same
    assert f"| a | 3 | {account.epsilon('a'):.3f} |" in (
        write_privacy_report(run.store.folder)[0].read_text()
    )


def test_accounts_from_outside_are_looked_at():
    good = CentralAccount(1.0, 1.0, 0.01, 10, {"a": 2}).statement()
    assert CentralAccount.read(good).rounds == {"a": 2}
    for name, value in (
        ("delta", 2.0),
        ("noise_multiplier", math.nan),
        ("clip_norm", -1),
        ("rounds", {"a": -1}),
        ("rounds", [1]),
        ("numbers", None),
    ):
        with pytest.raises(ValueError, match="no account"):
            CentralAccount.read({**good, name: value})


def test_what_epsilon_is_worth_is_said_in_words():
    account = CentralAccount(1.0, 1.0, 0.01, 10_000, dict.fromkeys("abcde", 100))
    assert "right at most 100.0 times in 100" in account.worth()
    assert "noise of a merge is 20 times as long" in account.worth()
    calm = replace(account, noise_multiplier=100.0)
    assert calm.largest < 1
