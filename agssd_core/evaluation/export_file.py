"""Writing one network of a checkpoint as a safetensors file that says where it comes from."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from agssd_core.errors import WeightsError
from agssd_core.weights import Weights, save_weights, weights_digest

Network = Literal["teacher", "student"]


def network_tensors(
    weights: Weights, network: Network, parts: tuple[str, ...]
) -> dict[str, Tensor]:
    """Copies of one network's arrays, by their name within it.

    Args:
        weights: a checkpoint's arrays.
        network: which of the pair.
        parts: its modules that are wanted, such as ``encoder``.

    Raises:
        WeightsError: the checkpoint holds no such network.
    """
    wanted = tuple(f"{network}/{part}." for part in parts)
    found = {
        name.removeprefix(f"{network}/"): torch.from_numpy(array.copy())
        for name, array in weights.items()
        if name.startswith(wanted)
    }
    if not found:
        raise WeightsError(
            f"the checkpoint holds no {network}. Export the other network, or a site's own "
            "checkpoint when teachers stay at the sites."
        )
    return found


def require_fit(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Names and shapes are those of the configured model.

    Raises:
        WeightsError: one is missing, too many or of another shape.
    """
    wrong = [n for n, t in expected.items() if n not in found or found[n].shape != t.shape]
    wrong += sorted(found.keys() - expected.keys())
    if wrong:
        raise WeightsError(
            f"{len(wrong)} encoder array(s) do not fit the configured model ({wrong[0]}). Use the "
            "configuration that is stored with the checkpoint."
        )


def save_network(
    out: Path, tensors: Mapping[str, Tensor], *, weights: Weights, facts: Mapping[str, str]
) -> None:
    """Write tensors atomically, with this package's version and the checkpoint's digest.

    Args:
        out: the file.
        tensors: by the names of the chosen form.
        weights: the checkpoint that they were taken from.
        facts: form, network and how to build the module.
    """
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    origin = {
        "agssd_version": version("agssd-federation"),
        "weights_digest": weights_digest(weights),
    }
    save_weights(out, arrays, metadata={**facts, **origin})
