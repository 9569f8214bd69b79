"""What noised merges cost each site, and who is told."""

import json
import math
import warnings
from dataclasses import replace
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agssd_core.errors import CheckpointError
from server.central_accounts import FILE, CentralAccount, account_of
from server.merge import merge_round
from server.privacy_report import write_privacy_report
from tests.support.central import AGSSD
from tests.support.killing import Killed
from tests.support.toy import Hospital


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
    assert "noise of a merge of all is 20 times as long" in account.worth()
    # With little epsilon what delta lets through counts: (e^0 + 0.2) / (e^0 + 1).
    loose = CentralAccount(1.0, 1e6, 0.2, 10_000, dict.fromkeys("abc", 1))
    assert "right at most 60.0 times in 100" in loose.worth()
    calm = replace(account, noise_multiplier=100.0)
    assert calm.largest < 1
