"""Weights as they travel: whole in float32, or as bf16 or int8 differences to a base.

The parts of a payload are safetensors bytes, one for each group of arrays. A difference needs no
names: both sides know the base, whose arrays of the group, sorted by name and flattened, are
laid end to end as ``codes``; int8 adds ``scales``, one float32 for every ``BLOCK`` codes of an
array. What coding lost is the residual; whoever codes adds it to the next difference (error
feedback), so that over the rounds nothing is lost.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from agssd_core.errors import WeightsError
from agssd_core.weights import (
    GROUPS,
    Array,
    Schema,
    Weights,
    group,
    schema_of,
    weights_from_bytes,
    weights_to_bytes,
)

Wire = Literal["float32", "bf16", "int8"]
WIRES: tuple[Wire, ...] = ("float32", "bf16", "int8")
Payload = dict[str, bytes]
Float32 = NDArray[np.float32]

BLOCK = 128
"""Codes that share a scale. Smaller blocks lose less and cost 4 / BLOCK bytes more a weight."""

_CODES, _SCALES = "codes", "scales"
_FRAME = 512  # bytes of a safetensors header with these two names, with room to spare
_MAX_CODE = 127


@dataclass(frozen=True)
class Encoded:
    """A difference on its way.

    Attributes:
        payload: group -> safetensors bytes.
        reached: the weights that whoever decodes the payload ends on, bit for bit.
        residual: float32 arrays; what the payload does not say yet.
    """

    payload: Payload = field(repr=False)
    reached: Weights = field(repr=False)
    residual: Weights = field(repr=False)


def pack_whole(weights: Mapping[str, Array]) -> Payload:
    """Weights as they are, by name: the form ``float32``."""
    return {name: weights_to_bytes(part) for name in GROUPS if (part := group(weights, name))}


def unpack_whole(payload: Mapping[str, bytes]) -> Weights:
    """Read what ``pack_whole`` wrote.

    Raises:
        WeightsError: the bytes are damaged, or an array stands in another group.
    """
    weights: Weights = {}
    for name in sorted(payload):
        arrays = weights_from_bytes(payload[name])
        if any(not key.startswith(f"{name}/") for key in arrays):
            raise WeightsError("an array stands in the wrong group. Use the same version.")
        weights.update(arrays)
    return weights


def encode(base: Weights, wanted: Weights, *, residual: Weights, wire: Wire) -> Encoded:
    """Code ``wanted - base + residual``.

    Args:
        base: what the other side holds; it may have more arrays.
        wanted: float arrays with names and shapes of the base.
        residual: of the difference before, by name; a missing one is 0.
        wire: ``bf16`` or ``int8``.

    Raises:
        WeightsError: a difference is not finite, or too large for the form.
    """
    reached, left, payload = Weights(), Weights(), Payload()
    for part in GROUPS:
        names = sorted(group(wanted, part))
        differences = {n: _difference(base[n], _aim(wanted[n], residual.get(n)), n) for n in names}
        if names:
            payload[part] = _to_bytes(differences, wire)
            moved = _from_bytes(payload[part], schema_of(differences), wire)
            for name in names:
                reached[name] = _moved(base[name], moved[name])
                aim = _aim(wanted[name], residual.get(name))
                left[name] = np.asarray(aim - reached[name].astype(np.float64), np.float32)
    return Encoded(payload, {name: reached[name] for name in wanted}, left)


def decode(payload: Mapping[str, bytes], base: Weights, *, wire: Wire) -> Weights:
    """The weights that a payload of differences leads to from a base.

    Args:
        payload: of the groups that were sent; nothing about it is trusted.
        base: the arrays that it was coded against.
        wire: ``bf16`` or ``int8``.

    Raises:
        WeightsError: the bytes are damaged or do not fit the base. Numbers are not looked at:
            a difference that is not finite gives weights that are not.
    """
    weights: Weights = {}
    for part in sorted(payload):
        arrays = group(base, part)
        moved = _from_bytes(payload[part], schema_of(arrays), wire)
        weights |= {name: _moved(arrays[name], moved[name]) for name in sorted(arrays)}
    return weights


def size_limit(schema: Schema, wire: Wire) -> int:
    """Most bytes that an honest payload with these arrays can have, framing included."""
    groups = {spec.name.split("/", 1)[0] for spec in schema}
    if wire == "float32":
        rows = sum(len(spec.name) + 100 for spec in schema)  # safetensors names every array
        return sum(_count(s.shape) * np.dtype(s.dtype).itemsize for s in schema) + rows + _FRAME
    numbers = sum(_count(spec.shape) for spec in schema)
    scales = sum(_blocks(_count(spec.shape)) for spec in schema)
    coded = 2 * numbers if wire == "bf16" else numbers + 4 * scales
    return coded + _FRAME * len(groups)


def _aim(wanted: Array, residual: Array | None) -> NDArray[np.float64]:
    aim = wanted.astype(np.float64)
    return aim if residual is None else np.asarray(aim + residual.astype(np.float64))


def _difference(base: Array, aim: NDArray[np.float64], name: str) -> Float32:
    with np.errstate(over="ignore", invalid="ignore"):
        difference = np.asarray(aim - base.astype(np.float64), dtype=np.float32)
    if not np.isfinite(difference).all():
        raise WeightsError(
            f"the difference of array {name} is not finite; nothing was sent. Lower "
            "training.optimiser.learning_rate, or use federation.wire = float32."
        )
    return difference


def _moved(base: Array, difference: Float32) -> Array:
    """Base plus difference, rounded once; the same bits on every machine."""
    with np.errstate(over="ignore", invalid="ignore"):
        total = base.astype(np.float64) + difference.astype(np.float64)
        return np.asarray(total, dtype=base.dtype)


def _to_bytes(differences: Mapping[str, Float32], wire: Wire) -> bytes:
    flat = [differences[name].ravel() for name in sorted(differences)]
    if wire == "bf16":
        return weights_to_bytes({_CODES: np.concatenate([_to_bf16(part) for part in flat])})
    coded = [_to_int8(part) for part in flat]
    codes = np.concatenate([part for part, _ in coded])
    return weights_to_bytes({_CODES: codes, _SCALES: np.concatenate([s for _, s in coded])})


def _from_bytes(data: bytes, schema: Schema, wire: Wire) -> dict[str, Float32]:
    arrays = weights_from_bytes(data)
    counts = [_count(spec.shape) for spec in schema]
    blocks = [_blocks(count) for count in counts]
    expected: dict[str, tuple[str, int]] = {_CODES: ("uint16", sum(counts))}
    if wire == "int8":
        expected = {_CODES: ("int8", sum(counts)), _SCALES: ("float32", sum(blocks))}
    if arrays.keys() != expected.keys() or any(
        (str(arrays[name].dtype), arrays[name].shape) != (kind, (length,))
        for name, (kind, length) in expected.items()
    ):
        raise WeightsError(
            f"a difference of {wire} does not fit the base's {len(schema)} arrays. Use the same "
            "model configuration and version."
        )
    found: dict[str, Float32] = {}
    at = block_at = 0
    for spec, count, block in zip(schema, counts, blocks, strict=True):
        codes = arrays[_CODES][at : at + count]
        if wire == "bf16":
            flat = (codes.astype(np.uint32) << np.uint32(16)).view(np.float32)
        else:
            flat = _from_int8(codes, arrays[_SCALES][block_at : block_at + block])
        found[spec.name] = flat.reshape(spec.shape)
        at, block_at = at + count, block_at + block
    return found


def _to_bf16(flat: Float32) -> NDArray[np.uint16]:
    """Round to the nearest bf16, ties to even."""
    bits = np.ascontiguousarray(flat).view(np.uint32)
    odd = (bits >> np.uint32(16)) & np.uint32(1)
    codes = ((bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)).astype(np.uint16)
    if ((codes & 0x7F80) == 0x7F80).any():
        raise WeightsError(
            "a difference is too large for bf16; nothing was sent. Use federation.wire = float32."
        )
    return codes


def _to_int8(flat: Float32) -> tuple[NDArray[np.int8], Float32]:
    """Codes of -127..127 and a scale for every block; a block of zeros has scale 0."""
    blocks = _in_blocks(flat)
    scales = (np.abs(blocks).max(axis=1, initial=0) / np.float32(_MAX_CODE)).astype(np.float32)
    # A scale that rounds to 0 leaves its block, below 1e-43, to the residual.
    divisor = np.where(scales > 0, scales, np.float32(np.inf))[:, None]
    codes = np.clip(np.rint(blocks / divisor), -_MAX_CODE, _MAX_CODE).astype(np.int8)
    return codes.ravel()[: flat.size], scales


def _from_int8(codes: Array, scales: Array) -> Float32:
    """Codes times their blocks' scales."""
    blocks = _in_blocks(codes.astype(np.float32))
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = blocks * scales.astype(np.float32)[:, None]
    return np.asarray(scaled.ravel()[: codes.size])


def _in_blocks(flat: Float32) -> Float32:
    """(n,) as (blocks, BLOCK), the last one filled up with zeros."""
    count = _blocks(flat.size)
    if flat.size == count * BLOCK:
        return flat.reshape(count, BLOCK)
    padded = np.zeros(count * BLOCK, np.float32)
    padded[: flat.size] = flat
    return padded.reshape(count, BLOCK)


def _blocks(count: int) -> int:
    return -(-count // BLOCK)


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count
