"""Ultrasound in the simulation: sites made, delineated and federated, alone and beside CT."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from agssd_core.config import parse_config
from agssd_core.console import progress_bar
from agssd_core.data.catalogue import open_catalogue
from agssd_core.data.frames import SiteFrames
from agssd_core.errors import CacheError, ConfigError
from simulation.cli import app
from simulation.phantoms import make_us_clip
from simulation.sites import build_sites
from simulation.table import run_table

US_SITE = {"modalities": ["US"], "format": "png", "patients": 2, "clips": 1}
CT_SITE = {"patients": 2, "size": [32, 32, 24], "spacing_mm": [8, 8, 9]}
SMALL = {
    "name": "small",
    "preset": "tiny",
    "cohorts": ["us"],
    "data": {"spacing_mm": [6, 6, 6], "foreground_margin": 2, "frames": {"max_side": 96}},
    "agssd": {
        "cvac": {"global_size": [16, 16, 16], "local_size": [8, 8, 8], "n_local": 1},
        "model": {"width": 24, "depth": 1, "heads": 2},
        "head": {"prototypes": 32, "hidden": 32, "bottleneck": 16},
    },
    "anaus": {
        "backbone": {"width": 8},
        "head": {"hidden_projector": 32, "projection": 16, "hidden_predictor": 32, "fpn": 16},
        "batch_size": 2,
    },
    "training": {"batch_size": 2},
    "federation": {"rounds": 2, "steps_per_round": 2, "min_sites": 1, "poll_s": 0.01},
    "simulation": {"workers": 1, "phantoms": [{"name": "fan", **US_SITE}]},
}


def settings(tmp_path, phantoms=None, **changes):
    plain = {**SMALL, "output": str(tmp_path), **changes}
    if phantoms is not None:
        plain["simulation"] = {**plain["simulation"], "phantoms": phantoms}
    return parse_config(plain)


def build(config, tmp_path):
    lines = []
    return build_sites(config, tmp_path / "sites", say=lines.append, bar=progress_bar), lines


def test_an_ultrasound_site_is_prepared_and_delineated_and_one_line_says_by_whom(tmp_path):
    sites, lines = build(settings(tmp_path), tmp_path)
    assert lines == [
        "fan: 2 clip(s) of 2 patient(s) ready; anatomies by superpixels (the fall-back without "
        "an anatomy model)"
    ]
    frames = SiteFrames.open(sites["fan"], settings(tmp_path).data)
    assert frames.label_source == "superpixels"
    assert np.unique(frames.read_labels(0)).size > 4


def test_labels_from_disk_are_the_phantoms_own(tmp_path):
    anaus = {**SMALL["anaus"], "labels": "disk"}
    config = settings(tmp_path, anaus=anaus)
    sites, lines = build(config, tmp_path)
    assert lines[0].endswith("anatomies by maps from disk")
    frames = SiteFrames.open(sites["fan"], config.data, labels="disk")
    drawn = {
        frozenset(np.unique(make_us_clip(config.simulation.phantoms[0], n, 0, seed=0).labels))
        for n in range(2)
    }
    read = {frozenset(np.unique(frames.read_labels(n))) for n in range(2)}
    assert read == drawn


@pytest.mark.parametrize(
    ("changes", "remedy"),
    [
        ({"anaus": {"labels": "lpsam"}}, "anaus.labels = superpixels"),
        ({"simulation": {"lpsam": "/nowhere/lpsam.safetensors"}}, "leave it out for superpixels"),
        (
            {"anaus": {"labels": "disk"}, "data": {"sites": {"a": "/scans"}}},
            "agssd-site delineate --labels",
        ),
    ],
)
def test_label_maps_that_nobody_can_draw_are_refused_before_any_work(tmp_path, changes, remedy):
    with pytest.raises(ConfigError, match=remedy) as refused:
        build(settings(tmp_path, **changes), tmp_path)
    assert "/nowhere" not in str(refused.value)
    assert not (tmp_path / "sites").exists()


@pytest.mark.parametrize(
    ("cohorts", "sites", "words"),
    [
        (["ct-mr", "us"], [{"name": "fan", **US_SITE}], "cohort ct-mr: 0 site"),
        (["us"], [{"name": "ct", **CT_SITE}], "cohort us: 0 site"),
    ],
)
def test_a_cohort_without_a_site_is_refused_with_a_remedy(tmp_path, cohorts, sites, words):
    with pytest.raises(ConfigError, match=f"{words}.*leave it out of cohorts"):
        build(settings(tmp_path, sites, cohorts=cohorts), tmp_path)


def test_a_cohort_with_fewer_sites_than_its_rounds_need_is_refused(tmp_path):
    plan = {"rounds": 2, "min_sites": 2}
    anaus = {**SMALL["anaus"], "federation": plan}
    sites = [{"name": "fan", **US_SITE}, {"name": "ct", **CT_SITE}]
    with pytest.raises(ConfigError, match=r"cohort us: 1 site\(s\) have ultrasound, at least 2"):
        build(settings(tmp_path, sites, cohorts=["ct-mr", "us"], anaus=anaus), tmp_path)


def test_a_site_without_a_scan_for_the_run_takes_no_part(tmp_path):
    sites, lines = build(
        settings(tmp_path, [{"name": "fan", **US_SITE}, {"name": "ct", **CT_SITE}]), tmp_path
    )
    assert list(sites) == ["fan"]
    assert lines[0] == "ct: takes no part, it has no scan for cohort us"


def test_a_clip_s_patient_at_two_sites_is_refused(tmp_path):
    build(settings(tmp_path), tmp_path / "one")
    raw = tmp_path / "one" / "sites" / "fan" / "raw"
    both = {"sites": {"a": [str(raw)], "b": [str(raw)]}}
    config = settings(tmp_path, data={**SMALL["data"], **both})
    with pytest.raises(ConfigError, match=r"2 at both a and b.*allow_shared_patients=true"):
        build(config, tmp_path / "two")


def test_a_prepared_site_is_taken_as_it_is_or_refused(tmp_path):
    sites, _ = build(settings(tmp_path), tmp_path / "one")
    prepared = {"sites": {"mine": [str(sites["fan"])]}}
    config = settings(tmp_path, data={**SMALL["data"], **prepared})
    assert build(config, tmp_path / "two")[0] == {"mine": sites["fan"]}
    part = {"sites": [{"name": "mine", "paths": [str(sites["fan"])], "modalities": ["CT"]}]}
    with pytest.raises(ConfigError, match="taken whole"):
        build(settings(tmp_path, data={**SMALL["data"], **part}), tmp_path / "three")
    other = {**SMALL["data"], "frames": {"max_side": 128}, **prepared}
    with pytest.raises(CacheError, match="agssd-site prepare"):
        build(settings(tmp_path, data=other), tmp_path / "four")


@pytest.mark.federation
def test_both_cohorts_run_side_by_side_and_stand_on_one_page(tmp_path):
    sites = [
        {"name": "both", **CT_SITE, "modalities": ["CT", "US"], "format": "dicom", "clips": 1,
         "frames": 2},
        {"name": "fan", **US_SITE},
    ]  # fmt: skip
    plain = settings(tmp_path, sites, cohorts=["ct-mr", "us"])
    file = tmp_path / "small.yaml"
    file.write_text(plain.model_dump_json())
    said = CliRunner().invoke(app, ["run", str(file)])
    assert said.exit_code == 0, (said.output, said.exception)
    run = tmp_path / "small"
    taken = {}
    for cohort in ("ct-mr", "us"):
        rows = [json.loads(x) for x in (run / cohort / "metrics.jsonl").read_text().splitlines()]
        taken[cohort] = {row["site"] for row in rows if row["kind"] == "site"}
    assert taken == {"ct-mr": {"both"}, "us": {"both", "fan"}}
    assert open_catalogue(run / "sites" / "both" / "site").cohorts == ("ct-mr", "us")
    page = (run / "report.html").read_text()
    assert "CT and MR: AG-SSD" in page
    assert "Ultrasound: ANAUS" in page
    assert "labels by superpixels" in page
    assert "No pictures:" not in page  # fan has none for CT and MR, and nobody misses them
    assert "Phantom^" not in page
    names = {path.parent.name for path in (run / "pictures").rglob("*.png")}
    assert names == {"ct-mr", "us"}
    pictures = {path.name for path in (run / "pictures" / "us").glob("fan-*.png")}
    assert {f"fan-{n}-{what}.png" for n in (1, 2) for what in ("pair", "overlap")} < pictures

    table = run_table([run])
    assert table.index("masked L1") < table.index("alignment (nat)")
    assert "| small | 0 | fan | 2 |" in table
    assert "nan" not in table
    assert "small, cohort us: 2 rounds, weights digest" in table
