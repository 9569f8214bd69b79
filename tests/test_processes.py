"""Children are ended with their children; commands refuse what this version must not do."""

import json
import os
import socket
import subprocess
import sys
import time

import psutil
import pytest
import yaml
from typer.testing import CliRunner

from agssd_core.config import dump_config
from agssd_core.errors import EngineError
from agssd_core.processes import (
    LOOPBACK,
    Child,
    engine_environment,
    free_port,
    is_healthy,
    wait_until_healthy,
)
from client.cli import app as site_app
from server.cli import app as server_app
from tests.support.toy import Hospital

STUBBORN = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[1], "w").write(str(child.pid))
time.sleep(600)
"""


def _wait_for(file):
    deadline = time.monotonic() + 30
    while not (file.exists() and file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return int(file.read_text())


def _gone(pid):
    """Ended; a container without an init may keep the entry of an orphan as a zombie."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_stopping_ends_grandchildren_and_the_stubborn(tmp_path):
    pid_file = tmp_path / "pid"
    child = Child(
        [sys.executable, "-c", STUBBORN, str(pid_file)],
        environment=os.environ,
        log_file=tmp_path / "log",
    )
    grandchild = _wait_for(pid_file)
    child.stop(patience_s=0.5)
    assert child.poll() is not None
    deadline = time.monotonic() + 10
    while not _gone(grandchild) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _gone(grandchild)


def test_a_child_goes_when_its_parent_is_killed(tmp_path):
    pid_file = tmp_path / "pid"
    script = f"""
import os, sys, time
from pathlib import Path
from agssd_core.processes import Child
child = Child([sys.executable, "-c", "import time; time.sleep(600)"], environment=os.environ,
              log_file=Path({str(tmp_path / "log")!r}))
open({str(pid_file)!r}, "w").write(str(child.process.pid))
time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", script])
    child = psutil.Process(_wait_for(pid_file))
    parent.kill()
    parent.wait()
    _, alive = psutil.wait_procs([child], timeout=10)
    assert not [member for member in alive if member.status() != psutil.STATUS_ZOMBIE]


def test_a_program_that_ends_or_is_missing_is_told_apart_from_a_slow_one(tmp_path):
    def started(*command):
        return Child(command, environment=os.environ, log_file=tmp_path / "log")

    with (
        started(sys.executable, "-c", "raise SystemExit(3)") as child,
        pytest.raises(EngineError, match="ended with code 3"),
    ):
        wait_until_healthy(free_port(), child, timeout_s=20)
    with (
        started(sys.executable, "-c", "import time; time.sleep(60)") as child,
        pytest.raises(EngineError, match=r"did not answer within 0\.3 s"),
    ):
        wait_until_healthy(free_port(), child, timeout_s=0.3)
    with pytest.raises(EngineError, match="could not be started"):
        started(str(tmp_path / "missing"))


def test_the_engine_looks_nothing_up_and_has_its_own_home(tmp_path):
    environment = engine_environment(tmp_path, threads=3)
    assert environment["FLWR_HOME"] == str(tmp_path)
    assert environment["FLWR_TELEMETRY_ENABLED"] == "0"
    assert environment["FLWR_DISABLE_UPDATE_CHECK"] == "1"
    assert environment["FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION"] == "1"
    assert environment["RAY_USAGE_STATS_ENABLED"] == "0"
    assert environment["OMP_NUM_THREADS"] == "3"


def _told(app, *arguments):
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.output


@pytest.mark.parametrize("server", ["hospital.example:443", "10.0.0.1:9092", "127.0.0.1", ":80"])
def test_a_site_without_certificates_stays_on_this_machine(tmp_path, server):
    code, words = _told(site_app, "run", tmp_path, "--server", server)
    assert code == 2
    assert "127.0.0.1:PORT only" in words


def test_serve_says_what_is_missing(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({"preset": "tiny", "output": str(tmp_path)}))
    assert "say for whom" in _told(server_app, "serve", file)[1]
    assert "number of sites" in _told(server_app, "serve", file, "--loopback")[1]
    code, words = _told(server_app, "serve", file, "federation.expected_sites=2", "--loopback")
    assert code == 2
    assert "agssd-sim init" in words


def test_rounds_and_check(tmp_path):
    run = Hospital(tmp_path / "x", rounds=2)
    run.run()
    code, words = _told(server_app, "rounds", run.folder / "run")
    assert code == 0
    assert "round 1: merged (a, b, c)" in words
    rows = _told(server_app, "rounds", run.folder / "run", "--json")[1].splitlines()
    assert [json.loads(row)["round"] for row in rows] == [0, 1]
    assert _told(server_app, "rounds", tmp_path)[0] == 2
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(json.loads(dump_config(run.config))))
    assert _told(server_app, "check", file)[0] == 0
    assert _told(server_app, "check", file, "seed=-1")[0] == 2


def test_serving_a_complete_run_does_nothing(tmp_path):
    run = Hospital(tmp_path / "x", rounds=1)
    run.run()
    content = json.loads(dump_config(run.config)) | {"output": str(run.folder), "name": "run"}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(content))
    code, words = _told(server_app, "serve", file, "--loopback")
    assert code == 0
    assert "complete" in words


def test_a_taken_port_is_named(tmp_path):
    run = Hospital(tmp_path / "x", rounds=1)
    content = json.loads(dump_config(run.config)) | {"output": str(run.folder), "name": "run"}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(content))
    with socket.socket() as other:
        other.bind((LOOPBACK, 0))
        other.listen()
        port = other.getsockname()[1]
        code, words = _told(server_app, "serve", file, "--loopback", "--port", port)
    assert code == 2
    assert f"port {port} of this machine cannot be listened on" in words
    assert "another with --port" in words
    assert not is_healthy(port)
