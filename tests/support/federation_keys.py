"""A federation's certificates and node keys, as small as they can be."""

import ipaddress
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from agssd_core.enrolment import Enrolment
from agssd_core.signing import SigningKey

LOCAL = (x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1")))


def make_federation(folder, names=LOCAL):
    """ca.crt, server.pem, server.key and signing.pem in a folder."""
    folder.mkdir(parents=True)
    authority, server = (ec.generate_private_key(ec.SECP384R1()) for _ in range(2))
    ca = _certificate("ca", authority.public_key(), "ca", authority, [])
    names = x509.SubjectAlternativeName(names)
    usage = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
    leaf = _certificate("server", server.public_key(), "ca", authority, [names, usage])
    (folder / "ca.crt").write_bytes(ca.public_bytes(Encoding.PEM))
    (folder / "server.pem").write_bytes(leaf.public_bytes(Encoding.PEM))
    key = folder / "server.key"
    key.touch(mode=0o600)
    key.write_bytes(server.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    SigningKey.create().save(folder / "signing.pem")
    return folder


def make_node_key(file):
    """A private key for a SuperNode in ``file``; its public half as text."""
    key = ec.generate_private_key(ec.SECP384R1())
    file.touch(mode=0o600)
    file.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


def make_enrolment(site, node_key, *, key_id=1, days=90, federation=None):
    """A record signed by the federation in that folder, or not at all."""
    moment = datetime.now(UTC) - timedelta(minutes=1)
    record = Enrolment(
        "trial",
        site,
        key_id,
        {"ct-mr": 3},
        node_key,
        SigningKey.create().public.text(),
        moment.isoformat(),
        (moment + timedelta(days=days)).isoformat(),
    )
    return record.signed(SigningKey.load(federation / "signing.pem")) if federation else record


def _certificate(subject, public_key, issuer, signer, extensions):
    moment = datetime.now(UTC)
    authority = subject == issuer
    builder = (
        x509.CertificateBuilder()
        .subject_name(_name(subject))
        .issuer_name(_name(issuer))
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(moment - timedelta(minutes=5))
        .not_valid_after(moment + timedelta(days=2))
    )
    own = x509.SubjectKeyIdentifier.from_public_key(public_key)
    above = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    basic = x509.BasicConstraints(ca=authority, path_length=0 if authority else None)
    builder = builder.add_extension(basic, critical=True)
    for extension in [own, above, *extensions]:
        builder = builder.add_extension(extension, critical=False)
    return builder.sign(signer, hashes.SHA384())


def _name(text):
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])
