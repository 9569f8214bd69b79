"""What adapters of CT data sets share: folders of numbered NIfTI files, and honest splits."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from simulation.datasets.rows import Mask, Row, Source
from simulation.datasets.tables import Tally, below, nifti_file, visible

NO_OUTLINES = "training scan(s) without outlines"


def first_folder(root: Path, needed: str, *inside: str) -> Path | None:
    """The root or the first of the named folders below it that holds ``needed``; None if none."""
    return next((root / name for name in ("", *inside) if (root / name / needed).is_dir()), None)


def numbered_files(folder: Path, pattern: str) -> Iterator[tuple[Path, re.Match[str]]]:
    """NIfTI files of a folder whose whole name without the ending fits a pattern.

    A file that lies there both packed and unpacked is given once.
    """
    seen = set()
    for file in visible(folder):
        stem = re.sub(r"\.nii(\.gz)?$", "", file.name)
        match = re.fullmatch(pattern, stem)
        if match is not None and stem != file.name and stem not in seen:
            seen.add(stem)
            yield nifti_file(folder, stem) or file, match


def outlines(root: Path, folder: Path, stem: str) -> tuple[Mask, ...]:
    """The mask with a structure's number for each voxel, empty where the file is missing."""
    file = nifti_file(folder, stem)
    return (Mask(Source(below(root, file), "nifti")),) if file is not None else ()


def honest_splits(rows: Sequence[Row], tally: Tally) -> list[Row]:
    """Rows whose official split can be used to test.

    A challenge that keeps the truth of its test scans leaves nothing to test with: then no row has
    a split, and the fact ``release`` says which part a scan was published in.
    """
    marked = [
        replace(row, facts={**row.facts, "release": row.split}) if row.split else row
        for row in rows
    ]
    held_out = [row for row in rows if row.split in ("validation", "test")]
    if any(row.masks or row.labels for row in held_out):
        return marked
    tally.add("scan(s) of the official test have no outlines; no split is taken", len(held_out))
    return [replace(row, split="") for row in marked]
