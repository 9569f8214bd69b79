"""A site takes out the encoder that it holds, or one that was delivered."""

import shutil

import pytest
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from agssd_core.config import parse_config
from agssd_core.console import progress_bar, say
from client.cli import app
from simulation.run import run_simulation
from tests.test_simulation import SMALL

pytestmark = pytest.mark.federation


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two phantom sites, two rounds."""

    content = yaml.safe_load(SMALL) | {"output": str(tmp_path_factory.mktemp("runs"))}
    return run_simulation(parse_config(content), say=say, bar=progress_bar).parent


def _export(place, out, *more):
    return CliRunner().invoke(app, ["export", str(place), "--out", str(out), *more])


def test_a_site_exports_its_own_newest_round(finished, tmp_path):
    out = tmp_path / "own.safetensors"
    done = _export(finished / "sites" / "a" / "site", out)
    assert done.exit_code == 0, done.output
    assert "teacher of round 1 as monai-vit" in done.output
    assert "cls_token" in load_file(out)


def test_a_delivered_checkpoint_is_checked_before_it_is_used(finished, tmp_path):
    checkpoint = finished / "checkpoints" / "round-0002"
    out = tmp_path / "merged.safetensors"
    assert _export(checkpoint, out, "--format", "safetensors").exit_code == 0
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    content = bytearray((copy / "weights.safetensors").read_bytes())
    content[-5] ^= 1
    (copy / "weights.safetensors").write_bytes(content)
    damaged = _export(copy, tmp_path / "none.safetensors")
    assert damaged.exit_code == 2
    assert "damaged" in damaged.output
    assert not (tmp_path / "none.safetensors").exists()


def test_a_folder_without_a_round_gets_a_remedy(tmp_path):
    empty = _export(tmp_path, tmp_path / "none.safetensors")
    assert empty.exit_code == 2
    assert "agssd-site run" in empty.output
