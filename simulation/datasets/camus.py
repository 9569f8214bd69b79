"""CAMUS: two- and four-chamber echocardiography of one hospital with outlines of the heart.

Both releases are read: NIfTI files (names verified) and the challenge's ``.mhd`` files (names
verified by published loaders). The lists of ``database_split`` and the values of outlines are from
memory. The frames at the end of diastole and systole carry the outlines. So does a sequence only
where those frames are missing, because it holds the same two frames again and would count them
twice. The challenge kept the outlines of its test part; without any, no split is taken.
"""

import re
from dataclasses import replace
from pathlib import Path

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
from simulation.datasets.tables import Tally, below, folders_named, said, scan_name, visible

VIEWS = ("2CH", "4CH")
QUALITIES = ("Good", "Medium", "Poor")
INFO = DatasetInfo(
    name="camus",
    title="CAMUS",
    modalities=("US",),
    size="500 patients, 2 views, 3.7 GB",
    licence="CC BY-NC-SA 4.0 (from memory)",
    url="https://humanheart-project.creatis.insa-lyon.fr/database/",
    site="one hospital (St-Etienne, GE Vivid E95)",
    site_verified=False,
    layout=(
        "CAMUS_public/database_nifti/patient0001/patient0001_2CH_ED.nii.gz, _2CH_ED_gt.nii.gz, "
        "_2CH_half_sequence.nii.gz, Info_2CH.cfg; CAMUS_public/database_split/",
        "or training/patient0001/patient0001_2CH_ED.mhd and .raw, _gt.mhd, _sequence.mhd; testing/",
        "folders of patients here or at most three folders down",
    ),
    citation="Leclerc et al. 2019, IEEE TMI 38(9)",
    structures={1: "left ventricle", 2: "myocardium", 3: "left atrium"},
    labels={"image_quality": QUALITIES, "view": VIEWS},
)
_NAME = re.compile(
    r"(?P<patient>patient\d+)_(?P<view>2CH|4CH)_(?P<phase>ED|ES|half_sequence|sequence)"
    r"(?P<mask>_gt)?\.(?P<kind>nii\.gz|nii|mhd|mha)"
)
_LISTS: dict[str, OfficialSplit] = {
    "training": "train",
    "validation": "validation",
    "testing": "test",
}
_FACTS = {"Sex": "sex", "Age": "age", "EF": "ef", "LVef": "ef"}


def read(root: Path) -> DatasetRows:
    """Frames and sequences of both views.

    Raises:
        DataError: no patient's folder with a frame.
    """
    tally = Tally()
    folders = folders_named(root, r"patient\d+", depth=4)
    if root.name.startswith("patient"):
        folders.append(root)
    listed = _listed(root)
    rows: dict[str, Row] = {}
    for folder in folders:
        split = listed.get(folder.name) or _LISTS.get(folder.parent.name.casefold(), "")
        found = _patient(root, folder, split, tally)
        if any(row.scan in rows for row in found):
            tally.add("patient(s) left out the second time: two folders of one name")
            continue
        rows.update({row.scan: row for row in found})
    if not rows:
        raise wrong_layout(INFO, "no frame such as patient0001/patient0001_2CH_ED.nii.gz or .mhd")
    return sorted_rows(_usable_split(list(rows.values()), tally), tally.lines)


def _usable_split(rows: list[Row], tally: Tally) -> list[Row]:
    """Rows without a split where nothing that is held out has outlines; its name stays a fact."""
    held_out = [row for row in rows if row.split in ("validation", "test")]
    if not held_out or any(row.masks for row in held_out):
        return rows
    tally.add("scan(s) of the official test have no outlines; no split is taken", len(held_out))
    return [replace(row, split="", facts={**row.facts, "release": row.split}) for row in rows]


def _listed(root: Path) -> dict[str, OfficialSplit]:
    """Official part by the patient's folder name."""
    listed: dict[str, OfficialSplit] = {}
    for folder in folders_named(root, "database_split", depth=2):
        for part, split in _LISTS.items():
            file = folder / f"subgroup_{part}.txt"
            if file.is_file():
                names = re.findall(r"patient\d+", file.read_text("utf-8", errors="replace"))
                listed.update(dict.fromkeys(names, split))
    return listed


def _patient(root: Path, folder: Path, split: OfficialSplit, tally: Tally) -> list[Row]:
    scans: dict[tuple[str, str], Source] = {}
    masks: dict[tuple[str, str], Mask] = {}
    for file in visible(folder):
        named = _NAME.fullmatch(file.name)
        if named is None or named["patient"] != folder.name:
            continue
        kind: SourceKind = "nifti" if named["kind"].startswith("nii") else "itk"
        source, place = Source(below(root, file), kind), (named["view"], named["phase"])
        if named["mask"]:
            masks.setdefault(place, Mask(source))
        else:
            scans.setdefault(place, source)
    if not scans:
        tally.add("patient(s) without a frame")
    rows = []
    for (view, phase), source in scans.items():
        outlined = {other for other in scans if other in masks and other[0] == view}
        mask = masks.get((view, phase))
        if phase.endswith("sequence"):
            mask = None if {(view, "ED"), (view, "ES")} & outlined else mask
        elif mask is None:
            tally.add("frame(s) without outlines")
        row = _row(folder, view, phase, source, split)
        rows.append(replace(row, masks=(mask,) if mask else ()))
    return rows


def _row(folder: Path, view: str, phase: str, source: Source, split: OfficialSplit) -> Row:
    info = _info(folder / f"Info_{view}.cfg")
    quality = info.get("ImageQuality", "").capitalize()
    facts = {name: info[key] for key, name in _FACTS.items() if said(info.get(key, ""))}
    labels = {"view": view}
    if quality in QUALITIES:
        labels["image_quality"] = facts["image_quality"] = quality
    return Row(
        scan=scan_name(f"{folder.name}_{view}_{phase}"),
        patient=folder.name,
        modality="US",
        source=source,
        vendor="GE",
        sequence=view,
        labels=labels,
        split=split,
        facts={"phase": phase, **facts},
    )


def _info(file: Path) -> dict[str, str]:
    """``Key: value`` lines; none where the file is missing."""
    try:
        lines = file.read_text("utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    parts = (line.partition(":") for line in lines)
    return {key.strip(): value.strip() for key, _, value in parts if value.strip()}


ADAPTER = Adapter(INFO, read)
