"""A simulated site's folder of raw scans, as a hospital would have it, from rows of a data set.

Files that the index can read are linked, the others converted, and a sidecar beside each says
whose scan it is. A scan appears whole or not at all; what is there already is not made again, so a
killed call goes on. Links lead to the data set's folder, which must stay where it is.
"""

import gzip
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np

from agssd_core.errors import DataError
from agssd_core.weights import sync_folder, write_bytes, write_text
from simulation.datasets.reading import read_volume
from simulation.datasets.reading_images import write_frames_from
from simulation.datasets.rows import Row
from simulation.phantom_files import nifti_image

# Says that a folder is ours to tidy; reasons of unusable scans; what a scan was made from.
MARK, UNUSABLE, MADE = "rows.json", "unusable.json", ".made.json"
Progress = Callable[[int, int], None]
_GZIP_LEVEL = 1
_OURS = re.compile(r"\.?scan-[0-9a-f]{16}(\.tmp)?")


def write_raw_site(
    root: Path, rows: Sequence[Row], folder: Path, *, progress: Progress | None = None
) -> int:
    """Make a folder that `agssd-site index` reads.

    Args:
        root: of the data set.
        rows: the site's scans.
        folder: where to; scans that an earlier call left there and these rows do not name are
            removed.
        progress: told (scans done, scans in all).

    Returns:
        Number of scans that could be used; ``unusable_scans`` tells of the others.

    Raises:
        DataError: none of the scans can be used, or the folder holds somebody's own files, which
            are left alone.
    """
    _take(folder)
    places = {row.scan: folder / _safe(row.patient) / _safe(row.scan) for row in rows}
    _remove_others(folder, set(places.values()))
    reasons = {}
    for done, row in enumerate(rows, start=1):
        try:
            _make(root, row, places[row.scan])
        except DataError as error:
            reasons[row.scan] = str(error)
        if progress is not None:
            progress(done, len(rows))
    _note(folder / UNUSABLE, json.dumps(reasons, sort_keys=True))
    if len(reasons) == len(rows):
        first = next(iter(reasons.values()), "there are none.")
        raise DataError(f"none of the site's {len(rows)} scan(s) can be used. The first: {first}")
    return len(rows) - len(reasons)


def unusable_scans(folder: Path) -> dict[str, str]:
    """Scan -> why ``write_raw_site`` could not use it."""
    file = folder / UNUSABLE
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def remove_raw_site(folder: Path) -> None:
    """Remove a folder that ``write_raw_site`` made; any other is left alone."""
    if (folder / MARK).is_file() and not folder.is_symlink():
        _remove_others(folder, set())
        for name in (UNUSABLE, MARK):
            (folder / name).unlink(missing_ok=True)
        if not any(folder.iterdir()):
            folder.rmdir()


def _take(folder: Path) -> None:
    """Mark a folder as ours, unless there is something in it that is not."""
    if folder.is_dir() and not (folder / MARK).is_file() and any(folder.iterdir()):
        raise DataError(
            "the folder that a site's scans are to go to holds other files. Name a new folder, or "
            "empty this one; nothing in it was changed."
        )
    folder.mkdir(parents=True, exist_ok=True)
    _note(folder / MARK, json.dumps({"made by": "agssd-sim split"}))


def _note(file: Path, text: str) -> None:
    if not file.is_file() or file.read_text(encoding="utf-8") != text:
        write_text(file, text, private=True)


def _remove_others(folder: Path, wanted: set[Path]) -> None:
    """A patient who was held out meanwhile must not stay among the scans that train."""
    for patient in [path for path in folder.iterdir() if _OURS.fullmatch(path.name)]:
        for scan in [path for path in patient.iterdir() if _OURS.fullmatch(path.name)]:
            if scan.is_symlink():
                scan.unlink()
            elif scan not in wanted:
                shutil.rmtree(scan)
        if not any(patient.iterdir()):
            patient.rmdir()


def _make(root: Path, row: Row, place: Path) -> None:
    """Gather one scan in a folder of another name, and rename that when it is whole."""
    source = root / row.source.path
    state = _state(source, row) if os.access(source, os.R_OK) else None
    made = place / MADE
    if state is not None and made.is_file() and made.read_text(encoding="utf-8") == state:
        return
    _discard(place)
    if state is None:
        raise DataError(
            "the scan's file is missing or may not be read. Unpack the download again, or mend its "
            "permissions."
        )
    temporary = place.with_name(f".{place.name}.tmp")
    _discard(temporary)
    temporary.mkdir(parents=True)
    try:
        _fill(root, row, temporary)
        write_text(temporary / MADE, state, private=True)
        temporary.rename(place)
        sync_folder(place.parent)
    finally:
        _discard(temporary)


def _discard(place: Path) -> None:
    if place.is_dir():
        shutil.rmtree(place)


def _fill(root: Path, row: Row, place: Path) -> None:
    source = (root / row.source.path).resolve()
    if row.source.kind == "dicom":
        (place / "series").symlink_to(source)  # its headers say whose it is
        return
    if row.modality == "US":
        if row.source.kind in ("image", "video"):
            # A name that no rule takes for a mask or another patient.
            file = place / f"{_safe(row.scan)}{source.suffix.lower()}"
            file.symlink_to(source)
        else:
            file = write_frames_from(root, row, place)
        _sidecar(file.with_suffix(".json"), row)
        return
    name = f"{row.modality}_image"
    if row.source.kind == "nifti" and row.source.index is None:
        suffix = ".nii.gz" if source.name.lower().endswith(".gz") else ".nii"
        (place / f"{name}{suffix}").symlink_to(source)
    else:
        volume = read_volume(root, row)
        array = np.asarray(volume.array, dtype=np.float32)
        # No time in the gzip header: equal scans give equal files.
        packed = gzip.compress(nifti_image(array, volume.affine).to_bytes(), _GZIP_LEVEL, mtime=0)
        write_bytes(place / f"{name}.nii.gz", packed)
    _sidecar(place / f"{name}.json", row)


def _sidecar(file: Path, row: Row) -> None:
    said = {"PatientID": row.patient, "Modality": row.modality, "Manufacturer": row.vendor}
    write_text(file, json.dumps({key: value for key, value in said.items() if value}))


def _safe(name: str) -> str:
    """A name for a folder or file: short, and different for different names."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()
    return f"scan-{digest[:16]}"


def _state(source: Path, row: Row) -> str:
    """All that a scan's folder depends on; a data set that was moved makes new links."""
    status = source.stat()
    said = [row.scan, row.patient, row.modality, row.vendor, dict(row.facts), asdict(row.source)]
    return json.dumps([str(source.resolve()), status.st_size, status.st_mtime_ns, *said])
