"""From an update that may leave to its envelope: coded, declared, signed."""

from dataclasses import replace

from agssd_core.differences import Wire, encode, pack_whole
from agssd_core.envelope import SealedUpdate, digests_of, sign, sizes_of
from agssd_core.protocol import SiteUpdate
from agssd_core.weights import Weights, weights_digest
from client.identity import Identity


def packed(
    update: SiteUpdate, base: Weights, *, wire: Wire, residual: Weights
) -> tuple[SealedUpdate, Weights]:
    """Code an update for its way.

    Args:
        update: as ``outbound.release`` let it pass.
        base: the order's weights.
        wire: how it travels.
        residual: what the difference before left over; nothing for ``float32``.

    Returns:
        The update, unsigned, and the residual to add to the next difference.

    Raises:
        WeightsError: a difference is not finite or too large for the form.
    """
    header = update.header
    if wire == "float32":
        payload, left = pack_whole(update.weights), Weights()
    else:
        coded = encode(base, update.weights, residual=residual, wire=wire)
        payload, left = coded.payload, coded.residual
        header = replace(header, weights_digest=weights_digest(coded.reached))
    header = replace(
        header,
        wire=wire,
        payload_digests=digests_of(payload),
        payload_sizes=sizes_of(payload),
    )
    return SealedUpdate(header, payload), left


def signed(
    update: SealedUpdate, identity: Identity | None, *, nonce: str | None = None
) -> SealedUpdate:
    """The update with its signature; ``nonce`` is that of a repeated order."""
    header = update.header if nonce is None else replace(update.header, nonce=nonce)
    key = None if identity is None else identity.signing_key
    return SealedUpdate(header, update.payload, sign(header, key))
