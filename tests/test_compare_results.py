"""Raw numbers survive processes that are killed, and become a table."""

import json
import multiprocessing

import pytest

from agssd_core.config import parse_config
from agssd_core.evaluation.outcome import Outcome
from simulation.compare.results import Cell, Result, ResultFile
from simulation.compare.summary import comparison_table, summarise


def cell(seed=0, arm="federated", site="", method="pixel", **more):
    return Cell(seed, arm, site, more.get("variant", ""), "gtv", method, 1.0, "s")


def result(value, sites=None, **more):
    sites = sites or {"north": value, "south": value - 0.1}
    per_site = {name: {"dice": own} for name, own in sites.items()}
    outcome = Outcome({"dice": value}, per_site, dict.fromkeys(sites, 2))
    return Result(cell(**more), outcome)


def settings():
    task = {"name": "gtv", "kind": "segmentation"}
    return parse_config({"preset": "tiny", "name": "test", "compare": {"tasks": [task]}})


def test_what_was_added_is_read_back(tmp_path):
    file = ResultFile(tmp_path / "results.jsonl")
    file.add(result(0.5))
    file.add(result(0.6, seed=1))
    assert [found.outcome.metrics["dice"] for found in file.read().values()] == [0.5, 0.6]


def test_half_a_line_of_a_killed_process_spoils_neither_neighbour(tmp_path):
    file = ResultFile(tmp_path / "results.jsonl")
    file.add(result(0.5))
    with file.file.open("a") as stream:
        stream.write('{"seed": 1, "arm": "fed')
    file.add(result(0.7, seed=2))
    assert [found.outcome.metrics["dice"] for found in file.read().values()] == [0.5, 0.7]


def _add_many(path, first):
    for seed in range(first, first + 50):
        ResultFile(path).add(result(0.5, seed=seed))


def test_processes_may_add_at_once(tmp_path):
    path = tmp_path / "results.jsonl"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_add_many, args=(path, n * 100)) for n in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({line["seed"] for line in lines}) == 100


def comparison(federated=0.6, random=0.4, control=0.3):
    found = []
    for seed in range(3):
        shift = 0.01 * seed
        found.append(result(federated + shift, seed=seed))
        found.append(result(random + shift, seed=seed, arm="random"))
        for site in ("north", "south"):
            own = {"north": 0.5 + shift, "south": 0.2 + shift}
            found.append(result(0.45 + shift, own, seed=seed, arm="alone", site=site))
        found += [result(control, seed=seed, arm=name) for name in ("position", "intensity")]
    return found


def test_a_task_that_no_arm_leads_is_marked():
    assert [one.informative for one in summarise(comparison(), settings())] == [True]
    near = summarise(comparison(federated=0.45, random=0.43), settings())
    assert [one.informative for one in near] == [False]
    assert "**not informative**" in comparison_table(
        comparison(federated=0.45, random=0.43), settings()
    )


def test_alone_is_judged_by_each_sites_own_model():
    (summary,) = summarise(comparison(), settings())
    alone = summary.columns["alone"]
    assert alone.sites["south"] == {0: pytest.approx(0.2), 1: pytest.approx(0.21), 2: 0.22}
    assert alone.worst()[0] == pytest.approx(0.2)
    assert summary.columns["federated"].worst()[0] == pytest.approx(0.5)


def test_the_table_names_worst_sites_and_paired_differences():
    text = comparison_table(comparison(), settings())
    worst = next(line for line in text.splitlines() if "*worst site*" in line)
    assert "south 0.510" in worst
    assert "south 0.210" in worst
    difference = next(line for line in text.splitlines() if "dice, all sites" in line)
    # The same shift on both sides: the paired difference has no spread.
    assert "**+0.200 ± 0.000**" in difference


def test_where_one_site_holds_labels_its_own_model_is_compared_and_none_is_the_worst():
    only = [result(0.5, {"north": 0.5}, seed=seed) for seed in range(2)]
    for seed in range(2):
        only += [
            result(value, {"north": value}, seed=seed, arm="alone", site=site)
            for site, value in (("north", 0.6), ("south", 0.2))
        ]
    text = comparison_table(only, settings())
    assert "worst site" not in text
    assert "so no site is the worst" in text
    difference = {
        what: next(line for line in text.splitlines() if f"dice, {what}" in line)
        for what in ("all sites", "the only site")
    }
    # Over all sites alone is the mean of both models, one of which never saw such scans.
    assert "+0.100" in difference["all sites"]
    assert "-0.100" in difference["the only site"]


def test_a_checkpoint_as_it_was_makes_no_question_informative():
    found = comparison(federated=0.45, random=0.43)
    found += [result(0.9, seed=seed, arm="start") for seed in range(3)]
    assert [one.informative for one in summarise(found, settings())] == [False]
