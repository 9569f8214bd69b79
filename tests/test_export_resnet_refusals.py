"""Exports of ultrasound encoders: statistics, and what is refused."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from agssd_core.errors import CheckpointError, ConfigError, WeightsError
from agssd_core.evaluation.export import export_encoder
from agssd_core.evaluation.export_resnet import export_resnet
from tests.support.training import SMALL
from tests.support.us import us_config
from tests.support.us_exports import GROUP, exported, fresh, own_statistics, trained


def test_merged_statistics_are_the_moments_of_all_sites(tmp_path):
    pairs = [trained(share=True), trained(share=True)]
    with torch.no_grad():  # the second site's images are brighter
        pairs[1].teacher.maps(torch.rand(8, 1, 64, 64) * 0.2 + 0.8)
    weights = [pair.shared_weights() for pair in pairs]
    merged = {name: 0.25 * weights[0][name] + 0.75 * weights[1][name] for name in weights[0]}
    out = tmp_path / "x.safetensors"
    export_resnet(merged, pairs[0].shape, network="teacher", form="monai-resnet", out=out)
    with safe_open(out, framework="pt") as stream:
        assert stream.metadata()["statistics"] == "merged"
    tensors = load_file(out)
    norms = [pair.teacher.backbone.layer2[0].bn1 for pair in pairs]
    means = [norm.running_mean for norm in norms]
    mean = 0.25 * means[0] + 0.75 * means[1]
    spread = [n.running_var + (m - mean) ** 2 for n, m in zip(norms, means, strict=True)]
    variance = 0.25 * spread[0] + 0.75 * spread[1]
    torch.testing.assert_close(tensors["layer2.0.bn1.running_mean"], mean)
    torch.testing.assert_close(tensors["layer2.0.bn1.running_var"], variance, atol=1e-5, rtol=1e-3)
    assert (variance - 0.25 * norms[0].running_var - 0.75 * norms[1].running_var).max() > 1e-4


def test_a_sites_own_statistics_come_before_the_merged_ones(tmp_path):
    pair = trained(share=True)
    own = {n: np.full_like(a, 3) for n, a in own_statistics(pair).items()}
    tensors, metadata = exported(tmp_path, pair, "monai-resnet", statistics=own)
    assert metadata["statistics"] == "site"
    assert (tensors["layer4.1.bn2.running_var"] == 3).all()
    assert tensors["layer4.1.bn2.num_batches_tracked"].shape == ()
    tensors, metadata = exported(tmp_path, pair, "monai-resnet", statistics={})
    assert metadata["statistics"] == "merged"
    norm = pair.teacher.backbone.layer4[1].bn2
    torch.testing.assert_close(
        tensors["layer4.1.bn2.running_var"], norm.running_var, atol=1e-5, rtol=1e-3
    )


@pytest.mark.parametrize("form", ["torchvision-resnet", "monai-resnet", "fpn", "safetensors"])
def test_batchnorm_without_statistics_is_refused_with_both_remedies(tmp_path, form):
    pair = fresh(width=64)
    with pytest.raises(CheckpointError, match=r"share_statistics.*GroupNorm"):
        exported(tmp_path, pair, form, statistics={})
    assert list(tmp_path.iterdir()) == []


def test_groupnorm_needs_no_statistics(tmp_path):
    tensors, metadata = exported(tmp_path, trained(**GROUP), "monai-resnet", statistics={})
    assert metadata["statistics"] == "none"
    assert not [name for name in tensors if "running" in name]


def test_another_shape_or_an_absent_network_is_refused(tmp_path):
    pair, out = trained(**GROUP), tmp_path / "x.safetensors"
    deeper = fresh(34, **GROUP)
    for weights, shape in (
        (pair.shared_weights(), deeper.shape),
        (deeper.shared_weights(), pair.shape),
    ):
        with pytest.raises(WeightsError, match="configuration that is stored with the checkpoint"):
            export_resnet(weights, shape, network="teacher", form="monai-resnet", out=out)
    alone = pair.shared_weights(include_teacher=False)
    with pytest.raises(WeightsError, match=r"holds no teacher\. Export the other network"):
        export_resnet(alone, pair.shape, network="teacher", form="fpn", out=out)
    assert not out.exists()


def test_a_stem_that_torchvision_has_not_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"stem has 8 planes.*--format monai-resnet"):
        exported(tmp_path, trained(), "torchvision-resnet")
    assert list(tmp_path.iterdir()) == []


def test_a_file_says_where_it_comes_from(tmp_path):
    _, metadata = exported(tmp_path, trained(**GROUP), "monai-resnet")
    assert metadata["form"] == "monai-resnet"
    assert metadata["network"] == "teacher"
    assert len(metadata["weights_digest"]) == 64
    facts = json.loads(metadata["input"])
    assert facts["range"] == [0, 1]
    assert facts["grey"] == "repeated as 3 colours"


def test_a_form_of_the_other_cohort_is_refused_and_each_has_a_default(tmp_path):
    from agssd_core.config import parse_config
    from agssd_core.training.anaus_build import build_pair
    from agssd_core.training.build import build_model

    out = tmp_path / "x.safetensors"
    us = us_config(anaus={"backbone": GROUP})
    weights = build_pair(us.anaus, seed=0).shared_weights()
    with pytest.raises(ConfigError, match="--format torchvision-resnet or monai-resnet or fpn"):
        export_encoder(weights, us, network="teacher", form="monai-vit", out=out)
    assert not out.exists()
    assert export_encoder(weights, us, network="teacher", form=None, out=out) == "monai-resnet"
    ct = parse_config(SMALL)
    weights = build_model(ct.agssd, seed=0).shared_weights()
    with pytest.raises(ConfigError, match="--format monai-vit or monai-unetr or safetensors"):
        export_encoder(weights, ct, network="teacher", form="fpn", out=out)
    assert export_encoder(weights, ct, network="teacher", form=None, out=out) == "monai-vit"
