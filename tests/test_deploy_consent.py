"""What a hospital refuses or fails at, over the real deployment: the server learns a class."""

import contextlib
import json

import pytest
import yaml

from agssd_core.processes import free_port
from client.cli import app as site_app
from server.cli import app as server_app
from tests.support.deployed import BIN, changed_environment, do, provisioned, started
from tests.support.federated import federated_config, started_run, two_sites
from tests.support.proxy import require_nginx

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(900)]

PATIENT = "Mustermann^Erika 1964-08-12"
# Runs in every Python process of the site before our code: training reads a file of the site and
# fails with its words.
SPOILED = """
import os

def train_steps(self, *_given):
    with open(os.environ["SITE_LOCAL_FILE"]) as stream:
        raise ValueError(stream.read())

module.SiteTrainer.train_steps = train_steps
"""


def _everything_under(folder):
    for path in folder.rglob("*"):
        if path.is_file():
            yield path, path.read_bytes()


def journal(app, folder):
    return [json.loads(line) for line in do(app, "journal", "show", folder, "--json").splitlines()]


def test_words_of_an_exception_and_a_foreign_application_stop_at_the_site(tmp_path, monkeypatch):
    require_nginx()
    monkeypatch.setenv("AGSSD_CA_PASSPHRASE", "correct horse battery")
    sites = two_sites(tmp_path / "sites")
    plan = {"rounds": 1, "min_sites": 1, "discovery_timeout_s": 60, "deadline_s": 120}
    config = federated_config(tmp_path / "deployed", federation=plan)
    started_run(config, tmp_path / "deployed" / "run")
    run = tmp_path / "run.yaml"
    run.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    port = free_port()
    federation = provisioned(tmp_path, sites, port)
    policy = yaml.safe_load((sites["south"] / "policy.yaml").read_text())
    policy["code"] = {"applications": ["0" * 64]}
    (sites["south"] / "policy.yaml").write_text(yaml.safe_dump(policy))
    (sites["north"] / "local.txt").write_text(PATIENT)
    spoiled = changed_environment(
        tmp_path / "spoiled", "agssd_core.training.site_round", SPOILED
    ) | {"SITE_LOCAL_FILE": str(sites["north"] / "local.txt")}
    server = [BIN / "agssd-server", "serve", run, "--federation", federation]
    with contextlib.ExitStack() as stack:
        serving = stack.enter_context(
            started(tmp_path / "server.log", *server, "--listen", f"127.0.0.1:{port}")
        )
        for name, environment in (("north", spoiled), ("south", None)):
            command = (BIN / "agssd-site", "run", sites[name])
            log = tmp_path / f"{name}.log"
            stack.enter_context(started(log, *command, environment=environment))
        assert serving.wait(600) == 0, (tmp_path / "server.log").read_text()

    told = do(server_app, "rounds", tmp_path / "deployed" / "run", "--json")
    refusals = json.loads(told.splitlines()[-1])["refusals"]
    assert refusals == {"north": "site-error", "south": "declined-policy-code"}
    entries = [
        json.loads(line)
        for line in do(server_app, "journal", "show", federation, "--json").splitlines()
    ]
    reasons = {e["facts"]["site"]: e["facts"]["reason"] for e in entries if e["kind"] == "refusal"}
    assert reasons == refusals
    own = journal(site_app, sites["south"])
    assert "policy-code" in {e["facts"].get("reason") for e in own if e["kind"] == "refusal"}
    for name in sites:
        do(site_app, "journal", "verify", sites[name])
    do(server_app, "journal", "verify", federation)

    assert "ValueError" in (sites["north"] / "federation" / "trainer.log").read_text()
    places = [
        tmp_path / "deployed",
        federation,
        sites["north"] / "federation",
        sites["north"] / "keys",
    ]
    found = [
        path.name
        for place in places
        for path, content in _everything_under(place)
        if b"Mustermann" in content or b"1964-08-12" in content
    ]
    assert found == []
    logs = [tmp_path / "server.log", tmp_path / "north.log", sites["north"] / "journal.jsonl"]
    assert not [log for log in logs if "Mustermann" in log.read_text()]
