"""Both cohorts through every engine: in this process, on Ray, and with real SuperNodes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from typer.testing import CliRunner

from agssd_core.config import dump_config, parse_config
from agssd_core.console import progress_bar
from agssd_core.errors import ConfigError
from agssd_core.processes import free_port
from server.serve import serve_on_loopback
from server.store import RunStore
from simulation import run as simulation_run
from simulation.cli import app
from simulation.engines import federate, with_site_counts
from simulation.run import initialise
from simulation.sites import build_sites

BIN = Path(sys.executable).parent
PLAN = {"rounds": 2, "steps_per_round": 1, "poll_s": 0.05, "discovery_timeout_s": 120.0}
SMALL = {
    "name": "both",
    "preset": "tiny",
    "cohorts": ["ct-mr", "us"],
    "data": {"spacing_mm": [6, 6, 6], "foreground_margin": 2},
    "agssd": {
        "cvac": {"global_size": [16, 16, 16], "local_size": [8, 8, 8], "n_local": 1},
        "model": {"width": 24, "depth": 1, "heads": 2},
        "head": {"prototypes": 32, "hidden": 32, "bottleneck": 16},
    },
    "anaus": {
        "backbone": {"width": 8, "norm": "batch"},
        "regions": {"scales": [2, 8], "per_view": 2},
        "batch_size": 2,
        "federation": {**PLAN, "expected_sites": 2},
    },
    "training": {"batch_size": 2},
    "federation": {**PLAN, "expected_sites": 1},
    "simulation": {
        "workers": 1,
        "phantoms": [
            {
                "name": "mixed",
                "modalities": ["CT", "US"],
                "format": "dicom",
                "patients": 2,
                "size": [32, 32, 24],
                "spacing_mm": [8, 8, 9],
            },
            {"name": "clips", "modalities": ["US"], "format": "png", "patients": 2},
        ],
    },
}


def configured(folder, **changes):
    return parse_config({**SMALL, "output": str(folder), **changes})


@pytest.fixture(scope="module")
def sites(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sites")
    return build_sites(configured(folder), folder, say=str, bar=progress_bar)


@pytest.fixture(scope="module")
def inside(tmp_path_factory, sites):
    """Digest of each cohort after a run in this process."""
    folder = tmp_path_factory.mktemp("inside")
    config = configured(folder)
    run, fresh = initialise(config)
    assert fresh
    federate(config, sites, run)
    return digests(run)


def digests(run):
    found = {}
    for name in ("ct-mr", "us"):
        store = RunStore(run / name)
        assert [row["merged"] for row in store.metrics.rows() if row["kind"] == "merge"] == [
            True
        ] * 2
        assert not [row for row in store.metrics.rows() if row["kind"] == "refusal"]
        found[name] = store.load(2).manifest.weights_digest
        assert found[name] != store.load(0).manifest.weights_digest
        manifest = store.load(2).manifest
        assert manifest.cohort == json.loads(manifest.config)["federation"]["cohort"] == name
        assert manifest.sites == (("clips", "mixed") if name == "us" else ("mixed",))
    return found


@pytest.mark.federation
def test_ray_ends_with_the_same_digests(tmp_path, sites, inside):
    config = configured(tmp_path, simulation={**SMALL["simulation"], "engine": "ray"})
    run, _ = initialise(config)
    told = []
    federate(config, sites, run, on_round=told.append)
    assert digests(run) == inside
    for name in ("ct-mr", "us"):
        assert [outcome.round for outcome in told if outcome.cohort == name] == [0, 1]


def _start(log, *command):
    with log.open("wb") as stream:
        return subprocess.Popen(
            [str(BIN / command[0]), *map(str, command[1:])],
            stdout=stream,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


@pytest.mark.deploy
def test_real_supernodes_end_with_the_same_digests(tmp_path, sites, inside):
    config = configured(tmp_path)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(json.loads(dump_config(config))))
    run, _ = initialise(config)
    port = free_port()
    log = tmp_path / "server.log"
    server = _start(log, "agssd-server", "serve", file, "--loopback", "--port", port)
    nodes = [
        _start(
            tmp_path / f"{name}.log",
            *("agssd-site", "run", site, "--server", f"127.0.0.1:{port}", "--name", name),
        )
        for name, site in sites.items()
    ]
    seen = set()
    try:
        deadline = time.monotonic() + 400
        while server.poll() is None and time.monotonic() < deadline:
            for process in (server, *nodes):
                with contextlib.suppress(psutil.NoSuchProcess):
                    seen.update(psutil.Process(process.pid).children(recursive=True))
            time.sleep(0.5)
        assert server.poll() == 0, log.read_text()
    finally:
        for node in nodes:
            node.send_signal(signal.SIGTERM)
        codes = [node.wait(60) for node in nodes]
        if server.poll() is None:
            os.kill(server.pid, signal.SIGTERM)
            server.wait(60)
    assert codes == [0, 0]
    _, alive = psutil.wait_procs(seen, timeout=20)
    assert not [member for member in alive if member.status() != psutil.STATUS_ZOMBIE]
    assert digests(run) == inside
    said = log.read_text()
    assert "ct-mr round 1: merged (mixed)" in said
    assert "us round 1: merged (clips, mixed)" in said
    assert "(patients: 2 ct-mr, 2 us)" in (tmp_path / "mixed.log").read_text()
    assert (run / "report.html").is_file()


@pytest.mark.federation
def test_sites_are_counted_for_each_cohort_where_nobody_said_how_many(sites, tmp_path):
    plan = {**PLAN, "expected_sites": 0}
    own = {**SMALL["anaus"], "federation": {**plan, "rounds": 7}}
    for anaus, rounds in ((own, 7), ({**own, "federation": None}, 2)):
        config = configured(tmp_path, federation=plan, anaus=anaus)
        counted = with_site_counts(config, sites)
        assert counted.federation.expected_sites == 1
        us = counted.for_cohort("us").federation
        assert (us.expected_sites, us.rounds) == (2, rounds)
    said = configured(tmp_path)
    for name in said.cohorts:
        counted = with_site_counts(said, sites).for_cohort(name)
        assert dump_config(counted) == dump_config(said.for_cohort(name))


@pytest.mark.federation
def test_a_cohort_without_a_quorum_fails_the_command_by_name(tmp_path, sites, monkeypatch):
    """Ultrasound's updates all move too far; CT and MR end as if it were not there."""
    monkeypatch.setattr(simulation_run, "build_sites", lambda *_, **__: sites)
    strict = {**SMALL["anaus"]["federation"], "max_update_norm": 1e-9}
    content = {**SMALL, "anaus": {**SMALL["anaus"], "federation": strict}}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**content, "output": str(tmp_path)}))
    done = CliRunner().invoke(app, ["run", str(file)])
    assert done.exit_code == 2, done.output
    said = " ".join(done.output.split())
    assert "cohort us: none of 2 round(s) reached its quorum" in said
    assert "cohort ct-mr:" not in said
    run = tmp_path / "both"
    assert f"{run / 'ct-mr' / 'checkpoints'}" in said.replace(" ", "")
    assert f"{run / 'us' / 'checkpoints'}" not in said.replace(" ", "")
    merged = {
        name: [
            row["merged"] for row in RunStore(run / name).metrics.rows() if row["kind"] == "merge"
        ]
        for name in ("ct-mr", "us")
    }
    assert merged == {"ct-mr": [True, True], "us": [False, False]}
    assert (run / "report.html").is_file()


def test_serving_asks_for_the_number_of_sites_of_each_cohort(tmp_path):
    plan = {**PLAN, "expected_sites": 0}
    config = configured(tmp_path, federation=plan)
    with pytest.raises(ConfigError, match=r"^federation\.expected_sites is 0"):
        serve_on_loopback(config, say=str)
    config = configured(tmp_path, anaus={**SMALL["anaus"], "federation": plan})
    with pytest.raises(ConfigError, match=r"^anaus\.federation\.expected_sites is 0"):
        serve_on_loopback(config, say=str)


def test_beginning_a_run_twice_changes_nothing(tmp_path):
    config = configured(tmp_path)
    run, fresh = initialise(config)
    before = {name: RunStore(run / name).load(0).manifest for name in ("ct-mr", "us")}
    assert fresh
    assert initialise(config) == (run, False)
    after = {name: RunStore(run / name).load(0).manifest for name in before}
    assert after == before
    assert before["us"].run != before["ct-mr"].run
    assert not (run / "checkpoints").exists()
