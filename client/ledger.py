"""A site's privacy ledger: what training has spent on its patients, written before it is spent.

PLACE/ledger.jsonl holds one signed entry a line (``ledger_chain``). A round is reserved, which is
on disk before anything of it is drawn, and committed once its reply is. A reservation counts
whether or not it was committed, so a killed process leaves too much in the ledger and never too
little. A second file, kept apart, holds the newest head: with it a ledger that was cut, restored
from an old copy or deleted is noticed. The ledger belongs to the patients, not to a run.
"""

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from agssd_core.accounting import Spending, accountant_name
from agssd_core.data.deidentify import Pseudonymiser, read_secret
from agssd_core.errors import KeyFileError, LedgerError
from agssd_core.folders import write_line
from agssd_core.signing import SigningKey
from agssd_core.weights import sync_folder, write_bytes, write_text
from client.budget import Limit, countable, require_within
from client.ledger_chain import (
    COMMITTED,
    MECHANISM,
    RESERVED,
    UNIT,
    Chain,
    Head,
    LedgerEntry,
    read_chain,
    require_order,
)

FILE, KEY, MARKER = "ledger.jsonl", "ledger-key.pem", "ledger-head.json"


@dataclass(frozen=True)
class Purpose:
    """What a round spends for: the run's id, the round, the digest of its plan."""

    run: str
    round: int
    plan: str


@dataclass(frozen=True)
class LedgerPlace:
    """Where a ledger and its marker lie."""

    folder: Path
    marker: Path

    @classmethod
    def of_site(cls, site: Path) -> "LedgerPlace":
        """The ledger of a site's patients; the marker lies with the runs' memory."""
        return cls(site / "private", site / "federation" / MARKER)

    @classmethod
    def of_run(cls, memory: Path) -> "LedgerPlace":
        """A ledger of one simulated run."""
        return cls(memory / "ledger", memory / MARKER)


class Ledger:
    """Several processes may write, one entry at a time.

    Args:
        place: where it lies.
        site: enrolled name, written into entries.
        population: pseudonym of the patients (``population_of``).
    """

    def __init__(self, place: LedgerPlace, *, site: str, population: str) -> None:
        self.place, self.site, self.population = place, site, population

    def reserve(
        self,
        spending: Spending,
        purpose: Purpose,
        *,
        limits: Sequence[Limit],
        delta: float,
        seen: Head | None = None,
    ) -> LedgerEntry:
        """Spend; on disk (fsync) when this returns.

        Args:
            spending: sigma, rate and steps of a round.
            purpose: for what.
            limits: none may be passed by what was spent so far and this.
            delta: at which the entry states epsilon.
            seen: head that the server holds; it must lie in the ledger.

        Raises:
            BudgetError: a limit would be passed; nothing was spent.
            LedgerError: the ledger does not hold or cannot be written.
            AccountingError: the numbers cannot be counted.
        """
        with self._writing() as descriptor:
            chain, key = self._mended(descriptor)
            if seen is not None:
                chain.require(seen, by="the server")
            history = chain.history()
            after = countable([*history, spending], delta=delta)
            for limit in limits:
                require_within(limit, history, spending)
            entry = LedgerEntry(
                sequence=chain.head[0] + 1,
                previous=chain.head[1],
                site=self.site,
                population=self.population,
                run=purpose.run,
                round=purpose.round,
                plan=purpose.plan,
                mechanism=MECHANISM,
                sigma=float(spending.sigma),
                rate=float(spending.rate),
                steps=int(spending.steps),
                unit=UNIT,
                delta=delta,
                epsilon_after=after,
                accountant=accountant_name(),
                state=RESERVED,
                settles=0,
                written=_now(),
            )
            return self._append(descriptor, chain, entry.signed(key))

    def commit(self, reserved: LedgerEntry) -> LedgerEntry:
        """Say that a reserved round was finished; changes nothing of what is spent.

        Raises:
            LedgerError: the ledger does not hold or cannot be written.
        """
        with self._writing() as descriptor:
            chain, key = self._mended(descriptor)
            facts = {
                **reserved.__dict__,
                "sequence": chain.head[0] + 1,
                "previous": chain.head[1],
                "state": COMMITTED,
                "settles": reserved.sequence,
                "written": _now(),
                "signature": "",
            }
            return self._append(descriptor, chain, LedgerEntry(**facts).signed(key))

    def read(self) -> Chain:
        """Check everything and change nothing; an empty chain before the first reservation.

        Raises:
            LedgerError: the ledger was cut, edited, rolled back, deleted or cannot be read.
        """
        file = self.place.folder / FILE
        content = b""
        if file.exists():
            try:
                with file.open("rb") as stream:
                    fcntl.flock(stream, fcntl.LOCK_SH)
                    content = stream.read()
            except OSError as error:
                raise _unwritable(error) from None
        return self._checked(content, self._key() if content else None)

    def _mended(self, descriptor: int) -> tuple[Chain, SigningKey]:
        """The chain for writing: what a killed writer left unfinished is set aside."""
        content = os.pread(descriptor, os.fstat(descriptor).st_size, 0)
        key = self._key(new=not content)
        chain = self._checked(content, key)
        if chain.torn:
            aside = self.place.folder / f"ledger.torn-{chain.head[0] + 1}"
            write_bytes(aside, chain.torn, private=True)
            os.ftruncate(descriptor, chain.length)
            os.fsync(descriptor)
        return chain, key

    def _checked(self, content: bytes, key: SigningKey | None) -> Chain:
        """Read and hold against the marker."""
        chain = Chain() if key is None else self._chain(content, key)
        marked = self._marked()
        if marked is not None and not chain.entries:
            raise LedgerError(
                "the privacy ledger is missing or empty, but this site has trained under privacy "
                f"({marked[0]} entries). Restore it from the newest copy; without it, train no "
                "more under privacy on these patients."
            )
        if marked is not None:
            chain.require(marked, by="the marker in this site's folder")
        return chain

    def _chain(self, content: bytes, key: SigningKey) -> Chain:
        chain = read_chain(content, key.public, population=self.population)
        require_order(chain.entries)
        return chain

    def _marked(self) -> Head | None:
        """The head in the marker; None where none was ever written."""
        if not self.place.marker.exists():
            return None
        try:
            found = json.loads(self.place.marker.read_text(encoding="utf-8"))
            return int(found["sequence"]), str(found["digest"])
        except (OSError, ValueError, KeyError, TypeError):
            raise LedgerError(
                "ledger-head.json of this site is damaged. Restore it from a copy; if there is "
                "none, compare `agssd-site ledger verify --head` with the server's privacy "
                "report, then remove it."
            ) from None

    def _key(self, *, new: bool = False) -> SigningKey:
        file = self.place.folder / KEY
        if new and not file.exists() and not self.place.marker.exists():
            SigningKey.create().save(file)
        try:
            return SigningKey.load(file)
        except KeyFileError as error:
            raise LedgerError(
                f"the privacy ledger's key cannot be used: {error} Restore ledger-key.pem from a "
                "copy."
            ) from None

    def _append(self, descriptor: int, chain: Chain, entry: LedgerEntry) -> LedgerEntry:
        """Ledger first, marker second: killed in between, the ledger is ahead, which is allowed."""
        line = entry.line()
        write_line(descriptor, line + b"\n", at=chain.length)
        head = {"sequence": entry.sequence, "digest": hashlib.sha256(line).hexdigest()}
        write_text(self.place.marker, json.dumps(head) + "\n", private=True)
        return entry

    @contextmanager
    def _writing(self) -> Iterator[int]:
        """The file, made if new, locked against other writers."""
        try:
            self.place.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            file = self.place.folder / FILE
            new = not file.exists()
            descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                if new:
                    sync_folder(self.place.folder)
                yield descriptor
            finally:
                os.close(descriptor)
        except OSError as error:
            raise _unwritable(error) from None


def population_of(site: Path) -> str:
    """Pseudonym of all patients in a site's folder, of whichever cohort.

    Raises:
        CatalogueError: the site's secret is missing, damaged or readable by others.
    """
    return Pseudonymiser(read_secret(site)).key("population")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _unwritable(error: OSError) -> LedgerError:
    return LedgerError(
        f"the privacy ledger cannot be read or written ({type(error).__name__}). Free disk space "
        "or mend the folder's permissions; nothing is trained without it."
    )
