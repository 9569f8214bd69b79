"""Copies of the metrics in the formats that other tools read."""

import sys

import pytest

from agssd_core.config import TrackingConfig, parse_config
from agssd_core.console import progress_bar
from agssd_core.errors import ConfigError
from agssd_core.tracking import open_tracker
from server.serve import serve_on_loopback
from server.tracking import tracking_rounds
from simulation.run import run_simulation
from tests.support.toy import Hospital

MODULES = [("tensorboard", "torch.utils.tensorboard"), ("mlflow", "mlflow.tracking")]


def test_tensorboard_and_mlflow_hold_what_was_logged(tmp_path):
    config = TrackingConfig(tensorboard=True, mlflow=True)
    for step, loss in enumerate((1.5, 0.5)):
        # Opened twice under one name, as a resumed run does.
        with open_tracker(config, tmp_path, run="r") as tracker:
            tracker.log({"loss": loss}, step, prefix="site-a")

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("site-a/loss")] == [(0, 1.5), (1, 0.5)]
    (stored,) = (tmp_path / "mlruns").rglob("metrics/site-a/loss")
    rows = [line.split()[1:3] for line in stored.read_text().splitlines()]
    assert rows == [["1.5", "0"], ["0.5", "1"]]


def test_nothing_is_opened_unless_asked_for(tmp_path):
    with open_tracker(TrackingConfig(), tmp_path, run="r") as tracker:
        tracker.log({"loss": 1.0}, 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("field", "module"), MODULES)
def test_a_missing_package_is_named_with_its_remedy(tmp_path, monkeypatch, field, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ConfigError, match=r"pip install 'agssd-federation\[tracking\]'"):
        open_tracker(TrackingConfig(**{field: True}), tmp_path, run="r")


BOTH = {"tensorboard": True, "mlflow": True}


class Killed(BaseException):
    """The end of a process."""


def tracked_run(hospital, *, run="r", on_round=None):
    config = TrackingConfig(**BOTH)
    with tracking_rounds(config, hospital.store, run=run, on_round=on_round) as told:
        return hospital.run(on_round=told)


def points(folder, name):
    """(step, value) of a metric in TensorBoard's files and in MLflow's."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), purge_orphaned_data=False).Reload()
    board = [(e.step, pytest.approx(e.value, rel=1e-6)) for e in events.Scalars(name)]
    (stored,) = (folder / "mlruns").rglob(f"metrics/{name}")
    rows = [line.split() for line in stored.read_text().splitlines()]
    return board, [(int(step), float(value)) for _, value, step in (row[:3] for row in rows)]


def assert_copied(hospital):
    """Every row's numbers stand once in both copies, under the site's name or the merge's."""
    folder = hospital.store.folder / "tracking"
    for site in hospital.sites:
        rows = [row for row in hospital.rows("site") if row["site"] == site]
        expected = [(row["round"], row["metrics"]["loss"]) for row in rows]
        board, stored = points(folder, f"sites/{site}/loss")
        assert stored == expected
        assert board == expected
    expected = [(row["round"], row["metrics"]["sites"]) for row in hospital.rows("merge")]
    board, stored = points(folder, "merge/sites")
    assert stored == board == expected


def test_a_run_is_copied_round_by_round_and_a_resumed_one_doubles_no_point(tmp_path):
    hospital = Hospital(tmp_path)

    def die(outcome):
        if outcome.round == 1:
            raise Killed

    with pytest.raises(Killed):
        tracked_run(hospital, on_round=die)
    assert [row["round"] for row in hospital.rows("merge")] == [0, 1]
    assert_copied(hospital)
    tracked_run(hospital)
    assert len(hospital.rows("merge")) == 3
    assert_copied(hospital)
    tracked_run(hospital)
    assert_copied(hospital)


@pytest.mark.parametrize("mark", [None, "9", "x"])
def test_copies_that_are_not_whole_are_made_again(tmp_path, mark):
    """A killed copier leaves no mark; a run that went back has one ahead of it."""
    hospital = Hospital(tmp_path)
    tracked_run(hospital)
    file = hospital.store.folder / "tracking" / "copied-rounds"
    file.unlink()
    if mark is not None:
        file.write_text(mark)
    tracked_run(hospital)
    assert_copied(hospital)


def test_a_run_that_goes_back_to_an_older_checkpoint_doubles_no_point(tmp_path):
    hospital = Hospital(tmp_path)
    tracked_run(hospital)
    (hospital.store.checkpoints / "round-0003").rename(tmp_path / "damaged")
    tracked_run(hospital)
    assert hospital.store.load(3).round == 3
    assert_copied(hospital)


def test_a_run_found_behind_its_copies_while_it_runs_doubles_no_point(tmp_path):
    hospital = Hospital(tmp_path)
    file = hospital.store.folder / "tracking" / "copied-rounds"
    tracked_run(hospital, on_round=lambda _: file.write_text("9"))
    file.write_text("3")
    assert_copied(hospital)


@pytest.mark.parametrize(("field", "module"), MODULES)
def test_a_missing_package_stops_a_simulation_before_anything_is_made(
    tmp_path, monkeypatch, field, module
):
    monkeypatch.setitem(sys.modules, module, None)
    settings = {"preset": "tiny", "output": str(tmp_path / "runs"), "tracking": {field: True}}
    with pytest.raises(ConfigError, match=r"pip install 'agssd-federation\[tracking\]'"):
        run_simulation(parse_config(settings), say=str, bar=progress_bar)
    assert not (tmp_path / "runs").exists()
    settings["federation"] = {"expected_sites": 2}
    with pytest.raises(ConfigError, match=r"pip install 'agssd-federation\[tracking\]'"):
        serve_on_loopback(parse_config(settings), say=str)
    assert not (tmp_path / "runs").exists()
