"""Updates and orders as they travel, and back."""

from agssd_core.differences import decode, pack_whole, unpack_whole
from agssd_core.envelope import SealedOrder, digests_of, sign, sizes_of
from agssd_core.protocol import SiteUpdate
from client.sending import packed, signed
from tests.support.orders import order_for


def sealed(update, identity=None):
    """An update with its arrays whole, as an honest site packs it."""
    whole, _ = packed(update, {}, wire="float32", residual={})
    return signed(whole, identity)


def weights_in(update, base=None):
    """What the server has after decoding a sealed update."""
    if update.header.wire == "float32":
        return unpack_whole(update.payload)
    return decode(update.payload, base, wire=update.header.wire)


def unsealed(update, base=None):
    return SiteUpdate(update.header, weights_in(update, base))


def sealed_order(weights, *args, key=None, payload=None, **changes):
    """An order with its weights whole, or with a payload of another form."""
    payload = pack_whole(weights) if payload is None else payload
    facts = {"payload_digests": digests_of(payload), "payload_sizes": sizes_of(payload)}
    order = order_for(weights, *args, **(facts | changes))
    return SealedOrder(order, payload, sign(order, key))
