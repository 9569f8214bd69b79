"""Both export verbs where there are two cohorts, and a site's own BatchNorm statistics."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from typer.testing import CliRunner

from agssd_core.config import dump_config, parse_config
from agssd_core.training.anaus_build import build_pair
from agssd_core.training.build import build_model
from client.cli import app as site_app
from client.site import Site, SiteFacts
from server.manifest import RoundRecord
from server.store import RunStore
from simulation.cli import app as sim_app
from tests.support.orders import order_for
from tests.support.training import merged
from tests.support.us import SMALL_US, MemoryFrames, us_trainer

GROUP = {"backbone": {"norm": "group"}}
COHORTS = ("ct-mr", "us")


class FrameBench:
    def __init__(self):
        self.trainers = []

    def facts(self, _folder, _cohort):
        return SiteFacts(3, 6)

    def trainer(self, _folder, config, *, site):
        changes = {"anaus": config.anaus.model_dump(exclude={"federation"})}
        self.trainers.append(us_trainer(MemoryFrames(), site=site, **changes))
        return self.trainers[-1]


def _us(**anaus):
    plan = {"rounds": 5, "steps_per_round": 2}
    return parse_config(merged(SMALL_US, {"anaus": anaus, "federation": plan}))


def _trained_site(folder, run, **anaus):
    """A site after one round of ``us``; returns its trainer."""
    config = _us(**anaus).for_cohort("us")
    bench = FrameBench()
    weights = build_pair(config.anaus, seed=0).shared_weights()
    order = order_for(weights, config=config, cohort="us", run=run)
    Site(folder, "north", bench).train_round(order, weights)
    return bench.trainers[-1]


def _two_cohorts(folder, *, names=COHORTS, **anaus):
    """A run's folder with the checkpoints of round 0, as ``run_cohorts`` lays them out."""
    config = _us(**anaus)
    for name in names:
        own = config.for_cohort(name)
        weights = (
            build_pair(own.anaus, seed=0).shared_weights()
            if name == "us"
            else build_model(own.agssd, seed=0).shared_weights()
        )
        store = RunStore(folder / name if len(names) > 1 else folder)
        store.save_round(RoundRecord("run-1", 0, name, dump_config(own)), weights)
    return folder


def _run(app, *words):
    done = CliRunner().invoke(app, ["export", *(str(word) for word in words)])
    return done.exit_code, " ".join(done.output.split())


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    return folder, _trained_site(folder, "first")


def test_a_site_exports_its_encoder_with_its_own_statistics(site, tmp_path):
    folder, trainer = site
    out = tmp_path / "own.safetensors"
    code, said = _run(site_app, folder, "--out", out, "--network", "student")
    assert code == 0, said
    assert "student of round 0 as monai-resnet" in said
    norm = trainer.learner.pair.student.backbone.layer1[0].bn1
    tensors = load_file(out)
    assert torch.equal(tensors["layer1.0.bn1.running_mean"], norm.running_mean)
    assert torch.equal(tensors["layer1.0.bn1.running_var"], norm.running_var)
    assert tensors["layer1.0.bn1.num_batches_tracked"] == norm.num_batches_tracked > 0
    with safe_open(out, framework="pt") as stream:
        assert stream.metadata()["statistics"] == "site"


def test_a_damaged_state_exports_nothing(tmp_path):
    _trained_site(tmp_path, "first")
    (file,) = tmp_path.glob("federation/first/round-0000/state/state-*.safetensors")
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    file.write_bytes(content)
    code, said = _run(site_app, tmp_path, "--out", tmp_path / "x.safetensors")
    assert code == 2
    assert "training state is damaged" in said
    assert not (tmp_path / "x.safetensors").exists()


def test_a_site_of_several_runs_is_asked_which(tmp_path):
    _trained_site(tmp_path, "first", **GROUP)
    _trained_site(tmp_path, "second", **GROUP)
    out = tmp_path / "x.safetensors"
    code, said = _run(site_app, tmp_path, "--out", out, "--cohort", "us")
    assert code == 2
    assert "first of cohort us, second of cohort us. Name one with --run" in said
    code, said = _run(site_app, tmp_path, "--out", out, "--cohort", "ct-mr", "--run", "first")
    assert code == 2
    assert "no such run of cohort ct-mr" in said
    assert not out.exists()
    assert _run(site_app, tmp_path, "--out", out, "--cohort", "us", "--run", "second")[0] == 0


def test_a_run_of_two_cohorts_is_asked_which(tmp_path):
    run, out = _two_cohorts(tmp_path / "run", **GROUP), tmp_path / "x.safetensors"
    code, said = _run(sim_app, run, "--out", out)
    assert code == 2
    assert "the run has 2 cohorts (ct-mr, us). Name one with --cohort" in said
    assert not out.exists()
    forms = {"ct-mr": "monai-vit", "us": "monai-resnet"}
    for cohort, form in forms.items():
        code, said = _run(sim_app, run, "--out", out, "--cohort", cohort)
        assert code == 0, said
        assert f"teacher of round 0 as {form}" in said
    assert "layer4.1.conv2.weight" in load_file(out)
    code, said = _run(sim_app, run / "us", "--out", out, "--format", "fpn")
    assert code == 0, said
    assert "fpn.layer_blocks.3.weight" in load_file(out)


def test_a_run_of_one_cohort_need_not_be_asked(tmp_path):
    run, out = _two_cohorts(tmp_path / "run", names=("us",), **GROUP), tmp_path / "x.safetensors"
    assert _run(sim_app, run, "--out", out)[0] == 0
    code, said = _run(sim_app, run, "--out", out, "--cohort", "ct-mr")
    assert code == 2
    assert "the run has no cohort ct-mr, only us" in said
    code, said = _run(site_app, run / "checkpoints" / "round-0000", "--out", out)
    assert code == 0, said
    code, said = _run(
        site_app, run / "checkpoints" / "round-0000", "--out", out, "--cohort", "ct-mr"
    )
    assert code == 2
    assert "the checkpoint is of cohort us, not ct-mr" in said


def test_merged_batchnorm_is_exported_with_shared_statistics_or_not_at_all(tmp_path):
    out = tmp_path / "x.safetensors"
    code, said = _run(sim_app, _two_cohorts(tmp_path / "a", names=("us",)), "--out", out)
    assert code == 2
    assert "anaus.share_statistics" in said
    assert "GroupNorm" in said
    assert not out.exists()
    shared = _two_cohorts(tmp_path / "b", names=("us",), share_statistics=True)
    code, said = _run(sim_app, shared, "--out", out)
    assert code == 0, said
    assert "bn1.running_var" in load_file(out)
