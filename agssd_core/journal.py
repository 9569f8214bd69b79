"""An append-only journal in which any later change shows.

FOLDER/journal.jsonl holds one entry a line. Every entry carries the digest of the one before and
a signature, so that an edited, removed, moved or added line is found. Cutting off the newest
lines leaves a shorter journal that is whole in itself: it is found by comparing with the head
that the other party has noted (``expected_head``).

A renewed key takes over by an entry that the old key signs and that names the new one
(``NEXT_KEY``). No entry holds data of patients: facts are plain values of a few kinds.
"""

import fcntl
import hashlib
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from agssd_core.errors import AgssdError, JournalError
from agssd_core.folders import write_line
from agssd_core.journal_chain import (
    GENESIS,
    KINDS,
    NEXT_KEY,
    Entry,
    Fact,
    Head,
    Place,
    fault,
    require_plain,
)
from agssd_core.signing import SigningKey, VerifyKey
from agssd_core.weights import sync_folder, write_bytes

__all__ = [
    "GENESIS",
    "JOURNAL_FILE",
    "KINDS",
    "NEXT_KEY",
    "Entry",
    "Fact",
    "Head",
    "Journal",
    "Verified",
    "entries_of",
    "key_in_force",
    "verify_journal",
]

JOURNAL_FILE = "journal.jsonl"


@dataclass(frozen=True)
class Verified:
    """A journal that holds.

    Attributes:
        head: (sequence, digest) of its newest entry.
        torn_bytes: length of a last line that a killed writer left unfinished. It was never an
            entry; the next command that writes sets it aside.
    """

    head: Head
    torn_bytes: int


class Journal:
    """The writer's side; several processes may write, one entry at a time."""

    def __init__(
        self,
        folder: Path,
        key: SigningKey,
        *,
        owner: str,
        clock: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        """Open or begin a journal.

        A last line that a killed writer left unfinished goes to ``journal.torn-N``, N being the
        entry it would have been, and an entry of kind ``start`` says so.

        Raises:
            JournalError: it is damaged, belongs to another key or cannot be written.
        """
        self.folder, self._key, self._owner, self._clock = folder, key, owner, clock
        self._signer = key.public.text()
        self._offset, self._place = 0, Place()
        self._mutex = threading.Lock()
        with self._mutex, _writing(folder) as descriptor:
            self._catch_up(descriptor)

    def append(self, kind: str, facts: Mapping[str, Fact]) -> Entry:
        """Add an entry; on disk (fsync) when this returns.

        Args:
            kind: one of ``KINDS``.
            facts: plain values under names of small letters; nothing about a patient.

        Raises:
            JournalError: kind or facts are not such, or the entry could not be written.
        """
        require_plain(kind, facts)
        with self._mutex, _writing(self.folder) as descriptor:
            self._catch_up(descriptor)
            return self._write(descriptor, kind, facts)

    def head(self) -> Head:
        """(sequence, digest) of the newest entry, whoever wrote it; (0, GENESIS) before one."""
        with self._mutex, _writing(self.folder) as descriptor:
            self._catch_up(descriptor)
            return self._place.sequence, self._place.digest

    def _catch_up(self, descriptor: int) -> None:
        """Follow what was added since; set aside what a killed writer left unfinished."""
        size = os.fstat(descriptor).st_size
        if size < self._offset:
            raise JournalError(
                "the journal has become shorter while it was in use. Keep what is left, restore "
                "it from the backup, and find out who did it."
            )
        *lines, torn = os.pread(descriptor, size - self._offset, self._offset).split(b"\n")
        for line in lines:
            _, self._place = self._place.after(line)
            self._offset += len(line) + 1
        aside = self.folder / f"journal.torn-{self._place.sequence + 1}"
        if torn:
            write_bytes(aside, torn, private=True)
            os.ftruncate(descriptor, self._offset)
            os.fsync(descriptor)
        # Left by a writer that was killed before the note, or just now.
        if aside.exists():
            content = aside.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            facts: dict[str, Fact] = {
                "event": "unfinished line set aside",
                "bytes": len(content),
                "sha256": digest,
            }
            self._write(descriptor, "start", facts)

    def _write(self, descriptor: int, kind: str, facts: Mapping[str, Fact]) -> Entry:
        if self._owner != (self._place.owner or self._owner):
            raise JournalError(
                f"the journal in this folder is that of {self._place.owner}, not of {self._owner}. "
                "Use one folder for each, or move journal.jsonl to a safe place and keep it."
            )
        if self._signer != (self._place.signer or self._signer):
            raise JournalError(
                "the journal is signed by another key. Restart what runs with an older key; if the "
                "key was lost, move journal.jsonl to a safe place, keep it, and try again."
            )
        moment = self._clock().astimezone(UTC).isoformat(timespec="milliseconds")
        number, previous = self._place.sequence + 1, self._place.digest
        entry = Entry(self._owner, number, moment, kind, dict(facts), previous, self._signer)
        entry = replace(entry, digest=entry.expected_digest())
        signature = self._key.sign("journal", entry.digest.encode())
        line = replace(entry, signature=signature).line()
        entry, place = self._place.after(line)
        write_line(descriptor, line + b"\n", at=self._offset)
        self._offset, self._place = self._offset + len(line) + 1, place
        return entry


def entries_of(folder: Path) -> Iterator[Entry]:
    """The entries in order, as far as the chain holds; signatures are not checked.

    Raises:
        JournalError: there is no journal, or from the first entry on that does not continue it.
    """
    place = Place()
    for line in _content(folder).split(b"\n")[:-1]:
        entry, place = place.after(line)
        yield entry


def key_in_force(folder: Path) -> str:
    """Public key that signs the next entry; empty when there is no entry yet."""
    place = Place()
    if (folder / JOURNAL_FILE).exists():
        for line in _content(folder).split(b"\n")[:-1]:
            _, place = place.after(line)
    return place.signer


def verify_journal(
    folder: Path, public_key: VerifyKey, expected_head: Head | None = None
) -> Verified:
    """Check a journal from its first entry to its last.

    Args:
        folder: where journal.jsonl lies.
        public_key: pinned key of its owner: the first, the newest or one between. A key vouches
            for all before its entries by the chain, and names the key that comes after it.
        expected_head: (sequence, digest) that another party noted; it must lie in the chain.

    Raises:
        JournalError: it is missing, or was edited, cut, reordered or rolled back; says where.
    """
    *lines, torn = _content(folder).split(b"\n")
    place, signers, digests = Place(), set(), {0: GENESIS}
    for line in lines:
        entry, place = place.after(line)
        try:
            signer = VerifyKey.from_text(entry.signer)
            signer.verify("journal", entry.digest.encode(), entry.signature)
        except AgssdError:
            raise fault(entry.sequence, "its signature is not that of the key in force") from None
        signers.add(signer)
        digests[entry.sequence] = entry.digest
    if signers and public_key not in signers:
        raise JournalError(
            "no entry of the journal is signed by the owner's key. It is another's journal or was "
            "written anew; compare the key with its owner."
        )
    if expected_head is not None:
        _require_head(digests, expected_head)
    return Verified((place.sequence, place.digest), len(torn))


def _require_head(digests: Mapping[int, str], expected: Head) -> None:
    sequence, digest = expected
    last = max(digests)
    if sequence > last:
        raise JournalError(
            f"the journal ends at entry {last}, but entry {sequence} was seen before: it was "
            "rolled back or cut. Restore it from the backup, and find out who did it."
        )
    if digests.get(sequence) != digest:
        raise fault(sequence, "it is another than the one seen before; history was rewritten")


@contextmanager
def _writing(folder: Path) -> Iterator[int]:
    """The journal's file, made if new, locked against other writers."""
    file = folder / JOURNAL_FILE
    try:
        new = not file.exists()
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if new:
                sync_folder(folder)
            yield descriptor
        finally:
            os.close(descriptor)
    except OSError as error:
        raise JournalError(
            f"the journal could not be written ({type(error).__name__}). Free disk space or mend "
            "the folder's permissions; nothing goes on without it."
        ) from None


def _content(folder: Path) -> bytes:
    """The file's bytes while nobody writes."""
    try:
        with (folder / JOURNAL_FILE).open("rb") as stream:
            fcntl.flock(stream, fcntl.LOCK_SH)
            return stream.read()
    except OSError:
        raise JournalError(
            "there is no readable journal.jsonl in the folder. Name the folder of a site or "
            "federation; if it had one, restore it from the backup."
        ) from None
