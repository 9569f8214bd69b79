"""The final checkpoint reaches every site as the coordinator signed it, or counts for nothing."""

import json
import os
from dataclasses import asdict, replace
from datetime import datetime

import pytest

from agssd_core.config.policy import DAYS
from agssd_core.delivery import Certificate
from agssd_core.envelope import sign
from agssd_core.errors import CheckpointError, WeightsError
from agssd_core.journal import verify_journal
from agssd_core.signing import SigningKey, VerifyKey, canonical
from agssd_core.weights import weights_digest
from client import wire as site_wire
from client.delivered import Signed, held, require_newer, write_checkpoint
from client.exporting import held_encoder
from server.control import set_state
from server.delivery import DELIVERIES_FILE, receipts, write_delivery
from simulation.grid import Fault
from tests.support.delivering import EnrolledHospital, certificate, fetch

LATER = DAYS[(datetime.now().weekday() + 3) % 7]


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch):
    """Nobody pulls a plug here: waiting for the disk is most of a toy round's time."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def hospital(tmp_path):
    return EnrolledHospital(tmp_path / "x", rounds=2)


@pytest.fixture
def seen(monkeypatch):
    """Final orders as they come to the sites; ``change`` may alter them."""
    original, found, change = site_wire.decode_final, [], {}

    def decode(message):
        sealed = original(message)
        sealed = change[sealed.order.site](sealed) if sealed.order.site in change else sealed
        found.append(sealed)
        return sealed

    monkeypatch.setattr(site_wire, "decode_final", decode)
    return found, change


@pytest.mark.parametrize("wire", ["float32", "bf16", "int8"])
def test_every_site_holds_the_signed_final_checkpoint_and_both_sides_note_it(tmp_path, seen, wire):
    hospital = EnrolledHospital(tmp_path / "x", rounds=2, wire=wire)
    hospital.run()
    for name, site in hospital.sites.items():
        (one,) = held(site)
        assert (one.certificate.round, one.certificate.rounds) == (2, 2)
        assert weights_digest(one.read(hospital.server_key.public)) == hospital.digest()
        assert hospital.deliveries(name) == ["came", "held"]
        verify_journal(site, hospital.identities[name].signing_key.public)
    assert sorted(hospital.deliveries()) == [(s, e) for s in "abc" for e in ("held", "sent")]
    verify_journal(hospital.federation, hospital.server_key.public)
    assert {sealed.order.wire for sealed in seen[0]} == {wire}


def test_fetch_checks_again_and_writes_what_export_takes(hospital, tmp_path):
    hospital.run()
    out = tmp_path / "encoder"
    answer = fetch("agssd", hospital.sites["a"], "--out", out)
    assert answer.exit_code == 0, answer.stderr
    assert "round 2 (final)" in answer.stdout
    assert sorted(path.name for path in out.iterdir()) == ["manifest.json", "weights.safetensors"]
    assert weights_digest(held_encoder(out, cohort="ct-mr").weights) == hospital.digest()
    assert fetch("agssd", hospital.sites["a"], "--out", out).exit_code == 0  # again, over its own
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    refused = fetch("agssd", hospital.sites["a"], "--out", tmp_path / "other")
    assert (refused.exit_code, "holds something else" in refused.stderr) == (2, True)
    missing = fetch("another", hospital.sites["a"])
    assert (missing.exit_code, "run-1" in missing.stderr) == (2, True)


def test_what_was_altered_on_the_sites_disk_is_not_handed_out(hospital, tmp_path):
    hospital.run()
    site, out = hospital.sites["a"], tmp_path / "encoder"
    (folder,) = (site / "delivered" / "run-1").iterdir()
    weights = folder / "weights.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    answer = fetch("agssd", site, "--out", out)
    assert (answer.exit_code, "not those that the coordinator signed" in answer.stderr) == (2, True)
    content[-1] ^= 1
    weights.write_bytes(content)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["certificate"]["rounds"] = 3
    (folder / "manifest.json").write_text(json.dumps(manifest))
    answer = fetch("agssd", site, "--out", out)
    assert (answer.exit_code, "signed by none" in answer.stderr) == (2, True)
    assert not out.exists()


def test_what_was_damaged_at_the_site_is_taken_again(hospital, tmp_path):
    hospital.run()
    site = hospital.sites["a"]
    (folder,) = (site / "delivered" / "run-1").iterdir()
    place = tmp_path / "final.safetensors"
    write_delivery(hospital.store, hospital.server_key, place)
    for name in ("weights.safetensors", "manifest.json"):
        (folder / name).write_bytes(b"damaged")
        assert fetch("agssd", site).exit_code == 2
        assert fetch(place, site).exit_code == 0
        assert fetch("agssd", site).exit_code == 0
    assert [path.name for path in folder.parent.iterdir()] == ["round-0002"]


def _unsigned(sealed, _own):
    return replace(sealed, signature="")


def _strangers(sealed, _own):
    return replace(sealed, signature=sign(sealed.order, SigningKey.create()))


def _flipped(sealed, _own):
    part = bytearray(sealed.payload["student"])
    part[-1] ^= 1
    return replace(sealed, payload=sealed.payload | {"student": bytes(part)})


def _resealed(sealed, own, **changes):
    order = replace(sealed.order, **changes)
    return replace(sealed, order=order, signature=sign(order, own))


def _another_sites(sealed, own):
    return _resealed(sealed, own, site="a")


def _uncertified(sealed, own):
    return _resealed(sealed, own, certificate_signature="")


def _edited_certificate(sealed, own):
    return _resealed(sealed, own, certificate=sealed.order.certificate | {"rounds": 9})


def _path_for_a_run(sealed, own):
    content = sealed.order.certificate | {"run": "../../evil"}
    signature = sign(Certificate.from_dict(content), own)
    return _resealed(
        sealed, own, run="../../evil", certificate=content, certificate_signature=signature
    )


def _another_round(sealed, own):
    return _resealed(sealed, own, round=1)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_unsigned, "signature"),
        (_strangers, "signature"),
        (_flipped, "base"),
        (_another_sites, "site"),
        (_uncertified, "certificate"),
        (_edited_certificate, "certificate"),
        (_path_for_a_run, "certificate"),
        (_another_round, "certificate"),
    ],
)
def test_a_delivery_that_does_not_hold_is_refused_by_name(hospital, seen, change, reason):
    seen[1]["b"] = lambda sealed: change(sealed, hospital.server_key)
    hospital.run()
    assert not (hospital.sites["b"] / "delivered").exists()
    told = receipts(hospital.store.folder)
    # Of a run with another id the refusal names that id, which the server did not ask about.
    assert told["b"]["reason"] == f"declined-{reason}"
    assert [bool(told[name]["held"]) for name in "abc"] == [True, False, True]
    assert "held" not in hospital.deliveries("b")


def test_other_weights_under_an_honest_certificate_are_refused(hospital, seen, monkeypatch):
    monkeypatch.setattr("client.delivery.unpack_whole", lambda _: hospital.store.load(1).weights)
    hospital.run()
    assert {said["reason"] for said in receipts(hospital.store.folder).values()} == {
        "declined-base"
    }
    assert not any((site / "delivered").exists() for site in hospital.sites.values())


def test_an_older_or_contradicting_delivery_is_refused_and_the_held_one_stays(hospital, tmp_path):
    hospital.run()
    site = hospital.sites["a"]
    (one,) = held(site)
    assert not require_newer(site, one.certificate)
    for number, reason in ((1, "older"), (2, "conflict")):
        with pytest.raises(Exception, match=r"Deliver the newest|Ask the coordinator") as refused:
            require_newer(site, certificate(number))
        assert refused.value.reason == reason
    hospital.store.folder.joinpath("checkpoints/round-0002").rename(tmp_path / "away")
    write_delivery(hospital.store, hospital.server_key, tmp_path / "old.safetensors")
    answer = fetch(tmp_path / "old.safetensors", site, "--out", tmp_path / "encoder")
    assert (answer.exit_code, "Deliver the newest" in answer.stderr) == (2, True)
    assert not (tmp_path / "encoder").exists()
    assert held(site) == [one]


def test_a_stop_ends_the_wait_for_sites_that_are_away(hospital):
    grid = hospital.grid()

    def leave(outcome):
        if outcome.round:
            grid.offline.add("b")
            set_state([hospital.store.folder], "stop")

    hospital.run(grid=grid, on_round=leave)
    assert grid.time.now < hospital.config.federation.delivery_s


def test_a_site_that_was_away_gets_it_when_the_server_serves_again(hospital, seen):
    grid = hospital.grid()
    hospital.run(grid=grid, on_round=lambda outcome: grid.offline.add("b") if outcome.round else 0)
    assert grid.time.now >= hospital.config.federation.delivery_s
    assert held(hospital.sites["b"]) == []
    hospital.run()
    assert [sealed.order.site for sealed in seen[0]] == ["a", "c", "b"]
    assert len(held(hospital.sites["b"])) == 1
    hospital.run()  # everybody has it
    assert len(seen[0]) == 3


def test_a_lost_receipt_is_answered_again_and_nothing_travels_twice(tmp_path, seen):
    hospital = EnrolledHospital(tmp_path / "x", rounds=2, wire="int8")
    hospital.run(lambda name, group: Fault(lost_reply=(name, group) == ("b", "final")))
    assert receipts(hospital.store.folder)["b"]["reason"] == "no-reply"
    hospital.run()
    assert receipts(hospital.store.folder)["b"] == {"held": hospital.digest(), "round": 2}
    assert [s.order.wire for s in seen[0] if s.order.site == "b"] == ["int8", "held"]
    assert hospital.deliveries("b") == ["came", "held", "came", "held"]


def test_a_receipt_signed_by_another_counts_for_nobody(hospital):
    identity = hospital.identities["a"]
    grid = hospital.grid()

    def swap(outcome):
        if outcome.round == 1:
            hospital.identities["b"] = identity
            grid._app = hospital.app()

    hospital.run(grid=grid, on_round=swap)
    assert receipts(hospital.store.folder)["b"]["reason"] == "signature"


def test_a_full_disk_leaves_nothing_and_the_server_is_told(hospital, monkeypatch):
    def full(*_given, **_named):
        raise WeightsError("weights could not be written (OSError). Free disk space.")

    monkeypatch.setattr("client.delivered.save_weights", full)
    hospital.run()
    for site in hospital.sites.values():
        assert not list((site / "delivered").rglob("*.safetensors"))
        assert not list((site / "delivered").rglob(".round*"))
    assert {said["reason"] for said in receipts(hospital.store.folder).values()} == {"site-error"}


@pytest.mark.parametrize("kind", ["tmp", "old"])
def test_what_a_killed_process_left_is_brought_back_or_removed(hospital, kind):
    hospital.run()
    site = hospital.sites["a"]
    (one,) = held(site)
    key, gone = hospital.server_key.public, 2**22 + 1  # above every process id of Linux
    weights = one.read(key)
    left = one.folder.with_name(f".{one.folder.name}.{gone}.{kind}")
    one.folder.rename(left)
    (one.folder.parent / f".round-0001.{gone}.{kind}").mkdir()  # another round's
    write_checkpoint(one.folder, one.signed, weights)
    assert held(site) == [one]
    assert not left.exists()


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ("cohorts: [us]", "policy-cohort"),
        (f"hours: [{{days: [{LATER}]}}]", "policy-hours"),
        ("nonsense: 1", "policy-file"),
    ],
)
def test_the_owners_policy_decides_about_a_delivery_too(hospital, policy, reason):
    def forbid(outcome):
        if outcome.round == 1:
            (hospital.sites["b"] / "policy.yaml").write_text(policy)

    hospital.run(on_round=forbid)
    assert receipts(hospital.store.folder)["b"]["reason"] == f"declined-{reason}"
    assert held(hospital.sites["b"]) == []


def test_an_unsigned_run_delivers_nothing_and_a_site_without_keys_takes_nothing(hospital):
    hospital.keys, keys = None, hospital.keys
    hospital.identities = dict.fromkeys(hospital.sites)
    hospital.run()
    assert not (hospital.store.folder / DELIVERIES_FILE).exists()
    hospital.keys = keys
    hospital.run()
    assert not receipts(hospital.store.folder)  # the site's answer who it is was not signed
    assert not any((site / "delivered").exists() for site in hospital.sites.values())


def test_a_signature_of_another_purpose_is_none(hospital):
    said = certificate(2)
    key = hospital.server_key
    for purpose in ("order", "delivery"):
        signed = Signed(said, key.sign(purpose, canonical(asdict(said))))
        with pytest.raises(Exception, match="signed by none"):
            signed.require(VerifyKey.from_text(key.public.text()))
    Signed(said, sign(said, key)).require(key.public)
    bad = replace(said, cohort="all")
    with pytest.raises(CheckpointError, match="no run, cohort or round"):
        Signed(bad, sign(bad, key)).require(key.public)
