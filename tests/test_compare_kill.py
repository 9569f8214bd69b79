"""A comparison whose process is killed goes on, and keeps every finished cell as it stands."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from simulation.compare.results import ResultFile
from tests.support.deployed import wait

CONFIG = Path(__file__).parents[1] / "configs" / "compare-tiny.yaml"
MODELS, CONTROLS, QUESTIONS = 5, 2, 3  # federated, pooled, two alone and random, of each seed


def _start(folder, *overrides):
    command = [sys.executable, "-m", "simulation", "compare", str(CONFIG), f"output={folder}"]
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen([*command, *overrides], stdout=log, stderr=log)


def _lines(folder):
    file = folder / "compare-tiny" / "results.jsonl"
    return file.read_text().splitlines() if file.is_file() else []


def _kill_and_go_on(folder, *overrides, cells):
    running = _start(folder, *overrides)
    assert wait(lambda: len(_lines(folder)) >= 4, 300), (folder / "log.txt").read_text()[-2000:]
    children = psutil.Process(running.pid).children(recursive=True)
    os.kill(running.pid, signal.SIGKILL)
    running.wait()
    assert wait(lambda: not any(_lives(child) for child in children), 30), "a worker lived on"
    kept = _lines(folder)
    assert len(kept) < cells, "it had ended before it could be killed"
    again = _start(folder, *overrides)
    assert again.wait(timeout=500) == 0, (folder / "log.txt").read_text()[-2000:]
    return kept


def _lives(process):
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def _assert_nothing_lost(folder, kept, *, cells):
    now = _lines(folder)
    assert now[: len(kept)] == kept
    answers = ResultFile(folder / "compare-tiny" / "results.jsonl").read()
    assert len(answers) == cells
    assert len(now) - len(answers) <= 1, "a finished cell was computed again"


def test_a_killed_comparison_loses_no_finished_cell(tmp_path):
    short = ("federation.rounds=1", "federation.steps_per_round=1")
    cells = (2 + CONTROLS) * QUESTIONS
    kept = _kill_and_go_on(
        tmp_path, "compare.seeds=[0]", "compare.arms=[federated,random]", *short, cells=cells
    )
    _assert_nothing_lost(tmp_path, kept, cells=cells)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_four_arms_and_three_seeds_survive_a_kill(tmp_path):
    cells = 3 * (MODELS + CONTROLS) * QUESTIONS
    kept = _kill_and_go_on(tmp_path, cells=cells)
    _assert_nothing_lost(tmp_path, kept, cells=cells)
    table = (tmp_path / "compare-tiny" / "comparison.md").read_text()
    assert all(arm in table for arm in ("federated", "pooled", "alone", "random"))
