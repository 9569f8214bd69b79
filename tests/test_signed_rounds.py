"""Signed rounds: what is not signed by the right key, over these very bytes, moves nothing."""

import os
from dataclasses import asdict, replace

import numpy as np
import pytest

from agssd_core.envelope import SealedOrder, SealedUpdate, sign
from agssd_core.protocol import PROTOCOL_VERSION, Refusal
from agssd_core.signing import SigningKey, canonical
from client import wire as site_wire
from client.identity import Identity
from server import wire as server_wire
from server.keys import Keys
from simulation.grid import Fault
from tests.support.hostile import forged, hostile
from tests.support.signing import SignedHospital
from tests.support.toy import Hospital

NAME = "student/head.w"


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch):
    """Nobody pulls a plug here: waiting for the disk is most of a toy round's time."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="module")
def without_b(tmp_path_factory):
    """Two unsigned rounds, of which b takes part in the first only."""
    absent = Hospital(tmp_path_factory.mktemp("absent") / "x", rounds=2)
    absent.run(lambda name, group: Fault(offline=(name, group) == ("b", "1")))
    return absent.digest()


@pytest.fixture
def signed(tmp_path):
    return SignedHospital(tmp_path / "x", rounds=2)


def struck(run, tamper):
    """b's reply of round 1 goes through these hands."""
    run.run(lambda name, group: Fault(tamper=tamper if (name, group) == ("b", "1") else None))
    return run.reasons()


def resigned(key, **changes):
    """The same update with other header fields, signed by this key; None does not sign."""

    def tamper(message):
        update = server_wire.decode_reply(message, max_bytes=1 << 20)
        header = replace(update.header, **changes)
        return forged(SealedUpdate(header, update.payload, sign(header, key)), message)

    return tamper


def nothing(_weights):
    return None


def put(value):
    def change(weights):
        weights[NAME][1, 2] = value

    return change


@pytest.mark.parametrize("wire", ["float32", "int8"])
def test_a_signed_run_ends_with_the_bits_of_an_unsigned_one(tmp_path, wire):
    signed = SignedHospital(tmp_path / "signed", wire=wire)
    plain = Hospital(tmp_path / "plain", wire=wire)
    signed.run(), plain.run()
    assert signed.digest() == plain.digest()
    assert signed.reasons() == []


@pytest.mark.parametrize("whose", ["nobody", "stranger", "other site", "server"])
def test_a_reply_signed_by_another_is_refused(signed, without_b, whose):
    key = {
        "nobody": None,
        "stranger": SigningKey.create(),
        "other site": signed.identities["a"].signing_key,
        "server": signed.server_key,
    }[whose]
    assert struck(signed, resigned(key)) == [(1, "b", "signature")]
    assert signed.digest() == without_b


@pytest.mark.parametrize(
    "changes",
    [{"patient_count": 400}, {"metrics": {}}, {"nonce": "0" * 32}, {"weights_digest": "0" * 64}],
    ids=str,
)
def test_a_header_altered_on_the_way_is_refused(signed, without_b, changes):
    def tamper(message):
        update = server_wire.decode_reply(message, max_bytes=1 << 20)
        return forged(replace(update, header=replace(update.header, **changes)), message)

    assert struck(signed, tamper) == [(1, "b", "signature")]
    assert signed.digest() == without_b


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"run": "run-2"}, "run"),
        ({"cohort": "us"}, "cohort"),
        ({"round": 0}, "round"),
        ({"base_digest": "0" * 64}, "base"),
        ({"nonce": "0" * 32}, "nonce"),
        ({"site": "a"}, "site"),
        ({"steps": 1}, "steps"),
        ({"protocol": PROTOCOL_VERSION + 1}, "protocol"),
        ({"wire": "int8"}, "wire"),
        ({"schema_digest": "0" * 64}, "schema"),
        ({"payload_digests": {"student": "0" * 64}}, "digest"),
        ({"payload_sizes": {"student": 1, "teacher": 1, "state": 1}}, "size"),
        ({"payload_sizes": {"student": 1}}, "schema"),
        ({"payload_sizes": {"student": 10**12, "teacher": 1, "state": 1}}, "size"),
        ({"weights_digest": "0" * 64}, "digest"),
        ({"patient_count": 10**6}, "weight"),
    ],
    ids=str,
)
def test_an_enrolled_site_that_signs_anything_else_is_refused_by_name(
    signed, without_b, changes, reason
):
    tamper = resigned(signed.identities["b"].signing_key, **changes)
    assert struck(signed, tamper) == [(1, "b", reason)]
    assert signed.digest() == without_b


def test_arrays_altered_and_resealed_without_the_key_are_refused(signed, without_b):
    assert struck(signed, hostile(put(0.5))) == [(1, "b", "signature")]
    assert signed.digest() == without_b


def test_altered_arrays_under_the_honest_header_are_refused(signed, without_b):
    def tamper(message):
        update = server_wire.decode_reply(message, max_bytes=1 << 20)
        part = bytearray(update.payload["student"])
        part[-5] ^= 1
        payload = update.payload | {"student": bytes(part)}
        return forged(replace(update, payload=payload), message)

    assert struck(signed, tamper) == [(1, "b", "digest")]
    assert signed.digest() == without_b


def test_an_honest_update_signed_again_by_its_own_site_is_admitted(signed, without_b):
    tamper = hostile(nothing, identity=signed.identities["b"])
    assert struck(signed, tamper) == []
    assert signed.digest() != without_b


@pytest.mark.parametrize("kept_from", [("b", "0"), ("a", "1")], ids=["replay", "another site's"])
def test_a_signed_reply_of_another_order_is_refused(signed, without_b, kept_from):
    kept = []

    def keep(message):
        kept.append(server_wire.decode_reply(message, max_bytes=1 << 20))
        return message

    tampers = {kept_from: keep, ("b", "1"): lambda message: forged(kept[0], message)}
    signed.run(lambda name, group: Fault(tamper=tampers.get((name, group))))
    assert signed.reasons() == [(1, "b", "round" if kept_from[1] == "0" else "site")]
    assert signed.digest() == without_b


def test_a_duplicated_reply_is_not_counted_twice(tmp_path):
    twice, once = SignedHospital(tmp_path / "twice"), SignedHospital(tmp_path / "once")
    twice.run(lambda _name, _group: Fault(twice=True))
    once.run()
    assert twice.digest() == once.digest()


def test_a_signed_run_without_any_key_admits_nobody(signed):
    signed.keys = Keys(signed.server_key, {})
    signed.run()
    assert {reason for _, _, reason in signed.reasons()} == {"signature"}
    assert [row["merged"] for row in signed.rows("merge")] == [False, False]


def test_sites_without_keys_are_refused_by_a_signed_run(signed):
    signed.identities = {}
    signed.run()
    assert [reason for _, _, reason in signed.reasons()] == ["signature"] * 6


def test_a_key_revoked_between_rounds_counts_from_the_next_reply(signed, without_b):
    keys = dict(signed.keys.sites)
    signed.keys = Keys(signed.server_key, keys)
    signed.run(on_round=lambda _: keys.pop("b", None))
    assert signed.reasons() == [(1, "b", "signature")]
    assert signed.digest() == without_b


def test_while_a_site_renews_its_key_both_are_valid(signed):
    renewed = SigningKey.create().public
    keys = {name: (renewed, *each) for name, each in signed.keys.sites.items()}
    signed.keys = Keys(signed.server_key, keys)
    signed.run()
    assert signed.reasons() == []


# --- orders


def test_an_unsigned_order_is_refused_by_every_signed_site(signed, monkeypatch):
    decoded = []
    monkeypatch.setattr("client.receive.unpack_whole", lambda payload: decoded.append(payload))
    Hospital.run(signed)  # a server without keys
    assert [reason for _, _, reason in signed.reasons()] == ["declined-signature"] * 6
    assert decoded == []
    assert signed.bench.trainers == []


@pytest.mark.parametrize("key", [None, "stranger", "site"])
def test_an_order_signed_by_another_is_refused_before_its_weights_are_decoded(
    signed, monkeypatch, key
):
    keys = {"stranger": SigningKey.create(), "site": signed.identities["a"].signing_key}
    if key is not None:
        signed.keys = Keys(keys[key], signed.keys.sites)
    else:
        monkeypatch.setattr("server.exchange.sign", lambda *_: "")
    monkeypatch.setattr("client.receive.unpack_whole", None)
    signed.run()
    assert [reason for _, _, reason in signed.reasons()] == ["declined-signature"] * 6


@pytest.mark.parametrize("change", ["site", "purpose", "weights"])
def test_an_order_for_another_site_or_with_other_weights_is_refused(signed, monkeypatch, change):
    original = site_wire.decode_order

    def altered(message):
        sealed = original(message)
        order = replace(sealed.order, site="c" if sealed.order.site != "c" else "a")
        if change == "site":  # signed by the server, but for somebody else
            return SealedOrder(order, sealed.payload, sign(order, signed.server_key))
        if change == "purpose":
            text = signed.server_key.sign("update", canonical(asdict(sealed.order)))
            return replace(sealed, signature=text)
        part = bytearray(sealed.payload["teacher"])
        part[-1] ^= 8
        return replace(sealed, payload=sealed.payload | {"teacher": bytes(part)})

    monkeypatch.setattr(site_wire, "decode_order", altered)
    signed.run()
    reason = {"site": "site", "purpose": "signature", "weights": "base"}[change]
    assert {each for _, _, each in signed.reasons()} == {f"declined-{reason}"}
    assert signed.bench.trainers == []


# --- refusals


@pytest.mark.parametrize(
    ("key", "nonce", "reason"),
    [
        ("own", "own", "declined-plan"),
        (None, "own", "signature"),
        ("other", "own", "signature"),
        ("own", "other", "nonce"),
    ],
    ids=str,
)
def test_a_refusal_counts_when_the_site_itself_signed_it(signed, without_b, key, nonce, reason):
    keys = {"own": signed.identities["b"], "other": signed.identities["a"]}

    def tamper(message):
        update = server_wire.decode_reply(message, max_bytes=1 << 20)
        said = update.header.nonce if nonce == "own" else "0" * 32
        refusal = Refusal(PROTOCOL_VERSION, "b", "run-1", 1, said, "plan")
        signature = sign(refusal, keys[key].signing_key if key else None)
        header = server_wire.decode_reply.__globals__["_header"](
            "refusal", refusal.to_json(), signature
        )
        message.content.pop("arrays")
        message.content["header"] = header
        return message

    assert struck(signed, tamper) == [(1, "b", reason)]
    assert signed.digest() == without_b


def test_an_identity_says_nothing_of_its_private_key(signed):
    identity: Identity = signed.identities["a"]
    assert "SigningKey(...)" in repr(identity)
    assert "BEGIN" not in repr(identity)
    assert np.char.count(repr(signed.keys), "SigningKey") == 0
