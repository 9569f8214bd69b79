"""Ed25519 signatures of a site and of the coordinator.

A signature covers its purpose as well as the bytes, so that one made for a journal can never
pass for one made for an update. Keys are pinned by enrolment; nothing here trusts a key that
came with a message.
"""

import base64
import binascii
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)

from agssd_core.errors import KeyFileError, SignatureError
from agssd_core.weights import write_bytes

Purpose = Literal[
    "order",
    "update",
    "refusal",
    "journal",
    "enrolment",
    "kit",
    "checkpoint",
    "ledger",
    "delivery",
    "receipt",
    "hello",
]
_PREFIX = "ed25519:"


def canonical(content: Mapping[str, Any]) -> bytes:
    """The one JSON form of a record that is signed: sorted keys, no spaces, no NaN."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("utf-8")


class VerifyKey:
    """A public key, pinned for one site or for the coordinator."""

    def __init__(self, key: Ed25519PublicKey) -> None:
        self._key = key

    @classmethod
    def from_text(cls, text: str) -> "VerifyKey":
        """Read ``ed25519:BASE64``.

        Raises:
            KeyFileError: it is no such key.
        """
        try:
            if not text.startswith(_PREFIX):
                raise ValueError("prefix")
            raw = base64.b64decode(text.removeprefix(_PREFIX), validate=True)
            return cls(Ed25519PublicKey.from_public_bytes(raw))
        except (ValueError, binascii.Error):
            raise KeyFileError(
                "a public signing key is not of the form ed25519:BASE64 with 32 bytes. Ask its "
                "owner for it again."
            ) from None

    def text(self) -> str:
        """As it is written into records."""
        return _PREFIX + base64.b64encode(self._raw()).decode("ascii")

    def verify(self, purpose: Purpose, payload: bytes, signature: str) -> None:
        """Check a signature made by ``SigningKey.sign``.

        Args:
            purpose: what it was made for.
            payload: the signed bytes.
            signature: Base64.

        Raises:
            SignatureError: it was made by another key, for another purpose or of other bytes.
        """
        try:
            raw = base64.b64decode(signature, validate=True)
            self._key.verify(raw, _message(purpose, payload))
        except (InvalidSignature, ValueError, binascii.Error):
            raise SignatureError(
                f"the signature of this {purpose} is not that of the enrolled key. Refuse it, and "
                "compare the key with its owner."
            ) from None

    def _raw(self) -> bytes:
        return self._key.public_bytes(Encoding.Raw, PublicFormat.Raw)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VerifyKey) and self._raw() == other._raw()

    def __hash__(self) -> int:
        return hash(self._raw())


class SigningKey:
    """A private key that never leaves its machine; files of it are readable by the owner only."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key

    @classmethod
    def create(cls) -> "SigningKey":
        """A new key from the operating system's randomness."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load(cls, path: Path) -> "SigningKey":
        """Read a key that ``save`` wrote.

        Raises:
            KeyFileError: there is none, it is damaged, or others can read it.
        """
        try:
            mode = path.stat().st_mode
            if mode & 0o077:
                raise KeyFileError(
                    f"a signing key can be read by others (mode {mode & 0o777:03o}). Set it to "
                    "600, and renew the key if others use this machine."
                )
            key = load_pem_private_key(path.read_bytes(), password=None)
        except (OSError, ValueError, TypeError):
            raise KeyFileError(
                "the signing key is missing or damaged. Restore it from the backup, or enrol again."
            ) from None
        if not isinstance(key, Ed25519PrivateKey):
            raise KeyFileError("the signing key is not an Ed25519 key. Enrol again.")
        return cls(key)

    def save(self, path: Path) -> None:
        """Write the key, PKCS8 PEM, mode 0600."""
        pem = self._key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        write_bytes(path, pem, private=True)

    @property
    def public(self) -> VerifyKey:
        """Its public half."""
        return VerifyKey(self._key.public_key())

    def sign(self, purpose: Purpose, payload: bytes) -> str:
        """Sign bytes for one purpose; Base64."""
        return base64.b64encode(self._key.sign(_message(purpose, payload))).decode("ascii")

    def __repr__(self) -> str:
        return "SigningKey(...)"


def _message(purpose: Purpose, payload: bytes) -> bytes:
    return b"agssd/" + purpose.encode("ascii") + b"/v1\0" + payload
