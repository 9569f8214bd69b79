"""The federation's certificate authority and the server's certificate.

The authority's key is encrypted under a passphrase and is needed for nothing but certificates:
it may lie offline between them. Sites trust its certificate alone.
"""

import ipaddress
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from agssd_core.errors import KeyFileError

CA_DAYS = 3650
# A site's clock may be behind.
_GRACE = timedelta(minutes=5)


@dataclass(frozen=True)
class Authority:
    """The CA: its private key, opened, and its certificate."""

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate


@dataclass(frozen=True)
class ServerCertificate:
    """A certificate and its private key, PEM; ``expires`` in UTC."""

    certificate: bytes
    key: bytes
    expires: datetime


def new_ca_key(passphrase: bytes) -> bytes:
    """A P-384 key, PKCS8 PEM, encrypted."""
    key = ec.generate_private_key(ec.SECP384R1())
    encryption = BestAvailableEncryption(passphrase)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)


def open_ca_key(pem: bytes, passphrase: bytes) -> ec.EllipticCurvePrivateKey:
    """Decrypt what ``new_ca_key`` made.

    Raises:
        KeyFileError: another passphrase, or no such key.
    """
    try:
        key = load_pem_private_key(pem, password=passphrase)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        raise KeyFileError(
            "ca.key does not open: the passphrase is another, or the file is damaged. Nothing was "
            "changed; try again."
        ) from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise KeyFileError("ca.key is no EC key. Restore it from the backup.")
    return key


def ca_certificate(key: ec.EllipticCurvePrivateKey, federation: str, now: datetime) -> bytes:
    """The authority's own certificate, PEM: it may sign servers and no further authority."""
    name = _name(f"{federation} CA")
    builder = (
        _builder(name, name, key.public_key(), now, now + timedelta(days=CA_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign_certificates=True), critical=True)
    )
    return builder.sign(key, hashes.SHA384()).public_bytes(Encoding.PEM)


def open_ca(key: ec.EllipticCurvePrivateKey, pem: bytes) -> Authority:
    """Put the authority together.

    Raises:
        KeyFileError: key and certificate do not belong together.
    """
    try:
        certificate = x509.load_pem_x509_certificate(pem)
    except ValueError:
        raise KeyFileError("ca.crt is damaged. Restore it from the backup.") from None
    if certificate.public_key() != key.public_key():
        raise KeyFileError("ca.crt and ca.key do not belong together. Restore both.")
    return Authority(key, certificate)


def server_certificate(
    authority: Authority, *, common_name: str, hosts: Sequence[str], days: int, now: datetime
) -> ServerCertificate:
    """Make a key for the server and certify it.

    Args:
        authority: signs.
        common_name: shown by tools; who connects looks at ``hosts`` only.
        hosts: DNS names and addresses, all that the certificate holds for.
        days: until it expires, the authority's own expiry at the latest.
        now: with time zone.

    Raises:
        KeyFileError: the authority has expired.
    """
    expires = min(now + timedelta(days=days), authority.certificate.not_valid_after_utc)
    if expires <= now:
        raise KeyFileError("the CA's certificate has expired. Provision a new federation.")
    key = ec.generate_private_key(ec.SECP384R1())
    alternative = x509.SubjectAlternativeName([_general_name(host) for host in hosts])
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.key.public_key())
    builder = (
        _builder(_name(common_name), authority.certificate.subject, key.public_key(), now, expires)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(sign_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(alternative, critical=False)
        .add_extension(issuer, critical=False)
    )
    certificate = builder.sign(authority.key, hashes.SHA384())
    chain = certificate.public_bytes(Encoding.PEM) + authority.certificate.public_bytes(
        Encoding.PEM
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return ServerCertificate(chain, private, certificate.not_valid_after_utc)


def certificate_expiry(file: Path) -> datetime:
    """When a server's certificate ends.

    Raises:
        KeyFileError: it is missing or damaged.
    """
    try:
        certificate = x509.load_pem_x509_certificate(file.read_bytes())
    except (OSError, ValueError):
        raise KeyFileError(
            "server.pem is missing or damaged. Use `agssd-server provision --renew-certificate`."
        ) from None
    return certificate.not_valid_after_utc.astimezone(UTC)


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    public: ec.EllipticCurvePublicKey,
    now: datetime,
    expires: datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _GRACE)
        .not_valid_after(expires)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _name(common_name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name[:64])])


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)
