"""The journal of an enrolled site, as the processes that answer orders write it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from agssd_core.journal import Journal
from agssd_core.journal_heads import heard, remember, told
from client.connection import CONNECTION_FILE, keys_folder, load_connection, signing_key

COORDINATOR = "coordinator"


@dataclass(frozen=True)
class SiteJournal:
    """Opens the journal for every entry, so that a key renewed meanwhile is the one that signs."""

    site: Path

    @classmethod
    def of(cls, site: Path) -> "SiteJournal | None":
        """The journal of a site; None when it is not enrolled and has no key to sign with."""
        return cls(site) if (keys_folder(site) / CONNECTION_FILE).exists() else None

    def append(self, kind: str, facts: Mapping[str, str | int | float | bool]) -> None:
        """Add an entry; on disk when this returns.

        Raises:
            KeyFileError: the signing key is missing, damaged or readable by others.
            JournalError: the journal is damaged or cannot be written.
        """
        self._open().append(kind, facts)

    def head(self) -> str:
        """``SEQUENCE:DIGEST`` of the newest entry (raises as ``append``)."""
        return told(self._open().head())

    def hear(self, head: str) -> None:
        """Keep the head of the coordinator's journal.

        Raises:
            JournalError: it is none, or the coordinator's journal was rolled back.
        """
        remember(self.site, COORDINATOR, heard(head))

    def _open(self) -> Journal:
        connection = load_connection(self.site)
        key = signing_key(self.site, connection)
        return Journal(self.site, key, owner=connection.site)
