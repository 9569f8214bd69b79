"""Real CT and MR at three sites: a short form of configs/sts-three-sites.yaml."""

import json
import math
from pathlib import Path

import pytest

from agssd_core.config import load_config
from agssd_core.console import progress_bar, say
from agssd_core.errors import ConfigError
from simulation.run import run_simulation

pytestmark = [pytest.mark.realdata, pytest.mark.federation]
CONFIG = Path(__file__).parent.parent / "configs" / "sts-three-sites.yaml"


def _sites(rows, number):
    found = [row for row in rows if row["kind"] == "site" and row["round"] == number]
    return {row["site"]: row["metrics"] for row in found}


def test_three_real_sites_learn_and_do_not_collapse(real_data, monkeypatch, tmp_path):
    monkeypatch.setenv("AGSSD_REAL_DATA", str(real_data))
    short = ["federation.rounds=3", "federation.steps_per_round=16"]
    config = load_config(CONFIG, [f"output={tmp_path}", *short])
    report = run_simulation(config, say=say, bar=progress_bar)
    rows = [json.loads(x) for x in (report.parent / "metrics.jsonl").read_text().splitlines()]
    first, last = _sites(rows, 0), _sites(rows, 2)
    assert set(last) == {"ct", "mr-ge", "mr-philips-siemens"}
    for site, metrics in last.items():
        assert all(math.isfinite(value) for value in metrics.values())
        assert metrics["monitor_volumes"] >= config.monitor.window
        for head in ("cls", "patch"):
            assert metrics[f"information_{head}"] > config.monitor.gate_nat
        assert metrics["rec_ratio"] < 0.9 * first[site]["rec_ratio"]
    page = report.read_text()
    assert "STS_" not in page
    assert "STS_" not in (report.parent / "metrics.jsonl").read_text()


def test_a_patient_with_dicom_here_and_nifti_there_is_refused(real_data, monkeypatch, tmp_path):
    monkeypatch.setenv("AGSSD_REAL_DATA", str(real_data))
    sites = f"{{a: {real_data}/dicom/sts/STS_019/CT, b: {real_data}/3d/sts/STS_019}}"
    config = load_config(CONFIG, [f"output={tmp_path}", f"data.sites={sites}"])
    with pytest.raises(ConfigError, match="1 at both a and b"):
        run_simulation(config, say=say, bar=progress_bar)
