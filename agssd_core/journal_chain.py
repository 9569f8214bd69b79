"""Entries of a journal and the chain that they form (see ``agssd_core.journal``)."""

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

from agssd_core.errors import AgssdError, JournalError
from agssd_core.protocol import Record
from agssd_core.signing import canonical

KINDS = ("order", "update", "refusal", "key", "export", "delivery", "start", "stop")
NEXT_KEY = "next_key"
GENESIS = "0" * 64
MAX_FACTS, MAX_TEXT = 24, 300

Fact = str | int | float | bool
Head = tuple[int, str]


@dataclass(frozen=True)
class Entry(Record):
    """One line.

    Attributes:
        sequence: counted from 1.
        time: ISO date-time in UTC, by the writer's clock.
        kind: one of ``KINDS``.
        previous, digest: SHA-256 of the entry before (``GENESIS`` for the first) and of this one.
        signer: public key that signed, ``ed25519:BASE64``.
        signature: over the digest, purpose ``journal``.
    """

    owner: str
    sequence: int
    time: str
    kind: str
    facts: dict[str, Fact]
    previous: str
    signer: str
    digest: str = ""
    signature: str = ""

    def line(self) -> bytes:
        """The one form in which it is written, without the line's end."""
        return canonical(asdict(self))

    def expected_digest(self) -> str:
        """SHA-256 over everything but digest and signature."""
        return hashlib.sha256(replace(self, digest="", signature="").line()).hexdigest()


@dataclass(frozen=True)
class Place:
    """How far a journal has been followed; ``signer`` is the key in force for the next entry."""

    sequence: int = 0
    digest: str = GENESIS
    signer: str = ""
    owner: str = ""

    def after(self, line: bytes) -> tuple[Entry, "Place"]:
        """Read the next line and check that it continues the chain; signatures are not checked.

        Raises:
            JournalError: it does not.
        """
        number = self.sequence + 1
        try:
            entry = Entry.from_json(line.decode("utf-8"))
            genuine = entry.line() == line and entry.digest == entry.expected_digest()
        except (AgssdError, ValueError):
            raise fault(number, "it is no entry") from None
        if entry.sequence != number:
            raise fault(number, f"entry {entry.sequence} stands there; some were removed or moved")
        if not genuine:
            raise fault(number, "it was edited, its digest is another")
        if entry.previous != self.digest:
            raise fault(number, "it does not follow the entry before it")
        if entry.kind not in KINDS or entry.owner != (self.owner or entry.owner):
            raise fault(number, "its kind or owner is another")
        if entry.signer != (self.signer or entry.signer):
            raise fault(number, "it is signed by another key than the one in force")
        named = entry.facts.get(NEXT_KEY) if entry.kind == "key" else None
        signer = named if isinstance(named, str) else entry.signer
        return entry, Place(number, entry.digest, signer, entry.owner)


def fault(number: int, what: str) -> JournalError:
    """The error that says where a journal stops to hold, and why."""
    return JournalError(
        f"the journal does not hold from entry {number} on: {what}. Keep the file as it is, "
        "restore it from the backup, and find out who changed it."
    )


def require_plain(kind: str, facts: Mapping[str, object]) -> None:
    """Check what shall become an entry.

    Raises:
        JournalError: the kind is none of ``KINDS``, or a fact is no plain value.
    """
    if kind not in KINDS or len(facts) > MAX_FACTS:
        raise JournalError(
            f"an entry is of no known kind or has {len(facts)} facts, at most {MAX_FACTS} are "
            f"allowed. Kinds: {', '.join(KINDS)}."
        )
    for name, value in facts.items():
        named = re.fullmatch(r"[a-z][a-z0-9_]{0,39}", name)
        if not (named and _is_plain(value)):
            raise JournalError(
                "a fact of an entry is no plain value: one line of text of at most "
                f"{MAX_TEXT} signs, a finite number or a truth value. Leave it out."
            )


def _is_plain(value: object) -> bool:
    if isinstance(value, str):
        return len(value) <= MAX_TEXT and value.isprintable()
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and abs(value) < 1 << 63
