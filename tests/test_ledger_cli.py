"""``agssd-site ledger``: what a person at a hospital asks, and what the answers are held to."""

import json
import os
from itertools import pairwise

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from agssd_core.accounting import epsilon
from agssd_core.errors import ConfigError
from client.cli import app
from client.ledger import FILE
from client.ledger_plan import Plan, Terms, plan_for, sampling_rate, table
from tests.support.orders import config_for, order_for
from tests.support.private_toy import RATE, SIGMA, STEPS, private_site
from tests.support.toy import toy_weights

TERMS = Terms(rate=0.032, steps=30, delta=1e-5)


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A site after two private rounds of two runs each, the last of them never finished."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    site = private_site(tmp_path / "north")
    weights = toy_weights()
    for run in ("run-1", "run-2"):
        for number in range(2):
            order = order_for(weights, number, config_for(steps_per_round=STEPS), run=run)
            site.train_round(order, weights)
    file = site.folder / "private" / FILE
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:-1]))
    marker = site.folder / "federation" / "ledger-head.json"
    marker.unlink()
    return site.folder


def _ask(*words):
    found = CliRunner().invoke(app, ["ledger", *map(str, words)])
    return found.exit_code, found.output


def test_show_adds_up_runs_and_says_what_is_left(site):
    spent = epsilon([(SIGMA, RATE, 4 * STEPS)], delta=1e-4)
    code, text = _ask("show", site)
    assert code == 0
    assert "sets no budget of its own" in text
    (site / "policy.yaml").write_text("privacy: {epsilon_budget: 5, delta: 1e-4}")
    code, text = _ask("show", site)
    assert f"epsilon {spent:.3f} at delta 0.0001" in text
    assert f"epsilon 5, of which {5 - spent:.3f} is left" in text
    assert "1 reserved round(s) were never finished; they count." in text
    facts = json.loads(_ask("show", site, "--json")[1])
    assert [run["rounds"] for run in facts["runs"]] == [2, 2]
    assert facts["epsilon"] == pytest.approx(spent)


def test_a_site_that_never_spent_says_so(tmp_path):
    private_site(tmp_path / "north")
    assert "nothing was spent" in _ask("show", tmp_path / "north")[1]


def test_verify_compares_with_the_head_that_the_server_holds(site):
    code, text = _ask("verify", site)
    assert code == 0
    assert text.startswith("7 entries hold.")
    head = text.split("head ")[1].strip()
    assert "the given head lies in it" in _ask("verify", site, "--head", head)[1]
    number, digest = head.split(":")
    code, text = _ask("verify", site, "--head", f"{int(number) + 2}:{digest}")
    assert code == 2
    assert "cut or rolled back" in text
    assert _ask("verify", site, "--head", "seven")[0] == 2
    file = site / "private" / FILE
    file.write_bytes(file.read_bytes().replace(b'"rate":0.1', b'"rate":0.01'))
    code, text = _ask("verify", site)
    assert code == 2
    assert "line 1 of the privacy ledger does not hold" in text


def test_plan_finds_the_one_that_was_not_given():
    given = plan_for(TERMS, sigma=1.3307, rounds=100, budget=None)
    assert given.epsilon == pytest.approx(epsilon([(1.3307, 0.032, 3000)], delta=1e-5))
    noise = plan_for(TERMS, sigma=None, rounds=100, budget=8.0)
    assert noise.asked == "sigma"
    assert 7.99 < noise.epsilon <= 8.0
    rounds = plan_for(TERMS, sigma=noise.sigma, rounds=None, budget=8.0)
    assert rounds.rounds == 100
    assert TERMS.epsilon_after(noise.sigma, 101) > 8.0
    with pytest.raises(ConfigError, match="two of"):
        plan_for(TERMS, sigma=1.0, rounds=None, budget=None)


def test_a_table_costs_more_to_the_bottom_and_to_the_left():
    head, *rows = table(Plan(TERMS, "epsilon", 1.2, 40, None))
    costs = [[float(cell) for cell in row[1:]] for row in rows]
    assert [row[0] for row in rows] == ["4", "10", "20", "40", "80"]
    assert head[2] == "sigma 1.2"
    for row, below in pairwise(costs):
        assert row == sorted(row, reverse=True)
        assert all(cost < more for cost, more in zip(row, below, strict=True))


def test_plan_counts_what_a_site_has_spent_and_draws_it(site, tmp_path):
    out = tmp_path / "plan.png"
    asked = ("plan", site, "--rate", 0.1, "--sigma", 1, "--rounds", 2, "--steps", STEPS)
    code, text = _ask(*asked, "--out", out)
    assert code == 0
    assert f"epsilon {epsilon([(SIGMA, RATE, 6 * STEPS)], delta=1e-5):.3f}" in text
    assert "spent before on these patients" in text
    with Image.open(out) as picture:
        assert min(picture.size) > 500
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20
    (site / "policy.yaml").write_text("privacy: {epsilon_budget: 0.1}")
    code, text = _ask(*asked)
    assert "above the budget of 0.1" in text


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        (("--rate", 0.1, "--patients", 9, "--batch", 3), "either --rate"),
        (("--patients", 9), "either --rate"),
        (("--patients", 9, "--batch", 20), "Lower --batch"),
        (("--patients", 200000, "--batch", 20), "Lower --delta"),
    ],
    ids=str,
)
def test_plans_without_meaning_are_refused(words, remedy):
    code, text = _ask("plan", "--sigma", 1, "--rounds", 2, *words)
    assert code == 2
    assert remedy in text


def test_a_rate_is_patients_a_step_over_patients():
    assert sampling_rate(None, 2000, 64) == 0.032
    assert sampling_rate(0.5, None, None) == 0.5
