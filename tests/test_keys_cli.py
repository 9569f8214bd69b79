"""The commands for keys, as two people use them: what they print and their exit codes."""

import json

import pytest
from typer.testing import CliRunner

from client.cli import app as site_app
from server.cli import app as server_app
from tests.support.enrolling import raw_site

YAML = """
name: lungs
server: {host: fed.example.org, port: 8443}
sites:
  - {name: north, cohorts: [ct-mr]}
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("AGSSD_CA_PASSPHRASE", "correct horse battery")
    (tmp_path / "federation.yaml").write_text(YAML)
    return tmp_path


def server(*words, code=0):
    return _run(server_app, words, code)


def site(*words, code=0):
    return _run(site_app, words, code)


def _run(app, words, code):
    result = CliRunner().invoke(app, words)
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def test_the_way_from_the_kit_to_the_connection(place):
    raw_site(place / "site")
    made = server("provision", "federation.yaml", "--out", "fed")
    assert "new kit: fed/kits/north.zip" in made
    opened = site("enrol", "fed/kits/north.zip", "--site", "site")
    coordinator = made.split("coordinator's key: ")[1].split("  ")[0]
    assert f"coordinator's key: {coordinator}" in opened
    assert "patients: ct-mr 2" in opened
    admitted = server("admit", "site/keys/request.json", "--federation", "fed")
    own = admitted.split("site's key: ")[1].splitlines()[0]
    assert f"this site's key 1: {own}" in opened
    assert "enrolled: site north, key 1" in site(
        "enrol", "--answer", "fed/answers/north-1.json", "--site", "site"
    )
    assert "this site's key 2" in site("renew", "site")
    server("admit", "site/keys/request.json", "--federation", "fed", "--answer", "answer.json")
    site("enrol", "--answer", "answer.json", "--site", "site")
    server("revoke", "north", "--federation", "fed", "--key", "1", "--reason", "old disk")
    rows = json.loads(server("sites", "--federation", "fed", "--json"))["keys"]
    assert [(row["key_id"], row["state"]) for row in rows] == [(1, "revoked"), (2, "active")]
    for shown in (site("journal", "show", "site", "--json"), server("journal", "show", "fed")):
        assert "key" in shown.splitlines()[-1]
    assert "the journal holds: 5 entries" in site("journal", "verify", "site")
    assert "the journal holds: 5 entries" in server("journal", "verify", "fed")


def test_a_journal_that_was_touched_ends_with_code_2_and_its_place(place):
    server("provision", "federation.yaml", "--out", "fed")
    journal = place / "fed" / "journal.jsonl"
    head = server("journal", "verify", "fed").split()[-1]
    whole = journal.read_bytes()
    journal.write_bytes(whole.replace(b"north", b"south"))
    assert "from entry 2 on: it was edited" in server("journal", "verify", "fed", code=2)
    journal.write_bytes(whole.splitlines(keepends=True)[0])
    assert "ends at entry 1, but entry 2" in server(
        "journal", "verify", "fed", "--head", head, code=2
    )
    journal.write_bytes(b"")
    assert "has no entry" in server("journal", "verify", "fed", code=2)


def test_bad_input_is_a_line_and_code_2(place, monkeypatch):
    assert "holds no federation" in server("sites", "--federation", "fed", code=2)
    (place / "r.json").write_text("{}")
    assert "no request" in server("admit", "r.json", "--federation", "fed", code=2)
    assert "cannot be used" in server("revoke", "north", "--federation", "fed", code=2)
    assert "either a KIT or --answer" in site("enrol", "--site", "site", code=2)
    assert "the kit is not there" in site("enrol", "kit.zip", "--site", "site", code=2)
    for given, said in [("", "Set AGSSD_CA_PASSPHRASE"), ("short", "at least 12 are needed")]:
        monkeypatch.setenv("AGSSD_CA_PASSPHRASE", given)
        assert said in server("provision", "federation.yaml", "--out", "fed", code=2)
        assert not (place / "fed" / "ca.key").exists()
