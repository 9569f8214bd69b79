"""What federating is worth on phantoms, by the committed configuration: about 40 minutes.

``AGSSD_RUNS`` may name a folder in which the comparison was begun or done before.
"""

import os
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest

from simulation.compare.results import ResultFile

CONFIG = Path(__file__).parents[1] / "configs" / "compare-phantoms.yaml"
SCORE = {"pixel": "dice", "knn": "balanced_accuracy", "linear": "balanced_accuracy"}


def _scores(file):
    """Mean score over seeds by question and arm; of arm ``alone`` also over its sites."""
    by_seed = {}
    for cell, result in ResultFile(file).read().items():
        score = result.outcome.metrics[SCORE[cell.method]]
        place = by_seed.setdefault((cell.task, cell.method, cell.arm), {})
        place.setdefault(cell.seed, []).append(score)
    return {
        question: mean(mean(of_sites) for of_sites in seeds.values())
        for question, seeds in by_seed.items()
    }


@pytest.fixture(scope="module")
def lead(tmp_path_factory):
    """Lead of one arm over another at a question, the mean over seeds."""
    folder = Path(os.environ.get("AGSSD_RUNS") or tmp_path_factory.mktemp("runs")).absolute()
    command = [sys.executable, "-m", "simulation", "compare", str(CONFIG), f"output={folder}"]
    subprocess.run(command, check=True)
    scores = _scores(folder / "compare-phantoms" / "results.jsonl")

    def of(task, method, arm, over):
        return scores[task, method, arm] - scores[task, method, over]

    return of
