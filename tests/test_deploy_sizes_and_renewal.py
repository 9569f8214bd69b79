"""Over the real deployment: a key renewed meanwhile, an order and an update that are too large."""

import contextlib
import json

import pytest
import yaml

from agssd_core.processes import free_port
from client.cli import app as site_app
from server.cli import app as server_app
from server.store import RunStore
from tests.support.deployed import BIN, changed_environment, do, provisioned, started, wait
from tests.support.federated import federated_config, started_run, two_sites
from tests.support.proxy import require_nginx
from tests.support.sites import make_site

pytestmark = [pytest.mark.deploy, pytest.mark.timeout(1500)]

ROUNDS = 3
# Runs in every Python process of the site before our code: its updates get 60 MB of zeros.
SWOLLEN = """
from dataclasses import replace

encode = module.encode_update

def encode_update(sealed, *, reply_to):
    payload = dict(sealed.payload)
    payload["student"] += bytes(60_000_000)
    sizes = {part: len(data) for part, data in payload.items()}
    header = replace(sealed.header, payload_sizes=sizes)
    return encode(replace(sealed, header=header, payload=payload), reply_to=reply_to)

module.encode_update = encode_update
"""


def _renew(folder, site, federation):
    """A renewed key, put into use by the documented commands."""
    do(site_app, "renew", site)
    answer = folder / "north-2.json"
    request = site / "keys" / "request.json"
    do(server_app, "admit", request, "--federation", federation, "--answer", answer)
    return do(site_app, "enrol", "--site", site, "--answer", answer)


def _reasons(rows, site):
    """Why a site's rounds were lost, apart from a node that a busy machine kept off line."""
    found = {row["reason"] for row in rows if row["site"] == site}
    return found - {"lost", "no-reply", "unreachable"}


def _refusals(app, folder):
    lines = do(app, "journal", "show", folder, "--json").splitlines()
    facts = [json.loads(line) for line in lines]
    return [each["facts"] for each in facts if each["kind"] == "refusal"]


def test_sizes_are_refused_and_a_renewed_key_is_taken_up_while_the_run_goes_on(
    tmp_path, monkeypatch
):
    require_nginx()
    monkeypatch.setenv("AGSSD_CA_PASSPHRASE", "correct horse battery")
    sites = two_sites(tmp_path / "sites")
    sites["coast"] = make_site(tmp_path / "sites" / "coast", "CT", seed=2)
    plan = {
        "rounds": ROUNDS,
        "min_sites": 1,
        "discovery_timeout_s": 120,
        "expected_sites": 3,
        "deadline_s": 150,
    }
    config = federated_config(tmp_path / "deployed", federation=plan)
    started_run(config, tmp_path / "deployed" / "run")
    run = tmp_path / "run.yaml"
    run.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    port = free_port()
    federation = provisioned(tmp_path, sites, port)
    policy = yaml.safe_load((sites["south"] / "policy.yaml").read_text())
    policy["work"]["order_megabytes"] = 0.01
    (sites["south"] / "policy.yaml").write_text(yaml.safe_dump(policy))
    swollen = changed_environment(tmp_path / "swollen", "client.wire", SWOLLEN)
    log = {name: tmp_path / f"{name}.log" for name in ("server", *sites)}
    server = [BIN / "agssd-server", "serve", run, "--federation", federation]
    with contextlib.ExitStack() as stack:
        serving = stack.enter_context(
            started(log["server"], *server, "--listen", f"127.0.0.1:{port}")
        )
        for name, site in sites.items():
            environment = swollen if name == "coast" else None
            command = (BIN / "agssd-site", "run", site)
            stack.enter_context(started(log[name], *command, environment=environment))
        assert wait(lambda: "round 0: merged" in log["server"].read_text(), 700)
        do(server_app, "pause", tmp_path / "deployed" / "run")
        said = _renew(tmp_path, sites["north"], federation)
        assert "key 2" in said
        assert wait(lambda: "key 2 is in use from now on" in log["north"].read_text(), 300)
        node = sites["north"] / "federation" / "node.log"
        assert wait(lambda: node.read_text().count("SuperNode ID") == 2, 300)
        do(server_app, "resume", tmp_path / "deployed" / "run")
        assert serving.wait(700) == 0, log["server"].read_text()

    store = RunStore(tmp_path / "deployed" / "run")
    rows = list(store.metrics.rows())
    merged = [(row["round"], row["site"]) for row in rows if row["kind"] == "site"]
    assert {site for _, site in merged} == {"north"}
    assert merged[-1] == (ROUNDS - 1, "north")  # with the new key
    rows = [row for row in rows if row["kind"] == "refusal"]
    assert _reasons(rows, "coast") == {"size"}
    assert _reasons(rows, "south") == {"declined-size"}
    told = _refusals(server_app, federation)
    assert _reasons(told, "coast") == {"size"}
    assert _reasons(told, "south") == {"declined-size"}
    assert {each["reason"] for each in _refusals(site_app, sites["south"])} == {"size"}
    for site in sites.values():
        do(site_app, "journal", "verify", site)
    do(server_app, "journal", "verify", federation)
