"""The coordinator's page: axes, ticks, gaps and shares."""

import json
import re

import pytest

from agssd_core import curves
from server.report import write_server_report
from server.run_record import read_run
from tests.support.reports import findings, healthy_rows, merge_row, write_run


def test_ticks_are_round_and_enclose_the_values():
    for low, high in [(0.0, 1.0), (0.0713, 0.1031), (-3, 250), (5, 5), (0, 0), (4.7, 4.86)]:
        marks = curves.ticks(low, high)
        assert marks[0] <= low + 1e-9
        assert marks[-1] >= high - 1e-9
        assert 2 <= len(marks) <= 9


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (1234.5, "1234"),
        (0.04683, "0.0468"),
        (3.0, "3"),
        (1e-6, "1.0e-06"),
        (-2.5, "-2.5"),
    ],
)
def test_numbers_keep_three_digits(value, text):
    assert curves.short(value) == text


@pytest.mark.parametrize("values", [(0.689, 0.858), (0.071, 0.103), (4.7, 4.86), (3.0, 3.0)])
def test_every_tick_lies_on_the_drawing(values):
    line = curves.Line("a", dict(enumerate(values)), 0)
    drawn = curves.line_chart([line], title="t")
    heights = [float(y) for y in re.findall(r'class="grid" d="M\d+ ([-0-9.]+)H', drawn)]
    assert len(heights) >= 2
    assert min(heights) >= 9.9
    assert max(heights) <= 198.1  # above the numbers of the rounds


def test_neighbouring_ticks_are_told_apart():
    values = {0: 10.02, 1: 10.9}
    chart = curves.line_chart([curves.Line("a", values, 0)], title="t")
    assert re.findall(r'text-anchor="end">([^<]*)<', chart) == [
        "10",
        "10.25",
        "10.5",
        "10.75",
        "11",
    ]


def test_a_gap_in_the_rounds_is_a_gap_in_the_line():
    line = curves.Line("a", {0: 1.0, 1: 2.0, 3: 1.0}, 0)
    path = re.search(r'class="line".*? d="([^"]*)"', curves.line_chart([line], title="t"))[1]
    assert path.count("M") == 2
    assert path.count("L") == 1


def test_an_enrolled_site_that_never_answered_stands_in_the_table(tmp_path):
    folder = write_run(tmp_path / "run", healthy_rows())
    counts = {"patient_count": 12, "volume_count": 30}
    (folder / "enrolment.json").write_text(json.dumps({"silent": counts}))
    silent = read_run(folder).sites[-1]
    assert (silent.name, silent.patient_count, silent.volume_count) == ("silent", 12, 30)
    page = write_server_report(folder).read_text()
    assert "silent did not answer in time in every round" in page


def test_the_shares_are_those_of_the_newest_merge(tmp_path):
    rows = [*healthy_rows(rounds=1), merge_row(1, merged=False, shares={})]
    rows[3]["shares"] = {"a": 0.7, "b": 0.2, "c": 0.1}
    page = write_server_report(write_run(tmp_path / "run", rows, shares={})).read_text()
    assert "<span>a</span>" in page
    assert "70 %" in page


def test_a_gate_of_the_monitor_that_is_not_drawn_still_counts(tmp_path):
    rows = healthy_rows()
    rows[-2]["metrics"]["collapsed"] = 1.0
    found = findings(write_run(tmp_path / "run", rows))
    assert (found[0].level, found[0].sites) == ("bad", ("c",))
    assert not any("No site has collapsed" in verdict.fact for verdict in found)


def test_poor_reconstruction_early_in_a_run_is_no_alarm(tmp_path):
    rows = healthy_rows(rounds=1)
    rows[0]["metrics"]["rec_ratio"] = 1.4
    found = findings(write_run(tmp_path / "run", rows, rounds=10))
    assert not any(verdict.level == "bad" for verdict in found)
    assert any("still above 0.7" in verdict.fact for verdict in found)
