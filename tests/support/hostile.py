"""Sites that alter what they answer."""

from dataclasses import replace

from agssd_core.envelope import SealedUpdate
from agssd_core.protocol import SiteUpdate
from agssd_core.weights import schema_digest, schema_of, weights_digest
from client import wire as client_wire
from server import wire
from tests.support.sealing import sealed as packed
from tests.support.sealing import weights_in


def hostile(change, *, sealed=True, identity=None, **header):
    """A site that alters its update; ``sealed`` makes its digests consistent again."""

    def tamper(message):
        update = wire.decode_reply(message, max_bytes=1 << 20)
        weights = {name: array.copy() for name, array in weights_in(update).items()}
        weights = change(weights) or weights
        facts = dict(header)
        if sealed:
            facts |= {
                "weights_digest": weights_digest(weights),
                "schema_digest": schema_digest(schema_of(weights)),
            }
        altered = SiteUpdate(replace(update.header, **facts), weights)
        return forged(packed(altered, identity), message)

    return tamper


def forged(update, message):
    """An update as the reply to the order that an honest message answers."""
    update = update if isinstance(update, SealedUpdate) else packed(update)
    reply = client_wire.encode_update(update, reply_to=message)
    reply.metadata.__dict__.update(message.metadata.__dict__)
    return reply
