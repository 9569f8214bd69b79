"""``agssd-sim run`` killed, interrupted or started twice: the bits of an undisturbed run."""

import os
import signal
import subprocess
import sys
import time

import pytest

from server.store import RunStore

pytestmark = pytest.mark.federation

CONFIG = """
name: small
preset: tiny
data: {spacing_mm: [6, 6, 6], foreground_margin: 2}
agssd:
  cvac: {global_size: [16, 16, 16], local_size: [8, 8, 8], n_local: 1}
  model: {width: 24, depth: 1, heads: 2}
  head: {prototypes: 32, hidden: 32, bottleneck: 16}
training: {batch_size: 2}
federation: {rounds: 5, steps_per_round: 8, min_sites: 2, poll_s: 0.01}
simulation:
  workers: 1
  phantoms:
    - {name: a, format: dicom, patients: 2, size: [32, 32, 24], spacing_mm: [8, 8, 9]}
    - {name: b, modalities: [MR], patients: 2, size: [30, 30, 26], spacing_mm: [8, 8, 8]}
"""


def _command(folder):
    file = folder / "run.yaml"
    if not file.exists():
        folder.mkdir(exist_ok=True)
        file.write_text(CONFIG)
    code = "from simulation.cli import main; main()"
    return [sys.executable, "-c", code, "run", str(file), f"output={folder}"]


def _start(folder):
    return subprocess.Popen(
        _command(folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _wait_for_round(folder, number, process):
    target = folder / "small" / "checkpoints" / f"round-{number:04d}"
    deadline = time.monotonic() + 120
    while not target.is_dir():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _finish(folder):
    done = subprocess.run(
        _command(folder), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    store = RunStore(folder / "small")
    assert store.rounds() == list(range(6))
    resets = [row["metrics"]["optimiser_reset"] for row in store.metrics.rows() if row["site"]]
    assert resets == [0.0] * 10
    assert [row["round"] for row in store.metrics.rows() if row["kind"] == "merge"] == list(
        range(5)
    )
    return store.load(5).manifest.weights_digest


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return _finish(tmp_path_factory.mktemp("whole") / "x")


def test_kill_9_and_the_same_command_again(tmp_path, undisturbed):
    folder = tmp_path / "x"
    process = _start(folder)
    _wait_for_round(folder, 2, process)
    process.kill()
    process.communicate()
    assert RunStore(folder / "small").rounds()[-1] < 5
    assert _finish(folder) == undisturbed
    assert not [path for path in folder.rglob("*") if ".tmp" in path.name]


def test_interrupted_or_started_twice(tmp_path, undisturbed):
    folder = tmp_path / "x"
    process = _start(folder)
    _wait_for_round(folder, 1, process)
    os.kill(process.pid, signal.SIGSTOP)  # holds the run's lock, however quick its rounds are
    try:
        second = subprocess.run(
            _command(folder), capture_output=True, text=True, timeout=120, check=False
        )
    finally:
        os.kill(process.pid, signal.SIGCONT)
    assert second.returncode == 2
    assert "another server is writing this run" in second.stderr
    assert "Traceback" not in second.stderr
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Run the same command to go on" in said
    assert "Traceback" not in said
    assert RunStore(folder / "small").rounds()[-1] < 5
    assert _finish(folder) == undisturbed
