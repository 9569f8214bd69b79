"""Looking on and steering: live.json, pause and stop between rounds, the page in a browser."""

import http.client
import json
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import pytest
from typer.testing import CliRunner

from server.cli import app
from server.control import set_state, state_of
from server.live import LiveBoard, read_live
from server.live_page import live_page
from tests.support.toy import Hospital


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


def browsed(address, profile):
    """The page's document as a browser holds it after four seconds."""
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("chromium is not installed (Debian: apt-get install chromium)")
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-sync"
    flags += " disable-background-networking disable-component-update virtual-time-budget=4000"
    command = [browser, *(f"--{flag}" for flag in flags.split()), f"--user-data-dir={profile}"]
    return subprocess.run(
        [*command, "--dump-dom", address], capture_output=True, text=True, timeout=120, check=True
    ).stdout


def got(address, path, host="127.0.0.1"):
    port = int(address.rsplit(":", 1)[1].strip("/"))
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request("GET", path, headers={"Host": f"{host}:{port}"})
    answer = connection.getresponse()
    body = answer.read()
    connection.close()
    return answer.status, body


def written(folder, sites, **more):
    """A run's folder in the midst of a round."""
    (folder / "checkpoints").mkdir(parents=True)
    board = LiveBoard(folder, cohort="ct-mr", round=3, rounds=20, **more)
    names = [f"hospital-{number:02d}" for number in range(sites)]
    board.online(names[:-1])
    for name in names:
        board.ordered(name, size=1_300_000)
    board.admitted(names[0], size=2_600_000)
    board.refused(names[1], "declined-policy-hours")
    board.enter("collecting")
    return names


def test_a_round_leaves_who_did_what(tmp_path):
    hospital = Hospital(tmp_path)
    hospital.run()
    live = read_live(hospital.store.folder)
    assert live["stage"] == "complete"
    for site in live["sites"].values():
        assert (site["online"], site["step"], site["rounds"]) == (True, "admitted", live["rounds"])
        assert site["bytes_up"] > 0 < site["bytes_down"]


def test_a_refused_site_shows_its_reason(tmp_path):
    written(tmp_path / "run", 3)
    site = read_live(tmp_path / "run")["sites"]["hospital-01"]
    assert (site["step"], site["refusals"]) == ("refused", 1)
    assert site["reason"] == "declined-policy-hours"


def test_a_stopped_run_ends_between_rounds_and_goes_on_later(tmp_path):
    hospital, whole = Hospital(tmp_path / "stopped"), Hospital(tmp_path / "whole")
    folder = hospital.store.folder
    hospital.run(on_round=lambda outcome: outcome.round == 0 and set_state([folder], "stop"))
    assert len(hospital.rows("merge")) == 1
    assert read_live(folder)["stage"] == "stopped"
    set_state([folder], "go")
    hospital.run()
    whole.run()
    assert hospital.digest() == whole.digest()


def test_a_paused_run_waits(tmp_path):
    hospital = Hospital(tmp_path)
    folder = hospital.store.folder
    paused = []
    grid = hospital.grid()
    sleep = grid.time.sleep

    def sleep_and_look(seconds):
        sleep(seconds)
        if state_of(folder) == "pause":
            paused.append(read_live(folder)["stage"])
            if len(paused) == 3:
                set_state([folder], "go")

    grid.time.sleep = sleep_and_look
    set_state([folder], "pause")
    hospital.run(grid=grid)
    assert paused == ["paused"] * 3
    assert read_live(folder)["stage"] == "complete"


def test_the_page_answers_this_machine_and_nothing_else(tmp_path):
    written(tmp_path / "run", 3)
    with live_page(tmp_path / "run") as address:
        assert len(json.loads(got(address, "/live.json")[1])[0]["sites"]) == 3
        for path, host, status in (
            ("/", "127.0.0.1", 200),
            ("/report.html", "localhost", 200),
            ("/", "rebound.example", 403),
            ("/../live.json", "127.0.0.1", 404),
            ("/checkpoints", "127.0.0.1", 404),
        ):
            assert got(address, path, host)[0] == status, path


@pytest.mark.parametrize("sites", [3, 30])
def test_the_page_in_a_browser(tmp_path, sites):
    names = written(tmp_path / "run", sites)
    (tmp_path / "run" / "report.html").write_text("<!doctype html><p>the curves</p>")
    with live_page(tmp_path / "run") as address:
        found = browsed(address, tmp_path / "profile")
    assert all(name in found for name in names)
    assert f"{sites - 1} site(s) on line" in found
    assert "collecting, round 4 of 20" in found
    assert "declined-policy-hours" in found
    assert found.count("<tr") == sites + 1


def test_a_name_from_outside_is_text_and_no_markup(tmp_path):
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    board = LiveBoard(tmp_path / "run", cohort="us")
    board.refused("site", "<script>document.title='owned'</script>")
    board.write(at_once=True)
    with live_page(tmp_path / "run") as address:
        found = browsed(address, tmp_path / "profile")
    assert "<title>run: live</title>" in found
    assert "&lt;script&gt;" in found


def test_steering_a_folder_that_holds_no_run_is_refused(tmp_path):
    for verb in ("pause", "resume", "stop"):
        result = CliRunner().invoke(app, [verb, str(tmp_path)])
        assert result.exit_code == 2
        assert "holds no run" in result.output


def test_the_page_answers_many_at_once(tmp_path):
    written(tmp_path / "run", 3)
    with live_page(tmp_path / "run") as address, ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: got(address, "/live.json")[0], range(60)))
    assert answers == [200] * 60
