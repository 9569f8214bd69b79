"""Make a site's catalogue: find scans, read their headers, group them into volumes and clips.

A file whose size and time of change are known is not read again, so a second run is quick and
an interrupted one goes on where it stopped.
"""

import os
import sqlite3
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from agssd_core.data.catalogue import (
    CATALOGUE_NAME,
    Skipped,
    database,
    site_lock,
    stored_path,
    true_path,
)
from agssd_core.data.deidentify import Pseudonymiser, ensure_secret
from agssd_core.data.grouping import Selection, regroup
from agssd_core.data.headers import read_header, scan_kind
from agssd_core.data.volume import Modality
from agssd_core.errors import CatalogueError, DataError

Progress = Callable[[int, int], None]
COMMIT_SECONDS = 2.0
REMEDY = "Name folders with DICOM, NIfTI files, or images and videos of ultrasound"
# Raised when files that were passed over before may now be scans.
READERS = "2"


@dataclass(frozen=True)
class IndexReport:
    """What one run of ``index_folders`` did.

    Attributes:
        volumes, clips: in the catalogue now.
        added, unchanged, removed: both together against the catalogue as it was (a changed one
            counts as added).
        left_out: volumes and clips that the selection does not want.
        ignored: files that are no scan by name and content.
    """

    volumes: int
    clips: int
    added: int
    unchanged: int
    removed: int
    left_out: int
    ignored: int
    patients: int
    skipped: tuple[Skipped, ...]


def index_folders(
    site_dir: Path,
    folders: Sequence[Path],
    *,
    progress: Progress | None = None,
    assume_modality: Modality | None = None,
    selection: Selection | None = None,
    secret: bytes | None = None,
) -> IndexReport:
    """Bring a site's catalogue up to date with what these folders hold.

    Scans of folders indexed earlier and not named now stay as they are.

    Args:
        site_dir: the site's folder, made if it does not exist.
        folders: searched with all their subfolders.
        progress: told (files done, files in all).
        assume_modality: of NIfTI files whose names and sidecars do not say it.
        selection: which scans the catalogue takes in; the rest is counted as left out.
        secret: for a new site, so that sites on one machine agree on pseudonyms.

    Raises:
        CatalogueError: a folder is missing, or nothing usable was found.
    """
    found = _find(site_dir, folders)
    if not found:
        raise _nothing(len(folders), files=0)
    with site_lock(site_dir):
        pseudonymiser = ensure_secret(site_dir, secret)
        with database(site_dir) as table:
            _doubt_old_readings(table)
            _forget_vanished(table, folders, {path for path, _ in found})
            ignored = _read_headers(
                table, found, pseudonymiser, assumed=assume_modality, progress=progress
            )
            _forget_moved(table)
            outcome = regroup(table, pseudonymiser, selection or Selection())
    if not outcome.volumes + outcome.clips:
        reasons = [item.reason for item in outcome.skipped]
        raise _nothing(len(folders), files=len(found), left_out=outcome.left_out, reasons=reasons)
    return IndexReport(
        volumes=outcome.volumes,
        clips=outcome.clips,
        added=outcome.added,
        unchanged=outcome.unchanged,
        removed=outcome.removed,
        left_out=outcome.left_out,
        ignored=ignored,
        patients=outcome.patients,
        skipped=outcome.skipped,
    )


def _nothing(
    folders: int, *, files: int, left_out: int = 0, reasons: Sequence[str] = ()
) -> CatalogueError:
    if left_out:
        return CatalogueError(
            f"{left_out} scan(s) were found but the selection wants none of them. Name other "
            "modalities, patients or vendors."
        )
    if not files:
        return CatalogueError(
            f"{folders} folder(s) hold no file, at least one CT, MR or ultrasound scan is needed. "
            f"{REMEDY}; is a network share not mounted?"
        )
    return CatalogueError(
        f"no usable CT or MR scan was found among {files} file(s) in {folders} folder(s) and no "
        f"ultrasound, at least one is needed. {REMEDY}; `agssd-site skipped SITE` lists what was "
        "left out and why." + (f" The first: {reasons[0]}" if reasons else "")
    )


def _find(site_dir: Path, folders: Sequence[Path]) -> list[tuple[Path, str]]:
    """All files with their path relative to the folder named, sorted."""
    found: dict[Path, str] = {}
    for number, folder in enumerate(folders, start=1):
        if not folder.is_dir():
            raise CatalogueError(
                f"folder {number} of {len(folders)} does not exist or is no folder. Check its name."
            )
        root = folder.resolve()
        for path in _walk(root, site_dir.resolve()):
            found.setdefault(path, path.relative_to(root).as_posix())
    return sorted(found.items())


def _walk(root: Path, site_dir: Path) -> Iterator[Path]:
    """Files, links that lead nowhere, and folders that cannot be opened.

    Linked folders are followed; each folder is visited once, so that links in a circle end.
    """
    seen: set[Path] = set()
    closed: list[Path] = []

    def note(error: OSError) -> None:
        closed.append(Path(error.filename))

    for place, inner, files in os.walk(root, followlinks=True, onerror=note):
        here, real = Path(place), Path(place).resolve()
        if real == site_dir or real in seen or CATALOGUE_NAME in files:
            inner.clear()
            continue
        seen.add(real)
        inner.sort()
        for path in (here / name for name in sorted(files)):
            # Pipes and sockets are passed over: opening one may wait for ever.
            if path.is_file() or (path.is_symlink() and not path.exists()):
                yield path
    yield from closed


def _doubt_old_readings(table: sqlite3.Connection) -> None:
    """Have files read again that an earlier version, with fewer readers, could not use."""
    with table:
        mark = table.execute("SELECT value FROM meta WHERE name = 'readers'").fetchone()
        if mark is None or mark[0] != READERS:
            table.execute("UPDATE files SET size = -2 WHERE kind IN ('other', 'unusable')")
            table.execute("INSERT OR REPLACE INTO meta VALUES ('readers', ?)", (READERS,))


def _forget_vanished(table: sqlite3.Connection, folders: Sequence[Path], found: set[Path]) -> None:
    roots = [folder.resolve() for folder in folders]
    with table:
        for (text,) in table.execute("SELECT path FROM files").fetchall():
            path = Path(true_path(text))
            if path not in found and any(path.is_relative_to(root) for root in roots):
                table.execute("DELETE FROM files WHERE path = ?", (text,))


def _forget_moved(table: sqlite3.Connection) -> None:
    """Drop files that are gone and were found again elsewhere: a folder that was renamed."""
    places: dict[str, list[str]] = defaultdict(list)
    query = (
        "SELECT COALESCE(json_extract(header, '$.content'), json_extract(header, '$.instance')), "
        "path FROM files WHERE header IS NOT NULL"
    )
    for scan, text in table.execute(query):
        places[scan].append(text)
    with table:
        for texts in places.values():
            if len(texts) < 2:
                continue
            gone = [text for text in texts if not Path(true_path(text)).exists()]
            if len(gone) < len(texts):
                table.executemany("DELETE FROM files WHERE path = ?", [(text,) for text in gone])


def _read_headers(
    table: sqlite3.Connection,
    found: Sequence[tuple[Path, str]],
    pseudonymiser: Pseudonymiser,
    *,
    assumed: Modality | None,
    progress: Progress | None,
) -> int:
    known = {
        row[0]: row[1:] for row in table.execute("SELECT path, size, mtime, assumed FROM files")
    }
    committed = time.monotonic()
    for done, (path, relative) in enumerate(found, start=1):
        try:
            status = path.stat()
            state = (status.st_size, status.st_mtime_ns, assumed or "")
        except OSError:
            state = (-1, -1, assumed or "")
        stored = stored_path(path)
        if known.get(stored) != state:
            row = _read_one(path, pseudonymiser, assumed=assumed)
            table.execute(
                "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (stored, stored_path(Path(relative)), *state, *row),
            )
        if time.monotonic() - committed > COMMIT_SECONDS:
            table.commit()
            committed = time.monotonic()
        if progress is not None:
            progress(done, len(found))
    table.commit()
    query = "SELECT COUNT(*) FROM files WHERE kind = 'other'"
    return int(table.execute(query).fetchone()[0])


def _read_one(
    path: Path, pseudonymiser: Pseudonymiser, *, assumed: Modality | None
) -> tuple[str, str | None, str | None]:
    """Kind, header and reason of one file."""
    try:
        kind = scan_kind(path)
        if kind is None:
            return "other", None, None
        return *read_header(path, kind, pseudonymiser, modality=assumed), None
    except DataError as error:
        return "unusable", None, str(error)
    except FileNotFoundError:
        return "unusable", None, "a link leads to no file. Mend the link, or mount what it needs."
    except OSError as error:
        what = "folder" if path.is_dir() else "file"
        reason = f"the {what} cannot be opened ({type(error).__name__}). Mend its permissions."
        return "unusable", None, reason
