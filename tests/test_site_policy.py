"""What the site's owner forbids is not done, whatever an order says, and the server learns why."""

import json
import os
from dataclasses import replace
from datetime import datetime

import numpy as np
import pytest
from typer.testing import CliRunner

import client.site
from agssd_core.config import dump_config, parse_config
from agssd_core.config.load import load_node
from agssd_core.config.policy import DAYS, HoursPolicy, LeavesPolicy, SitePolicy
from agssd_core.errors import ConfigError, OrderRefusedError
from agssd_core.journal import entries_of, verify_journal
from agssd_core.weights import schema_of
from client import app as client_app
from client.cli import app as cli
from client.connection import signing_key_file
from client.objections import metrics_that_leave, objections, plan_digest, require_may_leave
from client.policy import allowed_applications, read_policy
from client.policy_text import DEFAULT_POLICY
from client.site import Site
from client.site_journal import SiteJournal
from server.rounds import site_config
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


# --- single rules


def reasons(policy, order, now=WEDNESDAY):
    return [one.reason for one in objections(SitePolicy.model_validate(policy), order, now=now)]


def ordered(**settings):
    return order_for(toy_weights(), config=config_for(steps_per_round=4, **settings))


def with_privacy(**privacy):
    order = ordered()
    content = json.loads(order.config) | {"privacy": privacy}
    return replace(order, config=json.dumps(content))


PRIVATE = {
    "enabled": True,
    "secure_noise": True,
    "epsilon_budget": 4.0,
    "delta": 1e-6,
    "expected_batch": 16.0,
}


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({}, False),
        ({"enabled": False}, True),
        ({"enabled": 1}, True),
        ({"secure_noise": False}, True),
        ({"epsilon_budget": 0}, True),
        ({"epsilon_budget": 8.1}, True),
        ({"epsilon_budget": "4"}, True),
        ({"delta": 1e-4}, True),
        ({"delta": 0}, True),
    ],
    ids=str,
)
def test_required_privacy_is_that_of_the_plan_and_within_the_budget(changes, refused):
    found = reasons({"require_privacy": True}, with_privacy(**(PRIVATE | changes)))
    assert found == (["policy-privacy"] if refused else [])


def test_a_private_plan_counts_the_patients_that_a_step_draws():
    drawn = with_privacy(**(PRIVATE | {"expected_batch": 1.0}))
    assert reasons({}, drawn) == ["policy-minimum"]


@pytest.mark.parametrize(("steps", "batch"), [(1, 64), (64, 1), (3, 5)])
def test_one_step_or_one_image_is_refused_by_default(steps, batch):
    settings = {"rounds": 5, "steps_per_round": steps}
    content = {"preset": "tiny", "federation": settings, "training": {"batch_size": batch}}
    order = order_for(toy_weights(), config=parse_config(content))
    assert reasons({}, order) == ["policy-minimum"]


def test_ultrasound_counts_its_own_batch():
    content = {"preset": "tiny", "cohorts": ["us"], "federation": {"steps_per_round": 4}}
    content["anaus"] = {"batch_size": 3}
    config = parse_config(content).for_cohort("us")
    order = order_for(toy_weights(), config=config, cohort="us")
    assert reasons({}, order) == ["policy-minimum"]
    assert reasons({"work": {"least_images": 12}}, order) == []


def test_an_order_that_is_longer_than_its_plan_says_is_refused_too():
    assert reasons({"work": {"rounds": 5}}, ordered()) == []
    assert reasons({"work": {"rounds": 5}}, replace(ordered(), round=5)) == ["policy-rounds"]


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"federation": 3}', "[" * 10**5])
def test_a_configuration_that_cannot_be_read_is_refused(text):
    assert "policy-config" in reasons({}, replace(ordered(), config=text))


def test_only_listed_plans_are_taken_whatever_their_waiting_times():
    config = config_for(steps_per_round=4).model_copy(update={"name": "mine"})
    sent = dump_config(site_config(config))
    digest = plan_digest(json.loads(dump_config(config.for_cohort("ct-mr"))))
    order = replace(ordered(), config=sent)
    assert reasons({"plans": {"digests": [digest]}}, order) == []
    other = replace(order, config=sent.replace('"batch_size":8', '"batch_size":9'))
    assert other != order
    assert reasons({"plans": {"digests": [digest]}}, other) == ["policy-config"]


@pytest.mark.parametrize(
    ("bound", "refused"),
    [
        ({"key": "training.batch_size", "most": 8}, False),
        ({"key": "training.batch_size", "least": 9}, True),
        ({"key": "training.precision", "among": ["bf16"]}, True),
        ({"key": "training.precision", "among": ["fp32", "bf16"]}, False),
        ({"key": "training.compile", "among": [False]}, False),
        ({"key": "training.compile", "among": [0]}, True),
        ({"key": "training.compile", "most": 1}, True),
        ({"key": "training.nothing", "most": 1}, True),
    ],
    ids=str,
)
def test_bounds_of_single_settings(bound, refused):
    found = reasons({"plans": {"bounds": [bound]}}, ordered())
    assert found == (["policy-config"] if refused else [])


@pytest.mark.parametrize(
    ("moment", "open_"),
    [
        ("2026-11-27 18:59", False),  # a Friday
        ("2026-11-27 19:00", True),
        ("2026-11-28 05:59", True),
        ("2026-11-28 06:00", False),
        ("2026-11-28 19:00", False),
        ("2026-11-30 05:00", False),  # Monday, after a Sunday that is not listed
    ],
)
def test_a_window_over_midnight_belongs_to_the_day_it_begins_on(moment, open_):
    window = HoursPolicy(days=("mon", "tue", "wed", "thu", "fri"), begin="19:00", end="06:00")
    assert window.holds(datetime.fromisoformat(moment)) is open_


# --- the file


def test_the_written_file_holds_the_values_that_stand_without_it(tmp_path):
    answer = CliRunner().invoke(cli, ["policy", "init", str(tmp_path)])
    assert answer.exit_code == 0
    assert read_policy(tmp_path) == SitePolicy()
    again = CliRunner().invoke(cli, ["policy", "init", str(tmp_path)])
    assert again.exit_code == 2
    assert "stays as it is" in again.stderr


def test_without_a_file_only_an_enrolled_site_has_a_policy(tmp_path):
    assert read_policy(tmp_path) is None
    (tmp_path / "keys").mkdir()
    (tmp_path / "keys" / "connection.json").write_text("{}")
    assert read_policy(tmp_path) == SitePolicy()
    assert allowed_applications(tmp_path) == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hour: []", "Did you mean 'hours'"),
        ("hours: [{begin: '25:00'}]", "no time of day"),
        ("hours: [{begin: '08:00', end: '08:00'}]", "no length"),
        ("hours: [{days: []}]", "no days"),
        ("code: {applications: [abc]}", "no SHA-256"),
        ("work: {rounds: 0}", "outside"),
        ("work: {steps_per_round: 1}", "Lower the first"),
        ("plans: {bounds: [{key: training.batch_size}]}", "no least, most or among"),
        ("leaves: {groups: [everything]}", "leaves.groups"),
        ("require_privacy: perhaps", "require_privacy"),
        ("- a list", "policy.yaml"),
    ],
)
def test_a_wrong_file_is_explained(tmp_path, text, said):
    (tmp_path / "policy.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_node(tmp_path / "policy.yaml", SitePolicy)
    answer = CliRunner().invoke(cli, ["policy", "check", str(tmp_path)])
    assert answer.exit_code == 2


def test_times_without_quotes_are_what_they_look_like(tmp_path):
    (tmp_path / "policy.yaml").write_text("hours: [{begin: 19:30, end: 06:00}]")
    (window,) = read_policy(tmp_path).hours
    assert (window.begin, window.end) == ("19:30", "06:00")


def test_check_says_what_a_plan_would_meet(tmp_path):
    (tmp_path / "policy.yaml").write_text("work: {steps_per_round: 5}\nrequire_privacy: true")
    plan = ["--config", "configs/agssd-small.yaml"]
    answer = CliRunner().invoke(cli, ["policy", "check", str(tmp_path), *plan, "--json"])
    assert answer.exit_code == 1
    found = json.loads(answer.stdout)["ct-mr"]
    assert [each["reason"] for each in found["objections"]] == ["policy-steps", "policy-privacy"]
    (tmp_path / "policy.yaml").write_text(f"plans: {{digests: [{found['digest']}]}}")
    answer = CliRunner().invoke(cli, ["policy", "check", str(tmp_path), *plan])
    assert answer.exit_code == 0
    assert "would be carried out" in answer.stdout


def test_show_says_every_part_in_words(tmp_path):
    (tmp_path / "policy.yaml").write_text(
        "hours: [{days: [sat, sun]}]\nrequire_privacy: true\n"
        "plans: {bounds: [{key: training.batch_size, least: 4, most: 64}]}"
    )
    said = CliRunner().invoke(cli, ["policy", "show", str(tmp_path)]).stdout
    for part in ("00:00 to 24:00, sat, sun", "required; epsilon up to 8", "4 or more and 64 or"):
        assert part in said
