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


# Less than half of what the federated encoder led the untrained one by over seeds 0, 1 and 2
# (docs/results.md): 0.043, 0.082 and 0.074, of which no interval of 95 % held 0.
MARGINS = {
    ("lesion", "pixel"): 0.02,
    ("lesion-present", "linear"): 0.03,
    ("lesion-size", "linear"): 0.03,
}


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("task", "method"), MARGINS)
def test_training_together_beats_no_training_position_and_intensity(lead, task, method):
    for arm in ("federated", "pooled"):
        for control in ("random", "position", "intensity"):
            assert lead(task, method, arm, control) > MARGINS[task, method], (arm, control)
    assert lead(task, method, "alone", "random") > MARGINS[task, method] / 2


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize(("task", "method"), MARGINS)
def test_a_federation_keeps_up_with_all_scans_in_one_place_and_with_each_site_alone(
    lead, task, method
):
    assert lead(task, method, "federated", "alone") > -0.03
    assert lead(task, method, "federated", "pooled") > -0.06
