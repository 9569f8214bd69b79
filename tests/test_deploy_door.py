"""A run as hospitals see it: every command, nginx, SuperLink with TLS, two enrolled sites."""

import contextlib
import json
from collections import Counter

import psutil
import pytest
import yaml

from agssd_core.config import parse_config
from agssd_core.processes import engine_environment, free_port
from agssd_core.weights import weights_digest
from client.cli import app as site_app
from client.exporting import held_encoder
from server.cli import app as server_app
from server.nodes import NodeKeeper, node_statuses
from server.proxy import FLEET_CALLS
from server.store import RunStore
from server.superlink import Certificates, superlink
from simulation.engines import federate
from tests.support.deployed import BIN, do, provisioned, started, wait
from tests.support.federated import federated_config, started_run, two_sites
from tests.support.federation_keys import make_enrolment, make_federation, make_node_key
from tests.support.proxy import running_proxy, started_nginx

pytestmark = pytest.mark.deploy


@contextlib.contextmanager
def _node(folder, proxy, name):
    """A plain SuperNode with the key in ``folder / name``."""
    environment = engine_environment(folder / f"{name}-home", threads=1)
    command = [BIN / "flower-supernode", "--root-certificates", proxy.ca]
    command += ["--superlink", f"localhost:{proxy.port}", "--port", free_port()]
    command += ["--auth-supernode-private-key", folder / name]
    with started(folder / f"{name}.log", *command, environment=environment) as process:
        yield process


def _calls(folder, status):
    """Path -> how many calls ended with this status."""
    lines = (folder / "access.log").read_text().splitlines()
    return Counter(line.split()[3] for line in lines if line.split()[4] == str(status))


def test_enrolled_sites_train_through_the_proxy(tmp_path, monkeypatch):
    monkeypatch.setenv("AGSSD_CA_PASSPHRASE", "correct horse battery")
    sites = two_sites(tmp_path / "sites")
    config = federated_config(tmp_path / "deployed")
    started_run(config, tmp_path / "deployed" / "run")
    started_run(config, tmp_path / "in-process")
    federate(config, sites, tmp_path / "in-process")
    for site in sites.values():
        for left in (site / "federation").glob("run-1"):
            left.rename(left.with_name("in-process"))
    run = tmp_path / "run.yaml"
    run.write_text(yaml.safe_dump(config.model_dump(mode="json")))

    outside, inside = free_port(), free_port()
    federation = provisioned(tmp_path, sites, outside)
    front, listen = tmp_path / "proxy", f"127.0.0.1:{outside}"
    do(server_app, "proxy-config", federation, "-o", front, "--listen", listen, "--port", inside)
    server = [BIN / "agssd-server", "serve", run, "--federation", federation]
    server += ["--no-proxy", "--port", inside]
    with contextlib.ExitStack() as stack:
        stack.enter_context(started_nginx(front, outside, federation / "ca.crt"))
        serving = stack.enter_context(started(tmp_path / "server.log", *server))
        nodes = [
            stack.enter_context(started(tmp_path / f"{name}.log", BIN / "agssd-site", "run", site))
            for name, site in sites.items()
        ]
        rounds = tmp_path / "server.log"
        assert wait(lambda: "round 0: merged" in rounds.read_text() or serving.poll(), 300)
        members = psutil.Process(serving.pid).children(recursive=True)
        listening = {
            connection.laddr.ip
            for member in members
            for connection in member.net_connections(kind="inet")
            if connection.status == psutil.CONN_LISTEN
        }
        assert [node.poll() for node in nodes] == [None, None]
        assert serving.wait(200) == 0, rounds.read_text()

    assert listening == {"127.0.0.1"}
    assert f"the SuperLink listens on 127.0.0.1:{inside}" in rounds.read_text()
    digests = {
        RunStore(place).load(2).manifest.weights_digest
        for place in (tmp_path / "deployed" / "run", tmp_path / "in-process")
    }
    assert len(digests) == 1
    for name, site in sites.items():
        told = do(site_app, "fetch", "run", site, "--out", tmp_path / f"{name}-encoder")
        assert "round 2 (final)" in told
        fetched = held_encoder(tmp_path / f"{name}-encoder")
        assert {weights_digest(fetched.weights)} == digests
        do(site_app, "journal", "verify", site)
    do(server_app, "journal", "verify", federation)
    assert "final checkpoint of ct-mr: held by north, south" in rounds.read_text()
    used = {path.rpartition("/")[2] for path in _calls(front, 200)}
    assert used | {"deactivate-node"} == set(FLEET_CALLS)
    assert not _calls(front, 404)
    assert (tmp_path / "deployed/run/engine/superlink.db").stat().st_mode & 0o077 == 0


def _forget(engine, name):
    """As if the server had been killed between the engine's note of a key and its own."""
    file = engine / "nodes.json"
    file.write_text(
        json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != name})
    )


def test_strangers_stay_outside_and_a_revoked_key_is_shut_out(tmp_path):
    federation = make_federation(tmp_path / "federation")
    config, engine, said = parse_config({"preset": "tiny"}, ()), tmp_path / "engine", []
    certificates = Certificates.of(federation)
    keys = {name: make_node_key(tmp_path / name) for name in ("north", "south", "new", "stranger")}
    valid = [make_enrolment(name, keys[name]) for name in ("north", "south")]
    with contextlib.ExitStack() as stack:
        link = stack.enter_context(superlink(config, engine, certificates=certificates))
        proxy = stack.enter_context(running_proxy(federation, tmp_path / "proxy", link.port))
        keeper = NodeKeeper(link, lambda: list(valid), say=said.append, pause_s=0.0)
        stack.enter_context(_node(tmp_path, proxy, "north"))
        stranger = stack.enter_context(_node(tmp_path, proxy, "stranger"))
        assert stranger.wait(60) != 0
        assert _calls(proxy.folder, 412) == {"/v1/fleet/activate-node": 1}
        assert wait(lambda: _calls(proxy.folder, 200)["/v1/fleet/pull-messages"], 60)
        assert sorted(node_statuses(link).values()) == ["online", "registered"]

        valid[0] = make_enrolment("north", keys["new"], key_id=2)
        before = _calls(proxy.folder, 401).total()
        keeper()
        assert said == ["node north-1 is shut out: its key was revoked or has expired"]
        assert wait(lambda: _calls(proxy.folder, 401).total() > before, 60)
        statuses = node_statuses(link)
        assert sorted(statuses.values()) == ["registered", "registered", "unregistered"]

    # Started again on the same state: a key that was noted by the engine alone stays if it is
    # valid and is shut out if it is not.
    _forget(engine, "north-2")
    with superlink(config, engine, certificates=certificates) as link:
        NodeKeeper(link, lambda: list(valid), say=said.append)
        assert node_statuses(link) == statuses
        _forget(engine, "south-1")
        NodeKeeper(link, lambda: valid[:1], say=said.append)
        assert sorted(node_statuses(link).values()) == ["registered", *["unregistered"] * 2]
