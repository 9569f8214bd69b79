"""Real SuperLink and SuperNodes on loopback: two sites, two rounds, nothing left running."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml

from agssd_core.processes import free_port
from server.store import RunStore
from simulation.engines import federate
from tests.support.federated import federated_config, started_run, two_sites

pytestmark = pytest.mark.deploy

BIN = Path(sys.executable).parent


def _start(log, *command):
    with log.open("wb") as stream:
        return subprocess.Popen(
            [str(BIN / command[0]), *map(str, command[1:])],
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _family(process):
    try:
        return [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _listeners(processes):
    return {
        connection.laddr.ip
        for process in processes
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    }


def test_two_sites_as_real_supernodes_for_two_rounds(tmp_path):
    sites = two_sites(tmp_path / "sites")
    config = federated_config(tmp_path / "deployed", tracking={"tensorboard": True})
    started_run(config, tmp_path / "deployed" / "run")
    started_run(config, tmp_path / "in-process")
    federate(config, sites, tmp_path / "in-process")
    for site in sites.values():
        for left in (site / "federation").glob("run-1"):
            left.rename(left.with_name("in-process"))
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")))

    port = free_port()
    server = _start(
        tmp_path / "server.log", "agssd-server", "serve", file, "--loopback", "--port", port
    )
    nodes = {
        name: _start(
            tmp_path / f"{name}.log", "agssd-site", "run", site, "--server", f"127.0.0.1:{port}"
        )
        for name, site in sites.items()
    }
    seen, listening, pages = set(), set(), set()
    page = tmp_path / "deployed" / "run" / "report.html"
    try:
        deadline = time.monotonic() + 400
        while server.poll() is None and time.monotonic() < deadline:
            family = [
                member for process in (server, *nodes.values()) for member in _family(process)
            ]
            seen.update(family)
            with contextlib.suppress(psutil.Error):  # one of them may just have ended
                listening |= _listeners(family)
            if page.is_file():
                pages.add(page.stat().st_ino)
            time.sleep(0.5)
        assert server.poll() == 0, (tmp_path / "server.log").read_text()
    finally:
        for node in nodes.values():
            node.send_signal(signal.SIGTERM)
        codes = [node.wait(60) for node in nodes.values()]
        if server.poll() is None:
            os.kill(server.pid, signal.SIGTERM)
            server.wait(60)
    assert codes == [0, 0]
    _, alive = psutil.wait_procs(seen, timeout=20)
    assert not [member for member in alive if member.status() != psutil.STATUS_ZOMBIE]
    assert listening == {"127.0.0.1"}

    deployed = RunStore(tmp_path / "deployed" / "run")
    checkpoint = deployed.load(2, verify=True)
    assert checkpoint.manifest.sites == ("north", "south")
    assert all(np.isfinite(array).all() for array in checkpoint.weights.values())
    expected = RunStore(tmp_path / "in-process").load(2)
    assert checkpoint.manifest.weights_digest == expected.manifest.weights_digest
    assert "round 1: merged (north, south)" in (tmp_path / "server.log").read_text()
    assert not [row for row in deployed.metrics.rows() if row["kind"] == "refusal"]
    assert len(pages) >= 1
    assert "report: " in (tmp_path / "server.log").read_text()
    assert not list((tmp_path / "deployed" / "run").glob(".report*.tmp"))
    assert len(list((tmp_path / "deployed" / "run" / "tracking" / "tensorboard").iterdir())) == 1
