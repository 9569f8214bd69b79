"""A site's kit: the zip that the coordinator makes and the site opens."""

import hashlib
import io
import zipfile
import zlib
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from agssd_core.errors import EnrolmentError
from agssd_core.folders import read_small
from agssd_core.protocol import PROTOCOL_VERSION, Record
from agssd_core.signing import SigningKey, VerifyKey, canonical
from agssd_core.weights import write_bytes

MEMBERS = ("ca.crt", "kit.json")
MAX_MEMBER_BYTES = 16_384
MAX_KIT_BYTES = 3 * MAX_MEMBER_BYTES


@dataclass(frozen=True)
class Kit(Record):
    """What a site needs to enrol.

    Attributes:
        cohorts: what the site may take part in, separated by spaces.
        key_id: number of the key that it enrols: 1, or more after its keys were lost.
        server: HOST:PORT.
        server_key: the coordinator's public signing key.
        ca_digest: SHA-256 of ca.crt beside it.
        token: secret that proves once that a request comes from the kit's receiver.
        issued, expires: ISO date-time in UTC.
        signature: by ``server_key``, purpose ``kit``. It shows damage; that the key is the
            coordinator's, two people compare by its fingerprint.
    """

    protocol: int
    federation: str
    site: str
    cohorts: str
    key_id: int
    server: str
    server_key: str
    ca_digest: str
    token: str
    issued: str
    expires: str
    signature: str = ""

    def signed(self, key: SigningKey) -> "Kit":
        """The same kit with the coordinator's signature."""
        return replace(self, signature=key.sign("kit", self._payload()))

    def verify(self, ca: bytes, *, now: datetime) -> None:
        """Check signature, version, certificate and date.

        Raises:
            SignatureError, KeyFileError, EnrolmentError: one of them is wrong.
        """
        VerifyKey.from_text(self.server_key).verify("kit", self._payload(), self.signature)
        if self.protocol != PROTOCOL_VERSION:
            raise EnrolmentError(
                f"the kit speaks protocol {self.protocol}, this software {PROTOCOL_VERSION}. Use "
                "the same version on both sides."
            )
        if hashlib.sha256(ca).hexdigest() != self.ca_digest:
            raise EnrolmentError("the certificate in the kit is another. Ask for the kit again.")
        if now >= _moment(self.expires):
            raise EnrolmentError(
                f"the kit expired on {self.expires[:10]}. Ask the coordinator for a new one, or "
                "set this machine's clock."
            )

    def _payload(self) -> bytes:
        return canonical(asdict(self) | {"signature": ""})


def write_kit(path: Path, kit: Kit, ca: bytes) -> None:
    """Write the zip, readable by the owner only: it holds the token."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ca.crt", ca)
        archive.writestr("kit.json", kit.to_json() + "\n")
    write_bytes(path, buffer.getvalue(), private=True)


def read_kit(path: Path) -> tuple[Kit, bytes]:
    """Open a zip from outside: two members of known names and bounded size, nothing is unpacked.

    Returns:
        The kit, not yet verified, and the certificate's PEM.

    Raises:
        KeyFileError, EnrolmentError, ProtocolError: it is missing, too large or no kit.
    """
    content = read_small(path, limit=MAX_KIT_BYTES, what="the kit")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if sorted(archive.namelist()) != list(MEMBERS):
                raise _no_kit("it does not hold exactly ca.crt and kit.json")
            ca, text = (_member(archive, name) for name in MEMBERS)
        return Kit.from_json(text.decode("utf-8")), ca
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError):
        # RuntimeError: encrypted, or packed in a way that this Python does not know.
        raise _no_kit("it is damaged or no zip file") from None


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    with archive.open(name) as stream:
        content = stream.read(MAX_MEMBER_BYTES + 1)
    if len(content) > MAX_MEMBER_BYTES:
        raise _no_kit(f"{name} is larger than {MAX_MEMBER_BYTES} bytes")
    return content


def _moment(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text).astimezone(UTC)
    except (ValueError, OverflowError):
        raise _no_kit("its date is none") from None


def _no_kit(what: str) -> EnrolmentError:
    return EnrolmentError(f"the file is no kit: {what}. Ask the coordinator to send it again.")
