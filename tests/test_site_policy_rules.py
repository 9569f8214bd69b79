"""Single rules of a site's policy, and the file that holds them."""

import json
from dataclasses import replace
from datetime import datetime

import pytest
from typer.testing import CliRunner

from agssd_core.config import dump_config, parse_config
from agssd_core.config.load import load_node
from agssd_core.config.policy import DAYS, HoursPolicy, SitePolicy
from agssd_core.errors import ConfigError
from client.cli import app as cli
from client.objections import objections, plan_digest
from client.policy import allowed_applications, read_policy
from server.rounds import site_config
from tests.support.orders import config_for, order_for
from tests.support.toy import toy_weights

WEDNESDAY = datetime(2026, 11, 25, 12, 0)
LATER = DAYS[(datetime.now().weekday() + 3) % 7]


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
