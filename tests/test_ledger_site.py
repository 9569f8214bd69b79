"""A site that trains privately: what it pays, what it declines, and ends of its process."""

import json
import os
import shutil
from pathlib import Path

import pytest

from agssd_core.accounting import epsilon
from agssd_core.data.deidentify import ensure_secret
from agssd_core.errors import OrderRefusedError
from agssd_core.privacy_statement import PrivacyStatement
from client.app import make_app
from client.budget import limits_of
from client.ledger import FILE
from client.ledger_chain import RESERVED
from client.memory import RunMemory
from client.purse import Purse
from client.site import Site
from tests.support.orders import config_for, order_for
from tests.support.private_toy import RATE, SIGMA, STEPS, PrivateBench, private_site
from tests.support.spending import chain_of, kill_spender
from tests.support.toy import Hospital, ToyBench, toy_weights

ROOT = Path(__file__).parent.parent
PLAN = config_for(rounds=50, steps_per_round=STEPS)
DELTA = 1e-5


@pytest.fixture
def _fast_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def site(tmp_path, _fast_disk):
    return private_site(tmp_path / "north")


def _budget(folder, rounds):
    """A policy that affords just so many rounds."""
    limit = epsilon([(SIGMA, RATE, STEPS * rounds)], delta=DELTA) + 1e-6
    (folder / "policy.yaml").write_text(
        f"privacy: {{epsilon_budget: {limit}, delta: 1e-5}}\nlpsam: {{digests: []}}\n"
    )


def test_a_round_is_reserved_before_it_trains_and_committed_after(site):
    weights = toy_weights()
    seen = []
    trainer_of = site.workbench.trainer

    def watched(*args, **kwargs):
        trainer = trainer_of(*args, **kwargs)
        step = trainer._step
        trainer._step = lambda *a: (
            seen.append(chain_of(site.folder).open_reservations()) or step(*a)
        )
        return trainer

    site.workbench.trainer = watched
    update = site.train_round(order_for(weights, 0, PLAN), weights)
    assert seen == [1] * STEPS
    chain = chain_of(site.folder)
    assert [entry.state for entry in chain.entries] == ["reserved", "committed"]
    statement = PrivacyStatement.checked(update.header.privacy)
    assert statement.epsilon == pytest.approx(epsilon([(SIGMA, RATE, STEPS)], delta=DELTA))
    assert (statement.sequence, statement.digest) == (1, chain.digests[0])


def test_a_repeated_order_costs_nothing_and_a_retry_costs_again(site):
    weights = toy_weights()
    first = site.train_round(order_for(weights, 0, PLAN), weights)
    paid = chain_of(site.folder).history()
    again = Site(site.folder, "north", PrivateBench()).train_round(
        order_for(weights, 0, PLAN), weights
    )
    assert again.header.weights_digest == first.header.weights_digest
    assert chain_of(site.folder).history() == paid
    # The reply is lost: the round is trained again with other noise.
    (site.folder / "federation" / "run-1" / "round-0000" / "reply.json").unlink()
    fresh = Site(site.folder, "north", PrivateBench()).train_round(
        order_for(weights, 0, PLAN), weights
    )
    assert fresh.header.weights_digest != first.header.weights_digest
    assert chain_of(site.folder).history() == ((SIGMA, RATE, 2 * STEPS),)


def test_what_a_lone_run_spent_is_never_more_than_all_in_the_last_bit(site, tmp_path):
    """After 24 rounds of two steps the two sums differ by rounding."""
    order = order_for(toy_weights(), config=PLAN, config_text='{"privacy": {"epsilon_budget": 0}}')
    purse = Purse(site.folder, "north", order, "p" * 64, tmp_path, "site")
    for _ in range(24):
        purse.spend(SIGMA, RATE, STEPS)
    found = PrivacyStatement.checked(purse.statement({}))
    assert found.epsilon == found.epsilon_run


def test_runs_share_the_budget_but_simulated_runs_do_not(site, tmp_path):
    weights = toy_weights()
    _budget(site.folder, rounds=2)
    for run in ("run-1", "run-2"):
        update = site.train_round(order_for(weights, 0, PLAN, run=run), weights)
    assert update.header.privacy["epsilon"] > update.header.privacy["epsilon_run"]
    with pytest.raises(OrderRefusedError, match="budget of the site"):
        site.train_round(order_for(weights, 0, PLAN, run="run-3"), weights)
    simulated = private_site(tmp_path / "simulated", ledger="run")
    _budget(simulated.folder, rounds=2)
    for run in ("run-1", "run-2", "run-3"):
        update = simulated.train_round(order_for(weights, 0, PLAN, run=run), weights)
        assert update.header.privacy["scope"] == "run"
        assert update.header.privacy["epsilon"] == update.header.privacy["epsilon_run"]


def test_a_plan_s_budget_and_the_site_s_own_both_hold(site):
    config = json.dumps({"privacy": {"epsilon_budget": 3, "delta": 1e-4}})
    (limit,) = limits_of(site.folder, config)
    assert (limit.owner, limit.epsilon, limit.delta) == ("plan", 3, 1e-4)
    _budget(site.folder, rounds=2)
    assert [limit.owner for limit in limits_of(site.folder, config)] == ["plan", "site"]
    # 0 is no limit in a plan; a site that says 0 trains nothing under privacy.
    (site.folder / "policy.yaml").write_text("privacy: {epsilon_budget: 0}")
    weights = toy_weights()
    with pytest.raises(OrderRefusedError) as refused:
        site.train_round(order_for(weights, 0, PLAN), weights)
    assert refused.value.reason == "budget"
    (site.folder / "policy.yaml").write_text("privacy: {epsilon_bugdet: 8}")
    with pytest.raises(OrderRefusedError, match=r"policy\.yaml") as refused:
        site.train_round(order_for(weights, 0, PLAN), weights)
    assert refused.value.reason == "policy-file"


def test_a_plan_that_asks_for_privacy_is_declined_where_training_cannot_promise_it(tmp_path):
    order = order_for(toy_weights(), config=PLAN, config_text='{"privacy": {"enabled": true}}')
    purse = Purse(tmp_path, "north", order, "p" * 64, tmp_path, "site")
    with pytest.raises(OrderRefusedError, match="cannot promise"):
        purse.offer(ToyBench().trainer(tmp_path, PLAN, site="north"))
    purse.offer(PrivateBench().trainer(tmp_path, PLAN, site="north"))
    with pytest.raises(OrderRefusedError, match="did not ask"):
        purse.statement({})


# --- In a federation ---


class PrivateHospital(Hospital):
    """Three sites that train privately; a's patients are worth only two rounds."""

    def __init__(self, folder, **plan):
        super().__init__(folder, rounds=4, steps_per_round=STEPS, **plan)
        self.bench = PrivateBench()
        for name, place in self.sites.items():
            ensure_secret(place)
            if name == "a":
                _budget(place, rounds=2)

    def app(self):
        opened = {}

        def open_site(node):
            place = Path(node["site"])
            return opened.setdefault(node["name"], Site(place, node["name"], self.bench))

        return make_app(open_site)


@pytest.mark.usefixtures("_fast_disk")
def test_a_site_whose_budget_is_spent_declines_and_the_others_go_on(tmp_path):
    hospital = PrivateHospital(tmp_path)
    summary = hospital.run()
    assert summary.merged_rounds == 4
    assert hospital.reasons() == [(2, "a", "declined-budget"), (3, "a", "declined-budget")]
    rounds = {row["site"]: 0 for row in hospital.rows("site")}
    for row in hospital.rows("site"):
        rounds[row["site"]] += 1
    assert rounds == {"a": 2, "b": 4, "c": 4}
    told = hospital.store.latest().manifest.extra["privacy"]
    for name, count in rounds.items():
        expected = epsilon([(SIGMA, RATE, STEPS * count)], delta=DELTA)
        assert told[name]["epsilon"] == pytest.approx(expected)


def _truncate(folder, _backup):
    file = folder / "private" / FILE
    file.write_bytes(file.read_bytes()[:-300])


def _edit(folder, _backup):
    file = folder / "private" / FILE
    file.write_bytes(file.read_bytes().replace(b'"steps":2', b'"steps":1', 1))


def _delete(folder, _backup):
    (folder / "private" / FILE).unlink()


def _roll_back(folder, backup):
    """The whole folder, marker and all, from an old copy."""
    shutil.rmtree(folder)
    shutil.copytree(backup, folder)


def _index_anew(folder, _backup):
    shutil.rmtree(folder / "private")
    shutil.rmtree(folder / "federation")
    ensure_secret(folder)


@pytest.mark.parametrize("damage", [_truncate, _edit, _delete, _roll_back, _index_anew])
@pytest.mark.usefixtures("_fast_disk")
def test_a_site_with_a_damaged_ledger_trains_no_more_and_the_others_go_on(tmp_path, damage):
    hospital = PrivateHospital(tmp_path)
    site, backup = hospital.sites["b"], tmp_path / "backup"

    def meddle(outcome):
        if outcome.round == 0:
            shutil.copytree(site, backup)
        if outcome.round == 1:
            damage(site, backup)

    assert hospital.run(on_round=meddle).merged_rounds == 4
    assert [reason for reason in hospital.reasons() if reason[1] == "b"] == [
        (2, "b", "declined-ledger"),
        (3, "b", "declined-ledger"),
    ]
    assert {row["site"] for row in hospital.rows("site") if row["round"] == 3} == {"c"}


# --- Killed at any moment ---


def _summary(folder):
    chain = chain_of(folder)
    trained = (folder / "witness").read_text().split()
    paid = sum(entry.state == RESERVED for entry in chain.entries)
    torn = len(list((folder / "private").glob("ledger.torn-*")))
    return {
        "paid": paid,
        "trained": len(trained),
        "open": chain.open_reservations(),
        "torn": torn,
        "rounds": RunMemory.of(folder, "run-1").last().round + 1,
    }


def test_a_killed_site_has_paid_for_all_that_it_trained(tmp_path):
    assert len(list(kill_spender(tmp_path / "north", times=8, seed=1))) == 8
    found = _summary(tmp_path / "north")
    assert found["paid"] >= found["trained"] >= found["rounds"] > 0


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_site_killed_at_a_hundred_moments_has_paid_for_all_that_it_trained(tmp_path, capsys):
    assert len(list(kill_spender(tmp_path / "north", times=100, seed=2))) == 100
    found = _summary(tmp_path / "north")
    with capsys.disabled():
        print(f"\n100 kills: {found}")  # noqa: T201
    assert found["paid"] >= found["trained"] >= found["rounds"] > 0
    assert found["open"] > 0  # some were killed between reservation and commitment
