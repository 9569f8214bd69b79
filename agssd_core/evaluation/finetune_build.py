"""From a checkpoint to a network that can be fine-tuned, and how fast each layer learns."""

from typing import Any, cast

import torch
from torch import Tensor, nn

from agssd_core.config import RunConfig
from agssd_core.config.tasks import TaskConfig
from agssd_core.errors import CheckpointError
from agssd_core.evaluation import export_resnet, export_vit
from agssd_core.evaluation.export_file import Network, network_tensors
from agssd_core.evaluation.finetune_nets import NETWORKS, VitEncoder
from agssd_core.models.resnet2d import monai_arguments as resnet_arguments
from agssd_core.models.tokens import sincos_positions
from agssd_core.training.anaus_build import pair_shape
from agssd_core.training.build import model_shape
from agssd_core.views.seeds import rng_for
from agssd_core.weights import Weights

Build = dict[str, Any]
_RESNET_LAYERS = ("layer1", "layer2", "layer3", "layer4")


def network_build(config: RunConfig, task: TaskConfig, classes: int, feature_size: int) -> Build:
    """Which network it is, and how it is built again.

    Args:
        config: of the checkpoint; its cohort decides between transformer and ResNet.
        task: a segmentation or a classification.
        classes: outputs; of a segmentation background included.
        feature_size: of the decoder for volumes.

    Returns:
        ``name`` in ``finetune_nets``, its ``arguments``, and the ``size`` of a window or frame.
    """
    segments = task.kind == "segmentation"
    if config.federation.cohort != "us":
        vit = model_shape(config.agssd).vit
        arguments: Build = {"vit": export_vit.monai_arguments(vit), "classes": classes}
        if segments:
            arguments["feature_size"] = feature_size
        name = "Unetr" if segments else "VitClassifier"
        return {"name": name, "arguments": arguments, "size": list(vit.image_size)}
    shape = pair_shape(config.anaus)
    kind = shape.backbone
    arguments = {
        "resnet": resnet_arguments(kind),
        "groups": kind.groups if kind.norm == "group" else 0,
        "classes": classes,
    }
    if segments:
        arguments |= {"channels": list(kind.channels), "width": shape.fpn}
    else:
        arguments["width"] = kind.channels[-1]
    # The nearest multiple of 32 to the crops of pre-training.
    side = max(32, round(config.anaus.augment.size / 32) * 32)
    name = "FpnSegmenter" if segments else "ResnetClassifier"
    return {"name": name, "arguments": arguments, "size": [side, side]}


@torch.no_grad()
def build_network(build: Build, *, seed: int) -> nn.Module:
    """Draw a network's weights; the same seed gives the same bits."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng_for(seed, "finetune", "weights").integers(2**63 - 1)))
        network: Any = NETWORKS[build["name"]](**build["arguments"])
    vit = build["arguments"].get("vit")
    if vit is not None and vit["pos_embed_type"] == "sincos":
        patch = vit["patch_size"][0]
        depth, height, breadth = (side // patch for side in vit["img_size"])
        table = sincos_positions((depth, height, breadth), vit["hidden_size"])
        network.encoder.patch_embedding.position_embeddings.copy_(table)
    return cast(nn.Module, network)


def load_encoder(
    network: nn.Module, weights: Weights, config: RunConfig, *, source: Network = "teacher"
) -> bool:
    """Copy a checkpoint's encoder, and pyramid, into a network.

    Returns:
        Whether BatchNorm lacks running statistics, which stay at the sites of some runs; they are
        then to be measured on the training scans.

    Raises:
        WeightsError: the checkpoint holds no such network, or one of another shape.
    """
    if config.federation.cohort != "us":
        vit = model_shape(config.agssd).vit
        tensors = export_vit.encoder_tensors(weights, vit, network=source)
        named = export_vit.monai_vit_tensors(tensors, vit)
        _fill(network, {f"encoder.{n}": t for n, t in named.items()}, unused="encoder.classif")
        return False
    shape, missing = pair_shape(config.anaus), False
    try:
        tensors, _ = export_resnet.encoder_tensors(weights, shape, network=source)
    except CheckpointError:
        tensors, missing = network_tensors(weights, source, ("backbone", "pyramid")), True
    named = {
        f"encoder.{name}" if name.startswith("backbone.") else name: tensor
        for name, tensor in tensors.items()
    }
    _fill(network, named, unused="" if hasattr(network, "pyramid") else "pyramid.")
    return missing


def parameter_groups(network: nn.Module, *, decay: float, weight_decay: float) -> list[Build]:
    """Groups for AdamW: ``share`` of the learning rate falls by ``decay`` from layer to layer.

    Norms, biases and tokens have no weight decay.

    Source:
        Layer-wise learning rates after Clark et al. 2020, arXiv:2003.10555, as used by BEiT.
    """
    depth = _depth(network)
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            key = (_layer(name, depth), parameter.dim() > 1 and "_token" not in name)
            groups.setdefault(key, []).append(parameter)
    return [
        {
            "params": parameters,
            "share": decay ** (depth + 1 - layer),
            "weight_decay": weight_decay if decays else 0.0,
        }
        for (layer, decays), parameters in sorted(groups.items(), key=lambda item: item[0])
    ]


def _depth(network: nn.Module) -> int:
    encoder = network.encoder
    return len(encoder.blocks) if isinstance(encoder, VitEncoder) else len(_RESNET_LAYERS)


def _layer(name: str, depth: int) -> int:
    """0 of what sees the image first, to ``depth`` of the last block, one more of what is new."""
    if not name.startswith("encoder."):
        # The pyramid was trained with the encoder, and lies over its last layer.
        return depth if name.startswith("pyramid.") else depth + 1
    parts = name.split(".")
    if parts[1] == "blocks":
        return int(parts[2]) + 1
    if parts[1] == "norm":
        return depth
    return _RESNET_LAYERS.index(parts[2]) + 1 if parts[2:] and parts[2] in _RESNET_LAYERS else 0


def _fill(network: nn.Module, named: dict[str, Tensor], *, unused: str) -> None:
    kept = {n: t for n, t in named.items() if not (unused and n.startswith(unused))}
    held = dict(network.state_dict())
    surplus = kept.keys() - held.keys()
    if surplus:  # a fault of this module, never of the user
        raise KeyError(f"{len(surplus)} encoder array(s) have no place, such as {min(surplus)}")
    network.load_state_dict(held | kept)


def encoder_parts(network: nn.Module) -> list[nn.Module]:
    """What pre-training made: the encoder, and the pyramid where there is one."""
    parts = [getattr(network, name, None) for name in ("encoder", "pyramid")]
    return [part for part in parts if isinstance(part, nn.Module)]
