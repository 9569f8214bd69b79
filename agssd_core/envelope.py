"""Sealed records: what is checked before any array that came with them is decoded."""

import base64
import hashlib
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field

from agssd_core.delivery import Certificate, FinalOrder, FinalReceipt
from agssd_core.differences import Payload
from agssd_core.errors import PayloadError, SignatureError
from agssd_core.protocol import Refusal, RoundOrder, SiteHello, UpdateHeader
from agssd_core.signing import Purpose, SigningKey, VerifyKey, canonical


@dataclass(frozen=True)
class SealedOrder:
    """An order with its weights undecoded; ``signature`` is empty on an unsigned connection."""

    order: RoundOrder
    payload: Payload = field(repr=False)
    signature: str = ""


@dataclass(frozen=True)
class SealedUpdate:
    """An update with its arrays undecoded; ``signature`` is empty on an unsigned connection."""

    header: UpdateHeader
    payload: Payload = field(repr=False)
    signature: str = ""


@dataclass(frozen=True)
class SealedRefusal:
    """A refusal; ``signature`` is empty on an unsigned connection."""

    refusal: Refusal
    signature: str = ""


@dataclass(frozen=True)
class SealedHello:
    """What a site says of itself; ``signature`` is empty on an unsigned connection."""

    hello: SiteHello
    signature: str = ""


@dataclass(frozen=True)
class SealedFinal:
    """A final checkpoint with its weights undecoded."""

    order: FinalOrder
    payload: Payload = field(repr=False)
    signature: str = ""


@dataclass(frozen=True)
class SealedReceipt:
    """A site's word that it holds a final checkpoint."""

    receipt: FinalReceipt
    signature: str = ""


Signed = RoundOrder | UpdateHeader | Refusal | SiteHello | Certificate | FinalOrder | FinalReceipt
_PURPOSES: dict[type[Signed], Purpose] = {
    RoundOrder: "order",
    UpdateHeader: "update",
    Refusal: "refusal",
    SiteHello: "hello",
    Certificate: "checkpoint",
    FinalOrder: "delivery",
    FinalReceipt: "receipt",
}


def digests_of(payload: Mapping[str, bytes]) -> dict[str, str]:
    """SHA-256 of each part."""
    return {name: hashlib.sha256(data).hexdigest() for name, data in sorted(payload.items())}


def sizes_of(payload: Mapping[str, bytes]) -> dict[str, int]:
    """Bytes of each part."""
    return {name: len(data) for name, data in sorted(payload.items())}


def sign(record: Signed, key: SigningKey | None) -> str:
    """Signature over the record's canonical JSON; empty without a key."""
    return "" if key is None else key.sign(_purpose(record), canonical(asdict(record)))


def verify(record: Signed, signature: str, keys: Collection[VerifyKey]) -> None:
    """Check a signature by any of the signer's valid keys.

    Raises:
        SignatureError: it is missing, or by none of them; always when there is no key.
    """
    purpose = _purpose(record)
    if not signature:
        raise SignatureError(f"this {purpose} is not signed. Enrol whoever sent it.")
    if not _is_plain(signature):
        raise SignatureError(f"the signature of this {purpose} is not Base64. Send it again.")
    try:
        payload = canonical(asdict(record))
    except ValueError:
        raise SignatureError(
            f"this {purpose} holds a number that is not finite, so nobody can have signed it."
        ) from None
    for key in keys:
        try:
            return key.verify(purpose, payload, signature)
        except SignatureError:
            continue
    raise SignatureError(
        f"this {purpose} is signed by none of the {len(keys)} keys that are valid for it. Refuse "
        "it, and compare keys with its sender."
    )


def require_payload(
    record: RoundOrder | UpdateHeader | FinalOrder,
    payload: Mapping[str, bytes],
    *,
    max_bytes: int = 0,
) -> None:
    """Hold what came against what the record declares, sizes first.

    Args:
        record: with declared sizes and digests.
        payload: group -> bytes as they came.
        max_bytes: most that all parts together may have; 0 is no limit.

    Raises:
        PayloadError: with ``reason`` ``size`` or ``digest``.
    """
    declared = sum(record.payload_sizes.values())
    if max_bytes and declared > max_bytes:
        raise PayloadError(f"{declared} bytes declared, cap {max_bytes}", reason="size")
    if record.payload_sizes != sizes_of(payload):
        raise PayloadError("the parts have other sizes than declared", reason="size")
    if record.payload_digests != digests_of(payload):
        raise PayloadError("damaged on the way, or altered", reason="digest")


def _is_plain(signature: str) -> bool:
    """Whether the text is the one way to write these bytes, so that no bit of it is idle."""
    try:
        return base64.b64encode(base64.b64decode(signature, validate=True)).decode() == signature
    except ValueError:
        return False


def _purpose(record: Signed) -> Purpose:
    return _PURPOSES[type(record)]
