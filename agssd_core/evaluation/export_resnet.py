"""The ultrasound encoder in other libraries' forms, as safetensors that carry how to build it.

Frames are grey in [0, 1]; the first convolution takes three colours. The file's ``input`` says so
and with which mean and standard deviation: ``x = ((grey - mean) / std)`` with mean and std of
shape (3, 1, 1). Sides are multiples of 32.

``torchvision-resnet`` loads with ``strict=True`` into torchvision's ResNet::

    with safe_open(path, framework="pt") as stream:
        facts = json.loads(stream.metadata()["torchvision.models"])
    network = getattr(torchvision.models, facts["name"])(weights=None)
    network.load_state_dict(safetensors.torch.load_file(path), strict=True)
    network.fc = torch.nn.Identity()

``strict`` asks for the 1000 classes of ``fc``, which ANAUS has not: they are zeros, and give the
same score to every class until it is exchanged. For GroupNorm (``facts["groups"]`` above 0) build
with ``norm_layer=lambda planes: torch.nn.GroupNorm(facts["groups"], planes)``.

``monai-resnet`` loads with ``strict=True`` into MONAI's::

    with safe_open(path, framework="pt") as stream:
        arguments = json.loads(stream.metadata()["monai.networks.nets.ResNet"])
        groups = json.loads(stream.metadata()["norm"])["groups"]
    network = monai.networks.nets.ResNet(**arguments)
    for parent in list(network.modules()):
        for name, child in list(parent.named_children()):
            if groups and isinstance(child, torch.nn.BatchNorm2d):
                setattr(parent, name, torch.nn.GroupNorm(groups, child.num_features))
    network.load_state_dict(safetensors.torch.load_file(path), strict=True)

The loop is needed for GroupNorm alone, because MONAI's ``norm`` argument reaches only the stem.

``fpn`` is backbone and pyramid for detection and segmentation, in the names of torchvision's
``BackboneWithFPN``, which takes them with ``strict=True``::

    with safe_open(path, framework="pt") as stream:
        facts = json.loads(stream.metadata()["torchvision.models.detection"])
    resnet = getattr(torchvision.models, facts["name"])(weights=None)
    layers = {f"layer{n + 1}": str(n) for n in range(4)}
    network = BackboneWithFPN(resnet, layers, facts["in_channels_list"], facts["out_channels"])
    network.load_state_dict(safetensors.torch.load_file(path), strict=True)

Its maps "0", "1" and "2" are our p2, p3 and p4. ANAUS pools c5 itself and smooths no p5, so "3" is
c5 after its lateral convolution: ``layer_blocks.3`` is the identity. GroupNorm as above.

``safetensors`` holds our own names: those under ``backbone.`` fit
``ResNetBackbone(ResnetShape(**arguments))``, those under ``pyramid.`` its ``FeaturePyramid``.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from agssd_core.errors import CheckpointError, ConfigError
from agssd_core.evaluation.export_file import Network, network_tensors, require_fit, save_network
from agssd_core.models.anaus import GREY_MEAN, GREY_STD, AnausShape
from agssd_core.models.fpn import FeaturePyramid
from agssd_core.models.resnet2d import ResNetBackbone, ResnetShape, monai_arguments
from agssd_core.weights import Array, Weights

ResnetForm = Literal["torchvision-resnet", "monai-resnet", "fpn", "safetensors"]
CLASSES = 1000
_TORCHVISION_WIDTH = 64
_BACKBONE, _PYRAMID = "backbone.", "pyramid."
_RUNNING = ("running_mean", "running_var", "num_batches_tracked")


def export_resnet(
    weights: Weights,
    shape: AnausShape,
    *,
    network: Network,
    form: ResnetForm,
    out: Path,
    statistics: Weights | None = None,
) -> None:
    """Write one network's encoder, atomically.

    Args:
        weights: a checkpoint's arrays.
        shape: of the model that they are the weights of.
        network: which of the pair.
        form: see the module's text.
        out: the file to write.
        statistics: a site's own running statistics, such as
            ``student.backbone.bn1.running_mean``; without them the merged ones are used.

    Raises:
        WeightsError: the checkpoint holds no such network, or one of another shape.
        CheckpointError: a BatchNorm encoder has no running statistics.
        ConfigError: an encoder of this shape cannot be expressed in that form.
    """
    kind = shape.backbone
    if form == "torchvision-resnet" and kind.width != _TORCHVISION_WIDTH:
        raise ConfigError(
            f"this encoder's stem has {kind.width} planes; torchvision's is fixed to "
            f"{_TORCHVISION_WIDTH}. Export with --format monai-resnet."
        )
    tensors, origin = encoder_tensors(weights, shape, network=network, statistics=statistics)
    facts = {
        "form": form,
        "network": network,
        "statistics": origin,
        "norm": json.dumps({"kind": kind.norm, "groups": _groups(kind)}),
        "input": json.dumps(
            {"grey": "repeated as 3 colours", "range": [0, 1], "mean": GREY_MEAN, "std": GREY_STD}
        ),
    }
    backbone = {n.removeprefix(_BACKBONE): t for n, t in tensors.items() if n.startswith(_BACKBONE)}
    if form == "torchvision-resnet":
        tensors = backbone | _untrained_classes(kind)
        facts |= {"torchvision.models": json.dumps(_torchvision(kind)), "untrained": "fc"}
    elif form == "monai-resnet":
        tensors = backbone
        facts["monai.networks.nets.ResNet"] = json.dumps(monai_arguments(kind))
    elif form == "fpn":
        tensors = _with_fpn_names(tensors, shape)
        channels = {"in_channels_list": kind.channels, "out_channels": shape.fpn}
        facts["torchvision.models.detection"] = json.dumps(_torchvision(kind) | channels)
    else:
        facts["agssd_core.models.resnet2d.ResnetShape"] = json.dumps(asdict(kind))
        facts["agssd_core.models.fpn.FeaturePyramid"] = json.dumps(
            {"channels": kind.channels, "width": shape.fpn}
        )
    save_network(out, tensors, weights=weights, facts=facts)


def encoder_tensors(
    weights: Weights,
    shape: AnausShape,
    *,
    network: Network,
    statistics: Weights | None = None,
) -> tuple[dict[str, Tensor], str]:
    """State dicts of one network's ``backbone`` and ``pyramid``, with running statistics.

    Returns:
        The tensors, and where the statistics are from: ``site``, ``merged`` or ``none``.

    Raises:
        WeightsError: the network is absent or of another shape.
        CheckpointError: statistics are needed and there are none.
    """
    found = network_tensors(weights, network, ("backbone", "pyramid"))
    with torch.device("meta"):
        backbone = ResNetBackbone(shape.backbone)
        pyramid = FeaturePyramid(backbone.channels, shape.fpn)
    expected = {f"{_BACKBONE}{n}": t for n, t in backbone.state_dict().items()}
    expected |= {f"{_PYRAMID}{n}": t for n, t in pyramid.state_dict().items()}
    origin = "none"
    if shape.backbone.norm == "batch":
        norms = [n.removesuffix(".running_mean") for n in expected if n.endswith("running_mean")]
        mine = _of_site(statistics or {}, network, norms)
        held = mine or _merged(weights, network, norms)
        found |= held
        origin = "site" if mine else "merged"
        if not held:
            raise _no_statistics()
    require_fit(found, expected)
    return found, origin


def _of_site(statistics: Weights, network: Network, norms: list[str]) -> dict[str, Tensor]:
    """A site's own running statistics by our names; nothing unless all are there."""
    found: dict[str, Tensor] = {}
    for norm in norms:
        for part in _RUNNING:
            array = statistics.get(f"{network}.{norm}.{part}")
            if array is None:
                return {}
            scalar = part == "num_batches_tracked"
            # A site's state keeps a count as an array of length 1.
            found[f"{norm}.{part}"] = torch.from_numpy(array.copy()).view(() if scalar else -1)
    return found


def _merged(weights: Weights, network: Network, norms: list[str]) -> dict[str, Tensor]:
    """Running statistics from merged means and second moments; nothing unless all are there."""
    found: dict[str, Tensor] = {}
    for norm in norms:
        mean = weights.get(f"state/statistics.{network}.{norm}.mean")
        square = weights.get(f"state/statistics.{network}.{norm}.square")
        if mean is None or square is None:
            return {}
        found[f"{norm}.running_mean"] = _tensor(mean)
        variance = square.astype(np.float64) - mean.astype(np.float64) ** 2
        found[f"{norm}.running_var"] = _tensor(variance.clip(min=0))
        found[f"{norm}.num_batches_tracked"] = torch.tensor(0)
    return found


def _tensor(array: Array) -> Tensor:
    return torch.from_numpy(array.astype(np.float32))


def _no_statistics() -> CheckpointError:
    return CheckpointError(
        "this encoder has BatchNorm and the checkpoint holds no running statistics for it: they "
        "stay at the sites. Export a site's own round with `agssd-site export`, or train with "
        "anaus.share_statistics: true, or with anaus.backbone.norm: group (GroupNorm), which "
        "needs none."
    )


def _untrained_classes(shape: ResnetShape) -> dict[str, Tensor]:
    width = shape.channels[-1]
    return {"fc.weight": torch.zeros(CLASSES, width), "fc.bias": torch.zeros(CLASSES)}


def _groups(shape: ResnetShape) -> int:
    return shape.groups if shape.norm == "group" else 0


def _torchvision(shape: ResnetShape) -> dict[str, Any]:
    return {"name": f"resnet{shape.depth}", "groups": _groups(shape)}


def _with_fpn_names(tensors: Mapping[str, Tensor], shape: AnausShape) -> dict[str, Tensor]:
    """Our state dicts under the names of ``BackboneWithFPN``.

    These are the names before torchvision 0.13; later versions rename them while loading.
    """
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        new = name.replace(f"{_PYRAMID}lateral.", "fpn.inner_blocks.", 1)
        new = new.replace(f"{_PYRAMID}smooth.", "fpn.layer_blocks.", 1)
        found[new.replace(_BACKBONE, "body.", 1)] = tensor
    kernel = torch.zeros(shape.fpn, shape.fpn, 3, 3)
    kernel[:, :, 1, 1] = torch.eye(shape.fpn)
    coarsest = len(shape.backbone.channels) - 1
    found[f"fpn.layer_blocks.{coarsest}.weight"] = kernel
    found[f"fpn.layer_blocks.{coarsest}.bias"] = torch.zeros(shape.fpn)
    return found
