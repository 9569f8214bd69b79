"""Published weights of SAM, into LP-SAM: safetensors, or the original ``.pth``.

Nothing is fetched when a local file or folder is named. A ``.pth`` is only ever read with
``torch.load(weights_only=True)``, which builds tensors and runs no code.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from agssd_core.errors import WeightsError
from agssd_core.models.lpsam import LpSam
from agssd_core.weights import file_digest

Tensors = dict[str, Tensor]

_FILE = "model.safetensors"
_ADDED = (
    "engine.",
    "encoder.stem.",
    "encoder.position_down.",
    "encoder.input_adapter.",
    "encoder.adapters.",
)
_POSITIONS = "prompt_encoder.shared_embedding.positional_embedding"

# From transformers' names to ours.
_SHARED = (
    (r"^shared_image_embedding\.", "prompt_encoder.shared_embedding."),
    (r"^vision_encoder\.patch_embed\.projection\.", "encoder.patch_embed."),
    (r"^vision_encoder\.", "encoder."),
)
# From the names of the original release to ours.
_ORIGINAL = (
    (r"^module\.", ""),
    (r"^image_encoder\.patch_embed\.proj\.", "encoder.patch_embed."),
    (r"^image_encoder\.blocks\.", "encoder.layers."),
    (r"^image_encoder\.neck\.0\.", "encoder.neck.conv1."),
    (r"^image_encoder\.neck\.1\.", "encoder.neck.layer_norm1."),
    (r"^image_encoder\.neck\.2\.", "encoder.neck.conv2."),
    (r"^image_encoder\.neck\.3\.", "encoder.neck.layer_norm2."),
    (r"^image_encoder\.", "encoder."),
    (r"^prompt_encoder\.pe_layer\.positional_encoding_gaussian_matrix$", _POSITIONS),
    (r"^prompt_encoder\.point_embeddings\.", "prompt_encoder.point_embed."),
    (r"\.mask_downscaling\.0\.", ".mask_embed.conv1."),
    (r"\.mask_downscaling\.1\.", ".mask_embed.layer_norm1."),
    (r"\.mask_downscaling\.3\.", ".mask_embed.conv2."),
    (r"\.mask_downscaling\.4\.", ".mask_embed.layer_norm2."),
    (r"\.mask_downscaling\.6\.", ".mask_embed.conv3."),
    (r"\.output_upscaling\.0\.", ".upscale_conv1."),
    (r"\.output_upscaling\.1\.", ".upscale_layer_norm."),
    (r"\.output_upscaling\.3\.", ".upscale_conv2."),
    (r"(_mlps\.\d+|iou_prediction_head)\.layers\.0\.", r"\1.proj_in."),
    (r"(_mlps\.\d+|iou_prediction_head)\.layers\.2\.", r"\1.proj_out."),
    (r"(_mlps\.\d+|iou_prediction_head)\.layers\.1\.", r"\1.layers.0."),
    (r"\.norm(\d|_final_attn)\.", r".layer_norm\1."),
)


def load_sam(network: LpSam, source: str, *, digest: str = "") -> str:
    """Put SAM's published weights under LP-SAM's adapters.

    Args:
        network: its own additions keep their fresh weights.
        source: a ``.safetensors`` or ``.pth`` file, a folder with ``model.safetensors``, or a hub
            name such as ``facebook/sam-vit-base``, for which a network is needed.
        digest: SHA-256 that the file must have; empty does not check.

    Returns:
        The file's SHA-256.

    Raises:
        WeightsError: the file is missing, damaged, not the named one, or of another network.
    """
    file = _located(source)
    found = file_digest(file)
    if digest and found != digest:
        raise WeightsError(
            f"the file of SAM's weights has digest {found[:16]}..., lpsam.weights_digest says "
            f"{digest[:16]}.... Use the file that was meant, or mend the digest."
        )
    _take(network, renamed(_read(file)))
    return found


def renamed(tensors: Mapping[str, Tensor]) -> Tensors:
    """SAM's arrays under our names, whichever of both releases they come from."""
    original = any("image_encoder." in name for name in tensors)
    rules = _ORIGINAL if original else _SHARED
    named: Tensors = {}
    for name, tensor in tensors.items():
        for pattern, other in rules:
            name = re.sub(pattern, other, name)
        named[name] = tensor
    return named


def _take(network: LpSam, tensors: Tensors) -> None:
    own = network.state_dict()
    wanted = {name for name in own if not name.startswith(_ADDED)}
    missing, surplus = wanted - tensors.keys(), tensors.keys() - wanted
    if missing or surplus:
        raise WeightsError(
            f"{len(missing)} array(s) of SAM are missing and {len(surplus)} are unknown "
            f"({', '.join(sorted(missing | surplus)[:3])}). Use SAM ViT-B weights with "
            "lpsam.architecture = vit-b."
        )
    fitted = {name: _fitted(name, tensors[name], own[name]) for name in sorted(wanted)}
    network.load_state_dict({**own, **fitted})


def _fitted(name: str, tensor: Tensor, like: Tensor) -> Tensor:
    """Positions are resampled to our grid; everything else must have its own shape."""
    if name == "encoder.pos_embed" and tensor.ndim == like.ndim == 4:
        table = tensor.float().permute(0, 3, 1, 2)
        tensor = F.interpolate(table, size=like.shape[1:3], mode="bilinear").permute(0, 2, 3, 1)
    elif "rel_pos" in name and tensor.ndim == 2 and len(tensor) > len(like):
        line = tensor.float().T[None]
        tensor = F.interpolate(line, size=len(like), mode="linear")[0].T
    if tensor.shape != like.shape:
        raise WeightsError(
            f"array {name} is {tuple(tensor.shape)}, expected {tuple(like.shape)}. Use SAM ViT-B "
            "weights, lpsam.architecture = vit-b and lpsam.window = 14."
        )
    return tensor.to(like.dtype)


def _read(file: Path) -> Tensors:
    try:
        if file.suffix == ".safetensors":
            return dict(load_file(file))
        content: Any = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - a damaged file makes torch raise anything
        raise _unreadable(type(error).__name__) from None
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if isinstance(content, dict) and all(isinstance(v, Tensor) for v in content.values()):
        return content
    raise _unreadable("no tensors by name")


def _unreadable(why: str) -> WeightsError:
    return WeightsError(
        f"SAM's weights cannot be read ({why}): the file is damaged or holds more than named "
        "tensors. Download it again, as safetensors if there is a choice."
    )


def _located(source: str) -> Path:
    path = Path(source)
    if path.is_dir():
        path = path / _FILE
    if path.is_file():
        if path.suffix in (".safetensors", ".pth", ".pt"):
            return path
        raise WeightsError(
            "lpsam.weights names a file that is neither .safetensors nor .pth. Convert it first."
        )
    if not path.exists() and re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        return _downloaded(source)
    raise WeightsError(
        f"lpsam.weights names no file of SAM's weights. Name a folder with {_FILE}, a .pth file, "
        "or a hub name such as facebook/sam-vit-base."
    )


def _downloaded(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(name, _FILE))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise WeightsError(
            f"the hub's weights could not be fetched ({type(error).__name__}). Download "
            f"{_FILE} on a computer with a network and name its folder as lpsam.weights."
        ) from None
