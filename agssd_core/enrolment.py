"""What the coordinator knows of an enrolled site; signed by the coordinator, kept by both.

The request comes from the site, the enrolment is the coordinator's answer.
"""

import hashlib
import hmac
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ec import SECP384R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_ssh_public_key,
)

from agssd_core.errors import KeyFileError
from agssd_core.protocol import Record
from agssd_core.signing import SigningKey, VerifyKey, canonical


@dataclass(frozen=True)
class Enrolment(Record):
    """One key of one site.

    A renewed key is a further enrolment with the next ``key_id``; merging counts a site once.

    Attributes:
        federation, site: names.
        key_id: counted from 1.
        cohorts: cohort -> patients, the merging weights; taken from the site's signed request.
        node_key: public EC P-384 key of the site's Flower node, OpenSSH text.
        signing_key: public Ed25519 key, ``ed25519:BASE64``.
        admitted, expires: ISO date-time in UTC.
        signature: the coordinator's, over all the rest.
    """

    federation: str
    site: str
    key_id: int
    cohorts: dict[str, int]
    node_key: str
    signing_key: str
    admitted: str
    expires: str
    signature: str = field(default="")

    def signed(self, key: SigningKey) -> "Enrolment":
        """The same record with the coordinator's signature."""
        return Enrolment(**(asdict(self) | {"signature": key.sign("enrolment", self._payload())}))

    def verify(self, key: VerifyKey) -> None:
        """Check the coordinator's signature.

        Raises:
            SignatureError: the record was altered or is another federation's.
        """
        key.verify("enrolment", self._payload(), self.signature)

    def is_valid_at(self, moment: datetime) -> bool:
        """Whether the key may be used then."""
        return datetime.fromisoformat(self.admitted) <= moment < self.expiry

    @property
    def expiry(self) -> datetime:
        """When the key ends."""
        return datetime.fromisoformat(self.expires).astimezone(UTC)

    def _payload(self) -> bytes:
        return canonical(asdict(self) | {"signature": ""})


@dataclass(frozen=True)
class EnrolmentRequest(Record):
    """What a site sends to be enrolled, or to be enrolled with a further key. All of it is public.

    Attributes:
        key_id: number of the new key.
        renews: number of the key that vouches for the new one; 0 when the kit's token does.
        cohorts: cohort -> patients with a scan for it.
        node_key, signing_key: the new public keys, as in ``Enrolment``.
        made: ISO date-time in UTC.
        proof: HMAC-SHA256 under the token in hexadecimal, or the old key's signature in Base64.
        signature: by the new signing key, over all the rest.
    """

    protocol: int
    federation: str
    site: str
    key_id: int
    renews: int
    cohorts: dict[str, int]
    node_key: str
    signing_key: str
    made: str
    proof: str = ""
    signature: str = ""

    def proved_by_token(self, token: str) -> "EnrolmentRequest":
        """The same request with the proof of a first key; the token itself is not in it."""
        return replace(self, proof=self._token_proof(token))

    def proved_by_key(self, old: SigningKey) -> "EnrolmentRequest":
        """The same request with the proof of a renewal."""
        return replace(self, proof=old.sign("enrolment", self._payload("renewal")))

    def signed(self, key: SigningKey) -> "EnrolmentRequest":
        """The same request, signed by the new key."""
        return replace(self, signature=key.sign("enrolment", self._payload("request")))

    def verify(self) -> None:
        """Check that the request is whole and its maker holds the new signing key.

        Raises:
            KeyFileError, SignatureError: the key is none, or the request was altered.
        """
        key = VerifyKey.from_text(self.signing_key)
        key.verify("enrolment", self._payload("request"), self.signature)

    def has_token(self, token: str) -> bool:
        """Whether the maker knew the token; never so for an empty one."""
        expected = self._token_proof(token).encode()
        return bool(token) and hmac.compare_digest(expected, self.proof.encode("utf-8", "replace"))

    def verify_renewal(self, old: VerifyKey) -> None:
        """Check that the old key vouches for the new ones.

        Raises:
            SignatureError: it does not.
        """
        old.verify("enrolment", self._payload("renewal"), self.proof)

    def _token_proof(self, token: str) -> str:
        return hmac.new(token.encode(), self._payload("token"), hashlib.sha256).hexdigest()

    def _payload(self, purpose: str) -> bytes:
        """What is signed: for the request itself the proof too."""
        without = {"signature": ""} if purpose == "request" else {"signature": "", "proof": ""}
        return canonical(asdict(self) | without | {"purpose": purpose})


def require_node_key(text: str) -> None:
    """Check a node's public key: EC P-384, OpenSSH text without comment, nothing around it.

    Raises:
        KeyFileError: it is another kind, curve or form.
    """
    try:
        key = load_ssh_public_key(text.encode("utf-8"))
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, EllipticCurvePublicKey) or _p384_text(key) != text:
        raise KeyFileError(
            "a node key is no EC P-384 key in OpenSSH form. Make it with `agssd-site enrol`."
        )


def _p384_text(key: EllipticCurvePublicKey) -> str:
    """Its OpenSSH text; empty for another curve."""
    if not isinstance(key.curve, SECP384R1):
        return ""
    return key.public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode("ascii")


def fingerprint(key: str) -> str:
    """Eight groups of four digits that two people compare by telephone (128 bits of SHA-256)."""
    digest = hashlib.sha256(key.encode()).hexdigest()
    return " ".join(digest[place : place + 4] for place in range(0, 32, 4))
