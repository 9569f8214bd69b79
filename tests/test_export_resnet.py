"""Ultrasound encoders load into MONAI's and torchvision's networks and give the same maps."""

import json
from math import prod

import pytest
import torch
from monai.networks.nets import ResNet
from torch import nn
from torch.nn import functional

from agssd_core.models.fpn import FeaturePyramid
from agssd_core.models.resnet2d import ResNetBackbone, ResnetShape, monai_arguments
from tests.support.torchvision_resnet_names import BUFFERS, PARAMETERS, TENSORS, state_shapes
from tests.support.us_exports import GROUP, exported, trained


def same(found, expected):
    """Equal up to the order of float32 sums; random weights make values of any size."""
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert expected.std() > 0


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
