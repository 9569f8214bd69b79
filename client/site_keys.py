"""The private keys of a site: made on its own machine, in files for the owner alone."""

from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import (
    SECP384R1,
    EllipticCurvePrivateKey,
    generate_private_key,
)
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)

from agssd_core.errors import EnrolmentError, KeyFileError
from agssd_core.folders import require_private
from agssd_core.signing import SigningKey
from agssd_core.weights import write_bytes, write_text
from client.connection import node_key_file, signing_key_file


def make_keys(site: Path, key_id: int) -> SigningKey:
    """Make the node's key and the signing key ``key_id``; what is there already stays.

    Returns:
        The signing key.

    Raises:
        KeyFileError: a key that exists is damaged or readable by others.
    """
    node_file = node_key_file(site, key_id)
    if not node_file.exists():
        # Flower reads this form only, and no key with a passphrase.
        pem = generate_private_key(SECP384R1()).private_bytes(
            Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()
        )
        write_bytes(node_file, pem, private=True)
    write_text(node_file.with_name(f"{node_file.name}.pub"), node_public(site, key_id) + "\n")
    signing_file = signing_key_file(site, key_id)
    if not signing_file.exists():
        SigningKey.create().save(signing_file)
    return SigningKey.load(signing_file)


def node_public(site: Path, key_id: int) -> str:
    """The public half of a node's key, OpenSSH text.

    Raises:
        KeyFileError: the private key is missing, damaged, of another kind or readable by others.
    """
    file = node_key_file(site, key_id)
    require_private(file, what="the node's key")
    try:
        key = load_ssh_private_key(file.read_bytes(), password=None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, EllipticCurvePrivateKey) or not isinstance(key.curve, SECP384R1):
        raise KeyFileError(
            "the node's key is damaged or no EC P-384 key. Restore it from the backup, or enrol "
            "again."
        )
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode("ascii")


def signing_keys(site: Path, newest: int) -> list[SigningKey]:
    """The signing keys that the site has, the newest first.

    Raises:
        KeyFileError: one is damaged or readable by others, or there is none.
    """
    files = [signing_key_file(site, key_id) for key_id in range(newest, 0, -1)]
    keys = [SigningKey.load(file) for file in files if file.exists()]
    if not keys:
        raise KeyFileError("the site has no signing key. Restore it from the backup, or enrol.")
    return keys


def require_ca(pem: bytes, now: datetime) -> None:
    """Check that a certificate is that of an authority, and in force.

    Raises:
        EnrolmentError: it is not.
    """
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        constraints = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
        is_authority = constraints.value.ca
        expires = certificate.not_valid_after_utc
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension):
        raise EnrolmentError(
            "ca.crt in the kit is no certificate of an authority. Ask for the kit again."
        ) from None
    if not is_authority or expires <= now:
        raise EnrolmentError(
            "ca.crt in the kit is no authority's or has expired. Ask for the kit again, or set "
            "this machine's clock."
        )
