"""Provisioning: certificates that TLS accepts, keys made once, a kit for each site."""

import os
import socket
import ssl
import threading
from contextlib import suppress
from datetime import UTC, datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from agssd_core.config.deployment import DeploymentConfig
from agssd_core.config.load import load_node
from agssd_core.errors import ConfigError, KeyFileError
from agssd_core.kit import read_kit
from server import provision as provision_module
from server.federation_folder import load_federation
from server.provision import provision
from tests.support.enrolling import NOW, SECRET, events, kit_of, provisioned, settings
from tests.support.killing import Killed, Killer, watched

PRIVATE = ("ca.key", "server.key", "signing.pem", "kits/north.zip", "tokens/north.json")


def again(folder, config=None, *, secret=SECRET, now=NOW, **options):
    given = config or settings()
    return provision(given, folder, passphrase=lambda _new: secret, now=now, **options)


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def shake_hands(folder, host):
    """A TLS connection to a server that shows the certificate; who connects looks for ``host``."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(folder / "server.pem", folder / "server.key")
    client = ssl.create_default_context(cafile=folder / "ca.crt")
    near, far = socket.socketpair()

    def serve():
        with far, suppress(OSError), server.wrap_socket(far, server_side=True) as session:
            session.recv(1)

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with near, client.wrap_socket(near, server_hostname=host) as session:
            session.send(b"x")
            return session.version()
    finally:
        thread.join()


@pytest.mark.parametrize("host", ["fed.example.org", "10.20.0.5", "localhost", "127.0.0.1"])
def test_tls_accepts_the_certificate_for_its_names(tmp_path, host):
    folder = provisioned(tmp_path / "fed", now=datetime.now(UTC))
    assert shake_hands(folder, host) == "TLSv1.3"


def test_tls_refuses_another_name(tmp_path):
    folder = provisioned(tmp_path / "fed", now=datetime.now(UTC))
    with pytest.raises(ssl.SSLCertVerificationError, match="Hostname mismatch"):
        shake_hands(folder, "other.example.org")


def test_the_certificates_say_what_they_may_be_used_for(tmp_path):
    folder = provisioned(tmp_path / "fed", key_days=30)
    ca = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
    leaf = x509.load_pem_x509_certificate((folder / "server.pem").read_bytes())
    constraints = ca.extensions.get_extension_for_class(x509.BasicConstraints)
    assert constraints.critical
    assert (constraints.value.ca, constraints.value.path_length) == (True, 0)
    assert not leaf.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert leaf.not_valid_after_utc == NOW + timedelta(days=30)
    assert leaf.not_valid_before_utc == NOW - timedelta(minutes=5)
    for key in (ca.public_key(), leaf.public_key()):
        assert isinstance(key.curve, ec.SECP384R1)
    store = x509.verification.Store([ca])
    name = x509.DNSName("fed.example.org")
    for days, holds in [(29, True), (31, False)]:
        policy = x509.verification.PolicyBuilder().store(store).time(NOW + timedelta(days=days))
        verifier = policy.build_server_verifier(name)
        if holds:
            assert verifier.verify(leaf, [])
        else:
            with pytest.raises(x509.verification.VerificationError):
                verifier.verify(leaf, [])


def test_secrets_are_for_the_owner_alone_and_the_authority_is_encrypted(tmp_path):
    old = os.umask(0)
    try:
        folder = provisioned(tmp_path / "fed")
    finally:
        os.umask(old)
    assert folder.stat().st_mode & 0o777 == 0o700
    for name in PRIVATE:
        assert (folder / name).stat().st_mode & 0o077 == 0, name
    pem = (folder / "ca.key").read_bytes()
    assert b"ENCRYPTED" in pem
    assert load_pem_private_key(pem, SECRET)
    with pytest.raises(ValueError, match="password"):
        load_pem_private_key(pem, b"another passphrase")
    token = read_kit(kit_of(folder, "north"))[0].token
    public = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_mode & 0o044]
    assert {path.name for path in public} == {"ca.crt", "server.pem", "federation.json"}
    assert all(token.encode() not in path.read_bytes() for path in public)


def test_a_second_run_changes_nothing_and_asks_for_nothing(tmp_path):
    folder = provisioned(tmp_path / "fed")
    before = contents(folder)
    done = provision(settings(), folder, passphrase=lambda _new: pytest.fail("asked"), now=NOW)
    assert (done.kits, done.known, done.certificate_expires) == ((), ("north", "south"), None)
    assert contents(folder) == before


def test_a_new_site_gets_a_kit_without_the_authority(tmp_path):
    folder = provisioned(tmp_path / "fed")
    (folder / "ca.key").unlink()  # offline
    before = contents(folder)
    done = again(folder, settings("north", "south", "west"))
    assert done.kits == ("west",)
    kit, ca = read_kit(kit_of(folder, "west"))
    kit.verify(ca, now=NOW)
    after = contents(folder)
    changed = {path.name for path in before if after[path] != before[path]}
    assert changed == {"federation.json", "journal.jsonl"}
    assert events(folder)[-1] == "kit made"


def test_a_member_that_the_file_no_longer_names_stays_until_revoked(tmp_path):
    folder = provisioned(tmp_path / "fed")
    assert again(folder, settings("north")).unlisted == ("south",)
    members = [site.name for site in load_federation(folder).settings.sites]
    assert members == ["north", "south"]


def test_every_site_has_a_token_of_its_own(tmp_path):
    folder = provisioned(tmp_path / "fed", "a", "b", "c")
    kits = [read_kit(kit_of(folder, site))[0] for site in "abc"]
    assert len({kit.token for kit in kits}) == 3
    assert [kit.site for kit in kits] == ["a", "b", "c"]


def test_the_certificate_is_renewed_with_a_new_key_under_the_same_authority(tmp_path):
    folder = provisioned(tmp_path / "fed")
    before = contents(folder)
    done = again(folder, now=NOW + timedelta(days=80), renew_certificate=True)
    assert done.certificate_expires == NOW + timedelta(days=170)
    changed = {path.name for path, old in before.items() if path.read_bytes() != old}
    assert changed == {"server.pem", "server.key", "journal.jsonl"}


def test_a_wrong_passphrase_changes_nothing(tmp_path):
    folder = provisioned(tmp_path / "fed")
    before = contents(folder)
    with pytest.raises(KeyFileError, match="the passphrase is another"):
        again(folder, secret=b"something else", renew_certificate=True)
    assert contents(folder) == before


REFUSED = {
    "name": (settings(name="hearts"), {}, "is that of federation lungs, not of hearts"),
    "address": (
        settings(server={"host": "other.example.org"}),
        {},
        "sites hold the address fed.example.org:8443",
    ),
    "names": (
        settings(server={"host": "fed.example.org", "port": 8443}),
        {},
        "Add --renew-certificate",
    ),
    "again": (settings(), {"again": ["west"]}, "--again names west, no member"),
}


@pytest.mark.parametrize(("config", "options", "said"), REFUSED.values(), ids=REFUSED)
def test_a_change_that_sites_would_not_survive_is_refused(tmp_path, config, options, said):
    folder = provisioned(tmp_path / "fed")
    before = contents(folder)
    with pytest.raises(ConfigError, match=said):
        again(folder, config, **options)
    assert contents(folder) == before


def test_missing_and_open_keys_are_refused(tmp_path):
    folder = provisioned(tmp_path / "fed")
    (folder / "ca.key").chmod(0o640)
    with pytest.raises(KeyFileError, match=r"ca.key can be read by others \(mode 640\)"):
        again(folder, renew_certificate=True)
    (folder / "ca.key").unlink()
    with pytest.raises(ConfigError, match="Bring it back from where it is kept offline"):
        again(folder, renew_certificate=True)
    (folder / "signing.pem").unlink()
    with pytest.raises(KeyFileError, match="Restore it from the backup"):
        again(folder)
    assert not (folder / "signing.pem").exists()


def test_a_folder_that_others_can_enter_is_refused(tmp_path):
    (tmp_path / "fed").mkdir(mode=0o755)
    with pytest.raises(KeyFileError, match="Set it to 700"):
        provisioned(tmp_path / "fed")


def test_killed_anywhere_the_same_command_finishes_the_work(tmp_path, monkeypatch):
    """At every written file: one federation in the end, whose parts fit together."""
    names = ("write_bytes", "write_kit", "save_federation", "save_token", "open_journal")
    originals = {name: getattr(provision_module, name) for name in names}
    for at in range(1, 30):
        folder, killer = tmp_path / f"fed-{at}", Killer(at)
        with monkeypatch.context() as patch:
            for name, original in originals.items():
                patch.setattr(provision_module, name, watched(original, killer))
            try:
                provisioned(folder)
                break
            except Killed:
                pass
        provisioned(folder)
        chain = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        chain.load_cert_chain(folder / "server.pem", folder / "server.key")
        for site in ("north", "south"):
            kit, ca = read_kit(kit_of(folder, site))
            kit.verify(ca, now=NOW)
            assert kit.token in (folder / "tokens" / f"{site}.json").read_text()
            assert kit.server_key == load_federation(folder).server_key
    assert at > 15


BAD_CONFIGS = {
    "empty": ("{}", "name = .*Field required"),
    "key": ("{nme: x}", "nme is not a known key. Did you mean 'name'"),
    "site": ("{sites: [{name: ../x, cohorts: [us]}]}", "site name '../x' may hold letters"),
    "cohort": ("{sites: [{name: x, cohorts: [pet]}]}", "sites.0.cohorts.0 = 'pet'"),
    "no cohort": ("{sites: [{name: x, cohorts: []}]}", "site x has no cohort"),
    "twice": (
        "{name: n, server: {host: h}, sites: [{name: A, cohorts: [us]}, {name: a, cohorts: [us]}]}",
        "sites: a stands there twice",
    ),
    "host": ("{server: {host: 'https://x'}}", "neither a DNS name nor an address"),
    "address": ("{server: {host: 10.0.0.300}}", "neither a DNS name nor an address"),
    "wildcard": ("{server: {host: h, names: ['*.x.org']}}", "without port or wildcard"),
    "port": ("{server: {host: h, port: 70000}}", "server.port = 70000 lies outside"),
    "days": (
        "{name: n, server: {host: h}, sites: [{name: a, cohorts: [us]}], key_days: 91}",
        r"key_days = 91 lies outside \[1, 90\]",
    ),
    "no yaml": ("a: [", "is not valid YAML"),
}


@pytest.mark.parametrize(("text", "said"), BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_faults_of_the_configuration_are_told(tmp_path, text, said):
    (tmp_path / "federation.yaml").write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_node(tmp_path / "federation.yaml", DeploymentConfig)
