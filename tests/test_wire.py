"""What travels in a Flower message comes back as it was, and nothing else is accepted."""

from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict

from agssd_core.differences import pack_whole, unpack_whole
from agssd_core.envelope import SealedHello, SealedOrder, SealedRefusal, digests_of, sizes_of
from agssd_core.errors import AgssdError, ProtocolError, WeightsError
from agssd_core.protocol import PROTOCOL_VERSION, Refusal, RoundOrder, SiteHello, SiteQuery
from agssd_core.weights import weights_digest, weights_to_bytes
from client import wire as site_wire
from server import wire
from simulation.grid import _act_as_server, _deflate, _inflate
from tests.support.merging import model, update_of
from tests.support.sealing import sealed

PAYLOAD = pack_whole(model(0))
ORDER = RoundOrder(
    PROTOCOL_VERSION,
    "run-1",
    "ct-mr",
    3,
    10,
    30,
    100,
    "{}",
    "d" * 64,
    "n" * 32,
    site="a",
    payload_digests=digests_of(PAYLOAD),
    payload_sizes=sizes_of(PAYLOAD),
)


def over_the_wire(message):
    return _inflate(_deflate(message))


@pytest.fixture
def asked():
    """An order as a site receives it."""
    _act_as_server()
    sealed = SealedOrder(ORDER, PAYLOAD, "signature")
    return over_the_wire(wire.encode_order(sealed, node=7, ttl_s=60.0))


def test_order_and_weights_arrive_bit_for_bit(asked):
    found = site_wire.decode_order(asked)
    assert (found.order, found.signature) == (ORDER, "signature")
    assert weights_digest(unpack_whole(found.payload)) == weights_digest(model(0))
    assert wire.size_of(asked) > sum(ORDER.payload_sizes.values()) + len(ORDER.to_json())
    assert asked.metadata.message_type == "train"
    assert asked.metadata.ttl == 60.0


def test_few_objects_travel_however_many_arrays(asked):
    assert len(asked.content["arrays"]) == 3


def test_update_arrives_bit_for_bit(asked):
    update = update_of(model(1))
    travelling = sealed(update)
    reply = over_the_wire(site_wire.encode_update(travelling, reply_to=asked))
    found = wire.decode_reply(reply, max_bytes=10_000)
    assert found.header == travelling.header
    assert weights_digest(unpack_whole(found.payload)) == weights_digest(update.weights)
    assert wire.size_of(reply) > sum(array.nbytes for array in update.weights.values())


def test_hello_refusal_and_fault(asked):
    hello = SealedHello(SiteHello(PROTOCOL_VERSION, "north", "ct-mr", 4, 9, "0.1"), "s")
    refusal = SealedRefusal(Refusal(PROTOCOL_VERSION, "", "run-1", 3, "n", "plan"), "s")
    for record, encode in ((hello, site_wire.encode_hello), (refusal, site_wire.encode_refusal)):
        reply = over_the_wire(encode(record, reply_to=asked))
        assert wire.decode_reply(reply, max_bytes=0) == record
    fault = over_the_wire(site_wire.encode_fault("KeyError", reply_to=asked))
    assert wire.decode_reply(fault, max_bytes=0) == wire.Fault("KeyError", at_site=True)
    lost = Message(Error(code=4, reason="x" * 9999), reply_to=asked)
    assert wire.decode_reply(lost, max_bytes=0) == wire.Fault("x" * 300, at_site=False)


def test_query_asks_for_the_cohort():
    _act_as_server()
    query = SiteQuery(PROTOCOL_VERSION, "ct-mr", "0f")
    message = over_the_wire(wire.encode_query(query, node=7, ttl_s=60.0))
    assert site_wire.decode_query(message) == query


def packed(weights, group="student", form="safetensors"):
    data = weights if isinstance(weights, bytes) else weights_to_bytes(weights)
    return ArrayRecord({group: Array("uint8", (len(data),), form, data)})


HEADER = {"kind": "update", "body": update_of(model(1)).header.to_json()}
ONE = {"student/w": np.zeros(3, np.float32)}


@pytest.mark.parametrize(
    ("records", "limit", "remedy"),
    [
        ({}, 9999, "header"),
        ({"header": ConfigRecord({"kind": "song", "body": ""})}, 9999, "unknown kind"),
        ({"header": ConfigRecord({**HEADER, "body": "{}"})}, 9999, "same version"),
        ({"header": ConfigRecord({**HEADER, "body": "[" * 10**5})}, 9999, "not valid JSON"),
        ({"header": ConfigRecord(HEADER)}, 9999, "without arrays"),
        ({"header": ConfigRecord(HEADER), "arrays": packed(ONE, "other")}, 9999, "without arrays"),
        ({"header": ConfigRecord(HEADER), "arrays": packed(ONE, form="npy")}, 9999, "form"),
        ({"header": ConfigRecord(HEADER), "arrays": packed(ONE, "../x")}, 9999, "without arrays"),
        ({"header": ConfigRecord(HEADER), "arrays": packed(ONE)}, 20, "larger than 20 bytes"),
    ],
    ids=range(9),
)
def test_other_replies_are_refused(asked, records, limit, remedy):
    reply = over_the_wire(Message(RecordDict(records), reply_to=asked))
    with pytest.raises(AgssdError, match=remedy):
        wire.decode_reply(reply, max_bytes=limit)


@pytest.mark.parametrize(
    ("payload", "remedy"),
    [
        ({"student": b"\x80\x04N."}, "safetensors"),
        ({"teacher": weights_to_bytes(ONE)}, "wrong group"),
    ],
    ids=["pickle", "group"],
)
def test_other_arrays_are_refused_when_they_are_decoded(payload, remedy):
    with pytest.raises(WeightsError, match=remedy):
        unpack_whole(payload)


def test_a_site_refuses_an_order_without_weights_or_of_another_kind(asked):
    order = ConfigRecord({"kind": "order", "body": ORDER.to_json()})
    bare = Message(RecordDict({"header": order}), reply_to=asked)
    with pytest.raises(ProtocolError, match="without weights"):
        site_wire.decode_order(bare)
    with pytest.raises(ProtocolError, match="kind 'query'"):
        site_wire.decode_query(asked)
    fields = replace(ORDER, round=4).to_json().replace('"round": 4', '"round": "4"')
    typed = ConfigRecord({"kind": "order", "body": fields})
    with pytest.raises(ProtocolError, match="of type str"):
        site_wire.decode_order(Message(RecordDict({"header": typed}), reply_to=asked))


@pytest.mark.parametrize(
    ("code", "text", "reason"),
    [
        (2, "declined-size", "declined-size"),
        (2, "declined-policy-code", "declined-policy-code"),
        (2, "something broke", "site-error"),
        (0, "nobody answered", "lost"),
    ],
)
def test_a_reply_without_content_has_a_class_of_reason(asked, code, text, reason):
    answer = wire.decode_reply(Message(Error(code, text), reply_to=asked), max_bytes=1)
    assert answer.reason == reason
