"""Entries of a privacy ledger: one signed line of JSON each, chained by digests."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from agssd_core.accounting import Spending
from agssd_core.errors import AgssdError, LedgerError
from agssd_core.protocol import Record
from agssd_core.signing import SigningKey, VerifyKey, canonical

GENESIS = "0" * 64
RESERVED, COMMITTED = "reserved", "committed"
UNIT = "patient"
MECHANISM = "poisson-gaussian"

Head = tuple[int, str]
"""(sequence, digest) of the newest entry; (0, GENESIS) before the first."""


@dataclass(frozen=True)
class LedgerEntry(Record):
    """One line.

    Attributes:
        sequence: counted from 1; ``previous`` is the digest of the line before.
        site, population: whose patients; the population is a pseudonym of the site's secret.
        run, round, plan: for what; ``plan`` is the digest of the configuration.
        mechanism, unit: what sigma, rate and steps mean, and who is protected.
        sigma, rate, steps: noise multiplier, chance to be drawn, optimiser steps.
        delta, epsilon_after: of the population, after this and all that stands before.
        accountant: who counted.
        state: ``reserved`` spends; ``committed`` says that the round was finished.
        settles: sequence of the reservation that a commitment belongs to, else 0.
        written: ISO date-time in UTC.
        signature: over all the rest.
    """

    sequence: int
    previous: str
    site: str
    population: str
    run: str
    round: int
    plan: str
    mechanism: str
    sigma: float
    rate: float
    steps: int
    unit: str
    delta: float
    epsilon_after: float
    accountant: str
    state: str
    settles: int
    written: str
    signature: str = ""

    def signed(self, key: SigningKey) -> "LedgerEntry":
        """The same entry with its signature."""
        return replace(self, signature=key.sign("ledger", self._payload()))

    def line(self) -> bytes:
        """As it stands in the file, without the line's end."""
        return canonical(asdict(self))

    def verify(self, key: VerifyKey) -> None:
        """Check the signature.

        Raises:
            SignatureError: the entry was altered or is of another ledger.
        """
        key.verify("ledger", self._payload(), self.signature)

    def _payload(self) -> bytes:
        return canonical(asdict(self) | {"signature": ""})


@dataclass(frozen=True)
class Chain:
    """A ledger that holds.

    Attributes:
        entries: in order; ``digests`` of their lines.
        length: bytes of the whole lines.
        torn: what stands behind the last whole line: a writer was killed there.
    """

    entries: tuple[LedgerEntry, ...] = ()
    digests: tuple[str, ...] = ()
    length: int = 0
    torn: bytes = b""

    @property
    def head(self) -> Head:
        """The newest entry's."""
        return (len(self.digests), self.digests[-1]) if self.digests else (0, GENESIS)

    def history(self, *, run: str | None = None) -> tuple[Spending, ...]:
        """Everything that was spent, of one run or of all; steps of one kind added up.

        A reservation counts whether or not it was committed.
        """
        total: dict[tuple[float, float], int] = {}
        for entry in self.entries:
            if entry.state == RESERVED and run in (None, entry.run):
                kind = (entry.sigma, entry.rate)
                total[kind] = total.get(kind, 0) + entry.steps
        return tuple(Spending(*kind, steps) for kind, steps in total.items())

    def open_reservations(self) -> int:
        """Reservations without a commitment."""
        settled = {entry.settles for entry in self.entries if entry.state == COMMITTED}
        reserved = {entry.sequence for entry in self.entries if entry.state == RESERVED}
        return len(reserved - settled)

    def require(self, seen: Head, *, by: str) -> None:
        """Hold the chain against a head that somebody saw before.

        Args:
            seen: it must lie in the chain.
            by: who saw it, for the message.

        Raises:
            LedgerError: the chain ends before it, or has another entry there.
        """
        sequence, digest = seen
        if sequence > len(self.digests):
            raise LedgerError(
                f"the privacy ledger ends at entry {len(self.digests)}, but {by} has seen entry "
                f"{sequence}: it was cut or rolled back, and what it lacks was spent. Restore the "
                "newest copy; without it, train no more under privacy on these patients."
            )
        if sequence > 0 and self.digests[sequence - 1] != digest:
            raise LedgerError(
                f"entry {sequence} of the privacy ledger is another than {by} has seen: its "
                "history was rewritten. Restore the true copy; without it, train no more under "
                "privacy on these patients."
            )


def read_chain(content: bytes, key: VerifyKey, *, population: str) -> Chain:
    """Read a ledger's bytes, checking every line.

    Raises:
        LedgerError: a line was edited, removed, moved or added, or is another population's.
    """
    *lines, torn = content.split(b"\n")
    entries: list[LedgerEntry] = []
    digests: list[str] = []
    for number, line in enumerate(lines, start=1):
        entry = _entry(line, number)
        if (entry.sequence, entry.previous) != (number, digests[-1] if digests else GENESIS):
            raise _fault(number, "it does not continue the line before")
        try:
            entry.verify(key)
        except AgssdError:
            raise _fault(number, "its signature is not that of this ledger's key") from None
        if entry.population != population:
            raise _fault(number, "it is of another population of patients")
        entries.append(entry)
        digests.append(hashlib.sha256(line).hexdigest())
    return Chain(tuple(entries), tuple(digests), len(content) - len(torn), torn)


def require_order(entries: Sequence[LedgerEntry]) -> None:
    """Check that every commitment settles one earlier reservation.

    Raises:
        LedgerError: one does not.
    """
    waiting: set[int] = set()
    for entry in entries:
        if entry.state == RESERVED:
            waiting.add(entry.sequence)
        elif entry.state == COMMITTED and entry.settles in waiting:
            waiting.remove(entry.settles)
        else:
            raise _fault(entry.sequence, "it settles no reservation before it")


def _entry(line: bytes, number: int) -> LedgerEntry:
    try:
        entry = LedgerEntry.from_json(line.decode("utf-8"))
    except (AgssdError, UnicodeDecodeError):
        raise _fault(number, "it is no entry") from None
    if entry.line() != line:
        raise _fault(number, "it is not in the form that is signed")
    return entry


def _fault(number: int, what: str) -> LedgerError:
    return LedgerError(
        f"line {number} of the privacy ledger does not hold: {what}. Restore the newest copy; "
        "without it, train no more under privacy on these patients."
    )
