"""Flower messages to plain records and back, on the site's side."""

from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict

from agssd_core.delivery import FinalOrder
from agssd_core.differences import Payload
from agssd_core.envelope import (
    SealedFinal,
    SealedHello,
    SealedOrder,
    SealedReceipt,
    SealedRefusal,
    SealedUpdate,
)
from agssd_core.errors import ProtocolError
from agssd_core.protocol import RoundOrder, SiteQuery
from agssd_core.weights import GROUPS

_HEADER, _ARRAYS = "header", "arrays"
_PACKED = "safetensors"
_SITE_FAULT = 2  # Flower's code for an app that raised


def decode_query(message: Message) -> SiteQuery:
    """Read the server's question who we are."""
    return SiteQuery.from_json(_body(message, "query"))


def decode_order(message: Message) -> SealedOrder:
    """Read an order and the parts of its weights, none of which is decoded here.

    Raises:
        ProtocolError: a record is missing or of another form.
    """
    order = RoundOrder.from_json(_body(message, "order"))
    return SealedOrder(order, _parts(message), _signature(message))


def decode_final(message: Message) -> SealedFinal:
    """Read a final checkpoint's order; nothing of its weights is decoded (see above)."""
    order = FinalOrder.from_json(_body(message, "final"))
    return SealedFinal(order, _parts(message), _signature(message))


def encode_hello(sealed: SealedHello, *, reply_to: Message) -> Message:
    """Answer the server's question."""
    header = _header("hello", sealed.hello.to_json(), sealed.signature)
    return Message(RecordDict({_HEADER: header}), reply_to=reply_to)


def encode_update(update: SealedUpdate, *, reply_to: Message) -> Message:
    """Answer an order with an update: one packed array for each group, so few objects travel."""
    record = ArrayRecord(
        {name: Array("uint8", (len(data),), _PACKED, data) for name, data in update.payload.items()}
    )
    header = _header("update", update.header.to_json(), update.signature)
    return Message(RecordDict({_HEADER: header, _ARRAYS: record}), reply_to=reply_to)


def encode_refusal(refusal: SealedRefusal, *, reply_to: Message) -> Message:
    """Decline an order by a class of reason."""
    header = _header("refusal", refusal.refusal.to_json(), refusal.signature)
    return Message(RecordDict({_HEADER: header}), reply_to=reply_to)


def encode_receipt(receipt: SealedReceipt, *, reply_to: Message) -> Message:
    """Say that a final checkpoint is held."""
    header = _header("receipt", receipt.receipt.to_json(), receipt.signature)
    return Message(RecordDict({_HEADER: header}), reply_to=reply_to)


def encode_fault(text: str, *, reply_to: Message) -> Message:
    """Say that the site failed; ``text`` is all that the server learns."""
    return Message(Error(code=_SITE_FAULT, reason=text), reply_to=reply_to)


def _parts(message: Message) -> Payload:
    record = message.content.get(_ARRAYS)
    if not isinstance(record, ArrayRecord) or not set(record) <= set(GROUPS):
        raise ProtocolError("an order came without weights. Use the same version on both sides.")
    if any(part.stype != _PACKED for part in record.values()):
        raise ProtocolError("weights came in an unknown form. Use the same version.")
    return {name: record[name].data for name in sorted(record)}


def _header(kind: str, body: str, signature: str = "") -> ConfigRecord:
    return ConfigRecord({"kind": kind, "body": body, "signature": signature})


def _signature(message: Message) -> str:
    record = message.content[_HEADER]
    return str(record.get("signature", "")) if isinstance(record, ConfigRecord) else ""


def _body(message: Message, kind: str) -> str:
    record = message.content.get(_HEADER) if message.has_content() else None
    if not isinstance(record, ConfigRecord) or record.get("kind") != kind:
        raise ProtocolError(f"expected a message of kind {kind!r}. Use the same version.")
    return str(record.get("body", ""))
