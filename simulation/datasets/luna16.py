"""LUNA16: 888 chest CT of LIDC-IDRI with slices of at most 2.5 mm.

Folders, tables and file names are verified; the numbers in the masks of the lungs are from memory.
Makers of the scanners stand in no file of LUNA16. Where a folder LIDC-IDRI lies below the same
root, each scan's maker and patient are taken from it by the number of the series; else each scan
is its own patient (a few of LIDC-IDRI's patients have two series).
"""

import re
from dataclasses import replace
from pathlib import Path

from simulation.datasets.lidc_idri import Series, find_series
from simulation.datasets.rows import (
    Adapter,
    DatasetInfo,
    DatasetRows,
    Mask,
    Row,
    Source,
    sorted_rows,
    wrong_layout,
)
from simulation.datasets.tables import Tally, below, folders_named, read_table, visible

INFO = DatasetInfo(
    name="luna16",
    title="LUNA16",
    modalities=("CT",),
    size="888 scans, about 120 GB",
    licence="CC BY 4.0 (from memory)",
    url="https://zenodo.org/records/3723295",
    site="maker of the scanner by joining a folder LIDC-IDRI below the same root; unknown without",
    site_verified=True,
    layout=(
        "subset0 to subset9/<series>.mhd and .raw",
        "annotations.csv (seriesuid, coordX, coordY, coordZ, diameter_mm)",
        "seg-lungs-LUNA16/<series>.mhd and LIDC-IDRI/, optional",
    ),
    citation="Setio et al. 2017, doi:10.1016/j.media.2017.06.015",
    structures={3: "left lung", 4: "right lung", 5: "airways"},
    labels={"nodule": ("absent", "present")},
    shares_patients_with=("lidc-idri", "medmnist3d"),
)
TABLE, LUNGS = "annotations.csv", "seg-lungs-LUNA16"
_NUMBER = r"[0-9.]+"


def read(root: Path) -> DatasetRows:
    """Every scan, with its subset as a fact.

    Label ``nodule``: present where ``annotations.csv`` has a line of the scan; no label without
    the table.

    Raises:
        DataError: no folder subset0 to subset9, no scan, or a table that cannot be read.
    """
    folders = folders_named(root, r"subset\d", depth=2)
    if not folders:
        raise wrong_layout(INFO, "no folder subset0")
    tally = Tally()
    annotated = _annotated(root)
    tally.add(f"table {TABLE} missing: no classes", int(annotated is None))
    series = {each.number: each for each in find_series(root, Tally())}
    lungs = next(iter(folders_named(root, re.escape(LUNGS), depth=2)), root / LUNGS)
    rows: dict[str, Row] = {}
    for file in (file for folder in folders for file in visible(folder)):
        if file.suffix != ".mhd" or not re.fullmatch(_NUMBER, file.stem):
            continue
        if not file.with_suffix(".raw").is_file() and not file.with_suffix(".zraw").is_file():
            tally.add("scan(s) left out: the .raw file is missing")
            continue
        tally.add("scan(s) left out: a copy lies in another subset", int(file.stem in rows))
        row = _row(root, file, lungs, series.get(file.stem))
        labels = {} if annotated is None else {"nodule": _class(file.stem, annotated)}
        rows.setdefault(file.stem, replace(row, labels=labels))
    if not rows:
        raise wrong_layout(INFO, "no file <series>.mhd in subset0 to subset9")
    unknown = sum(not row.vendor for row in rows.values())
    tally.add("scan(s) of unknown maker: not in a folder LIDC-IDRI below the root", unknown)
    tally.add("scan(s) without a mask of the lungs", sum(not row.masks for row in rows.values()))
    return sorted_rows(list(rows.values()), tally.lines)


def _annotated(root: Path) -> set[str] | None:
    """Numbers of the series with a nodule; None without the table."""
    files = sorted([*root.glob(TABLE), *root.glob(f"*/{TABLE}")])
    return {cells.get("seriesuid", "") for cells in read_table(files[0])} if files else None


def _class(number: str, annotated: set[str]) -> str:
    return "present" if number in annotated else "absent"


def _row(root: Path, file: Path, lungs: Path, series: Series | None) -> Row:
    mask = lungs / file.name
    vendor = series.vendor if series is not None else ""
    return Row(
        scan=file.stem,
        patient=series.patient if series is not None else file.stem,
        modality="CT",
        source=Source(below(root, file), "itk"),
        site=vendor if vendor != "other" else "",
        vendor=vendor,
        masks=(Mask(Source(below(root, mask), "itk")),) if mask.is_file() else (),
        facts={"subset": file.parent.name[-1]},
    )


ADAPTER = Adapter(INFO, read)
