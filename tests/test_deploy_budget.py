"""Hospitals with budgets of their own, over the real deployment: one that is spent declines."""

import contextlib
import json

import pytest
import yaml

from agssd_core.accounting import epsilon, joint_sigma
from agssd_core.processes import free_port
from client.cli import app as site_app
from server.cli import app as server_app
from server.store import RunStore
from tests.support.deployed import BIN, do, provisioned, started
from tests.support.federated import federated_config, small_sites, started_run
from tests.support.proxy import require_nginx

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(900)]

ROUNDS, STEPS, DELTA = 3, 2, 0.01
RATE, SIGMA = 1 / 3, joint_sigma(1.0, 4.0)
AFFORDS = {"north": 1, "south": 2, "west": ROUNDS}


def spent(rounds):
    return epsilon([(SIGMA, RATE, STEPS * rounds)], delta=DELTA)


def entries(app, folder):
    return [json.loads(line) for line in do(app, "journal", "show", folder, "--json").splitlines()]


def reasons(journal):
    return [e["facts"].get("reason") for e in journal if e["kind"] == "refusal"]


def test_a_hospital_whose_budget_is_spent_declines_and_the_others_go_on(tmp_path, monkeypatch):
    require_nginx()
    monkeypatch.setenv("AGSSD_CA_PASSPHRASE", "correct horse battery")
    sites = small_sites(tmp_path / "sites", north="CT", south="MR", west="CT")
    config = federated_config(
        tmp_path / "deployed",
        agssd={"eaam": {"kappa": 0}},
        privacy={"enabled": True, "expected_batch": 1, "delta": DELTA, "epsilon_budget": 0},
        federation={"rounds": ROUNDS, "expected_sites": 3, "deadline_s": 200},
    )
    folder = tmp_path / "deployed" / "run"
    started_run(config, folder)
    run = tmp_path / "run.yaml"
    run.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    port = free_port()
    federation = provisioned(tmp_path, sites, port)
    for name, site in sites.items():
        policy = yaml.safe_load((site / "policy.yaml").read_text())
        policy["privacy"] = {"epsilon_budget": spent(AFFORDS[name]) + 1e-6, "delta": DELTA}
        (site / "policy.yaml").write_text(yaml.safe_dump(policy))
    server = [BIN / "agssd-server", "serve", run, "--federation", federation]
    with contextlib.ExitStack() as stack:
        serving = stack.enter_context(
            started(tmp_path / "server.log", *server, "--listen", f"127.0.0.1:{port}")
        )
        for name, site in sites.items():
            log = tmp_path / f"{name}.log"
            stack.enter_context(started(log, BIN / "agssd-site", "run", site))
        assert serving.wait(800) == 0, (tmp_path / "server.log").read_text()

    told = do(server_app, "rounds", folder, "--json").splitlines()
    assert [json.loads(line)["refusals"] for line in told] == [
        {},
        {"north": "declined-budget"},
        {"north": "declined-budget", "south": "declined-budget"},
    ]
    manifest = RunStore(folder).latest().manifest
    assert manifest.round == ROUNDS
    assert manifest.sites == ("west",)
    assert manifest.extra["refusals"] == json.loads(told[-1])["refusals"]
    for name, rounds in AFFORDS.items():
        said = manifest.extra["privacy"][name]
        assert said["epsilon"] == pytest.approx(spent(rounds))
        assert (said["noise"], said["unit"]) == ("secure", "patient")
    assert reasons(entries(server_app, federation)) == ["declined-budget"] * 3
    assert reasons(entries(site_app, sites["north"])) == ["budget"] * 2
    assert reasons(entries(site_app, sites["west"])) == []
    do(server_app, "privacy-report", folder)
    page = (folder / "privacy-report.md").read_text()
    assert "north declined 2 round(s): its budget was spent." in page
    assert "of which 0.000 is left" in do(site_app, "ledger", "show", sites["north"])
