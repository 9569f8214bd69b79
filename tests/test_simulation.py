"""One federation on one machine: the main job, run again, resumed, refused, exported."""

import json

import pytest
import torch
import yaml
from monai.networks.nets import ViT
from safetensors.torch import load_file
from typer.testing import CliRunner

from agssd_core.config import load_config, parse_config
from agssd_core.console import progress_bar, say
from agssd_core.errors import CheckpointError, ConfigError
from server.store import RunStore
from simulation.cli import app
from simulation.run import run_simulation
from tests.support.sites import make_raw_site

SMALL = """
name: small
preset: tiny
data: {spacing_mm: [6, 6, 6], foreground_margin: 2}
agssd:
  cvac: {global_size: [16, 16, 16], local_size: [8, 8, 8], n_local: 1}
  model: {width: 24, depth: 1, heads: 2}
  head: {prototypes: 32, hidden: 32, bottleneck: 16}
training: {batch_size: 2}
federation: {rounds: 2, steps_per_round: 2, min_sites: 2, poll_s: 0.01}
simulation:
  workers: 1
  phantoms:
    - {name: a, format: dicom, patients: 2, size: [32, 32, 24], spacing_mm: [8, 8, 9]}
    - {name: b, modalities: [MR], patients: 2, size: [30, 30, 26], spacing_mm: [8, 8, 8]}
"""


@pytest.fixture
def command(tmp_path):
    """Run ``agssd-sim VERB small.yaml output=...`` and return its result."""
    file = tmp_path / "small.yaml"
    file.write_text(SMALL)

    def run(verb, *more, expect=0):
        result = CliRunner().invoke(app, [verb, str(file), f"output={tmp_path}", *more])
        assert result.exit_code == expect, (result.output, result.exception)
        return result.output

    run.file, run.folder = file, tmp_path / "small"
    return run


@pytest.mark.federation
def test_the_main_job_ends_with_checkpoints_metrics_and_a_report(command):
    said = command("run")
    assert "round 2/2: merged, 2 site(s)" in said
    store = RunStore(command.folder)
    assert store.rounds() == [0, 1, 2]
    assert store.load(2).manifest.sites == ("a", "b")
    rows = [json.loads(x) for x in (command.folder / "metrics.jsonl").read_text().splitlines()]
    assert {row["site"] for row in rows if row["kind"] == "site"} == {"a", "b"}
    page = (command.folder / "report.html").read_text()
    assert page.count("data:image/png;base64,") >= 8
    assert "Phantom^" not in page
    before = store.load(2).manifest.weights_digest
    assert "going on with the run" in command("run")
    assert store.load(2).manifest.weights_digest == before


@pytest.mark.federation
def test_a_run_in_which_no_round_merged_does_not_pass_for_a_success(command):
    said = command("run", "federation.max_update_norm=1e-9", expect=2)
    assert "none of 2 round(s) reached its quorum" in said
    store = RunStore(command.folder)
    assert store.load(2).manifest.weights_digest == store.load(0).manifest.weights_digest


@pytest.mark.federation
def test_two_runs_with_one_seed_end_with_the_same_digest(tmp_path):
    digests = set()
    for place in ("one", "two"):
        file = tmp_path / f"{place}.yaml"
        file.write_text(SMALL)
        config = load_config(file, [f"output={tmp_path / place}"])
        folder = run_simulation(config, say=say, bar=progress_bar).parent
        store = RunStore(folder)
        assert store.load(2).manifest.sites == ("a", "b")
        digests.add(store.load(2).manifest.weights_digest)
    assert len(digests) == 1
    assert digests.isdisjoint({store.load(0).manifest.weights_digest})


@pytest.mark.federation
def test_another_seed_or_folder_under_the_same_name_is_refused(command):
    command("run", "federation.rounds=1")
    config = load_config(command.file, [f"output={command.folder.parent}", "seed=1"])
    with pytest.raises(CheckpointError, match="start under another name"):
        run_simulation(config, say=say, bar=progress_bar)


@pytest.mark.federation
def test_init_then_export_to_monai(command, tmp_path):
    assert "round 0 written" in command("init")
    assert "nothing changed" in command("init")
    out = tmp_path / "vit.safetensors"
    result = CliRunner().invoke(app, ["export", str(command.folder), "--out", str(out)])
    assert result.exit_code == 0, result.output
    vit = ViT(
        in_channels=1, img_size=16, patch_size=8, hidden_size=24, mlp_dim=96, num_layers=1,
        num_heads=2, qkv_bias=True, classification=True,
    )  # fmt: skip
    vit.load_state_dict(load_file(out), strict=True)
    assert torch.isfinite(vit(torch.zeros(1, 1, 16, 16, 16))[0]).all()


def _folders(tmp_path, *, shared):
    raw = make_raw_site(tmp_path / "raw", "CT", patients=2)
    patients = sorted(path for path in raw.iterdir() if path.is_dir())
    other = patients if shared else patients[1:]
    return {"sites": {"a": [str(patients[0])], "b": [str(path) for path in other]}}


def _config(tmp_path, data, **simulation):
    content = yaml.safe_load(SMALL)
    content["data"] |= data
    content["simulation"] = {"workers": 1, **simulation}
    content["output"] = str(tmp_path)
    return parse_config(content)


@pytest.mark.federation
def test_a_patient_at_two_sites_is_refused_unless_asked_for(tmp_path):
    data = _folders(tmp_path, shared=True)
    with pytest.raises(ConfigError, match=r"simulation\.allow_shared_patients=true"):
        run_simulation(_config(tmp_path, data), say=say, bar=progress_bar)
    allowed = _config(tmp_path / "allowed", data, allow_shared_patients=True)
    assert run_simulation(allowed, say=say, bar=progress_bar).is_file()


@pytest.mark.federation
def test_folders_instead_of_phantoms_and_a_change_of_them_is_refused(tmp_path):
    data = _folders(tmp_path, shared=False)
    assert run_simulation(_config(tmp_path, data), say=say, bar=progress_bar).is_file()
    data["sites"]["b"] = data["sites"]["a"]
    with pytest.raises(ConfigError, match="another name"):
        run_simulation(_config(tmp_path, data), say=say, bar=progress_bar)


def test_check_reports_every_fault_and_exits_with_2(command):
    said = CliRunner().invoke(app, ["check", str(command.file), "threads=0", "seed=-1"])
    assert said.exit_code == 2
    assert "threads = 0" in said.output
    assert "seed = -1" in said.output
    assert "valid" in CliRunner().invoke(app, ["check", str(command.file)]).output


@pytest.mark.parametrize("verb", ["run", "check", "init", "export", "report"])
def test_every_verb_has_help_with_an_example(verb):
    said = CliRunner().invoke(app, [verb, "--help"])
    assert said.exit_code == 0
    assert f"Example: agssd-sim {verb}" in said.output


def test_an_empty_folder_is_refused_and_leaves_nothing_half_written(command, tmp_path):
    (tmp_path / "empty").mkdir()
    sites = f"data.sites={{a: {tmp_path / 'empty'}, b: {tmp_path / 'none'}}}"
    said = command("run", sites, "simulation.phantoms=[]", expect=2)
    assert "agssd" in said or "scan" in said
    assert not list(command.folder.rglob("*.tmp"))
