"""Flower messages to plain records and back, on the site's side."""

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict

from agssd_core.errors import ProtocolError, WeightsError
from agssd_core.protocol import Refusal, RoundOrder, SiteHello, SiteQuery, SiteUpdate
from agssd_core.weights import GROUPS, Weights, group, weights_from_bytes, weights_to_bytes

_HEADER, _ARRAYS = "header", "arrays"
_PACKED = "safetensors"
_SITE_FAULT = 2  # Flower's code for an app that raised


def decode_query(message: Message) -> SiteQuery:
    """Read the server's question who we are."""
    return SiteQuery.from_json(_body(message, "query"))


def decode_order(message: Message) -> RoundOrder:
    """Read an order; the weights that come with it stay as they are.

    Raises:
        ProtocolError: it is of another form.
    """
    return RoundOrder.from_json(_body(message, "order"))


def decode_base(message: Message) -> Weights:
    """Read the base weights that come with an order.

    Raises:
        ProtocolError: the record is missing or of another form.
        WeightsError: the arrays are damaged.
    """
    record = message.content.get(_ARRAYS)
    if not isinstance(record, ArrayRecord) or not set(record) <= set(GROUPS):
        raise ProtocolError("an order came without weights. Use the same version on both sides.")
    weights: Weights = {}
    for name in sorted(record):
        part = record[name]
        if part.stype != _PACKED:
            raise WeightsError("weights came in an unknown form. Use the same version.")
        weights.update(weights_from_bytes(part.data))
    return weights


def encode_hello(hello: SiteHello, *, reply_to: Message) -> Message:
    """Answer the server's question."""
    return Message(RecordDict({_HEADER: _header("hello", hello.to_json())}), reply_to=reply_to)


def encode_update(update: SiteUpdate, *, reply_to: Message) -> Message:
    """Answer an order with an update: one packed array for each group, so few objects travel."""
    packed = {
        name: weights_to_bytes(arrays) for name in GROUPS if (arrays := group(update.weights, name))
    }
    record = ArrayRecord(
        {name: Array("uint8", (len(data),), _PACKED, data) for name, data in packed.items()}
    )
    header = _header("update", update.header.to_json())
    return Message(RecordDict({_HEADER: header, _ARRAYS: record}), reply_to=reply_to)


def encode_refusal(refusal: Refusal, *, reply_to: Message) -> Message:
    """Decline an order by a class of reason."""
    return Message(RecordDict({_HEADER: _header("refusal", refusal.to_json())}), reply_to=reply_to)


def encode_fault(text: str, *, reply_to: Message) -> Message:
    """Say that the site failed; ``text`` is all that the server learns."""
    return Message(Error(code=_SITE_FAULT, reason=text), reply_to=reply_to)


def _header(kind: str, body: str) -> ConfigRecord:
    return ConfigRecord({"kind": kind, "body": body})


def _body(message: Message, kind: str) -> str:
    record = message.content.get(_HEADER) if message.has_content() else None
    if not isinstance(record, ConfigRecord) or record.get("kind") != kind:
        raise ProtocolError(f"expected a message of kind {kind!r}. Use the same version.")
    return str(record.get("body", ""))
