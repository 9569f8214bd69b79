"""Ultrasound encoders load into MONAI's and torchvision's networks and give the same maps."""

import json
from math import prod

import numpy as np
import pytest
import torch
from monai.networks.nets import ResNet
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

from agssd_core.errors import CheckpointError, ConfigError, WeightsError
from agssd_core.evaluation.export import export_encoder
from agssd_core.evaluation.export_resnet import export_resnet
from agssd_core.models.anaus import AnausPair, AnausShape
from agssd_core.models.fpn import FeaturePyramid
from agssd_core.models.resnet2d import ResNetBackbone, ResnetShape, monai_arguments
from tests.support.models import randomised
from tests.support.torchvision_resnet_names import BUFFERS, PARAMETERS, TENSORS, state_shapes
from tests.support.training import SMALL
from tests.support.us import us_config

GROUP = {"norm": "group", "groups": 4}


def fresh(depth=18, *, width=8, share=False, **backbone):
    torch.manual_seed(0)
    kind = ResnetShape(depth=depth, width=width, **backbone)
    heads = {"fpn": 12, "hidden_projector": 8, "projection": 4, "hidden_predictor": 8}
    return AnausPair(AnausShape(kind, share_statistics=share, **heads)).train()


def trained(depth=18, **shape):
    """A pair whose networks differ everywhere and have seen a few batches."""
    pair = fresh(depth, **shape)
    for number, network in enumerate((pair.student, pair.teacher)):
        randomised(network.pyramid, number)
        with torch.no_grad():
            for parameter in network.backbone.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
            for _ in range(3):
                network.maps(torch.rand(4, 1, 64, 64))
    return pair


def same(found, expected):
    """Equal up to the order of float32 sums; random weights make values of any size."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert expected.std() > 0


def own_statistics(pair):
    """As a site's training state holds them."""
    return {n: np.atleast_1d(b.numpy().copy()) for n, b in pair.norm_buffers().items()}


def exported(tmp_path, pair, form, *, network="teacher", statistics=None):
    out = tmp_path / f"{form}.safetensors"
    if statistics is None:
        statistics = own_statistics(pair)
    export_resnet(
        pair.shared_weights(),
        pair.shape,
        network=network,
        form=form,
        out=out,
        statistics=statistics,
    )
    with safe_open(out, framework="pt") as stream:
        return load_file(out), stream.metadata()


def seen(metadata, frames):
    """Grey frames as the file says that the encoder wants them."""
    facts = json.loads(metadata["input"])
    mean, std = (torch.tensor(facts[name])[:, None, None] for name in ("mean", "std"))
    return (frames - mean) / std


def monai_resnet(metadata):
    """MONAI's network, built as the module's text says."""
    network = ResNet(**json.loads(metadata["monai.networks.nets.ResNet"]))
    groups = json.loads(metadata["norm"])["groups"]
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if groups and isinstance(child, nn.BatchNorm2d):
                setattr(parent, name, nn.GroupNorm(groups, child.num_features))
    return network.eval()


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_the_list_of_torchvisions_names_is_right(depth):
    names = state_shapes(depth)
    assert len(names) == TENSORS[depth]
    learnt = [shape for name, shape in names.items() if not name.endswith(BUFFERS)]
    assert sum(prod(shape) for shape in learnt) == PARAMETERS[depth]
    arguments = monai_arguments(ResnetShape(depth=depth))
    with torch.device("meta"):
        monai = ResNet(**{**arguments, "feed_forward": True, "num_classes": 1000})
    found = {name: tuple(tensor.shape) for name, tensor in monai.state_dict().items()}
    assert found == names


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_the_backbone_has_torchvisions_names_and_shapes(depth):
    with torch.device("meta"):
        backbone = ResNetBackbone(ResnetShape(depth=depth))
    found = {name: tuple(tensor.shape) for name, tensor in backbone.state_dict().items()}
    expected = state_shapes(depth)
    assert found == {n: s for n, s in expected.items() if not n.startswith("fc.")}
    maps = backbone(torch.empty(1, 3, 64, 64, device="meta"))
    assert [tuple(each.shape[2:]) for each in maps] == [(16, 16), (8, 8), (4, 4), (2, 2)]


@pytest.mark.parametrize("backbone", [{}, GROUP], ids=["batch", "group"])
def test_the_torchvision_form_is_whole_and_gives_the_same_features(tmp_path, backbone):
    pair = trained(18, width=64, **backbone)
    tensors, metadata = exported(tmp_path, pair, "torchvision-resnet")
    expected = state_shapes(18, statistics=not backbone)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    assert all(
        tensor.dtype == (torch.int64 if name.endswith("tracked") else torch.float32)
        for name, tensor in tensors.items()
    )
    facts = json.loads(metadata["torchvision.models"])
    assert facts == {"name": "resnet18", "groups": 4 if backbone else 0}
    assert metadata["untrained"] == "fc"
    # MONAI's network with a classifier has torchvision's names and, as here, its arithmetic.
    arguments = monai_arguments(pair.shape.backbone)
    arguments |= {"feed_forward": True, "num_classes": 1000}
    network = monai_resnet(metadata | {"monai.networks.nets.ResNet": json.dumps(arguments)})
    network.load_state_dict(tensors, strict=True)
    frames = torch.rand(2, 1, 64, 64)
    assert torch.equal(network(seen(metadata, frames)), torch.zeros(2, 1000))
    network.fc = nn.Identity()
    pair.eval()
    features = pair.teacher.maps(frames)[-1].mean(dim=(2, 3))
    same(network(seen(metadata, frames)), features)


@pytest.mark.parametrize("network", ["teacher", "student"])
@pytest.mark.parametrize("depth", [18, 50])
@pytest.mark.parametrize("backbone", [{}, GROUP], ids=["batch", "group"])
def test_a_plain_monai_resnet_gives_the_same_features(tmp_path, network, depth, backbone):
    pair = trained(depth, **backbone)
    tensors, metadata = exported(tmp_path, pair, "monai-resnet", network=network)
    monai = monai_resnet(metadata)
    monai.load_state_dict(tensors, strict=True)
    frames = torch.rand(2, 1, 64, 64)
    expected = getattr(pair.eval(), network).maps(frames)[-1].mean(dim=(2, 3))
    found = monai(seen(metadata, frames))
    same(found, expected)


def pyramid_of(tensors, maps):
    """Torchvision's feature pyramid, written out, under its names."""

    def conv(name, x, **more):
        weight, bias = (tensors[f"fpn.{name}.{part}"] for part in ("weight", "bias"))
        return functional.conv2d(x, weight, bias, **more)

    top = conv("inner_blocks.3", maps[3])
    found = [conv("layer_blocks.3", top, padding=1)]
    for level in (2, 1, 0):
        lateral = conv(f"inner_blocks.{level}", maps[level])
        top = lateral + functional.interpolate(top, size=lateral.shape[-2:], mode="nearest")
        found.insert(0, conv(f"layer_blocks.{level}", top, padding=1))
    return found


@pytest.mark.parametrize("depth", [18, 50])
def test_the_fpn_form_gives_our_pyramid_and_what_pooling_sees_of_it(tmp_path, depth):
    pair = trained(depth)
    tensors, metadata = exported(tmp_path, pair, "fpn")
    facts = json.loads(metadata["torchvision.models.detection"])
    channels = pair.shape.backbone.channels
    assert facts == {
        "name": f"resnet{depth}",
        "groups": 0,
        "in_channels_list": list(channels),
        "out_channels": 12,
    }
    body = {n.removeprefix("body."): t for n, t in tensors.items() if n.startswith("body.")}
    assert body.keys() == state_shapes(depth).keys() - {"fc.weight", "fc.bias"}
    backbone = ResNetBackbone(pair.shape.backbone).eval()
    backbone.load_state_dict(body, strict=True)
    frames = torch.rand(2, 1, 64, 64)
    maps = backbone(seen(metadata, frames))
    dense = pyramid_of(tensors, maps)
    teacher = pair.teacher.eval()
    ours = teacher.maps(frames)
    for found, expected in zip(dense, teacher.pyramid(ours)[:3], strict=False):
        same(found, expected)
    same(dense[3], teacher.pyramid.lateral[3](ours[3]))
    for level in range(3):
        side = dense[level].shape[-1]
        masks = (torch.rand(2, 5, side * side) < 0.3).float()
        masks = masks / masks.sum(dim=2, keepdim=True).clamp_min(1)
        under = masks @ dense[level].flatten(2).transpose(1, 2)
        same(under, teacher.pooled(ours, masks, level))
    blocks = {n: t.shape for n, t in tensors.items() if n.startswith("fpn.")}
    assert len(blocks) == 16


@pytest.mark.parametrize("backbone", [{}, GROUP], ids=["batch", "group"])
def test_our_own_form_rebuilds_backbone_and_pyramid(tmp_path, backbone):
    pair = trained(**backbone)
    tensors, metadata = exported(tmp_path, pair, "safetensors")
    shape = ResnetShape(**json.loads(metadata["agssd_core.models.resnet2d.ResnetShape"]))
    ours = ResNetBackbone(shape).eval()
    pyramid = FeaturePyramid(**json.loads(metadata["agssd_core.models.fpn.FeaturePyramid"]))
    for name, module in (("backbone.", ours), ("pyramid.", pyramid)):
        part = {n.removeprefix(name): t for n, t in tensors.items() if n.startswith(name)}
        module.load_state_dict(part, strict=True)
    frames = torch.rand(2, 1, 64, 64)
    expected = pair.teacher.eval().maps(frames)
    maps = ours(seen(metadata, frames))
    for found, wanted in zip(
        [*maps, *pyramid(maps)], [*expected, *pair.teacher.pyramid(expected)], strict=True
    ):
        same(found, wanted)


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
