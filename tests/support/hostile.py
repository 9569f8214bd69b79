"""Sites that alter what they answer."""

from dataclasses import replace

import numpy as np

from agssd_core.envelope import SealedUpdate
from agssd_core.protocol import PROTOCOL_VERSION, SiteUpdate
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


NAME = "student/head.w"


def put(value):
    def change(weights):
        weights[NAME][1, 2] = value

    return change


def with_array(name, array):
    return lambda weights: {**weights, name: array}


def nothing(_weights):
    return None


# What a hostile site may do to its update, and the class of reason that it is refused for.
BAD = {
    "nan": (hostile(put(np.nan)), "non-finite"),
    "inf": (hostile(put(-np.inf)), "non-finite"),
    "huge": (hostile(put(1e30)), "magnitude"),
    "shape": (hostile(with_array(NAME, np.zeros((5, 3), np.float32))), "schema"),
    "broadcast": (hostile(with_array("state/density", np.zeros((1,), np.float32))), "schema"),
    "dtype": (hostile(with_array(NAME, np.zeros((3, 5), np.float64))), "schema"),
    "missing": (hostile(lambda w: {n: a for n, a in w.items() if n != NAME}), "schema"),
    "extra": (hostile(with_array("student/extra", np.zeros(2, np.float32))), "schema"),
    "negative-weight": (hostile(nothing, patient_count=-4), "weight"),
    "no-weight": (hostile(nothing, patient_count=0), "weight"),
    "great-weight": (hostile(nothing, patient_count=10**12), "weight"),
    "other-run": (hostile(nothing, run="run-2"), "run"),
    "other-round": (hostile(nothing, round=0), "round"),
    "other-base": (hostile(nothing, base_digest="0" * 64), "base"),
    "other-nonce": (hostile(nothing, nonce="0" * 32), "nonce"),
    "other-site": (hostile(nothing, site="a"), "site"),
    "fewer-steps": (hostile(nothing, steps=1), "steps"),
    "version": (hostile(nothing, protocol=PROTOCOL_VERSION + 1), "protocol"),
    "altered": (hostile(put(0.5), sealed=False), "digest"),
    "far": (hostile(lambda w: {n: a + (n == NAME) * 900 for n, a in w.items()}), "norm"),
}
