"""``sites.csv``: who holds which scan, as a table that people can read and commands check."""

import csv
import io
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path, PurePosixPath
from typing import Any, get_args

from agssd_core.config.node import ScanModality, name_problem
from agssd_core.errors import DataError
from agssd_core.weights import write_text
from simulation.datasets.rows import Mask, OfficialSplit, Row, Source, SourceKind
from simulation.partition import Placed, Split

COLUMNS = (
    *("site", "split", "patient", "scan", "modality", "vendor", "sequence", "labels"),
    *("path", "kind", "index", "key", "masks", "natural_site", "official_split", "facts"),
)
_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, csv.Error, RecursionError)


def write_sites(file: Path, placed: Sequence[Placed]) -> None:
    """Write a division; the same one gives the same bytes. Private: it names patients.

    Raises:
        DataError: as ``require_apart``; nothing is written.
    """
    require_apart(placed)
    stream = io.StringIO()
    table = csv.writer(stream, lineterminator="\n")
    table.writerow(COLUMNS)
    for item in sorted(placed, key=lambda one: (one.site, one.split, one.row.scan)):
        table.writerow(_cells(item))
    write_text(file, stream.getvalue(), private=True)


def read_sites(file: Path) -> tuple[Placed, ...]:
    """Read what ``write_sites`` wrote, or somebody edited.

    Raises:
        DataError: the table is missing or damaged, a patient stands at two sites or on both sides
            of the split, a scan stands twice, or a path leaves the data set's folder.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError("there is no sites.csv. Make one with `agssd-sim split`.") from None
    except (OSError, UnicodeDecodeError):
        raise DataError(
            "the table of sites cannot be read. Mend its permissions, or make it again."
        ) from None
    placed = _parsed(text)
    require_apart(placed)
    return placed


def _parsed(text: str) -> tuple[Placed, ...]:
    table = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    placed = []
    try:
        if tuple(table.fieldnames or ()) != COLUMNS:
            raise DataError(
                "the table of sites has other columns than `agssd-sim split` writes. Make it again."
            )
        for line in table:
            placed.append(_placed(line))
    except _UNREADABLE:
        raise DataError(
            f"the table of sites is damaged in its scan {len(placed) + 1}. Mend that line, or make "
            "the table again."
        ) from None
    return tuple(placed)


def require_apart(placed: Sequence[Placed]) -> None:
    """Check that patients and scans are where they may be.

    Raises:
        DataError: a patient at two sites or on both sides of the split, a scan twice, a path
            outside the data set's folder, or text that no table can hold.
    """
    scans = {item.row.scan for item in placed}
    places: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for item in placed:
        places[item.row.patient].add((item.site, item.split))
    astray = sum(len(found) > 1 for found in places.values())
    if astray or len(scans) < len(placed):
        raise DataError(
            f"{astray} patient(s) stand at two sites or on both sides of the split and "
            f"{len(placed) - len(scans)} scan(s) stand twice, none may: what is learnt would leak "
            "into the test. Give each patient one site and one side."
        )
    for item in placed:
        sources = (item.row.source, *(mask.source for mask in item.row.masks))
        if any(_leaves(source.path) for source in sources):
            raise DataError(
                "a path of the table leaves the data set's folder. Name files below it."
            )
    garbled = sum(not _is_text(item.row) for item in placed)
    if garbled:
        raise DataError(
            f"{garbled} scan(s) have names with signs that no table in UTF-8 can hold. "
            "Rename these files."
        )


def _leaves(path: str) -> bool:
    parts = PurePosixPath(path.replace("\\", "/"))
    return not path or parts.is_absolute() or ".." in parts.parts or path[1:2] == ":"


def _is_text(row: Row) -> bool:
    try:
        json.dumps(asdict(row), ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        return False
    # A lone carriage return would end the line when it is read back.
    cells = (row.scan, row.patient, row.site, row.vendor, row.sequence, row.source.path)
    return not any("\r" in text for text in (*cells, row.source.key))


def _cells(item: Placed) -> list[str]:
    row = item.row
    return [
        *(item.site, item.split, row.patient, row.scan, row.modality, row.vendor, row.sequence),
        _json(dict(row.labels)),
        *(row.source.path, row.source.kind),
        "" if row.source.index is None else str(row.source.index),
        row.source.key,
        _json([asdict(mask) for mask in row.masks]),
        *(row.site, row.split),
        _json(dict(row.facts)),
    ]


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


def _placed(line: dict[str, str]) -> Placed:
    if None in line or None in line.values() or name_problem(line["site"]):
        raise ValueError("more or fewer cells than columns, or no name of a site")
    row = Row(
        scan=_said(line["scan"]),
        patient=_said(line["patient"]),
        modality=_one_of(line["modality"], ScanModality),
        source=_source(
            path=line["path"],
            kind=line["kind"],
            index=int(line["index"]) if line["index"] else None,
            key=line["key"],
        ),
        site=line["natural_site"],
        vendor=line["vendor"],
        sequence=line["sequence"],
        labels=_texts(line["labels"]),
        masks=tuple(_mask(**one) for one in json.loads(line["masks"])),
        split=_one_of(line["official_split"], OfficialSplit),
        facts=_texts(line["facts"]),
    )
    return Placed(row, line["site"], _one_of(line["split"], Split))


def _mask(source: dict[str, Any], value: int | None, threshold: float) -> Mask:
    if not (value is None or type(value) is int) or isinstance(threshold, bool):
        raise TypeError("no number")
    return Mask(_source(**source), value, float(threshold))


def _source(path: str, kind: str, index: int | None, key: str) -> Source:
    if not (index is None or type(index) is int):
        raise TypeError("no whole number")
    if any("\0" in text for text in (path, kind, key)):
        raise ValueError("no text")
    return Source(path, _one_of(kind, SourceKind), index, key)


def _one_of(text: str, literal: Any) -> Any:
    if text not in get_args(literal):
        raise ValueError("not one of the words allowed")
    return text


def _said(text: str) -> str:
    if not text:
        raise ValueError("empty")
    return text


def _texts(text: str) -> dict[str, str]:
    found = json.loads(text)
    if not all(isinstance(value, str) for value in found.values()):
        raise TypeError("a value is no text")
    return dict(found)
