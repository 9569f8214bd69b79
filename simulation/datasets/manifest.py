"""Any folder of scans with a table ``MANIFEST.csv`` that says what they are.

The layout is the house's own. Columns:

``path`` and ``modality`` (CT, MR, US) are needed. A path that ends in ``/``, or names a folder, is
a DICOM series.
``site``, ``vendor``, ``patient``, ``sequence``, ``split`` may be left out or empty. A vendor is
taken from the site's text where it names one. A patient is derived from the file's name and its
folders as `agssd-site index` does, or is the scan itself.
``label`` is the scan's class. Instead of a class ``mask:NAME`` says what is outlined and
``sequence:NAME`` which sequence it is; text in brackets is a remark.
``mask`` names files of outlines, separated by ``;``.
``label:NAME`` and ``fact:NAME`` are further classifications and facts.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import cast

from agssd_core.config.node import ScanModality
from agssd_core.data.clip_naming import describe_clip
from agssd_core.data.clips import IMAGE_SUFFIXES, VIDEO_SUFFIXES
from agssd_core.data.deidentify import vendor_name
from agssd_core.data.naming import describe_name
from agssd_core.errors import DataError
from simulation.datasets.rows import (
    Adapter,
    DatasetInfo,
    DatasetRows,
    Mask,
    OfficialSplit,
    Row,
    Source,
    SourceKind,
    sorted_rows,
    wrong_layout,
)
from simulation.datasets.tables import Tally, read_table, said, scan_name

TABLE = "MANIFEST.csv"
INFO = DatasetInfo(
    name="manifest",
    title="a folder with MANIFEST.csv",
    modalities=("CT", "MR", "US"),
    size="as the table lists",
    licence="as the owner of the folder says",
    url="",
    site="column site of the table",
    site_verified=True,
    layout=(
        f"{TABLE} with the columns path, modality; if known site, vendor, patient, sequence, "
        "label, mask, split, label:NAME, fact:NAME",
        "the files and folders that its column path names",
    ),
    citation="",
    structures={1: "outlined"},
    labels={"class": ()},
)
SPLITS: Mapping[str, OfficialSplit] = {
    "": "",
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}
_MODALITIES = {"ct": "CT", "mr": "MR", "mri": "MR", "us": "US", "ultrasound": "US"}
_KINDS: Mapping[str, SourceKind] = {
    ".nii": "nifti",
    ".gz": "nifti",
    ".mha": "itk",
    ".mhd": "itk",
    ".nrrd": "itk",
    ".hdr": "analyze",
    ".img": "analyze",
    ".dcm": "dicom",
    **dict.fromkeys(IMAGE_SUFFIXES, "image"),
    **dict.fromkeys(VIDEO_SUFFIXES, "video"),
}
_ENDING = re.compile(r"(\.nii)?\.[A-Za-z0-9]{2,5}$")
# Grey values that JPEG smears round the edges of a mask lie below.
_JPEG_THRESHOLD = 127.0


def read_manifest(root: Path, *, only: tuple[str, ...] = ()) -> DatasetRows:
    """The scans that a folder's table lists.

    Args:
        root: the folder with the table.
        only: patterns of paths such as ``us2d/busi/*``, where ``*`` goes through folders; a scan
            that fits one is taken. Empty takes all.

    Raises:
        DataError: no table, no column ``path`` or ``modality``, or no scan fits ``only``.
    """
    if not (root / TABLE).is_file():
        raise wrong_layout(INFO, f"no file {TABLE}")
    table = read_table(root / TABLE)
    missing = [name for name in ("path", "modality") if table and name not in table[0]]
    if missing or not table:
        raise wrong_layout(INFO, f"{TABLE} has no column {missing[0]}" if missing else "no rows")
    chosen = [cells for cells in table if _fits(cells["path"], only)]
    if not chosen:
        raise DataError(
            f"none of the {len(table)} scans in {TABLE} fits the patterns {', '.join(only)}. "
            'Patterns are paths below its folder, such as "3d/*" or "*_T1.nii.gz".'
        )
    unused = [name for name in only if not any(_fits(cells["path"], (name,)) for cells in chosen)]
    tally = Tally()
    rows: dict[str, Row] = {}
    for cells in chosen:
        row = _row(root, cells, tally)
        if row is None:
            continue
        if row.source.path in rows:
            tally.add("row(s) of the table left out: the scan is listed twice")
            continue
        rows[row.source.path] = row
    notes = (*tally.lines, *(f"no scan fits the pattern {pattern}" for pattern in unused))
    return sorted_rows(_distinct(list(rows.values())), notes)


def _fits(path: str, only: tuple[str, ...]) -> bool:
    return not only or any(fnmatchcase(path, pattern) for pattern in only)


def _distinct(rows: list[Row]) -> list[Row]:
    """Names that only differ in signs get a few digits of their path's hash."""
    count = Counter(row.scan for row in rows)
    return [
        replace(row, scan=f"{row.scan}-{_digits(row.source.path)}", patient=_own(row))
        if count[row.scan] > 1
        else row
        for row in rows
    ]


def _own(row: Row) -> str:
    """The patient; a scan that is its own patient keeps a name apart from its like."""
    return f"{row.scan}-{_digits(row.source.path)}" if row.patient == row.scan else row.patient


def _digits(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:8]


def _row(root: Path, cells: Mapping[str, str], tally: Tally) -> Row | None:
    """One line of the table; None, with a reason in the tally, where it cannot be used."""
    modality = _MODALITIES.get(cells["modality"].casefold())
    if modality is None:
        tally.add("scan(s) left out: their modality is not CT, MR or US")
        return None
    source = _source(root, cells["path"], tally, what="scan(s) left out")
    if source is None:
        return None
    if modality != "US" and source.kind in ("image", "video"):
        tally.add("scan(s) left out: an image or a video is no volume of CT or MR")
        return None
    scan = scan_name(_ENDING.sub("", source.path))
    label, remarks = _label(cells)
    place = PurePosixPath(source.path).parts[:2]
    return Row(
        scan=scan,
        patient=said(cells.get("patient", "")) or _patient(root, source, modality) or scan,
        modality=cast(ScanModality, modality),
        source=source,
        site=said(cells.get("site", "")),
        vendor=_vendor(cells),
        sequence=said(cells.get("sequence", "")) or remarks.get("sequence", ""),
        labels={**label, **_columns(cells, "label:")},
        masks=_masks(root, cells.get("mask", ""), tally),
        split=_split(cells.get("split", ""), tally),
        facts={
            "folder": "/".join(place),
            "site_text": said(cells.get("site", "")),
            **({"mask": remarks["mask"]} if "mask" in remarks else {}),
            **_columns(cells, "fact:"),
        },
    )


def _source(root: Path, path: str, tally: Tally, *, what: str) -> Source | None:
    """Where pixels lie; None, with a reason in the tally, where nothing usable lies there."""
    inside = PurePosixPath(path.replace("\\", "/"))
    if not path or inside.is_absolute() or ".." in inside.parts:
        tally.add(f"{what}: the path leads out of the folder")
        return None
    place = root / inside
    if place.is_dir():
        return Source(inside.as_posix(), "dicom")
    kind = _KINDS.get(inside.suffix.casefold())
    if kind is None and not path.endswith("/"):
        tally.add(f"{what}: the format is not known")
    elif not place.is_file() or path.endswith("/"):
        tally.add(f"{what}: the file is missing")
    else:
        return Source(inside.as_posix(), cast(SourceKind, kind))
    return None


def _label(cells: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """The class by name, and what the cell says instead of a class."""
    text = said(cells.get("label", ""))
    if not text or text.startswith("("):
        return {}, {}
    for name in ("mask", "sequence"):
        if text.startswith(f"{name}:"):
            return {}, {name: text.removeprefix(f"{name}:").strip()}
    return {"class": text}, {}


def _columns(cells: Mapping[str, str], start: str) -> dict[str, str]:
    """Filled cells of the columns ``label:NAME`` or ``fact:NAME``, by NAME."""
    return {
        name.removeprefix(start): said(cell)
        for name, cell in cells.items()
        if name.startswith(start) and said(cell)
    }


def _vendor(cells: Mapping[str, str]) -> str:
    found = vendor_name(said(cells.get("vendor", "")) or said(cells.get("site", "")))
    return "" if found == "other" else found


def _patient(root: Path, source: Source, modality: str) -> str:
    place = root / source.path
    if modality == "US" and source.kind in ("image", "video", "itk"):
        return describe_clip(place).patient
    return describe_name(place).patient if source.kind == "nifti" else ""


def _masks(root: Path, cell: str, tally: Tally) -> tuple[Mask, ...]:
    masks = []
    for path in filter(None, (part.strip() for part in cell.split(";"))):
        source = _source(root, path, tally, what="mask(s) left out")
        if source is not None:
            jpeg = PurePosixPath(path).suffix.casefold() in (".jpg", ".jpeg", ".jpe")
            masks.append(Mask(source, value=1, threshold=_JPEG_THRESHOLD if jpeg else 0.0))
    return tuple(masks)


def _split(cell: str, tally: Tally) -> OfficialSplit:
    found = SPLITS.get(said(cell).casefold())
    if found is None:
        tally.add("split(s) not understood; train, validation and test are")
    return found or ""


ADAPTER = Adapter(INFO, read_manifest)
