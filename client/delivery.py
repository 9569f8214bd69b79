"""A final checkpoint comes to a site as a message, and is kept when everything about it holds."""

from pathlib import Path

from agssd_core.delivery import Certificate, FinalOrder, FinalReceipt
from agssd_core.differences import Wire, decode, unpack_whole
from agssd_core.envelope import SealedFinal, SealedReceipt, sign
from agssd_core.errors import (
    AgssdError,
    CheckpointError,
    OrderRefusedError,
)
from agssd_core.protocol import HELD, PROTOCOL_VERSION
from agssd_core.weights import Weights
from client.bases import KeptBase
from client.delivered import Signed, require_newer, store
from client.identity import Identity
from client.policy import Guard
from client.receive import require_envelope


def take_final(
    sealed: SealedFinal, folder: Path, name: str, identity: Identity | None, guard: Guard
) -> SealedReceipt:
    """Check a final checkpoint, keep it in the site's folder, and say so.

    One that the site holds already is answered again without being decoded.

    Args:
        sealed: as it came; nothing about it is trusted.
        folder: the site's.
        name: its enrolled name.
        identity: only the pinned key is believed; without keys nothing is taken.
        guard: the owner's policy and the journal.

    Raises:
        OrderRefusedError: ``signature``, ``site``, ``base``, ``certificate``, ``older``,
            ``conflict``, or what the policy says; nothing is kept then.
        CheckpointError: the disk is full; what was held before still is.
        JournalError: it cannot be noted.
    """
    order = sealed.order
    if identity is None:
        message = "a final checkpoint is taken over a signed connection only. Enrol the site."
        raise OrderRefusedError(message, reason="signature")
    signed = _checked(sealed, name, identity)
    guard.admit_final(order)
    if require_newer(folder, signed.certificate):
        weights = _weights(sealed, KeptBase.of(folder, order.cohort))
        try:
            signed.require_weights(weights)
        except CheckpointError as error:
            raise OrderRefusedError(str(error), reason="base") from None
        store(folder, signed, weights)
        if order.wire != "float32":  # so that the next one, or a repeated one, travels as little
            KeptBase.of(folder, order.cohort).keep(weights, order.weights_digest)
    guard.delivered(order)
    receipt = FinalReceipt(
        protocol=PROTOCOL_VERSION,
        site=name,
        run=order.run,
        cohort=order.cohort,
        round=order.round,
        nonce=order.nonce,
        weights_digest=order.weights_digest,
    )
    return SealedReceipt(receipt, sign(receipt, identity.signing_key))


def _checked(sealed: SealedFinal, name: str, identity: Identity) -> Signed:
    """Who sent it, to whom, what it declares, and the certificate; nothing is decoded."""
    order = sealed.order
    require_envelope(sealed, site=name, identity=identity)
    try:
        signed = Signed(Certificate.from_dict(order.certificate), order.certificate_signature)
        signed.require(identity.server_key)
    except AgssdError as error:
        raise OrderRefusedError(str(error), reason="certificate") from None
    if not _agree(order, signed.certificate):
        message = "the delivery and its certificate name different weights. Send it again."
        raise OrderRefusedError(message, reason="certificate")
    return signed


def _agree(order: FinalOrder, said: Certificate) -> bool:
    one = (order.run, order.cohort, order.round, order.weights_digest)
    return one == (said.run, said.cohort, said.round, said.weights_digest)


def _weights(sealed: SealedFinal, kept: KeptBase) -> Weights:
    order = sealed.order
    same = kept.read(order.weights_digest)
    if same is not None:
        return same
    try:
        if order.wire == "float32":
            return unpack_whole(sealed.payload)
        previous = None if order.wire == HELD else kept.read(order.previous_digest)
        if previous is not None:
            form: Wire = "int8" if order.wire == "int8" else "bf16"
            return decode(sealed.payload, previous, wire=form)
    except AgssdError as error:
        raise OrderRefusedError(str(error), reason="base") from None
    message = "the site does not hold the base of the delivered weights. Send them whole."
    raise OrderRefusedError(message, reason="base")
