"""Flipped bits, other versions, and keys by the node's configuration."""

import json
import os
from dataclasses import asdict, replace

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from agssd_core.envelope import SealedOrder, SealedUpdate, sign, verify
from agssd_core.errors import (
    AgssdError,
    KeyFileError,
    OrderRefusedError,
    ProtocolVersionError,
    SignatureError,
)
from agssd_core.protocol import (
    PROTOCOL_VERSION,
    Refusal,
    RoundOrder,
    SiteHello,
    SiteQuery,
    UpdateHeader,
)
from agssd_core.signing import SigningKey
from agssd_core.weights import weights_digest
from client import wire as site_wire
from client.site import named_site
from server.exchange import read_update
from tests.support.fuzzing import Pair, flipped, message_of
from tests.support.toy import Hospital, ToyBench

FLIPS = 1200
_NAMED = ("signature", "digest", "protocol", "site")


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch):
    """Nobody pulls a plug here: waiting for the disk is most of a toy round's time."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(params=["float32", "bf16", "int8"])
def pair(request, tmp_path):
    return Pair(tmp_path / "north", request.param)


def test_no_flipped_bit_of_a_reply_reaches_the_merge(pair):
    update = pair.site.answer(pair.order)
    texts = {"kind": "update", "body": update.header.to_json(), "signature": update.signature}
    honest, reason = read_update(message_of(texts, update.payload), pair.rules, asked="north")
    assert (honest is not None, reason) == (True, "")
    assert weights_digest(honest.weights) == update.header.weights_digest
    rng, reasons = np.random.default_rng(11), set()
    for _ in range(FLIPS):
        message = message_of(*flipped(texts, update.payload, rng))
        found, reason = read_update(message, pair.rules, asked="north")
        assert found is None
        reasons.add(reason)
    assert {"signature", "digest", "malformed"} <= reasons <= {*_NAMED, "malformed"}


def test_no_flipped_bit_of_an_order_is_carried_out(pair):
    texts = {
        "kind": "order",
        "body": pair.order.order.to_json(),
        "signature": pair.order.signature,
    }
    rng, refused = np.random.default_rng(12), []
    for _ in range(FLIPS):
        message = message_of(*flipped(texts, pair.order.payload, rng))
        with pytest.raises(AgssdError) as error:
            pair.site.answer(site_wire.decode_order(message))
        refused.append(getattr(error.value, "reason", "malformed"))
    assert set(refused) == {"signature", "base", "malformed"}
    assert pair.site.workbench.trainers == []
    assert pair.site.answer(pair.order).header.round == 1


def test_the_next_base_ends_on_the_servers_bits_at_the_site(pair):
    pair.site.answer(pair.order)
    assert weights_digest(pair.site.workbench.trainers[0].anchor) == weights_digest(pair.base)


@pytest.mark.parametrize("text", ["", "ed25519:", "AAAA", "AAAA AAAA", "A" * 88, "%" * 88])
def test_what_is_no_signature_is_refused(pair, text):
    with pytest.raises(SignatureError):
        verify(pair.order.order, text, (pair.server_key.public,))


def test_a_number_that_is_not_finite_cannot_be_signed(pair):
    header = replace(pair.site.answer(pair.order).header, metrics={"loss": float("nan")})
    with pytest.raises(SignatureError, match="not finite"):
        verify(header, "A" * 86 + "==", (pair.server_key.public,))


def test_a_number_of_thousands_of_digits_ends_no_round(pair):
    update = pair.site.answer(pair.order)
    body = update.header.to_json().replace('"patient_count": 7', f'"patient_count": {"9" * 5000}')
    texts = {"kind": "update", "body": body, "signature": update.signature}
    found = read_update(message_of(texts, update.payload), pair.rules, asked="north")
    assert found == (None, "malformed")


# --- versions


@pytest.mark.parametrize("kind", [RoundOrder, SiteQuery])
@pytest.mark.parametrize(("said", "older"), [(1, "server"), (PROTOCOL_VERSION + 1, "site")])
def test_a_site_says_which_side_to_upgrade(kind, said, older):
    with pytest.raises(ProtocolVersionError, match=f"Upgrade the {older}"):
        kind.from_json(json.dumps({"protocol": said, "anything": 1}))


@pytest.mark.parametrize("kind", [UpdateHeader, SiteHello, Refusal])
@pytest.mark.parametrize(("said", "older"), [(1, "site"), (PROTOCOL_VERSION + 1, "server")])
def test_a_server_says_which_side_to_upgrade(kind, said, older):
    with pytest.raises(ProtocolVersionError, match=f"Upgrade the {older}"):
        kind.from_json(json.dumps({"protocol": said, "anything": 1}))


def test_a_site_of_an_older_version_is_named_in_the_servers_log(tmp_path, monkeypatch, caplog):
    run = Hospital(tmp_path / "x", rounds=1)
    monkeypatch.setattr(
        "client.wire.encode_hello",
        lambda sealed, *, reply_to: Message(
            RecordDict(
                {
                    "header": ConfigRecord(
                        {
                            "kind": "hello",
                            "body": json.dumps({"protocol": 1, "site": sealed.hello.site}),
                        }
                    )
                }
            ),
            reply_to=reply_to,
        ),
    )
    run.run()
    said = f"the site speaks protocol 1, this server speaks {PROTOCOL_VERSION}. Upgrade the site."
    assert said in caplog.text
    assert [row["merged"] for row in run.rows("merge")] == [False]


def test_a_server_of_an_older_version_is_told_by_its_sites(tmp_path, monkeypatch, caplog):
    run = Hospital(tmp_path / "x", rounds=1)
    monkeypatch.setattr("server.discovery.PROTOCOL_VERSION", 1)
    run.run()
    said = f"the server speaks protocol 1, this site speaks {PROTOCOL_VERSION}. Upgrade the server."
    assert said in caplog.text
    assert run.bench.trainers == []


# --- keys


def test_a_node_names_its_keys_itself(tmp_path):
    key, server = SigningKey.create(), SigningKey.create().public
    key.save(tmp_path / "signing-1.pem")
    node = {"site": str(tmp_path), "name": "north", "server-key": server.text()}
    bench = ToyBench()
    with pytest.raises(KeyFileError, match="only one of server-key and signing-key"):
        named_site(node, workbench=bench)
    node["signing-key"] = str(tmp_path / "signing-1.pem")
    site = named_site(node, workbench=bench)
    assert site.identity.server_key == server
    assert site.identity.signing_key.public == key.public
    assert named_site(node, workbench=bench) is site
    unsigned = named_site({"site": str(tmp_path), "name": "north"}, workbench=bench)
    assert unsigned.identity is None
    (tmp_path / "signing-1.pem").chmod(0o644)
    with pytest.raises(KeyFileError, match="read by others"):
        named_site(node, workbench=ToyBench())


def test_an_order_of_another_cohorts_name_touches_no_file(pair):
    order = replace(pair.order.order, cohort="../../ct-mr")
    sealed = SealedOrder(order, pair.order.payload, sign(order, pair.server_key))
    with pytest.raises(OrderRefusedError) as refused:
        pair.site.answer(sealed)
    assert refused.value.reason == "cohort"


def test_a_repeated_order_gets_the_saved_payload_in_a_fresh_envelope(pair):
    first = pair.site.answer(pair.order)
    order = replace(pair.order.order, nonce="f" * 32)
    again: SealedUpdate = pair.site.answer(
        SealedOrder(order, pair.order.payload, sign(order, pair.server_key))
    )
    assert again.payload == first.payload
    assert again.signature != first.signature
    assert asdict(again.header) == asdict(first.header) | {"nonce": "f" * 32}
    verify(again.header, again.signature, pair.rules.keys["north"])
    assert len(pair.site.workbench.trainers) == 1
