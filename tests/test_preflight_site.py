"""What is wrong with a site's keys, machine or data is said, and nothing that must stay."""

import json
from datetime import UTC, datetime, timedelta

import pytest
from typer.testing import CliRunner

from agssd_core.config import dump_config, parse_config
from agssd_core.journal import Journal
from agssd_core.signing import SigningKey
from client.cli import app
from client.connection import ca_file, load_connection, node_key_file, signing_key_file
from client.preflight_keys import (
    check_admitted,
    check_expiry,
    check_files,
    check_journal,
    check_policy,
    check_privacy_of_files,
)
from client.preflight_machine import (
    check_data,
    check_disk,
    check_gpu,
    check_memory,
    check_versions,
)
from client.preflight_step import Estimate, estimate_memory
from tests.support.enrolled import enrol
from tests.support.sites import FAST, make_site
from tests.support.tls_server import Authority
from tests.support.training import SMALL, merged

NOW = datetime.now(UTC)
GB = 10**9


@pytest.fixture
def enrolled(tmp_path):
    enrol(tmp_path, expires=(NOW + timedelta(days=60)).isoformat())
    ca_file(tmp_path).write_bytes(Authority().pem())
    return tmp_path


def test_whole_private_keys_are_green(enrolled):
    connection = load_connection(enrolled)
    assert check_files(enrolled, connection, now=NOW).level == "ok"
    assert check_privacy_of_files(enrolled).level == "ok"
    assert check_expiry(connection, now=NOW).level == "ok"
    assert check_journal(enrolled).level == "ok"


@pytest.mark.parametrize("which", [ca_file, node_key_file, signing_key_file])
def test_a_missing_or_damaged_key_is_red(enrolled, which):
    file = which(enrolled) if which is ca_file else which(enrolled, 1)
    for damage in (lambda: file.write_bytes(b"-----BEGIN"), file.unlink):
        damage()
        row = check_files(enrolled, load_connection(enrolled), now=NOW)
        assert row.level == "fail"
        assert row.remedy
        assert str(enrolled) not in row.found + row.remedy


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o620])
def test_a_key_that_others_can_reach_is_red(enrolled, mode):
    signing_key_file(enrolled, 1).chmod(mode)
    row = check_privacy_of_files(enrolled)
    assert (row.level, f"signing-1.pem {mode:03o}" in row.found) == ("fail", True)
    assert "renew the keys" in row.remedy


@pytest.mark.parametrize(("days", "level"), [(-1, "fail"), (3, "warn"), (30, "ok")])
def test_an_ended_key_is_red_and_a_late_one_a_warning(tmp_path, days, level):
    enrol(tmp_path, expires=(NOW + timedelta(days=days)).isoformat(timespec="seconds"))
    assert check_expiry(load_connection(tmp_path), now=NOW).level == level


def test_an_answer_of_another_coordinator_is_red_and_none_a_warning(enrolled):
    connection = load_connection(enrolled)
    assert check_admitted(enrolled, connection).level == "warn"
    (enrolled / "keys" / "enrolment-1.json").write_text("{}")
    assert check_admitted(enrolled, connection).level == "fail"


def test_a_damaged_journal_is_red(enrolled):
    journal = Journal(enrolled, SigningKey.load(signing_key_file(enrolled, 1)), owner="north")
    journal.append("start", {"event": "trial"})
    assert check_journal(enrolled).level == "ok"
    file = enrolled / "journal.jsonl"
    file.write_text(file.read_text().replace("trial", "triel"))
    assert check_journal(enrolled).level == "fail"


def test_a_policy_that_cannot_be_read_is_red_and_none_a_warning(tmp_path):
    assert check_policy(tmp_path).level == "warn"
    (tmp_path / "policy.yaml").write_text("hour: 3")
    assert check_policy(tmp_path).level == "fail"
    (tmp_path / "policy.yaml").write_text("cohorts: [us]")
    assert check_policy(tmp_path).level == "ok"


def test_versions_are_held_against_what_was_tested(tmp_path):
    assert check_versions().level == "ok"
    tested = tmp_path / "constraints.txt"
    tested.write_text("# a comment\nnumpy==0.1\nnot-installed-here==1.0\n")
    row = check_versions(tested)
    assert row.level == "warn"
    assert "1 are not" in row.found
    assert "numpy" in row.found


def test_a_package_that_is_too_old_is_red(monkeypatch):
    monkeypatch.setattr("client.preflight_machine.requires", lambda _: ["numpy>=99", "none-such>1"])
    row = check_versions()
    assert row.level == "fail"
    assert "none-such missing" in row.found
    assert "numpy" in row.found


def test_a_plan_for_a_gpu_needs_one(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    plain = parse_config({"preset": "tiny"})
    assert check_gpu(plain).level == "warn"
    assert (
        check_gpu(parse_config({"preset": "tiny", "training": {"device": "cuda"}})).level == "fail"
    )


@pytest.mark.parametrize(("free", "level"), [(12 * GB, "ok"), (9 * GB, "warn"), (7 * GB, "fail")])
def test_memory_is_held_against_the_estimate(free, level):
    config = parse_config({"preset": "tiny"})
    row = check_memory(config, Estimate(8 * GB, GB, exact=False), available=(free, "free here"))
    assert row.level == level
    assert "estimated" in row.found
    assert check_memory(config, None, available=(free, "free here")).level == "warn"


def test_a_full_disk_is_red(tmp_path):
    assert check_disk(tmp_path, shared=10**6).level != "fail"
    assert check_disk(tmp_path, shared=10**17).level == "fail"


def test_a_step_is_measured_and_other_settings_are_not_prepared(tmp_path):
    site = make_site(tmp_path / "north", "CT", seed=1)
    config = parse_config(merged(SMALL, {"data": FAST.model_dump()})).for_cohort("ct-mr")
    assert check_data(site, config).level == "ok"
    found = estimate_memory(site, config, batch=2)
    assert found is not None
    assert found.exact
    assert 0 < found.shared < found.needed < 10**10
    other = parse_config({"preset": "tiny"}).for_cohort("ct-mr")
    row = check_data(site, other)
    assert (row.level, "agssd-site prepare" in row.remedy) == ("fail", True)


def test_the_command_is_red_in_json_and_tells_no_path(tmp_path):
    site = make_site(tmp_path / "north", "CT", seed=1)
    plan = tmp_path / "plan.yaml"
    plan.write_text(dump_config(parse_config(merged(SMALL, {"data": FAST.model_dump()}))))
    given = ["preflight", str(site), "--config", str(plan), "--quick"]
    answer = CliRunner().invoke(app, [*given, "--json"])
    assert answer.exit_code == 1
    rows = {row["name"]: row for row in json.loads(answer.stdout)}
    assert [name for name, row in rows.items() if row["level"] == "fail"] == ["enrolment"]
    assert "agssd-site enrol" in rows["enrolment"]["remedy"]
    assert str(tmp_path) not in answer.stdout
    shown = CliRunner().invoke(app, given)
    assert "1 red" in shown.stdout
    assert str(tmp_path) not in shown.stdout
