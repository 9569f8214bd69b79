"""The final checkpoint as a file: it is taken as the coordinator signed it, or not at all."""

import os

import pytest
from typer.testing import CliRunner

from agssd_core.signing import SigningKey
from agssd_core.weights import load_weights, weights_digest
from server.cli import app
from server.delivery import write_delivery
from simulation.grid import Fault
from tests.support.delivering import EnrolledHospital, fetch


@pytest.fixture(autouse=True)
def _fast_disk(monkeypatch):
    """Nobody pulls a plug here: waiting for the disk is most of a toy round's time."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def hospital(tmp_path):
    return EnrolledHospital(tmp_path / "x", rounds=2)


@pytest.fixture
def file(hospital, tmp_path):
    hospital.run(lambda _name, group: Fault(offline=group == "final"))
    place = tmp_path / "final.safetensors"
    write_delivery(hospital.store, hospital.server_key, place)
    return place


def test_a_file_brings_the_checkpoint_to_a_site_that_was_away(hospital, file, tmp_path):
    site = hospital.sites["a"]
    answer = fetch(file, site, "--out", tmp_path / "encoder")
    assert answer.exit_code == 0, answer.stderr
    assert weights_digest(load_weights(tmp_path / "encoder" / "weights.safetensors")) == (
        hospital.digest()
    )
    assert hospital.deliveries("a") == ["held"]
    assert fetch("run-1", site).exit_code == 0


@pytest.mark.parametrize("damage", ["flipped", "cut", "none", "unsigned", "stranger", "edited"])
def test_a_file_that_does_not_hold_is_refused_and_nothing_is_written(
    hospital, file, tmp_path, damage, monkeypatch
):
    content = bytearray(file.read_bytes())
    if damage == "flipped":
        content[-1] ^= 1
    if damage == "cut":
        content = content[:-50]
    if damage == "none":
        content = bytearray(b"no safetensors")
    if damage == "stranger":
        write_delivery(hospital.store, SigningKey.create(), file)
        content = file.read_bytes()
    if damage == "unsigned":
        monkeypatch.setattr("server.delivery.sign", lambda *_: "")
        write_delivery(hospital.store, hospital.server_key, file)
        content = file.read_bytes()
    if damage == "edited":
        content = content.replace(b'\\"rounds\\": 2', b'\\"rounds\\": 3')
        assert content != file.read_bytes()
    file.write_bytes(content)
    answer = fetch(file, hospital.sites["a"], "--out", tmp_path / "encoder")
    words = {
        "flipped": "not those that the coordinator signed",
        "cut": "no delivery",
        "none": "no delivery",
        "unsigned": "is not signed",
        "stranger": "signed by none",
        "edited": "signed by none",
    }
    assert answer.exit_code == 2
    assert words[damage] in " ".join(answer.stderr.split())
    assert not (hospital.sites["a"] / "delivered").exists()
    assert not (tmp_path / "encoder").exists()


def test_a_cohort_that_the_run_has_not_is_said(hospital, tmp_path, monkeypatch):
    hospital.run()
    folder = str(hospital.store.folder)
    monkeypatch.setattr("server.deliver_cli.signing_key", lambda _: hospital.server_key)
    command = ["deliver", folder, "-f", str(tmp_path), "--cohort", "us"]
    answer = CliRunner().invoke(app, [*command, "--out", str(tmp_path / "file")])
    assert (answer.exit_code, "the run is of cohort ct-mr, not us" in answer.stderr) == (2, True)
    assert not (tmp_path / "file").exists()
