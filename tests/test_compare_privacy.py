"""The table and picture of what privacy costs, from raw numbers."""

import pytest

from agssd_core.config import parse_config
from agssd_core.evaluation.outcome import Outcome
from simulation.compare.private import LEVELS, SOURCES, name_of
from simulation.compare.private_figure import draw_privacy
from simulation.compare.private_table import privacy_table
from simulation.compare.results import Cell, Result

SEEDS = (0, 1, 2)
PLAIN, NOISELESS, EIGHT = LEVELS[:3]


def settings():
    tasks = [{"name": "lesion", "kind": "segmentation"}]
    return parse_config(
        {
            "preset": "tiny",
            "cohorts": ["us"],
            "init": {"digest": "ab" * 32},
            "compare": {"tasks": tasks, "fractions": []},
        }
    )


def result(seed, arm, variant, dice):
    told = {
        "private": 1.0,
        "privacy_epsilon": 8.0,
        "privacy_sigma": 1.5 + seed,
        "privacy_rate": 0.5,
    }
    facts = {"privacy": {"north": told}} if variant.startswith("epsilon-8") else {}
    cell = Cell(seed, arm, "", variant, "lesion", "pixel", 1.0, "stamp")
    return Result(cell, Outcome({"dice": dice}, {}, {}), facts)


@pytest.fixture
def results():
    found = []
    for seed in SEEDS:
        for source in SOURCES:
            for place, level in enumerate(LEVELS):
                dice = 0.6 - 0.05 * place + 0.01 * seed + (0.2 if source == "continued" else 0)
                found.append(result(seed, "federated", name_of(level, source), dice))
        controls = {"start": 0.55, "random": 0.3, "position": 0.3, "intensity": 0.2}
        found += [result(seed, arm, "", dice + 0.01 * seed) for arm, dice in controls.items()]
    return found


def rows(table):
    lines = (line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| "))
    return {cells[0]: cells[1:] for cells in lines}


def test_each_model_has_a_row_and_each_step_down_its_cost(results):
    found = rows(privacy_table(results, settings()))
    assert found["plain-scratch"] == ["0.610 ± 0.025"]
    assert found["epsilon-1-continued"] == ["0.610 ± 0.025"]
    assert found["plain-continued - start"] == ["**+0.250 ± 0.000**"]
    assert found["noiseless-scratch - plain-scratch"] == ["**-0.050 ± 0.000**"]
    assert found["epsilon-8-continued - noiseless-continued"] == ["**-0.050 ± 0.000**"]
    assert found["start - random"] == ["**+0.250 ± 0.000**"]
    assert found["*informative*"] == ["yes"]
    assert found["epsilon-8-scratch"] == ["north", "0.5", "1.5 to 3.5", "8"]
    assert "weights abababababababab..." in privacy_table(results, settings())


def test_a_table_is_written_before_all_cells_are_there(results):
    found = rows(privacy_table(results[:1], settings()))
    assert found["epsilon-1-continued"] == ["-"]


def test_the_picture_is_one(tmp_path, results):
    draw_privacy(tmp_path / "privacy.png", results, settings())
    assert (tmp_path / "privacy.png").read_bytes().startswith(b"\x89PNG")
