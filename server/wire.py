"""Flower messages to plain records and back, on the server's side."""

from dataclasses import dataclass

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from agssd_core.application import DECLINED_UNOPENED
from agssd_core.delivery import FinalReceipt
from agssd_core.differences import Payload
from agssd_core.envelope import (
    SealedFinal,
    SealedHello,
    SealedOrder,
    SealedReceipt,
    SealedRefusal,
    SealedUpdate,
)
from agssd_core.errors import OversizeError, ProtocolError
from agssd_core.protocol import Refusal, SiteHello, SiteQuery, UpdateHeader
from agssd_core.weights import GROUPS

_HEADER, _ARRAYS = "header", "arrays"
_PACKED = "safetensors"
_SITE_FAULT = 2  # Flower's code for an app that raised; every other code is a fault of the way
MAX_FAULT_TEXT = 300
NOT_FETCHED = "agssd: above its cap, not fetched"
"""What stands for a reply whose arrays were left where they are (server/pulling.py)."""


@dataclass(frozen=True)
class Fault:
    """A reply without content.

    Attributes:
        at_site: the site's software failed; otherwise the message was lost on its way.
    """

    text: str
    at_site: bool

    @property
    def reason(self) -> str:
        """Class of reason: the site's own where it declined before it opened the message."""
        if self.text in DECLINED_UNOPENED:
            return self.text
        return "site-error" if self.at_site else "lost"


Reply = SealedUpdate | SealedRefusal | SealedReceipt | SealedHello | Fault


def encode_query(query: SiteQuery, *, node: int, ttl_s: float) -> Message:
    """Ask a node who it is."""
    content = RecordDict({_HEADER: _header("query", query.to_json())})
    return Message(content, node, "query.hello", ttl=ttl_s, group_id="hello")


def encode_order(sealed: SealedOrder, *, node: int, ttl_s: float) -> Message:
    """Order a round of a node: one packed array for each group, so few objects travel."""
    content = _sealed("order", sealed.order.to_json(), sealed.signature, sealed.payload)
    return Message(content, node, "train", ttl=ttl_s, group_id=str(sealed.order.round))


def encode_final(sealed: SealedFinal, *, node: int, ttl_s: float) -> Message:
    """Bring a node the final checkpoint, packed as an order's weights are."""
    content = _sealed("final", sealed.order.to_json(), sealed.signature, sealed.payload)
    return Message(content, node, "train.final", ttl=ttl_s, group_id="final")


def decode_reply(message: Message, *, max_bytes: int) -> Reply:
    """Read whatever a node sent; nothing of it is trusted, and no array is decoded here.

    Raises:
        ProtocolError: the reply follows no form that we know.
        ProtocolVersionError: it is of another version.
        OversizeError: it is larger than ``max_bytes``.
    """
    if message.has_error():
        reason = str(message.error.reason or "no reason given")
        if NOT_FETCHED in reason:
            raise OversizeError(f"a reply is above its cap of {max_bytes} bytes, and not fetched.")
        text = reason[:MAX_FAULT_TEXT]
        return Fault(text, at_site=message.error.code == _SITE_FAULT)
    record = message.content.get(_HEADER) if message.has_content() else None
    if not isinstance(record, ConfigRecord):
        raise ProtocolError("a reply came without a header. Use the same version on both sides.")
    body, signature = str(record.get("body", "")), str(record.get("signature", ""))
    if record.get("kind") == "hello":
        return SealedHello(SiteHello.from_json(body), signature)
    if record.get("kind") == "refusal":
        return SealedRefusal(Refusal.from_json(body), signature)
    if record.get("kind") == "receipt":
        return SealedReceipt(FinalReceipt.from_json(body), signature)
    if record.get("kind") != "update":
        raise ProtocolError("a reply is of an unknown kind. Use the same version on both sides.")
    header = UpdateHeader.from_json(body)
    return SealedUpdate(header, _parts(message.content, max_bytes), signature)


def size_of(message: Message) -> int:
    """Bytes of a message's arrays and header."""
    if not message.has_content():
        return 0
    record = message.content.get(_ARRAYS)
    parts = list(record.values()) if isinstance(record, ArrayRecord) else []
    header = message.content.get(_HEADER)
    texts = list(header.values()) if isinstance(header, ConfigRecord) else []
    return sum(len(part.data) for part in parts) + sum(len(str(text)) for text in texts)


def _sealed(kind: str, body: str, signature: str, payload: Payload) -> RecordDict:
    record = ArrayRecord(
        {name: Array("uint8", (len(data),), _PACKED, data) for name, data in payload.items()}
    )
    return RecordDict({_HEADER: _header(kind, body, signature), _ARRAYS: record})


def _parts(content: RecordDict, max_bytes: int) -> Payload:
    record = content.get(_ARRAYS)
    if not isinstance(record, ArrayRecord) or not set(record) <= set(GROUPS):
        raise ProtocolError("an update came without arrays. Use the same version on both sides.")
    if sum(len(part.data) for part in record.values()) > max_bytes:
        raise OversizeError(f"an update is larger than {max_bytes} bytes. Send the shared arrays.")
    if any(part.stype != _PACKED for part in record.values()):
        raise ProtocolError("an update's arrays are of an unknown form. Use the same version.")
    return {name: record[name].data for name in sorted(record)}


def _header(kind: str, body: str, signature: str = "") -> ConfigRecord:
    return ConfigRecord({"kind": kind, "body": body, "signature": signature})
