"""The table of a site's volumes and ultrasound clips.

A site's folder::

    SITE/                    mode 0700
      catalogue.sqlite       mode 0600: source files (paths!), scans, skipped items, refusals
      private/secret.key     mode 0600: secret of the pseudonyms
      cache/VOLUME.b2nd      voxels of a prepared volume, compressed in chunks
      cache/VOLUME.json      its geometry, stamp and checksum; written last
      cache/CLIP.b2nd, CLIP.json                the same of a prepared ultrasound clip
      cache/CLIP.SOURCE.b2nd, CLIP.SOURCE.json  its label maps, by whoever drew them
      lock                   held by the command that is changing the folder

Everything but the table ``files``, ``sources`` and the paths of ``skipped`` is pseudonymous.
Volumes and clips are named in different name spaces, so ``sources`` and ``refused`` hold both.
"""

import fcntl
import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from agssd_core.config.federation import COHORT_OF, Cohort
from agssd_core.data.records import (
    ClipRecord,
    ScanRecord,
    Skipped,
    VolumeRecord,
    clip_record,
    volume_record,
)
from agssd_core.errors import CatalogueError

__all__ = [
    "CATALOGUE_NAME",
    "Catalogue",
    "ClipRecord",
    "ScanRecord",
    "Skipped",
    "VolumeRecord",
    "database",
    "open_catalogue",
    "site_lock",
    "source_paths",
    "stored_path",
    "true_path",
]

CATALOGUE_NAME = "catalogue.sqlite"
RAW_NAME = "raw-bytes:"
LABELS_STAMP = "labels"
SCHEMA = """
CREATE TABLE IF NOT EXISTS files(path TEXT PRIMARY KEY, relative TEXT, size INTEGER,
    mtime INTEGER, assumed TEXT, kind TEXT, header TEXT, reason TEXT);
CREATE TABLE IF NOT EXISTS volumes(volume TEXT PRIMARY KEY, record TEXT);
CREATE TABLE IF NOT EXISTS clips(clip TEXT PRIMARY KEY, record TEXT);
CREATE TABLE IF NOT EXISTS sources(volume TEXT, position INTEGER, path TEXT);
CREATE TABLE IF NOT EXISTS skipped(reference TEXT, reason TEXT, paths TEXT);
CREATE TABLE IF NOT EXISTS refused(volume TEXT PRIMARY KEY, stamp TEXT, fingerprint TEXT,
    reason TEXT);
CREATE TABLE IF NOT EXISTS meta(name TEXT PRIMARY KEY, value TEXT);
CREATE INDEX IF NOT EXISTS sources_by_volume ON sources(volume);
"""


@dataclass(frozen=True)
class Catalogue:
    """A site's volumes and clips, each sorted by name.

    Attributes:
        records: the volumes.
        refused: (scan, stamp, fingerprint) of what could not be prepared, or under
            ``LABELS_STAMP`` not be delineated -> reason.
    """

    site_dir: Path
    records: tuple[VolumeRecord, ...]
    skipped: tuple[Skipped, ...]
    refused: dict[tuple[str, str, str], str]
    secret_fingerprint: str
    clips: tuple[ClipRecord, ...] = ()

    @property
    def scans(self) -> tuple[ScanRecord, ...]:
        """Volumes, then clips."""
        return (*self.records, *self.clips)

    @property
    def patients(self) -> frozenset[str]:
        """Pseudonyms of all patients with a volume or clip."""
        return frozenset(record.patient for record in self.scans)

    @property
    def patient_count(self) -> int:
        """Number of patients with a volume or clip."""
        return len(self.patients)

    @property
    def cohorts(self) -> tuple[Cohort, ...]:
        """The cohorts that this site has scans for, sorted."""
        return tuple(sorted({COHORT_OF[record.modality] for record in self.scans}))

    def patients_of(self, cohort: Cohort) -> frozenset[str]:
        """Pseudonyms of the patients with a scan for this cohort."""
        return frozenset(record.patient for record in self._scans_of(cohort))

    def scan_count(self, cohort: Cohort) -> int:
        """Number of volumes or clips for this cohort."""
        return len(self._scans_of(cohort))

    def refusal(self, record: ScanRecord, stamp: str) -> str | None:
        """Why this scan could not be prepared under these settings; None if it was not tried."""
        return self.refused.get((record.name, stamp, record.fingerprint))

    def undelineated(self, clip: str, fingerprint: str) -> bool:
        """Whether a clip was tried and could not be given label maps."""
        return (clip, LABELS_STAMP, fingerprint) in self.refused

    def _scans_of(self, cohort: Cohort) -> list[ScanRecord]:
        return [record for record in self.scans if COHORT_OF[record.modality] == cohort]


def open_catalogue(site_dir: Path) -> Catalogue:
    """Read a site's catalogue.

    Raises:
        CatalogueError: there is none, or it is damaged.
    """
    if not (site_dir / CATALOGUE_NAME).is_file():
        raise CatalogueError(
            "the folder holds no catalogue. Make one with `agssd-site index DIR --out SITE`."
        )
    with database(site_dir, write=False) as table:
        rows = table.execute("SELECT record FROM volumes ORDER BY volume").fetchall()
        # A catalogue made before ultrasound was read has no such table, nor could it be added
        # where the folder is read-only.
        clips = _clip_rows(table)
        skipped = table.execute(
            "SELECT reference, reason, paths FROM skipped ORDER BY reason, reference"
        ).fetchall()
        refused = table.execute("SELECT volume, stamp, fingerprint, reason FROM refused").fetchall()
        mark = table.execute("SELECT value FROM meta WHERE name = 'secret'").fetchone()
    return Catalogue(
        site_dir,
        tuple(volume_record(row[0]) for row in rows),
        tuple(
            Skipped(row[0], row[1], tuple(true_path(path) for path in json.loads(row[2])))
            for row in skipped
        ),
        {(row[0], row[1], row[2]): row[3] for row in refused},
        mark[0] if mark else "",
        tuple(clip_record(text) for text in clips),
    )


def stored_path(path: Path) -> str:
    """A path as the tables hold it: names that are no UTF-8 (old exports) as hexadecimal bytes."""
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        return RAW_NAME + os.fsencode(path).hex()
    return str(path)


def true_path(text: str) -> str:
    """Undo ``stored_path``."""
    if text.startswith(RAW_NAME):
        return os.fsdecode(bytes.fromhex(text.removeprefix(RAW_NAME)))
    return text


def refuse(
    table: sqlite3.Connection, scan: str, *, stamp: str, fingerprint: str, reason: str
) -> None:
    """Note why a scan cannot be used under some settings."""
    with table:
        row = (scan, stamp, fingerprint, reason)
        table.execute("INSERT OR REPLACE INTO refused VALUES (?, ?, ?, ?)", row)


def source_paths(table: sqlite3.Connection, scan: str) -> tuple[str, ...]:
    """Stored paths of a volume's or clip's files, in the order of reading. Private."""
    query = "SELECT path FROM sources WHERE volume = ? ORDER BY position"
    return tuple(row[0] for row in table.execute(query, (scan,)))


@contextmanager
def database(site_dir: Path, *, write: bool = True) -> Iterator[sqlite3.Connection]:
    """Open the catalogue's tables, making them on first use with mode 0600.

    Args:
        site_dir: the site's folder.
        write: False for who only looks: the folder may then be read-only.

    Raises:
        CatalogueError: the file is damaged, of another version, or cannot be written.
    """
    path = site_dir / CATALOGUE_NAME
    try:
        if write:
            path.touch(mode=0o600, exist_ok=True)
        place = f"{path.absolute().as_uri()}?mode={'rw' if write else 'ro'}"
        with closing(sqlite3.connect(place, timeout=30, uri=True)) as table:
            if write:
                table.executescript(SCHEMA)
            yield table
    except sqlite3.OperationalError as error:
        full = "full" in str(error)
        raise CatalogueError(
            f"the catalogue cannot be {'written: the disk is full' if full else 'used'}. Free "
            "space or mend the folder's permissions, then run the command again."
        ) from None
    except sqlite3.DatabaseError:
        raise CatalogueError(
            "the catalogue is damaged. Move catalogue.sqlite away and index the folders again; "
            "prepared scans are kept."
        ) from None
    except OSError as error:
        raise CatalogueError(
            f"the site's folder cannot be used ({type(error).__name__}). Mend its permissions."
        ) from None


@contextmanager
def site_lock(site_dir: Path) -> Iterator[None]:
    """Let one command at a time change a site's folder; a killed one leaves no lock behind.

    Raises:
        CatalogueError: another command holds it, or the folder cannot be written.
    """
    try:
        site_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        stream = (site_dir / "lock").open("w")
    except OSError as error:
        raise CatalogueError(
            f"the site's folder cannot be written ({type(error).__name__}). Name another with "
            "--out, or mend its permissions."
        ) from None
    with stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise CatalogueError(
                "another agssd-site command is working on this folder. Wait for it, or stop it."
            ) from None
        yield


def _clip_rows(table: sqlite3.Connection) -> list[str]:
    query = "SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = 'clips'"
    if table.execute(query).fetchone() is None:
        return []
    return [row[0] for row in table.execute("SELECT record FROM clips ORDER BY clip")]
