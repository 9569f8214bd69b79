"""A site sees what its own rounds measured, also what it lets nobody else see."""

import json
import os

import pytest
from typer.testing import CliRunner

from client.cli import app
from client.history import HISTORY_FILE, RoundNote, note_round, read_history
from tests.support.toy import Hospital


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch):
    """Nobody pulls a plug here: waiting for the disk is most of a toy round's time."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


def test_the_page_has_every_metric_of_every_round_and_fetches_nothing(tmp_path):
    one = Hospital(tmp_path, patients={"a": 3})
    (one.sites["a"] / "policy.yaml").write_text("leaves: {metrics: []}\nwork: {least_images: 1}")
    one.run()
    assert one.rows("site")[0]["metrics"] == {}
    notes, damaged = read_history(one.sites["a"] / "federation" / "run-1")
    assert (list(notes), damaged) == ([0, 1, 2], 0)
    answer = CliRunner().invoke(app, ["report", str(one.sites["a"])])
    assert answer.exit_code == 0, answer.stderr
    file = one.sites["a"] / "report.html"
    page = file.read_text()
    assert file.stat().st_mode & 0o077 == 0
    for part in ("Total loss", "Learning rate", "3 round(s)", "run-1"):
        assert part in page
    assert page.count("<svg") == len(notes[0].metrics)
    assert "<script" not in page
    assert "http" not in page.replace("http-equiv", "")


def test_a_round_trained_again_counts_once_and_damage_is_said(tmp_path):
    for loss in (3.0, 2.0):
        note_round(tmp_path, RoundNote(4, 1.0, {"loss": loss}))
    with (tmp_path / HISTORY_FILE).open("a") as stream:
        stream.write('{"round": 5, "ti')
    notes, damaged = read_history(tmp_path)
    assert ({number: note.metrics["loss"] for number, note in notes.items()}, damaged) == (
        {4: 2.0},
        1,
    )


def test_names_from_a_history_are_escaped(tmp_path):
    folder = tmp_path / "federation" / "run-1"
    folder.mkdir(parents=True)
    row = {"round": 0, "time": 0.0, "metrics": {"<b>x</b>": 1.0}}
    (folder / HISTORY_FILE).write_text(json.dumps(row) + "\n")
    assert CliRunner().invoke(app, ["report", str(tmp_path)]).exit_code == 0
    assert "<b>" not in (tmp_path / "report.html").read_text()


def test_a_site_without_a_round_is_told_so(tmp_path):
    answer = CliRunner().invoke(app, ["report", str(tmp_path)])
    assert answer.exit_code == 2
    assert "agssd-site run" in answer.stderr
