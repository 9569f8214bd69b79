"""What the site's owner forbids is not done, whatever an order says, and the server learns why."""

import os
from datetime import datetime

import numpy as np
import pytest

import client.site
from agssd_core.config.policy import DAYS, LeavesPolicy
from agssd_core.errors import OrderRefusedError
from agssd_core.journal import entries_of, verify_journal
from agssd_core.weights import schema_of
from client import app as client_app
from client.connection import signing_key_file
from client.objections import metrics_that_leave, require_may_leave
from client.policy_text import DEFAULT_POLICY
from client.site import Site
from client.site_journal import SiteJournal
from simulation.grid import Fault
from tests.support.enrolled import enrol
from tests.support.orders import config_for, order_for
from tests.support.toy import Hospital, ToyBench, toy_weights

WEDNESDAY = datetime(2026, 11, 25, 12, 0)
LATER = DAYS[(datetime.now().weekday() + 3) % 7]


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch):
    """Nobody pulls a plug here: waiting for the disk is most of a toy round's time."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


class Notes:
    """A journal in memory."""

    def __init__(self):
        self.entries = []

    def append(self, kind, facts):
        self.entries.append((kind, dict(facts)))

    def head(self):
        return f"{len(self.entries)}:{'0' * 64}"

    def hear(self, head):
        """The coordinator's journal is no matter here."""

    def of(self, kind):
        return [entry for entry in self.entries if entry[0] == kind]


class FullDisk(Notes):
    """A journal that takes entries of this kind no more."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def append(self, kind, facts):
        if kind == self.kind:
            raise OSError(28, "No space left on device")
        super().append(kind, facts)


class OwnJournal(SiteJournal):
    """A real journal; the toy server keeps none that it could be told of."""

    def hear(self, head):
        assert head == ""


class Guarded(Hospital):
    """A toy federation whose site ``a`` has a policy and whose sites note what they do."""

    def __init__(self, folder, policy, **settings):
        super().__init__(folder, **settings)
        (self.sites["a"] / "policy.yaml").write_text(policy)
        self.notes = {name: Notes() for name in self.sites}

    def app(self):
        opened = {}

        def open_site(node_config):
            name = node_config["name"]
            if name not in opened:
                folder = self.sites[name]
                opened[name] = Site(folder, name, self.bench, recorder=self.notes[name])
            return opened[name]

        return client_app.make_app(open_site)

    def trained(self):
        return {trainer.site for trainer in self.bench.trainers}


FORBIDDEN = {
    "policy-cohort": "cohorts: [us]",
    "policy-hours": f"hours: [{{days: [{LATER}]}}]",
    "policy-rounds": "work: {rounds: 1}",
    "policy-steps": "work: {steps_per_round: 3}",
    "policy-minimum": "work: {least_images: 1000}",
    "policy-config": "plans: {bounds: [{key: training.batch_size, most: 4}]}",
    "policy-privacy": "require_privacy: true",
    "policy-leaves": "leaves: {groups: [student, state]}",
    "policy-file": "work: {round: 2}",
}


@pytest.mark.parametrize(("reason", "policy"), FORBIDDEN.items(), ids=FORBIDDEN)
def test_a_forbidden_order_is_refused_noted_and_seen_as_a_class(tmp_path, reason, policy):
    one = Guarded(tmp_path, policy, rounds=2)
    one.run()
    assert {entry for entry in one.reasons() if entry[1] == "a"} == {
        (number, "a", f"declined-{reason}") for number in range(2)
    }
    assert one.trained() == {"b", "c"}
    assert one.notes["a"].of("refusal") == [
        ("refusal", {"run": "run-1", "cohort": "ct-mr", "round": number, "reason": reason})
        for number in range(2)
    ]
    assert not (one.sites["a"] / "federation" / "run-1" / "round-0000").exists()


def test_nothing_that_came_with_a_forbidden_order_is_decoded(tmp_path, monkeypatch):
    decoded = []
    really = client.site.opened
    monkeypatch.setattr(
        client.site, "opened", lambda *given, **more: decoded.append(1) or really(*given, **more)
    )
    one = Guarded(tmp_path, "work: {rounds: 2}", patients={"a": 3}, rounds=3)
    one.run()
    assert decoded == []
    assert one.reasons()


def test_an_allowed_order_is_carried_out_to_the_same_bits_and_noted(tmp_path):
    plain, one = Hospital(tmp_path / "plain"), Guarded(tmp_path / "guarded", DEFAULT_POLICY)
    plain.run()
    one.run()
    assert one.digest() == plain.digest()
    kinds = [kind for kind, _ in one.notes["a"].entries]
    assert kinds == ["order", "update"] * 3
    assert one.notes["a"].of("update")[0][1]["patients"] == 3


@pytest.mark.parametrize("kind", ["order", "update"])
def test_what_cannot_be_noted_is_not_done_and_does_not_leave(tmp_path, kind):
    one = Guarded(tmp_path, DEFAULT_POLICY, rounds=1)
    one.notes["a"] = FullDisk(kind)
    one.run()
    assert one.reasons() == [(0, "a", "site-error")]
    assert ("a" in one.trained()) == (kind == "update")


def test_a_refusal_that_cannot_be_noted_stays_a_refusal(tmp_path):
    one = Guarded(tmp_path, "cohorts: [us]", rounds=1)
    one.notes["a"] = FullDisk("refusal")
    one.run()
    assert one.reasons() == [(0, "a", "declined-policy-cohort")]


def test_an_enrolled_site_signs_what_it_refused_and_what_left(tmp_path):
    one = Guarded(tmp_path, DEFAULT_POLICY, rounds=2)
    public = enrol(one.sites["a"])
    one.notes["a"] = OwnJournal.of(one.sites["a"])

    def tightened(name, group):
        if group == "1":
            (one.sites["a"] / "policy.yaml").write_text("require_privacy: true")
        return Fault()

    one.run(tightened)
    verify_journal(one.sites["a"], public)
    found = [(entry.kind, entry.facts.get("reason")) for entry in entries_of(one.sites["a"])]
    assert found == [
        ("order", None),
        ("update", None),
        ("order", None),
        ("refusal", "policy-privacy"),
    ]


def test_a_site_that_lost_its_signing_key_sends_nothing(tmp_path):
    one = Guarded(tmp_path, DEFAULT_POLICY, rounds=1)
    enrol(one.sites["a"])
    signing_key_file(one.sites["a"], 1).unlink()
    one.notes["a"] = OwnJournal.of(one.sites["a"])
    one.run()
    assert one.reasons() == [(0, "a", "site-error")]


def test_a_change_of_the_policy_counts_from_the_next_order_on(tmp_path):
    one = Guarded(tmp_path, DEFAULT_POLICY, rounds=3)
    policy = one.sites["a"] / "policy.yaml"

    def tightened(name, group):
        if group == "1":
            policy.write_text("cohorts: [us]")
        return Fault()

    one.run(tightened)
    assert one.reasons() == [(1, "a", "declined-policy-cohort"), (2, "a", "declined-policy-cohort")]


def test_a_saved_reply_stays_when_its_arrays_may_no_longer_leave(tmp_path):
    (tmp_path / "facts.json").write_text('{"patients": 7}')
    weights = toy_weights()
    config = config_for(steps_per_round=4)
    Site(tmp_path, "north", ToyBench()).train_round(order_for(weights, config=config), weights)
    (tmp_path / "policy.yaml").write_text("leaves: {arrays: ['*/encoder.*', 'state/*']}")
    with pytest.raises(OrderRefusedError, match="2 array") as refused:
        Site(tmp_path, "north", ToyBench()).train_round(order_for(weights, config=config), weights)
    assert refused.value.reason == "policy-leaves"


def test_metrics_that_fit_no_pattern_stay(tmp_path):
    one = Guarded(tmp_path, "leaves: {metrics: ['lo*']}", rounds=1)
    one.run()
    sent = {row["site"]: row["metrics"] for row in one.rows("site")}
    assert "learning_rate" in sent["b"]
    assert "loss" in sent["a"]
    assert "learning_rate" not in sent["a"]
    assert metrics_that_leave({"loss": 1.0}, LeavesPolicy(metrics=())) == {}


def test_an_update_larger_than_the_owner_allows_stays():
    weights = {"student/w": np.zeros((500, 500), np.float32)}
    require_may_leave(schema_of(weights), LeavesPolicy(megabytes=1.0))
    with pytest.raises(OrderRefusedError, match=r"1 MB, limit 0\.9"):
        require_may_leave(schema_of(weights), LeavesPolicy(megabytes=0.9))
