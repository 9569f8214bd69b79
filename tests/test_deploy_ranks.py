"""A site that trains in two processes, over the real deployment: ranks and nodes may die."""

import contextlib
import signal

import psutil
import pytest
import yaml

from agssd_core.processes import free_port
from client.cli import app as site_app
from server.store import RunStore
from tests.support.deployed import BIN, do, provisioned, started, wait
from tests.support.federated import federated_config, started_run
from tests.support.proxy import require_nginx
from tests.support.sites import make_site

pytestmark = [pytest.mark.deploy, pytest.mark.slow, pytest.mark.timeout(2400)]


def _of(process, *words):
    """Descendants of a process whose command has all these words."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for member in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if set(words) <= set(member.cmdline()):
                    found.append(member)
    return found


def _ranks(site):
    """The processes that train."""
    starters = _of(site, "agssd_core.training.ranks")
    return [rank for each in starters for rank in _of(each, "--multiprocessing-fork")]


def _listeners(site):
    """Addresses on which anything of the site listens."""
    found = set()
    for member in psutil.Process(site.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            found |= {
                each.laddr.ip
                for each in member.net_connections(kind="inet")
                if each.status == psutil.CONN_LISTEN
            }
    return found


def test_two_ranks_survive_a_nodes_restart_and_a_ranks_death_costs_one_round(tmp_path, monkeypatch):
    require_nginx()
    monkeypatch.setenv("AGSSD_CA_PASSPHRASE", "correct horse battery")
    sites = {"north": make_site(tmp_path / "north", "CT", seed=1)}
    config = federated_config(
        tmp_path / "deployed",
        training={"batch_size": 4, "processes": 2, "device": "cpu"},
        federation={"rounds": 4, "min_sites": 1, "expected_sites": 1, "deadline_s": 200},
    )
    started_run(config, tmp_path / "deployed" / "run")
    run = tmp_path / "run.yaml"
    run.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    port = free_port()
    federation = provisioned(tmp_path, sites, port)
    log = tmp_path / "server.log"
    server = [BIN / "agssd-server", "serve", run, "--federation", federation]
    with contextlib.ExitStack() as stack:
        serving = stack.enter_context(started(log, *server, "--listen", f"127.0.0.1:{port}"))
        site = stack.enter_context(
            started(tmp_path / "site.log", BIN / "agssd-site", "run", sites["north"])
        )
        assert wait(lambda: "round 0: merged" in log.read_text(), 800)
        (trainer,) = _of(site, "client.trainer")

        ranks = wait(lambda: len(_ranks(site)) == 2 and _ranks(site), 500)
        ranks[1].send_signal(signal.SIGKILL)
        assert wait(lambda: "round 1:" in log.read_text(), 600)

        assert wait(lambda: len(_ranks(site)) == 2, 500)
        assert _listeners(site) == {"127.0.0.1"}
        (node,) = _of(site, "client.launcher", "node")
        node.send_signal(signal.SIGKILL)
        assert serving.wait(600) == 0, log.read_text()
        assert [each.pid for each in _of(site, "client.trainer")] == [trainer.pid]
        assert [each.pid for each in _of(site, "client.launcher", "node")] != [node.pid]
        assert _ranks(site) == []

    store = RunStore(tmp_path / "deployed" / "run")
    refused = [
        (row["round"], row["reason"]) for row in store.metrics.rows() if row["kind"] == "refusal"
    ]
    assert refused == [(1, "site-error")]
    assert (
        "one of 2 training processes ended unexpectedly"
        in (tmp_path / "north" / "federation" / "trainer.log").read_text()
    )
    assert [store.load(number).manifest.sites for number in (1, 3, 4)] == [("north",)] * 3
    rows = [row["metrics"] for row in store.metrics.rows() if row["kind"] == "site"]
    assert [row["optimiser_reset"] for row in rows][2:] == [0]
    do(site_app, "journal", "verify", sites["north"])
