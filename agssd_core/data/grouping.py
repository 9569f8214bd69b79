"""Group catalogued files into volumes and list what is left out."""

import hashlib
import json
import sqlite3
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from agssd_core.data.catalogue import Skipped, VolumeRecord, record_json
from agssd_core.data.deidentify import Pseudonymiser
from agssd_core.data.headers import dicom_header, nifti_header
from agssd_core.data.series import COPY, StoredFile, select_slices, stack_affine
from agssd_core.data.volume import Modality, check_affine, check_shape, spacing_of
from agssd_core.errors import DataError

FileState = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Selection:
    """Which volumes a catalogue takes in. An empty tuple takes all.

    Attributes:
        patients: as the hospital names them (PatientID, folder or file name), not pseudonyms.
        vendors: as in ``deidentify.VENDORS``.
    """

    modalities: tuple[Modality, ...] = ()
    patients: tuple[str, ...] = ()
    vendors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Grouped:
    """What changed in the catalogue."""

    added: int
    unchanged: int
    removed: int
    left_out: int
    patients: int
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class _Found:
    record: VolumeRecord
    paths: tuple[str, ...]


def regroup(
    table: sqlite3.Connection, pseudonymiser: Pseudonymiser, selection: Selection
) -> Grouped:
    """Rebuild the volumes and the list of skipped items from the files, in one transaction.

    Where nothing would be left the catalogue stays as it was: a share that is not mounted, or a
    selection that fits nothing, must not cost a site its prepared volumes.
    """
    skipped = [
        Skipped(pseudonymiser.reference(path), reason, (path,))
        for path, reason in table.execute("SELECT path, reason FROM files WHERE kind = 'unusable'")
    ]
    everything = [
        *_dicom_volumes(table, pseudonymiser, skipped),
        *_nifti_volumes(table, pseudonymiser, skipped),
    ]
    wanted_patients = {pseudonymiser.patient(name) for name in selection.patients}
    kept = {
        found.record.volume: found
        for found in everything
        if (not selection.modalities or found.record.modality in selection.modalities)
        and (not wanted_patients or found.record.patient in wanted_patients)
        and (not selection.vendors or found.record.vendor in selection.vendors)
    }
    before = dict(table.execute("SELECT volume, record FROM volumes").fetchall())
    after = {volume: record_json(found.record) for volume, found in kept.items()}
    if kept or not before:
        _store(table, kept, skipped, mark=pseudonymiser.fingerprint)
    same = sum(before.get(volume) == record for volume, record in after.items())
    return Grouped(
        added=len(after) - same,
        unchanged=same,
        removed=len(before.keys() - after.keys()),
        left_out=len(everything) - len(kept),
        patients=len({found.record.patient for found in kept.values()}),
        skipped=tuple(sorted(skipped, key=lambda item: (item.reason, item.reference))),
    )


def _store(
    table: sqlite3.Connection, kept: dict[str, _Found], skipped: Sequence[Skipped], *, mark: str
) -> None:
    with table:
        for name in ("volumes", "sources", "skipped"):
            table.execute(f"DELETE FROM {name}")  # noqa: S608 - our own three names
        for volume, found in kept.items():
            table.execute("INSERT INTO volumes VALUES (?, ?)", (volume, record_json(found.record)))
            rows = [(volume, position, path) for position, path in enumerate(found.paths)]
            table.executemany("INSERT INTO sources VALUES (?, ?, ?)", rows)
        rows_out = [(item.reference, item.reason, json.dumps(item.paths)) for item in skipped]
        table.executemany("INSERT INTO skipped VALUES (?, ?, ?)", rows_out)
        table.execute("INSERT OR REPLACE INTO meta VALUES ('secret', ?)", (mark,))


def _dicom_volumes(
    table: sqlite3.Connection, pseudonymiser: Pseudonymiser, skipped: list[Skipped]
) -> Iterator[_Found]:
    query = "SELECT path, size, mtime, header FROM files WHERE kind = 'dicom' ORDER BY path"
    series: dict[str, list[StoredFile]] = defaultdict(list)
    states: FileState = {}
    for path, size, mtime, text in table.execute(query):
        header = dicom_header(text)
        series[header.series].append(StoredFile(path, header))
        states[path] = (size, mtime)
    for name, files in sorted(series.items()):
        paths = tuple(file.path for file in files)
        try:
            chosen, left_out = select_slices(files)
            record = _dicom_record(name, chosen, states, pseudonymiser)
        except DataError as error:
            skipped.append(Skipped(pseudonymiser.reference(name), str(error), paths))
            continue
        for part in left_out:
            reference = pseudonymiser.reference(part.paths[0])
            skipped.append(Skipped(reference, part.reason, part.paths))
        yield _Found(record, tuple(file.path for file in chosen))


def _dicom_record(
    series: str, files: Sequence[StoredFile], states: FileState, pseudonymiser: Pseudonymiser
) -> VolumeRecord:
    first = files[0].header
    affine, order = stack_affine(file.header for file in files)
    shape = (first.columns, first.rows, len(order))
    check_shape(shape)
    check_affine(np.asarray(affine))
    return VolumeRecord(
        volume=pseudonymiser.key("volume", "dicom", series),
        patient=first.patient,
        study=first.study,
        modality=first.modality,
        vendor=first.vendor,
        model=first.model,
        kind="dicom",
        shape=shape,
        spacing_mm=spacing_of(affine),
        fingerprint=_fingerprint([file.path for file in files], states),
    )


def _nifti_volumes(
    table: sqlite3.Connection, pseudonymiser: Pseudonymiser, skipped: list[Skipped]
) -> Iterator[_Found]:
    query = (
        "SELECT path, relative, size, mtime, header FROM files WHERE kind = 'nifti' ORDER BY path"
    )
    taken: dict[str, int] = defaultdict(int)
    contents: set[str] = set()
    for path, relative, size, mtime, text in table.execute(query).fetchall():
        header = nifti_header(text)
        if header.content in contents:
            skipped.append(Skipped(pseudonymiser.reference(path), COPY, (path,)))
            continue
        contents.add(header.content)
        # Names depend on the place within the folder, not on where the folder lies, so that a
        # copied folder gives the same order of volumes.
        twin = f"{header.patient}/{relative}"
        taken[twin] += 1
        record = VolumeRecord(
            volume=pseudonymiser.key("volume", "nifti", twin, str(taken[twin])),
            patient=header.patient,
            study="",
            modality=header.modality,
            vendor=header.vendor,
            model=header.model,
            kind="nifti",
            shape=header.shape,
            spacing_mm=header.spacing_mm,
            fingerprint=_fingerprint([path], {path: (size, mtime)}),
        )
        yield _Found(record, (path,))


def _fingerprint(paths: Sequence[str], states: FileState) -> str:
    rows = sorted((path, *states[path]) for path in paths)
    return hashlib.sha256(json.dumps(rows).encode("utf-8", "surrogateescape")).hexdigest()[:16]
