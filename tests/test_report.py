"""The coordinator's page: what it says, and that nothing in a run folder can break it."""

import math
import re
from html.parser import HTMLParser

import pytest

from server.report import write_server_report
from server.run_record import read_run
from server.verdicts import headline
from tests.support.reports import findings, healthy_rows, merge_row, site_row, write_run

VOID = {"meta", "link", "br", "img", "path", "circle", "polyline"}


def refusal_row(number, site, reason):
    return {
        "round": number,
        "cohort": "ct-mr",
        "site": site,
        "kind": "refusal",
        "metrics": {},
        "reason": reason,
    }


class _Outline(HTMLParser):
    """Open tags, to see that every one is closed, and attributes that load something."""

    def __init__(self):
        super().__init__()
        self.open, self.loads, self.headings = [], [], []

    def handle_starttag(self, tag, attrs):
        self.loads += [v for k, v in attrs if k in ("src", "href") and not v.startswith("data:")]
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


def outline(page):
    parser = _Outline()
    parser.feed(page)
    assert parser.open == []
    return parser


def test_a_healthy_run_is_called_healthy_and_shows_its_numbers(tmp_path):
    folder = write_run(tmp_path / "run-1", healthy_rows(), shares={"a": 0.5, "b": 0.3, "c": 0.2})
    page = write_server_report(folder).read_text()
    assert "The run is healthy" in page
    assert "2 / 2" in page
    assert "ab" * 32 in page
    assert page.count("<figure>") >= 6
    row = re.search(r'<tr><th scope="row">.*?a</th>(.*?)</tr>', page)[1]
    cells = re.findall(r"<td[^>]*>(.*?)</td>", row)
    expected = ["4", "7", "50 %", "2", "0", "0", "0", "0", "2 MB", "4 MB", "60 s"]
    assert cells == expected


@pytest.mark.parametrize("count", [3, 30])
def test_the_page_is_whole_loads_nothing_and_nests_its_headings(tmp_path, count):
    sites = [f"hospital-{number:02d}" for number in range(count)]
    page = write_server_report(write_run(tmp_path / "run", healthy_rows(sites))).read_text()
    found = outline(page)
    assert found.loads == []
    assert "<script" not in page
    assert found.headings[0] == 1
    assert all(b - a <= 1 for a, b in zip(found.headings, found.headings[1:], strict=False))
    assert page.count('role="img"') == page.count('role="img" aria-label="')
    assert ("median and middle half of all sites" in page) == (count == 30)


def test_a_run_without_rounds_says_so(tmp_path):
    page = write_server_report(tmp_path).read_text()
    assert "No round has been completed yet." in page
    outline(page)


def test_a_torn_line_and_foreign_rows_are_left_out_and_counted(tmp_path):
    folder = write_run(
        tmp_path / "run", healthy_rows(), tail='[1]\n{"kind": "x"}\n{"round": 2, "si'
    )
    assert read_run(folder).damaged_lines == 3
    assert "3 line(s) of metrics.jsonl could not be read" in write_server_report(folder).read_text()


def test_missing_and_broken_metrics_do_not_stop_the_page(tmp_path):
    rows = [site_row(0, "a"), merge_row(0)]
    rows[0]["metrics"] = {"loss": math.nan, "loss_rec": None, "drift": "much", "cls_std": 1e300}
    folder = write_run(tmp_path / "run", rows)
    page = write_server_report(folder).read_text()
    assert "values that are not finite (loss)" in page
    assert "nan" not in re.sub(r"<pre>.*?</pre>", "", page, flags=re.S)
    outline(page)


def test_training_time_is_the_site_s_own_without_its_waiting(tmp_path):
    rows = [site_row(0, "a", seconds=7.0), site_row(1, "a", seconds=8.0), merge_row(0)]
    assert read_run(write_run(tmp_path / "run", rows)).sites[0].total("seconds") == 15.0


def test_names_and_reasons_from_outside_are_escaped_even_inside_a_chart(tmp_path):
    name = '"><script>alert(1)</script>{{ 7 * 7 }}{0}'
    rows = [site_row(0, name), refusal_row(0, name, "<b>norm</b>"), merge_row(0)]
    page = write_server_report(write_run(tmp_path / "<i>run", rows)).read_text()
    assert "<script" not in page
    assert "<b>norm" not in page
    assert "<i>run" not in page
    assert "{{ 7 * 7 }}" in page
    outline(page)


def test_the_newer_row_of_a_round_counts(tmp_path):
    rows = [site_row(0, "a", loss=5.0), site_row(0, "a", loss=3.0), merge_row(0), merge_row(0)]
    run = read_run(write_run(tmp_path / "run", rows))
    assert run.completed_rounds == 1
    assert run.sites[0].values("loss") == {0: 3.0}


@pytest.mark.parametrize("head", ["cls", "patch"])
def test_a_collapsed_site_is_named_with_a_remedy(tmp_path, head):
    rows = healthy_rows()
    rows[-2]["metrics"][f"information_{head}"] = 0.02
    found = findings(write_run(tmp_path / "run", rows))
    assert found[0].level == "bad"
    assert found[0].sites == ("c",)
    assert f"Collapse of the {head} head at c 0.02" in found[0].fact
    assert "teacher_temperature" in found[0].remedy
    assert headline(found).fact.endswith("Concerned: c.")
    assert not any("No site has collapsed" in verdict.fact for verdict in found)


def test_information_is_not_judged_before_the_window_is_full(tmp_path):
    rows = [site_row(0, "a", information_cls=0.0, monitor_volumes=80.0), merge_row(0)]
    found = findings(write_run(tmp_path / "run", rows))
    assert any("has no verdict yet" in verdict.fact for verdict in found)
    assert not any("Collapse" in verdict.fact for verdict in found)


@pytest.mark.parametrize(("marginal", "kind"), [(4.84, "uniform"), (0.2, "constant")])
def test_the_kind_of_collapse_is_told_from_the_marginal_entropy(tmp_path, marginal, kind):
    rows = healthy_rows()
    rows[-2]["metrics"] |= {"information_cls": 0.0, "entropy_cls_marginal": marginal}
    assert f"({kind} collapse)" in findings(write_run(tmp_path / "run", rows))[0].fact


def test_a_site_that_cannot_reconstruct_is_named(tmp_path):
    rows = healthy_rows()
    rows[-2]["metrics"]["rec_ratio"] = 1.01
    found = findings(write_run(tmp_path / "run", rows))
    assert found[0].level == "bad"
    assert "no better than one grey" in found[0].fact


def test_late_missed_and_refused_rounds_are_counted_apart(tmp_path):
    rows = [
        *healthy_rows(("a",), rounds=4),
        site_row(0, "b"),
        refusal_row(1, "b", "late"),
        refusal_row(2, "b", "non-finite"),
    ]
    page = write_server_report(write_run(tmp_path / "run", rows, rounds=4)).read_text()
    row = re.search(r'<tr><th scope="row"><svg.*?</svg>b</th>(.*?)</tr>', page)[1]
    cells = re.findall(r"<td[^>]*>(.*?)</td>", row)
    assert cells[3:7] == ["1", "1", "1", "1 (non-finite 1)"]
    assert "an array holds NaN or infinity" in page


def test_a_round_without_quorum_is_not_counted_as_merged(tmp_path):
    rows = [*healthy_rows(rounds=1), site_row(1, "a"), merge_row(1, merged=False)]
    folder = write_run(tmp_path / "run", rows)
    assert read_run(folder).completed_rounds == 1
    assert any("without enough usable updates" in v.fact for v in findings(folder))


def test_the_page_is_replaced_in_one_move_and_leaves_nothing_beside_it(tmp_path):
    folder = write_run(tmp_path / "run", healthy_rows())
    write_server_report(folder)
    before = (folder / "report.html").stat().st_ino
    write_server_report(folder)
    assert (folder / "report.html").stat().st_ino != before
    names = {path.name for path in folder.iterdir()}
    assert names == {"metrics.jsonl", "checkpoints", "report.html"}
