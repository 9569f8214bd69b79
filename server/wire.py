"""Flower messages to plain records and back, on the server's side."""

from dataclasses import dataclass

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from agssd_core.errors import ProtocolError
from agssd_core.protocol import Refusal, RoundOrder, SiteHello, SiteQuery, SiteUpdate, UpdateHeader
from agssd_core.weights import GROUPS, Weights, group, weights_from_bytes, weights_to_bytes

_HEADER, _ARRAYS = "header", "arrays"
_PACKED = "safetensors"
_SITE_FAULT = 2  # Flower's code for an app that raised; every other code is a fault of the way
MAX_FAULT_TEXT = 300


class OversizeError(ProtocolError):
    """An update holds more bytes than its cap."""


@dataclass(frozen=True)
class Fault:
    """A reply without content.

    Attributes:
        at_site: the site's software failed; otherwise the message was lost on its way.
    """

    text: str
    at_site: bool


Reply = SiteUpdate | Refusal | SiteHello | Fault


@dataclass(frozen=True)
class PackedWeights:
    """Base weights serialised once for all orders of a round."""

    record: ArrayRecord
    size: int


def pack_base(weights: Weights) -> PackedWeights:
    """Serialise base weights: one packed array for each group, so few objects travel."""
    packed = {name: weights_to_bytes(arrays) for name in GROUPS if (arrays := group(weights, name))}
    record = ArrayRecord(
        {name: Array("uint8", (len(data),), _PACKED, data) for name, data in packed.items()}
    )
    return PackedWeights(record, sum(len(data) for data in packed.values()))


def encode_query(query: SiteQuery, *, node: int, ttl_s: float) -> Message:
    """Ask a node who it is."""
    content = RecordDict({_HEADER: _header("query", query.to_json())})
    return Message(content, node, "query.hello", ttl=ttl_s, group_id="hello")


def encode_order(order: RoundOrder, base: PackedWeights, *, node: int, ttl_s: float) -> Message:
    """Order a round of a node."""
    content = RecordDict({_HEADER: _header("order", order.to_json()), _ARRAYS: base.record})
    return Message(content, node, "train", ttl=ttl_s, group_id=str(order.round))


def decode_reply(message: Message, *, max_bytes: int) -> Reply:
    """Read whatever a node sent; nothing of it is trusted.

    Raises:
        ProtocolError: the reply follows no form that we know.
        OversizeError: it is larger than ``max_bytes``.
        WeightsError: its arrays are damaged.
    """
    if message.has_error():
        text = str(message.error.reason or "no reason given")[:MAX_FAULT_TEXT]
        return Fault(text, at_site=message.error.code == _SITE_FAULT)
    record = message.content.get(_HEADER) if message.has_content() else None
    if not isinstance(record, ConfigRecord):
        raise ProtocolError("a reply came without a header. Use the same version on both sides.")
    body = str(record.get("body", ""))
    if record.get("kind") == "hello":
        return SiteHello.from_json(body)
    if record.get("kind") == "refusal":
        return Refusal.from_json(body)
    if record.get("kind") != "update":
        raise ProtocolError("a reply is of an unknown kind. Use the same version on both sides.")
    header = UpdateHeader.from_json(body)
    return SiteUpdate(header, _arrays(message.content, max_bytes))


def size_of(message: Message) -> int:
    """Bytes of a reply's arrays and header, as they travelled."""
    if not message.has_content():
        return 0
    record = message.content.get(_ARRAYS)
    parts = list(record.values()) if isinstance(record, ArrayRecord) else []
    arrays = sum(len(part.data) for part in parts)
    header = message.content.get(_HEADER)
    body = header.get("body", "") if isinstance(header, ConfigRecord) else ""
    return arrays + len(str(body))


def _arrays(content: RecordDict, max_bytes: int) -> Weights:
    record = content.get(_ARRAYS)
    if not isinstance(record, ArrayRecord) or not set(record) <= set(GROUPS):
        raise ProtocolError("an update came without arrays. Use the same version on both sides.")
    parts = {name: record[name] for name in sorted(record)}
    if sum(len(part.data) for part in parts.values()) > max_bytes:
        raise OversizeError(f"an update is larger than {max_bytes} bytes. Send the shared arrays.")
    weights: Weights = {}
    for name, part in parts.items():
        if part.stype != _PACKED:
            raise ProtocolError("an update's arrays are of an unknown form. Use the same version.")
        arrays = weights_from_bytes(part.data)
        if any(not key.startswith(f"{name}/") for key in arrays):
            raise ProtocolError("an array stands in the wrong group. Use the same version.")
        weights.update(arrays)
    return weights


def _header(kind: str, body: str) -> ConfigRecord:
    return ConfigRecord({"kind": kind, "body": body})
