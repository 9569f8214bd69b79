"""The page of an ultrasound run, and of a run with both cohorts."""

import json
import re
import subprocess
import sys

import pytest

from agssd_core.config import dump_config, parse_config
from agssd_core.measures import measures_of
from server import anaus_verdicts
from server.report import write_server_report
from server.run_record import read_run, read_runs
from server.verdicts import headline, judge
from tests.test_report import healthy_rows, outline, write_run

HEALTHY_US = {
    "loss": 20.0,
    "loss_align": 19.0,
    "loss_context": 1.0,
    "effective_rank": 11.0,
    "effective_rank_share": 0.9,
    "same_anatomy_cosine": 0.8,
    "other_anatomy_cosine": 0.5,
    "anatomy_gap": 0.3,
    "projection_std": 0.7,
    "overlap": 0.6,
    "valid_share": 0.97,
    "anatomies_per_view": 5.2,
    "monitor_frames": 256.0,
    "collapsed": 0.0,
    "frames_per_s": 80.0,
}


def us_rows(sites=("e", "f"), rounds=2, **changes):
    rows = []
    for number in range(rounds):
        rows += [
            {
                "round": number,
                "cohort": "us",
                "site": site,
                "kind": "site",
                "metrics": HEALTHY_US | changes,
                "bytes_up": 3_000_000,
                "bytes_down": 3_000_000,
                "seconds": 10.0,
                "patient_count": 5,
                "volume_count": 9,
            }
            for site in sites
        ]
        rows.append({"round": number, "cohort": "us", "site": None, "kind": "merge", "metrics": {}})
    return rows


def write_us(folder, rows, *, rounds=2, **changes):
    write_run(folder, rows, rounds=rounds)
    given = {"preset": "tiny", "cohorts": ["us"], "federation": {"rounds": rounds}, **changes}
    config = dump_config(parse_config(given).for_cohort("us"))
    manifest = folder / "checkpoints" / f"round-{rounds:04d}" / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(content | {"config": config, "cohort": "us"}))
    return folder


def write_both(folder, *, us=None):
    write_run(folder / "ct-mr", healthy_rows())
    write_us(folder / "us", us or us_rows())
    return folder


def findings(tmp_path, rows, **changes):
    return judge(read_run(write_us(tmp_path / "run", rows, **changes)))


def test_an_ultrasound_run_has_its_own_words_measures_and_settings(tmp_path):
    page = write_server_report(write_us(tmp_path / "run", us_rows())).read_text()
    assert "<title>run: ANAUS run report</title>" in page
    assert "ANAUS, pre-training across sites, cohort us" in page
    assert "AG-SSD" not in page
    assert "The run is healthy" in page
    for heading in ("Lead of the same anatomy (cosine)", "Inter-view alignment (nat)"):
        assert f"<h3>{heading}</h3>" in page
    assert 'scope="col">Clips</th>' in page
    facts = dict(re.findall(r"<dt>([^<]*)</dt><dd>([^<]*)</dd>", page))
    assert facts["Depth of the ResNet"] == "18"
    assert facts["Norm"] == "group"
    assert facts["Scales, cells a side"] == "2 x 4 x 8 x 16"
    assert facts["Anatomy labels"] == "auto"


def test_both_cohorts_stand_on_one_page_that_is_whole(tmp_path):
    page = write_server_report(write_both(tmp_path / "both")).read_text()
    found = outline(page)
    assert found.headings[0] == 1
    assert all(b - a <= 1 for a, b in zip(found.headings, found.headings[1:], strict=False))
    assert all(target.startswith("#") for target in found.loads)
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert {target[1:] for target in found.loads} <= set(ids)
    assert set(re.findall(r'aria-labelledby="([^"]+)"', page)) <= set(ids)
    assert "<title>both: AG-SSD and ANAUS run report</title>" in page
    assert page.index("CT and MR: AG-SSD") < page.index("Ultrasound: ANAUS")
    assert "<script" not in page


def test_the_tiles_of_both_cohorts_add_up(tmp_path):
    rows = [row | {"site": "a"} if row["site"] == "e" else row for row in us_rows()]
    page = write_server_report(write_both(tmp_path / "both", us=rows)).read_text()
    tiles = {
        name: number for number, name in re.findall(r"<li><b>([^<]*)</b><span>([^<]*)</", page)
    }
    assert tiles["sites"] == "4"  # a, b, c and f: a is in both cohorts
    assert tiles["rounds merged, us"] == "2 / 2"
    assert tiles["sent by sites"] == "18 MB"  # 3 sites x 2 rounds x 1 MB, 2 x 2 x 3 MB


def test_one_cohort_s_trouble_is_the_run_s_headline_and_stays_its_own_verdict(tmp_path):
    rows = us_rows()
    rows[-2]["metrics"] = HEALTHY_US | {"anatomy_gap": 0.001, "collapsed": 1.0}
    folder = write_both(tmp_path / "both", us=rows)
    ct, us = read_runs(folder)
    assert (ct.name, ct.cohort, us.name, us.cohort) == ("both", "ct-mr", "both", "us")
    assert all(verdict.level == "good" for verdict in judge(ct))
    assert [verdict.level for verdict in judge(us)].count("bad") == 1
    page = write_server_report(folder).read_text()
    state = re.search(r'<p id="state" class="([^"]*)">([^<]*)', page)
    assert state[1] == "headline bad"
    assert state[2].endswith("Concerned: f.")
    assert re.search(r'<li class="good"><a href="#ct-mr-cohort">', page)
    assert re.search(r'<li class="bad"><a href="#us-cohort">', page)


def test_a_cohort_without_a_round_yet_says_so_beside_the_other(tmp_path):
    folder = write_both(tmp_path / "both")
    (folder / "us" / "metrics.jsonl").unlink()
    page = write_server_report(folder).read_text()
    assert "No round has been completed yet." in page
    assert "All 2 rounds closed and were merged." in page
    outline(page)


@pytest.mark.parametrize(
    ("changes", "words", "remedy"),
    [
        ({"anatomy_gap": 0.01}, "not told apart at e 0.01, f 0.01", "label maps"),
        ({"projection_std": 0.01}, "nearly one vector", "anaus.loss.align"),
        ({"effective_rank_share": 0.2}, "is under 25% of where it began", "learning_rate"),
        ({"collapsed": 1.0}, "failed a gate in the newest round", "log"),
    ],
)
def test_every_gate_of_the_ultrasound_monitor_has_its_words(tmp_path, changes, words, remedy):
    found = findings(tmp_path, us_rows(**changes))
    assert found[0].level == "bad"
    assert words in found[0].fact
    assert remedy in found[0].remedy
    assert found[0].sites == ("e", "f")
    assert headline(found).level == "bad"
    assert not any("No site has collapsed" in verdict.fact for verdict in found)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"valid_share": 0.3}, "overlap enough"), ({"anatomies_per_view": 0.5}, "little to align")],
)
def test_poor_views_deserve_a_look(tmp_path, changes, words):
    found = findings(tmp_path, us_rows(**changes))
    assert (found[0].level, found[0].sites) == ("watch", ("e", "f"))
    assert words in found[0].fact


def test_nothing_is_judged_before_the_window_of_frames_is_full(tmp_path):
    found = findings(tmp_path, us_rows(anatomy_gap=0.0, monitor_frames=96.0))
    assert any("has no verdict yet" in verdict.fact for verdict in found)
    assert not any(verdict.level == "bad" for verdict in found)


def test_frames_with_one_anatomy_each_are_no_collapse(tmp_path):
    """The monitor has nothing to compare then and passes the gate; so does the page."""
    found = findings(tmp_path, us_rows(anatomy_gap=0.0, other_anatomy_cosine=0.0))
    assert not any(verdict.level == "bad" for verdict in found)


def test_remedies_name_the_settings_of_the_cohort(tmp_path):
    rows = us_rows()
    rows.append(
        {"round": 1, "cohort": "us", "site": "e", "kind": "refusal", "metrics": {},
         "reason": "non-finite"}
    )  # fmt: skip
    found = [verdict for verdict in findings(tmp_path, rows) if "Refused" in verdict.fact]
    assert "anaus.optimiser.learning_rate" in found[0].remedy


def test_the_page_s_gates_are_the_monitor_s():
    from agssd_core.training import anaus_monitor

    gates = {m.metric: m.gate[1] for m in measures_of("us").monitor if m.gate}
    assert gates["projection_std"] == anaus_verdicts.SPREAD == anaus_monitor.LEAST_SPREAD
    assert gates["effective_rank_share"] == anaus_verdicts.RANK_SHARE
    assert anaus_verdicts.RANK_SHARE == anaus_monitor.LEAST_RANK_SHARE
    assert gates["anatomy_gap"] == parse_config({}).monitor.gate_gap


def test_the_page_is_made_without_torch():
    code = "import sys, server.report; sys.exit('torch' in sys.modules or 'monai' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
