"""A signed order and its answer, and single bits of them that flip on the way."""

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from agssd_core.differences import encode
from agssd_core.protocol import uplink_groups
from agssd_core.signing import SigningKey
from agssd_core.weights import weights_digest
from client.bases import KeptBase
from client.identity import Identity
from client.site import Site
from server.admission import AdmissionRules
from simulation.grid import _act_as_server
from tests.support.orders import config_for
from tests.support.sealing import sealed_order
from tests.support.toy import ToyBench, toy_weights


class Pair:
    """A signed order of round 1 and the site that answers it."""

    def __init__(self, folder, wire):
        folder.mkdir()
        (folder / "facts.json").write_text('{"patients": 7}')
        self.server_key, site_key = SigningKey.create(), SigningKey.create()
        identity = Identity(site_key, self.server_key.public)
        self.site = Site(folder, "north", ToyBench(), identity)
        config = config_for(wire=wire)
        before = toy_weights(1)
        self.base, form = toy_weights(), {}
        if wire != "float32":
            coded = encode(before, self.base, residual={}, wire=wire)
            self.base = coded.reached
            form = {
                "payload": coded.payload,
                "wire": wire,
                "previous_digest": weights_digest(before),
            }
            KeptBase.of(folder, "ct-mr").keep(before, weights_digest(before))
        self.order = sealed_order(self.base, 1, config, key=self.server_key, **form)
        self.rules = AdmissionRules(
            base=self.base,
            groups=uplink_groups("average"),
            run="run-1",
            cohort="ct-mr",
            round=1,
            steps=2,
            base_digest=self.order.order.base_digest,
            nonces={"north": self.order.order.nonce},
            enrolled={"north": 7},
            wire=wire,
            keys={"north": (site_key.public,)},
        )


def flipped(texts, parts, rng):
    """One bit of the header's texts or of the parts, each byte as likely as any other."""
    pool = {**texts, **parts}
    sizes = np.array([len(value) for value in pool.values()])
    # Half of the flips fall on the header, which is the smaller part of a real message.
    names = list(texts) if rng.integers(2) else list(parts)
    weights = np.array([len(pool[name]) for name in names], float)
    name = names[int(rng.choice(len(names), p=weights / weights.sum()))]
    value = pool[name]
    data = bytearray(value.encode() if isinstance(value, str) else value)
    data[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
    assert sizes.all()
    changed = data.decode("latin-1") if isinstance(value, str) else bytes(data)
    return {n: changed if n == name else v for n, v in texts.items()}, {
        n: changed if n == name else v for n, v in parts.items()
    }


def message_of(texts, parts, kind="train"):
    _act_as_server()
    arrays = {n: Array("uint8", (len(d),), "safetensors", d) for n, d in parts.items()}
    content = RecordDict({"header": ConfigRecord(texts), "arrays": ArrayRecord(arrays)})
    return Message(content, 7, kind, ttl=60.0, group_id="1")
