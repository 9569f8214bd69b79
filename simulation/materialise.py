"""A simulated site's folder of raw scans, as a hospital would have it, from rows of a data set.

Files that the index can read are linked, the others converted, and a sidecar beside each says
whose scan it is. What is there already is not made again; a killed call goes on.
"""

import gzip
import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from agssd_core.errors import DataError
from agssd_core.weights import write_bytes, write_text
from simulation.datasets.reading import read_volume
from simulation.datasets.reading_images import write_frames_from
from simulation.datasets.rows import Row
from simulation.phantom_files import nifti_image

MARK = "rows.json"
Progress = Callable[[int, int], None]
_GZIP_LEVEL = 1


def write_raw_site(
    root: Path, rows: Sequence[Row], folder: Path, *, progress: Progress | None = None
) -> int:
    """Make a folder that `agssd-site index` reads.

    Args:
        root: of the data set.
        rows: the site's scans.
        folder: where to; what earlier rows left there and these do not name is removed.
        progress: told (scans done, scans in all).

    Returns:
        Number of scans that could be used; the others are left out.

    Raises:
        DataError: none of the scans can be used.
    """
    wanted = json.dumps([_mark(root, row) for row in rows])
    mark = folder / MARK
    if mark.is_file() and mark.read_text(encoding="utf-8").startswith(wanted):
        return int(mark.read_text(encoding="utf-8")[len(wanted) :])
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    made = 0
    reason = ""
    for done, row in enumerate(rows, start=1):
        try:
            _write(root, row, folder / _safe(row.patient) / _safe(row.scan))
            made += 1
        except DataError as error:
            reason = reason or str(error)
        if progress is not None:
            progress(done, len(rows))
    if not made:
        raise DataError(f"none of the site's {len(rows)} scan(s) can be used. The first: {reason}")
    write_text(mark, f"{wanted}{made}", private=True)
    return made


def _write(root: Path, row: Row, place: Path) -> None:
    source = root / row.source.path
    if not source.exists():
        raise DataError("the scan's file is missing. Unpack the download again.")
    if row.source.kind == "dicom":
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(source.resolve())
        return
    place.mkdir(parents=True, exist_ok=True)
    if row.modality == "US":
        linked = row.source.kind in ("image", "video")
        file = _linked(source, place, row) if linked else write_frames_from(root, row, place)
        _sidecar(file.with_suffix(".json"), row)
        return
    name = f"{row.modality}_image"
    if row.source.kind == "nifti" and row.source.index is None:
        suffix = ".nii.gz" if source.name.lower().endswith(".gz") else ".nii"
        (place / f"{name}{suffix}").symlink_to(source.resolve())
    else:
        volume = read_volume(root, row)
        array = np.asarray(volume.array, dtype=np.float32)
        # No time in the gzip header: equal scans give equal files.
        packed = gzip.compress(nifti_image(array, volume.affine).to_bytes(), _GZIP_LEVEL, mtime=0)
        write_bytes(place / f"{name}.nii.gz", packed)
    _sidecar(place / f"{name}.json", row)


def _linked(source: Path, place: Path, row: Row) -> Path:
    """A link whose name no rule takes for a mask or another patient."""
    file = place / f"{_safe(row.scan)}{source.suffix.lower()}"
    file.symlink_to(source.resolve())
    return file


def _sidecar(file: Path, row: Row) -> None:
    said = {"PatientID": row.patient, "Modality": row.modality, "Manufacturer": row.vendor}
    write_text(file, json.dumps({key: value for key, value in said.items() if value}))


def _safe(name: str) -> str:
    """A name for a folder or file: short, and different for different names."""
    return f"scan-{hashlib.sha256(name.encode()).hexdigest()[:16]}"


def _mark(root: Path, row: Row) -> list[str]:
    file = root / row.source.path
    status = file.stat() if file.exists() else None
    state = f"{status.st_size} {status.st_mtime_ns}" if status else "missing"
    return [row.scan, row.patient, row.source.path, str(row.source.index), row.source.key, state]
