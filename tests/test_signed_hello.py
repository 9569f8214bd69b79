"""Who a node is: in a signed run the site's own signature over the very question, or nobody."""

import os
from dataclasses import asdict, replace

import pytest

from agssd_core.envelope import SealedHello, sign
from agssd_core.journal import Journal, entries_of
from agssd_core.signing import SigningKey, canonical
from client import wire as site_wire
from server import wire as server_wire
from server.chronicle import Chronicle
from simulation.grid import Fault
from tests.support.signing import SignedHospital
from tests.support.toy import Hospital


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch):
    """Nobody pulls a plug here: waiting for the disk is most of a toy round's time."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def signed(tmp_path):
    return SignedHospital(tmp_path / "x", rounds=1)


@pytest.fixture(scope="module")
def without_b(tmp_path_factory):
    absent = Hospital(tmp_path_factory.mktemp("absent") / "x", rounds=1)
    absent.run(lambda name, _group: Fault(offline=name == "b"))
    return absent.digest()


class Owners:
    """Whose node is whose, as the server knows it by the nodes' keys."""

    def site_of(self, node):
        return "abc"[node - 101]

    def patients(self, _site, _cohort):
        return {"a": 3, "b": 2, "c": 4}[_site]


def answering(node, change):
    """One node's answer to the question who it is goes through these hands."""

    def tamper(message):
        sealed = change(server_wire.decode_reply(message, max_bytes=1 << 16))
        reply = site_wire.encode_hello(sealed, reply_to=message)
        reply.metadata.__dict__.update(message.metadata.__dict__)
        return reply

    return lambda name, group: Fault(tamper=tamper if (name, group) == (node, "hello") else None)


def by(key, **changes):
    def change(sealed):
        hello = replace(sealed.hello, **changes)
        return SealedHello(hello, sign(hello, key))

    return change


def unsigned(sealed):
    return replace(sealed, signature="")


def altered(sealed):
    return replace(sealed, hello=replace(sealed.hello, software="9"))


BAD = {
    "unsigned": lambda _run: unsigned,
    "altered": lambda _run: altered,
    "stranger": lambda _run: by(SigningKey.create()),
    "another site's": lambda run: by(run.identities["a"].signing_key),
    "the server's": lambda run: by(run.server_key),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_hello_that_its_site_did_not_sign_is_refused(signed, without_b, kind):
    signed.run(answering("b", BAD[kind](signed)))
    assert signed.reasons() == [(0, "b", "signature")]
    assert signed.digest() == without_b


def test_the_answer_to_an_earlier_question_is_refused(signed, without_b):
    signed.run(answering("b", by(signed.identities["b"].signing_key, nonce="0" * 32)))
    assert signed.reasons() == [(0, "b", "nonce")]
    assert signed.digest() == without_b


def test_a_signature_of_another_record_is_none(signed, without_b):
    key = signed.identities["b"].signing_key

    def change(sealed):
        return SealedHello(sealed.hello, key.sign("update", canonical(asdict(sealed.hello))))

    signed.run(answering("b", change))
    assert signed.reasons() == [(0, "b", "signature")]
    assert signed.digest() == without_b


@pytest.mark.parametrize("signer", ["a", "b", None])
def test_a_node_that_takes_anothers_name_keeps_nobody_out(signed, signer):
    """Node a is asked first and says that it is b; b takes part all the same, and a is named."""
    key = signed.identities[signer].signing_key if signer else None
    signed.run(answering("a", by(key, site="b")), members=Owners())
    reason = "site" if signer == "b" else "signature"
    assert signed.reasons() == [(0, "a", reason)]
    assert signed.store.latest().manifest.sites == ("b", "c")


def test_without_members_the_owner_of_a_taken_name_is_not_blamed(signed):
    key = signed.identities["a"].signing_key
    signed.run(answering("a", by(key, site="b")))
    assert signed.reasons() == []
    assert signed.store.latest().manifest.sites == ("b", "c")


def test_the_coordinators_journal_tells_of_it(signed, tmp_path):
    folder = tmp_path / "journal"
    folder.mkdir()
    journal = Journal(folder, signed.server_key, owner="trial")
    signed.run(answering("b", unsigned), members=Owners(), chronicle=Chronicle(journal))
    refused = [entry.facts for entry in entries_of(folder) if entry.kind == "refusal"]
    of_b = [(each["reason"], each["round"]) for each in refused if each["site"] == "b"]
    assert of_b == [("signature", 0)]


def test_an_unsigned_run_asks_for_no_signature(tmp_path):
    plain = Hospital(tmp_path / "x", rounds=1)
    plain.run(answering("b", altered))
    assert plain.reasons() == []
    assert plain.store.latest().manifest.sites == ("a", "b", "c")
