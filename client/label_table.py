"""The hospital's table of labels: a CSV that says which scan has which label or label map.

Columns: ``path`` (a file of the scan, or the folder that holds the one scan's files, as indexed) or
``scan`` (its name in ``agssd-site show``); optional ``mask`` (file of its label map) and ``split``
(``train`` or ``test``). Every other column is a label by that name. Relative paths start at the
table's folder. Rows are spoken of by their line numbers, since paths may name patients.
"""

import csv
import hashlib
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

from agssd_core.data.catalogue import database, open_catalogue, source_paths, true_path
from agssd_core.data.records import ScanRecord
from agssd_core.errors import DataError
from agssd_core.evaluation.labelled import Split
from client.site_scans import SiteScan

PATH, SCAN, MASK, SPLIT = "path", "scan", "mask", "split"
HELD_OUT = 5
_MOST_BYTES = 64 << 20


@dataclass(frozen=True)
class Table:
    """Labelled scans, and the lines that could not be used with the reason."""

    scans: tuple[SiteScan, ...]
    left_out: dict[str, str]


@dataclass(frozen=True)
class _Files:
    """Where the catalogue's scans lie: private, never printed.

    Attributes:
        places: every file of a scan and every folder above it -> names of the scans there.
    """

    records: Mapping[str, ScanRecord]
    paths: Mapping[str, tuple[str, ...]] = field(repr=False)
    places: Mapping[Path, tuple[str, ...]] = field(repr=False)
    headers: Mapping[str, tuple[str, ...]] = field(repr=False)

    def named(self, name: str) -> str:
        """The scan of a name.

        Raises:
            DataError: there is none.
        """
        if name not in self.records:
            raise DataError("no scan of the catalogue has this name. See `agssd-site show SITE`.")
        return name

    def at(self, path: Path) -> str:
        """The scan that a file belongs to, or the only one below a folder.

        Raises:
            DataError: there is none, or several.
        """
        try:
            found = self.places.get(path.resolve(), ())
        except (OSError, ValueError):
            raise DataError("the path cannot be read. Write one of this machine.") from None
        if len(found) == 1:
            return found[0]
        if not found:
            raise DataError(
                "no scan of the catalogue lies there. Index its folder first; `agssd-site skipped "
                "SITE` lists what was left out."
            )
        raise DataError(
            f"{len(found)} scans lie there, one is needed. Name a file of the one that is meant."
        )


def read_table(file: Path, site: Path, *, seed: int = 0, label: str = "") -> Table:
    """Read a table and find its scans in the site's catalogue.

    Args:
        file: CSV in UTF-8, comma or semicolon, with a header.
        site: indexed folder.
        seed: where the table does not say it, one patient of five is held out, drawn by this.
        label: whose classes are spread over both sides alike.

    Raises:
        DataError: the table cannot be read, has no usable row, or puts a patient on both sides.
        CatalogueError: the folder is no site.
    """
    header, rows = _rows(file)
    if (PATH in header) == (SCAN in header):
        raise DataError(
            f"the table needs a column {PATH} or a column {SCAN}, and not both. Its header names "
            f"{len(header)} column(s)."
        )
    if label and label not in header:
        raise DataError(f"the table has no column for the label {label}. Add it, or name another.")
    files = _files(site)
    left_out: dict[str, str] = {}
    found: dict[str, SiteScan] = {}
    said: dict[str, str] = {}
    for number, row in rows:
        try:
            scan = _scan(row, files, file.parent)
            if scan.scan in found:
                raise DataError("the scan stands in the table twice. Keep one line.")
            said[scan.scan] = _side(row)
        except DataError as error:
            left_out[f"line {number}"] = str(error)
        else:
            found[scan.scan] = scan
    if not found:
        first = f" The first: {next(iter(left_out.values()))}" if left_out else ""
        raise DataError(f"none of the table's {len(rows)} row(s) can be used.{first}")
    return Table(_placed(list(found.values()), said, seed=seed, label=label), left_out)


def _rows(file: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise DataError(f"the table is larger than {_MOST_BYTES >> 20} MiB. Split it.")
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"the table cannot be read ({type(error).__name__}). Name a CSV file in UTF-8."
        ) from None
    head = text.splitlines()[0] if text.strip() else ""
    reader = csv.reader(io.StringIO(text), delimiter=";" if ";" in head else ",")
    lines = [(reader.line_num, [cell.strip() for cell in line]) for line in reader]
    lines = [(number, line) for number, line in lines if any(line)]
    header = lines[0][1] if lines else []
    if len(set(header)) < len(header) or not all(header) or len(lines) < 2:
        raise DataError(
            "the table needs a header in which every column has a name of its own, and a row."
        )
    rows = []
    for number, line in lines[1:]:
        cells = [*line, *[""] * (len(header) - len(line))]
        rows.append((number, dict(zip(header, cells, strict=False))))
    return header, rows


def _files(site: Path) -> _Files:
    records = {record.name: record for record in open_catalogue(site).scans}
    paths, headers = {}, {}
    query = "SELECT header FROM files WHERE path = ?"
    with database(site, write=False) as table:
        for name in records:
            stored = source_paths(table, name)
            told = [table.execute(query, (one,)).fetchone() or ("",) for one in stored]
            paths[name] = tuple(true_path(one) for one in stored)
            headers[name] = tuple(str(one[0]) for one in told)
    return _Files(records, paths, _places(paths), headers)


def _scan(row: Mapping[str, str], files: _Files, folder: Path) -> SiteScan:
    name = files.named(row[SCAN]) if SCAN in row else files.at(folder / _filled(row[PATH]))
    mask = row.get(MASK, "")
    return SiteScan(
        record=files.records[name],
        paths=files.paths[name],
        headers=files.headers[name],
        labels={k: v for k, v in row.items() if k not in (PATH, SCAN, MASK, SPLIT) and v},
        split="train",
        mask=folder / mask if mask else None,
    )


def _filled(path: str) -> str:
    if not path:
        raise DataError("the row names no path.")
    return path


def _side(row: Mapping[str, str]) -> str:
    side = row.get(SPLIT, "")
    if side not in ("", "train", "test"):
        raise DataError("its split is neither train nor test.")
    return side


def _placed(
    scans: Sequence[SiteScan], said: Mapping[str, str], *, seed: int, label: str
) -> tuple[SiteScan, ...]:
    """Every patient on one side: as the table says, otherwise drawn, class by class."""
    patients: dict[str, list[SiteScan]] = defaultdict(list)
    for scan in sorted(scans, key=lambda scan: scan.scan):
        patients[scan.patient].append(scan)
    sides: dict[str, str] = {}
    for patient, own in patients.items():
        found = {said[scan.scan] for scan in own} - {""}
        if len(found) > 1:
            raise DataError(
                "the table's split puts scans of one patient on both sides, so the numbers would "
                "flatter. Give each patient to one side."
            )
        sides[patient] = next(iter(found), "")
    if not any(sides.values()):
        sides = _drawn(patients, seed=seed, label=label)
    split = {patient: cast("Split", side or "train") for patient, side in sides.items()}
    return tuple(replace(s, split=split[s.patient]) for own in patients.values() for s in own)


def _drawn(patients: Mapping[str, Sequence[SiteScan]], *, seed: int, label: str) -> dict[str, str]:
    """One patient of five of every class is held out, at least one where there are two."""
    classes: dict[str, list[str]] = defaultdict(list)
    for patient, own in patients.items():
        classes[own[0].labels.get(label, "")].append(patient)
    sides = {}
    for members in classes.values():
        ordered = sorted(members, key=lambda p: hashlib.sha256(f"{seed}/{p}".encode()).digest())
        held_out = -(-len(ordered) // HELD_OUT) if len(ordered) > 1 else 0
        for place, patient in enumerate(ordered):
            sides[patient] = "test" if place < held_out else "train"
    return sides


def _places(paths: Mapping[str, Sequence[str]]) -> dict[Path, tuple[str, ...]]:
    found: dict[Path, set[str]] = defaultdict(set)
    for name, files in paths.items():
        for file in {Path(one).resolve() for one in files}:
            for place in (file, *file.parents):
                found[place].add(name)
    return {place: tuple(sorted(names)) for place, names in found.items()}
