"""Sites that join a cohort, and the folders of a run with two."""

import json
import logging
import os

import pytest
from typer.testing import CliRunner

from agssd_core.config import dump_config, parse_config
from agssd_core.errors import CheckpointError, RoundError
from server.cli import app as server_app
from server.cohorts import cohort_folders, run_cohorts, run_folders
from server.report import write_server_report
from server.rounds import site_config
from tests.support.pairs import down, merged_rounds, trained_in
from tests.support.toy import BOTH, Consortium, Hospital, config_from_json


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch):
    """Nobody pulls a plug here: waiting for the disk is most of a toy round's time."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


CHANGES = {
    "us": {"anaus": {"batch_size": 5}, "data": {"frames": {"max_side": 100}}},
    "ct-mr": {"agssd": {"cvac": {"n_local": 1}}, "data": {"spacing_mm": [4, 4, 4]}},
}


@pytest.mark.parametrize(("mine", "other"), [("us", "ct-mr"), ("ct-mr", "us")])
def test_the_other_cohorts_settings_never_reach_an_order(mine, other):
    base = {"preset": "tiny", "cohorts": ["ct-mr", "us"]}
    plain, changed = parse_config(base), parse_config(base | CHANGES[other])
    own = parse_config(base | CHANGES[mine])
    texts = [dump_config(site_config(each.for_cohort(mine))) for each in (plain, changed, own)]
    assert texts[0] == texts[1] != texts[2]
    alone = parse_config({**base, "cohorts": [mine]})
    assert dump_config(site_config(alone.for_cohort(mine))) == texts[0]


def test_a_run_resumes_although_the_other_cohort_was_reconfigured(tmp_path):
    """ct-mr is done, us goes on with its own configuration; ct-mr's new rate is refused alone."""
    run = Consortium(tmp_path)
    run.run(down("d", "a", rounds=[2]))
    plain = json.loads(dump_config(run.config))
    changed = config_from_json(json.dumps(plain | {"anaus": {**plain["anaus"], "batch_size": 5}}))
    grid = run.grid()
    with pytest.raises(CheckpointError, match=r"Cohort us: .*anaus\.batch_size = 5") as refused:
        run_cohorts(
            grid,
            changed,
            tmp_path / "run",
            clock=grid.time.clock,
            sleep=grid.time.sleep,
            threads=False,
        )
    assert "ct-mr" not in str(refused.value)


def hellos(grid):
    """Let a grid note whom it asks for which cohort."""
    asked = []
    push = grid.push_messages

    def noting(messages):
        (message,) = messages
        if message.metadata.group_id == "hello":
            node = message.metadata.dst_node_id
            cohort = json.loads(message.content["header"]["body"])["cohort"]
            asked.append((sorted(BOTH)[node - 101], cohort))
        return push([message])

    grid.push_messages = noting
    return asked


def test_a_site_without_scans_is_asked_once_and_nobody_is_alarmed(tmp_path, caplog):
    run = Consortium(tmp_path)
    grid = run.grid()
    asked = hellos(grid)
    with caplog.at_level(logging.INFO):
        run.run(grid=grid)
    assert asked.count(("b", "us")) == asked.count(("d", "ct-mr")) == 1
    assert [record.message for record in caplog.records if record.levelno > logging.INFO] == []
    assert "no scans for cohort us" in caplog.text


def _index_ultrasound(run, site):
    (run.sites[site] / "facts.json").write_text('{"patients": {"ct-mr": 2, "us": 9}}')


def test_a_site_that_indexed_ultrasound_joins_when_it_connects_anew(tmp_path):
    run = Consortium(tmp_path, rounds=4)
    grid = run.grid()

    def told(outcome):
        if outcome.cohort == "us" and outcome.round == 0:
            _index_ultrasound(run, "b")
            grid.offline.add("b")
        elif outcome.cohort == "us" and outcome.round == 1:
            grid.offline.discard("b")

    run.run(grid=grid, on_round=told)
    assert [number for number, site in trained_in(run, "us") if site == "b"] == [2, 3]
    row = next(row for row in run.of("us").rows("site") if row["site"] == "b")
    assert row["patient_count"] == 9


def test_it_also_joins_when_it_is_asked_again(tmp_path):
    run = Consortium(tmp_path, rounds=4)
    grid = run.grid()
    asked = hellos(grid)

    def told(outcome):
        if outcome.cohort == "us" and outcome.round == 0:
            _index_ultrasound(run, "b")
        elif outcome.cohort == "us" and outcome.round == 1:
            grid.time.sleep(3600.0)

    run.run(grid=grid, on_round=told)
    assert [number for number, site in trained_in(run, "us") if site == "b"] == [2, 3]
    assert asked.count(("b", "us")) == 2


def test_a_site_in_both_counts_trains_and_remembers_each_by_itself(tmp_path):
    run = Consortium(tmp_path)
    run.run()
    counts = {
        name: next(r["patient_count"] for r in run.of(name).rows("site") if r["site"] == "a")
        for name in ("ct-mr", "us")
    }
    assert counts == {"ct-mr": 3, "us": 5}
    # A trainer for each cohort, warm from its first round to its last.
    mine = [trainer for trainer in run.bench.trainers if trainer.site == "a"]
    assert sorted((trainer.us, trainer.steps_taken) for trainer in mine) == [
        (False, 12),
        (True, 12),
    ]
    kept = {path.name for path in (run.sites["a"] / "federation").iterdir() if path.is_dir()}
    assert kept == {"run-ct-mr", "run-us"}
    enrolled = json.loads((tmp_path / "run" / "us" / "enrolment.json").read_text())
    assert {name: entry["patient_count"] for name, entry in enrolled.items()} == {"a": 5, "d": 2}


def test_one_cohort_keeps_the_runs_own_folder_and_several_have_theirs(tmp_path):
    one, two = parse_config({"cohorts": ["us"]}), parse_config({"cohorts": ["ct-mr", "us"]})
    assert cohort_folders(tmp_path, one) == {"us": tmp_path}
    assert cohort_folders(tmp_path, two) == {"ct-mr": tmp_path / "ct-mr", "us": tmp_path / "us"}


def test_a_run_is_not_taken_up_with_another_layout(tmp_path):
    Hospital(tmp_path / "one")
    Consortium(tmp_path / "two")
    one, two = parse_config({}), parse_config({"cohorts": ["us", "ct-mr"]})
    with pytest.raises(CheckpointError, match="started with one cohort"):
        cohort_folders(tmp_path / "one" / "run", two)
    with pytest.raises(CheckpointError, match="started with several cohorts"):
        cohort_folders(tmp_path / "two" / "run", one)
    cohort_folders(tmp_path / "one" / "run", one)
    assert list(cohort_folders(tmp_path / "two" / "run", two)) == ["us", "ct-mr"]


def test_the_verb_lists_the_rounds_of_both_cohorts(tmp_path):
    run = Consortium(tmp_path, rounds=1)
    run.run(down("d"))
    folder = tmp_path / "run"
    said = CliRunner().invoke(server_app, ["rounds", str(folder)])
    assert said.exit_code == 0, said.output
    assert "ct-mr round 0: merged (a, b, c)" in said.output
    assert "us round 0: merged (a; d: no-reply)" in said.output
    rows = CliRunner().invoke(server_app, ["rounds", str(folder), "--json"]).output.splitlines()
    assert [json.loads(row)["cohort"] for row in rows] == ["ct-mr", "us"]
    assert run_folders(folder / "us") == {"": folder / "us"}


def test_two_servers_never_write_one_cohort(tmp_path):
    run = Consortium(tmp_path)
    with run.stores["us"].writing(), pytest.raises(CheckpointError, match="Cohort us: another"):
        run.run()
    assert merged_rounds(run, "ct-mr") == [True] * 3


def test_a_mixture_of_failures_is_one_error(tmp_path, monkeypatch):
    run = Consortium(tmp_path)
    (run.stores["us"].checkpoints / "round-0000" / "manifest.json").unlink()

    def fail(*_args, **_kwargs):
        raise RoundError("the disk is full. Free space.")

    monkeypatch.setattr("server.rounds.round_rows", fail)
    with pytest.raises(RoundError, match=r"Cohort ct-mr: the disk is full.*Cohort us: "):
        run.run()


def test_the_page_stands_while_one_cohort_has_closed_no_round(tmp_path):
    run, pages = Consortium(tmp_path), []
    enrolled = {"a": {"patient_count": 5, "volume_count": 5}}
    (run.stores["us"].folder / "enrolment.json").write_text(json.dumps(enrolled))

    def look(_outcome):
        pages.append(write_server_report(tmp_path / "run").read_text())

    run.run(on_round=look)
    assert len(pages) == 6
    assert all(page.rstrip().endswith("</html>") for page in pages)
    assert ">d<" in pages[-1]
