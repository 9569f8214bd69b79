"""Preflight's line on the privacy budget: what is spent, what the plan costs, red when too much."""

import json

import pytest
from typer.testing import CliRunner

from agssd_core.accounting import Spending, epsilon, joint_sigma
from agssd_core.config import dump_config
from client.cli import app
from client.ledger import Ledger, LedgerPlace, Purpose, population_of
from client.preflight_privacy import privacy_rows
from tests.support.privacy import private_config
from tests.support.sites import make_site

DELTA, STEPS, ROUNDS = 0.01, 2, 4
PART = Spending(joint_sigma(1.0, 4.0), 1 / 3, STEPS)


def planned(**privacy):
    return private_config(
        privacy={"expected_batch": 1, "delta": DELTA, "epsilon_budget": 0, **privacy},
        federation={"rounds": ROUNDS, "steps_per_round": STEPS},
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return make_site(tmp_path_factory.mktemp("preflight") / "north", "CT", seed=1)


@pytest.fixture
def site(made, monkeypatch):
    monkeypatch.setattr("os.fsync", lambda _: None)
    yield made
    for file in ("policy.yaml", "private/ledger.jsonl", "federation/ledger-head.json"):
        (made / file).unlink(missing_ok=True)


def spend(site, rounds, run="run-1"):
    ledger = Ledger(LedgerPlace.of_site(site), site="north", population=population_of(site))
    for number in range(rounds):
        ledger.reserve(PART, Purpose(run, number, "p" * 64), limits=(), delta=DELTA)


def budget(site, steps):
    limit = epsilon([(*PART[:2], steps)], delta=DELTA) + 1e-6
    (site / "policy.yaml").write_text(f"privacy: {{epsilon_budget: {limit}, delta: {DELTA}}}")


def only_row(site, config, **given):
    (row,) = privacy_rows(site, config, **given)
    return row


def test_a_plan_that_fits_is_green_and_says_what_it_costs(site):
    spend(site, 2, run="older")
    budget(site, steps=STEPS * (2 + ROUNDS))
    row = only_row(site, planned())
    spent, after = (epsilon([(*PART[:2], STEPS * n)], delta=DELTA) for n in (2, 2 + ROUNDS))
    assert row.level == "ok"
    assert f"epsilon {spent:.3f} is spent, 8 planned step(s) would make it {after:.3f}" in row.found


def test_a_plan_that_does_not_fit_is_red_with_what_would_fit(site):
    spend(site, 2, run="older")
    budget(site, steps=STEPS * (2 + ROUNDS) - 1)
    row = only_row(site, planned())
    assert row.level == "fail"
    assert "the budget of the site is" in row.found
    assert "it affords 7 step(s)" in row.found
    assert "Raise privacy.epsilon_budget in policy.yaml" in row.remedy
    assert "ask the coordinator" in row.remedy


def test_rounds_that_the_run_has_paid_for_are_not_planned_again(site):
    spend(site, 3)
    budget(site, steps=STEPS * ROUNDS)
    assert only_row(site, planned(), run="run-1").level == "ok"
    assert only_row(site, planned()).level == "fail"


def test_the_plan_s_own_budget_and_a_small_site_are_red(site):
    row = only_row(site, planned(epsilon_budget=0.5))
    assert (row.level, "the budget of the plan is 0.5" in row.found) == ("fail", True)
    row = only_row(site, planned(expected_batch=50))
    assert (row.level, "more than the site has" in row.found) == ("fail", True)


def test_a_damaged_ledger_is_red_and_no_budget_a_warning(site):
    assert only_row(site, planned()).level == "warn"
    spend(site, 2)
    file = site / "private" / "ledger.jsonl"
    file.write_bytes(file.read_bytes().replace(b'"steps":2', b'"steps":1', 1))
    row = only_row(site, planned())
    assert (row.level, "Restore the newest copy" in row.remedy) == ("fail", True)


def test_a_run_without_privacy_has_no_such_line_and_a_private_one_has(site, tmp_path):
    plan = tmp_path / "plan.yaml"
    plan.write_text(dump_config(planned()))
    for change, expected in (([], 1), (["--set", "privacy.enabled=false"], 0)):
        given = ["preflight", str(site), "--config", str(plan), "--quick", "--json", *change]
        rows = json.loads(CliRunner().invoke(app, given).stdout)
        assert [row["name"] for row in rows].count("privacy budget") == expected


def test_a_plan_with_a_target_is_priced_by_the_noise_that_training_takes(site):
    row = only_row(site, planned(target_epsilon=3.0))
    steps, rest = row.found.split("planned step(s) would make it ")
    assert float(rest.split()[0]) == pytest.approx(3.0, abs=0.01)
    assert steps.endswith(f"{ROUNDS * STEPS} ")


def test_a_plan_without_noise_asks_no_ledger_and_has_no_line(site):
    nothing = {"noise_multiplier": 0, "secure_noise": False}
    assert list(privacy_rows(site, planned(**nothing))) == []
