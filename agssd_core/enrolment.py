"""What the coordinator knows of an enrolled site; signed by the coordinator, kept by both."""

from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime

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
