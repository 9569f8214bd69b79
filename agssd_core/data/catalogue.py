"""The table of a site's volumes.

A site's folder::

    SITE/                    mode 0700
      catalogue.sqlite       mode 0600: source files (paths!), volumes, skipped items, refusals
      private/secret.key     mode 0600: secret of the pseudonyms
      cache/VOLUME.b2nd      voxels of a prepared volume, compressed in chunks
      cache/VOLUME.json      its geometry, stamp and checksum; written last
      lock                   held by the command that is changing the folder

Everything but the table ``files``, ``sources`` and the paths of ``skipped`` is pseudonymous.
"""

import fcntl
import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from agssd_core.data.volume import Modality
from agssd_core.errors import CatalogueError

CATALOGUE_NAME = "catalogue.sqlite"
RAW_NAME = "raw-bytes:"
SCHEMA = """
CREATE TABLE IF NOT EXISTS files(path TEXT PRIMARY KEY, relative TEXT, size INTEGER,
    mtime INTEGER, assumed TEXT, kind TEXT, header TEXT, reason TEXT);
CREATE TABLE IF NOT EXISTS volumes(volume TEXT PRIMARY KEY, record TEXT);
CREATE TABLE IF NOT EXISTS sources(volume TEXT, position INTEGER, path TEXT);
CREATE TABLE IF NOT EXISTS skipped(reference TEXT, reason TEXT, paths TEXT);
CREATE TABLE IF NOT EXISTS refused(volume TEXT PRIMARY KEY, stamp TEXT, fingerprint TEXT,
    reason TEXT);
CREATE TABLE IF NOT EXISTS meta(name TEXT PRIMARY KEY, value TEXT);
CREATE INDEX IF NOT EXISTS sources_by_volume ON sources(volume);
"""


@dataclass(frozen=True)
class VolumeRecord:
    """One scan of the catalogue.

    Attributes:
        volume: pseudonym, also the stem of its cache files.
        patient: pseudonym; equal at sites that share a secret.
        kind: ``dicom`` or ``nifti``.
        shape: stored size; (columns, rows, slices) for DICOM.
        spacing_mm: of the stored axes.
        fingerprint: changes when a source file does.
    """

    volume: str
    patient: str
    study: str
    modality: Modality
    vendor: str
    model: str
    kind: str
    shape: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    fingerprint: str


@dataclass(frozen=True)
class Skipped:
    """Something that was left out; ``reference`` is its public name."""

    reference: str
    reason: str
    paths: tuple[str, ...] = ()


@dataclass(frozen=True)
class Catalogue:
    """A site's volumes, sorted by name."""

    site_dir: Path
    records: tuple[VolumeRecord, ...]
    skipped: tuple[Skipped, ...]
    refused: dict[tuple[str, str, str], str]
    secret_fingerprint: str

    @property
    def patients(self) -> frozenset[str]:
        """Pseudonyms of all patients with a volume."""
        return frozenset(record.patient for record in self.records)

    @property
    def patient_count(self) -> int:
        """Number of patients with a volume."""
        return len(self.patients)

    def refusal(self, record: VolumeRecord, stamp: str) -> str | None:
        """Why this volume could not be prepared under these settings; None if it was not tried."""
        return self.refused.get((record.volume, stamp, record.fingerprint))


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
        skipped = table.execute(
            "SELECT reference, reason, paths FROM skipped ORDER BY reason, reference"
        ).fetchall()
        refused = table.execute("SELECT volume, stamp, fingerprint, reason FROM refused").fetchall()
        mark = table.execute("SELECT value FROM meta WHERE name = 'secret'").fetchone()
    return Catalogue(
        site_dir,
        tuple(_record(row[0]) for row in rows),
        tuple(
            Skipped(row[0], row[1], tuple(true_path(path) for path in json.loads(row[2])))
            for row in skipped
        ),
        {(row[0], row[1], row[2]): row[3] for row in refused},
        mark[0] if mark else "",
    )


def record_json(record: VolumeRecord) -> str:
    """A record as the catalogue stores it."""
    return json.dumps(asdict(record))


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


def source_paths(table: sqlite3.Connection, volume: str) -> tuple[str, ...]:
    """Stored paths of a volume's files, in the order of reading. Private."""
    query = "SELECT path FROM sources WHERE volume = ? ORDER BY position"
    return tuple(row[0] for row in table.execute(query, (volume,)))


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
            "prepared volumes are kept."
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


def _record(text: str) -> VolumeRecord:
    plain = json.loads(text)
    return VolumeRecord(
        **{**plain, "shape": tuple(plain["shape"]), "spacing_mm": tuple(plain["spacing_mm"])}
    )
