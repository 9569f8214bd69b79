"""``sites.csv``: who holds which scan, as a table that people can read and commands check."""

import csv
import io
import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path, PurePosixPath

from agssd_core.errors import DataError
from agssd_core.weights import write_text
from simulation.datasets.rows import Mask, Row, Source
from simulation.partition import Placed

COLUMNS = (
    *("site", "split", "patient", "scan", "modality", "vendor", "sequence", "labels"),
    *("path", "kind", "index", "key", "masks", "natural_site", "official_split", "facts"),
)


def write_sites(file: Path, placed: Sequence[Placed]) -> None:
    """Write a division; the same one gives the same bytes. Private: it names patients."""
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
        with file.open(newline="", encoding="utf-8") as stream:
            table = csv.DictReader(stream)
            if tuple(table.fieldnames or ()) != COLUMNS:
                raise DataError(
                    "the table of sites has other columns than `agssd-sim split` writes. Make it "
                    "again."
                )
            placed = tuple(_placed(line) for line in table)
    except FileNotFoundError:
        raise DataError("there is no sites.csv. Make one with `agssd-sim split`.") from None
    except (ValueError, KeyError, TypeError, UnicodeDecodeError):
        raise DataError("the table of sites is damaged. Make it again.") from None
    require_apart(placed)
    return placed


def require_apart(placed: Sequence[Placed]) -> None:
    """Check that patients and scans are where they may be.

    Raises:
        DataError: a patient at two sites or on both sides of the split, a scan twice, or a path
            outside the data set's folder.
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
        for source in (item.row.source, *(mask.source for mask in item.row.masks)):
            path = PurePosixPath(source.path)
            if path.is_absolute() or ".." in path.parts:
                raise DataError(
                    "a path of the table leaves the data set's folder. Name files below it."
                )


def _cells(item: Placed) -> list[str]:
    row = item.row
    plain = {"ensure_ascii": False, "sort_keys": True}
    return [
        *(item.site, item.split, row.patient, row.scan, row.modality, row.vendor, row.sequence),
        json.dumps(dict(row.labels), **plain),  # type: ignore[arg-type]
        *(row.source.path, row.source.kind),
        "" if row.source.index is None else str(row.source.index),
        row.source.key,
        json.dumps([asdict(mask) for mask in row.masks], **plain),  # type: ignore[arg-type]
        *(row.site, row.split),
        json.dumps(dict(row.facts), **plain),  # type: ignore[arg-type]
    ]


def _placed(line: dict[str, str]) -> Placed:
    masks = tuple(
        Mask(Source(**one["source"]), one["value"], one["threshold"])
        for one in json.loads(line["masks"])
    )
    index = int(line["index"]) if line["index"] else None
    row = Row(
        scan=line["scan"],
        patient=line["patient"],
        modality=line["modality"],  # type: ignore[arg-type]
        source=Source(line["path"], line["kind"], index, line["key"]),  # type: ignore[arg-type]
        site=line["natural_site"],
        vendor=line["vendor"],
        sequence=line["sequence"],
        labels=json.loads(line["labels"]),
        masks=masks,
        split=line["official_split"],  # type: ignore[arg-type]
        facts=json.loads(line["facts"]),
    )
    if line["split"] not in ("train", "test") or row.modality not in ("CT", "MR", "US"):
        raise ValueError("no such split or modality")
    return Placed(row, line["site"], line["split"])  # type: ignore[arg-type]
