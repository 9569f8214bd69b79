"""The CT and MR encoder in other libraries' forms, as safetensors that carry how to build it.

``monai-vit`` loads with ``strict=True`` into a plain MONAI ViT::

    with safe_open(path, framework="pt") as stream:
        arguments = json.loads(stream.metadata()["monai.networks.nets.ViT"])
    network = monai.networks.nets.ViT(**arguments)
    network.load_state_dict(safetensors.torch.load_file(path), strict=True)

``network.norm(network(x)[1][-1])`` is then our cls token followed by our patch tokens; x is in
[0, 1], RAS, one channel. Three tensors that we do not have are MONAI's initial ones: each
block's unused ``norm_cross_attn``, the untrained ``classification_head``, and, where positions
are fixed, their table.

``monai-unetr`` fits ``UNETR(**arguments, in_channels=1, out_channels=...)`` with
``strict=False``: every tensor of its ``vit``, under ``vit.``. UNETR has no cls token, so its
tokens differ from ours until it is fine-tuned.

``safetensors`` holds our own names, for ``VisionTransformer3d(VitShape(**arguments))``.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from monai.networks.nets import ViT
from torch import Tensor

from agssd_core.errors import ConfigError
from agssd_core.evaluation.export_file import Network, network_tensors, require_fit, save_network
from agssd_core.models.student_teacher import AgssdShape
from agssd_core.models.tokens import sincos_positions
from agssd_core.models.vit3d import VisionTransformer3d, VitShape
from agssd_core.weights import Weights

VitForm = Literal["monai-vit", "monai-unetr", "safetensors"]
_UNETR_DEPTH, _UNETR_PATCH = 12, 16
_POSITIONS = "patch_embedding.position_embeddings"
_RENAMED = {
    "patch_embed.weight": "patch_embedding.patch_embeddings.weight",
    "patch_embed.bias": "patch_embedding.patch_embeddings.bias",
    "pos_embed.weight": _POSITIONS,
    "cls_token.weight": "cls_token",
}


def export_vit(
    weights: Weights,
    shape: AgssdShape,
    *,
    network: Network,
    form: VitForm,
    out: Path,
    notes: Mapping[str, str] | None = None,
) -> None:
    """Write one network's encoder, atomically.

    Args:
        weights: a checkpoint's arrays.
        shape: of the model that they are the weights of.
        network: which of the pair.
        form: see the module's text.
        out: the file to write.
        notes: further metadata, such as spacing and intensity windows.

    Raises:
        WeightsError: the checkpoint holds no such network, or one of another shape.
        ConfigError: an encoder of this shape cannot be expressed in that form.
    """
    vit = shape.vit
    tensors = encoder_tensors(weights, vit, network=network)
    if form == "safetensors":
        builder = {"agssd_core.models.vit3d.VitShape": json.dumps(asdict(vit))}
    elif form == "monai-vit":
        tensors = monai_vit_tensors(tensors, vit)
        builder = {"monai.networks.nets.ViT": json.dumps(monai_arguments(vit))}
    else:
        tensors = monai_unetr_tensors(tensors, vit)
        builder = {"monai.networks.nets.UNETR": json.dumps(unetr_arguments(vit))}
    facts = {**(notes or {}), "form": form, "network": network, **builder}
    save_network(out, tensors, weights=weights, facts=facts)


def encoder_tensors(weights: Weights, shape: VitShape, *, network: Network) -> dict[str, Tensor]:
    """State dict of one network's ``VisionTransformer3d``.

    Raises:
        WeightsError: the network is absent or of another shape.
    """
    named = network_tensors(weights, network, ("encoder",))
    found = {name.removeprefix("encoder."): tensor for name, tensor in named.items()}
    with torch.device("meta"):
        expected = VisionTransformer3d(shape).state_dict()
    require_fit(found, expected)
    return found


def monai_arguments(shape: VitShape) -> dict[str, Any]:
    """Arguments of ``monai.networks.nets.ViT`` with a cls token."""
    return {
        "in_channels": 1,
        "img_size": list(shape.image_size),
        "patch_size": [shape.patch_size] * 3,
        "hidden_size": shape.width,
        "mlp_dim": shape.mlp_width,
        "num_layers": shape.depth,
        "num_heads": shape.heads,
        "pos_embed_type": shape.pos_embed,
        "qkv_bias": shape.qkv_bias,
        "classification": True,
    }


def unetr_arguments(shape: VitShape) -> dict[str, Any]:
    """Arguments of ``monai.networks.nets.UNETR`` that fix its encoder."""
    names = ("img_size", "hidden_size", "mlp_dim", "num_heads", "qkv_bias")
    return {name: monai_arguments(shape)[name] for name in names}


def monai_vit_tensors(tensors: Mapping[str, Tensor], shape: VitShape) -> dict[str, Tensor]:
    """Our state dict as that of a plain MONAI ViT, complete for ``strict=True``."""
    ours = {
        _RENAMED.get(name, name): tensor
        for name, tensor in tensors.items()
        if not name.startswith("mask_token")
    }
    if shape.pos_embed == "sincos":
        ours[_POSITIONS] = sincos_positions(shape.grid, shape.width)
    # Its own generator state: an export must not move the caller's, and twice gives one file.
    # Positions are ours already, so MONAI need not build them.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        filler = ViT(**{**monai_arguments(shape), "pos_embed_type": "none"}).state_dict()
    return {name: ours.get(name, tensor) for name, tensor in filler.items()}


def monai_unetr_tensors(tensors: Mapping[str, Tensor], shape: VitShape) -> dict[str, Tensor]:
    """Our state dict under the names of UNETR's encoder.

    Raises:
        ConfigError: UNETR cannot have this depth or patch size.
    """
    if (shape.depth, shape.patch_size) != (_UNETR_DEPTH, _UNETR_PATCH):
        raise ConfigError(
            f"this encoder has {shape.depth} blocks and patch size {shape.patch_size}; MONAI's "
            f"UNETR is fixed to {_UNETR_DEPTH} and {_UNETR_PATCH}. Export with --format monai-vit."
        )
    kept = monai_vit_tensors(tensors, shape)
    left_out = ("cls_token", "classification_head")
    return {f"vit.{name}": t for name, t in kept.items() if not name.startswith(left_out)}
