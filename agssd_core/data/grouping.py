"""Group catalogued files into volumes and clips, and list what is left out."""

import hashlib
import json
import sqlite3
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from agssd_core.config.node import ScanModality
from agssd_core.data.deidentify import Pseudonymiser
from agssd_core.data.headers import CLIP_KINDS, clip_header, dicom_header, nifti_header
from agssd_core.data.records import ClipRecord, ScanRecord, Skipped, VolumeRecord, record_json
from agssd_core.data.series import COPY, StoredFile, select_slices, stack_affine
from agssd_core.data.volume import check_affine, check_shape, spacing_of
from agssd_core.errors import DataError

FileState = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Selection:
    """Which volumes and clips a catalogue takes in. An empty tuple takes all.

    Attributes:
        patients: as the hospital names them (PatientID, folder or file name), not pseudonyms.
        vendors: as in ``deidentify.VENDORS``.
    """

    modalities: tuple[ScanModality, ...] = ()
    patients: tuple[str, ...] = ()
    vendors: tuple[str, ...] = ()


@dataclass(frozen=True)
class Grouped:
    """What the catalogue holds now, and what changed in it; scans are volumes and clips."""

    volumes: int
    clips: int
    added: int
    unchanged: int
    removed: int
    left_out: int
    patients: int
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class _Found:
    record: ScanRecord
    paths: tuple[str, ...]


def regroup(
    table: sqlite3.Connection, pseudonymiser: Pseudonymiser, selection: Selection
) -> Grouped:
    """Rebuild the scans and the list of skipped items from the files, in one transaction.

    Where nothing would be left the catalogue stays as it was: a share that is not mounted, or a
    selection that fits nothing, must not cost a site its prepared scans.
    """
    skipped = [
        Skipped(pseudonymiser.reference(path), reason, (path,))
        for path, reason in table.execute("SELECT path, reason FROM files WHERE kind = 'unusable'")
    ]
    everything = [
        *_dicom_volumes(table, pseudonymiser, skipped),
        *_nifti_volumes(table, pseudonymiser, skipped),
        *_clips(table, pseudonymiser, skipped),
    ]
    kept = _selected(everything, pseudonymiser, selection)
    query = "SELECT volume, record FROM volumes UNION ALL SELECT clip, record FROM clips"
    before = dict(table.execute(query).fetchall())
    after = {name: record_json(found.record) for name, found in kept.items()}
    if kept or not before:
        _store(table, kept, skipped, mark=pseudonymiser.fingerprint)
    same = sum(before.get(name) == record for name, record in after.items())
    clips = sum(isinstance(found.record, ClipRecord) for found in kept.values())
    return Grouped(
        volumes=len(kept) - clips,
        clips=clips,
        added=len(after) - same,
        unchanged=same,
        removed=len(before.keys() - after.keys()),
        left_out=len(everything) - len(kept),
        patients=len({found.record.patient for found in kept.values()}),
        skipped=tuple(sorted(skipped, key=lambda item: (item.reason, item.reference))),
    )


def _selected(
    everything: Sequence[_Found], pseudonymiser: Pseudonymiser, selection: Selection
) -> dict[str, _Found]:
    patients = {pseudonymiser.patient(name) for name in selection.patients}
    return {
        found.record.name: found
        for found in everything
        if (not selection.modalities or found.record.modality in selection.modalities)
        and (not patients or found.record.patient in patients)
        and (not selection.vendors or found.record.vendor in selection.vendors)
    }


def _store(
    table: sqlite3.Connection, kept: dict[str, _Found], skipped: Sequence[Skipped], *, mark: str
) -> None:
    with table:
        for name in ("volumes", "clips", "sources", "skipped"):
            table.execute(f"DELETE FROM {name}")  # noqa: S608 - our own four names
        for scan, found in kept.items():
            place = "clips" if isinstance(found.record, ClipRecord) else "volumes"
            row = (scan, record_json(found.record))
            table.execute(f"INSERT INTO {place} VALUES (?, ?)", row)  # noqa: S608 - one of two
            rows = [(scan, position, path) for position, path in enumerate(found.paths)]
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
    twins = _Twins()
    contents: set[str] = set()
    for path, relative, size, mtime, text in table.execute(query).fetchall():
        header = nifti_header(text)
        if header.content in contents:
            skipped.append(Skipped(pseudonymiser.reference(path), COPY, (path,)))
            continue
        contents.add(header.content)
        record = VolumeRecord(
            volume=pseudonymiser.key("volume", "nifti", *twins.of(header.patient, relative)),
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


def _clips(
    table: sqlite3.Connection, pseudonymiser: Pseudonymiser, skipped: list[Skipped]
) -> Iterator[_Found]:
    query = (
        "SELECT path, relative, size, mtime, kind, header FROM files "
        "WHERE kind IN (?, ?, ?) ORDER BY path"
    )
    twins = _Twins()
    seen: set[str] = set()
    for path, relative, size, mtime, kind, text in table.execute(query, CLIP_KINDS).fetchall():
        header = clip_header(text)
        # Exports exist that give a still and its clip one number; they are no copies.
        named = f"{header.instance} {header.frames}x{header.rows}x{header.columns}"
        marks = {header.content, f"instance {named}"}
        if marks & seen:
            skipped.append(Skipped(pseudonymiser.reference(path), COPY, (path,)))
            continue
        seen |= marks
        parts = (named,) if kind == "us-dicom" else twins.of(header.patient, relative)
        record = ClipRecord(
            clip=pseudonymiser.key("clip", kind, *parts),
            patient=header.patient,
            study=header.study,
            vendor=header.vendor,
            model=header.model,
            kind=kind,
            frames=header.frames,
            rows=header.rows,
            columns=header.columns,
            fingerprint=_fingerprint([path], {path: (size, mtime)}),
        )
        yield _Found(record, (path,))


class _Twins:
    """Names of files by their place within the folder, not by where the folder lies.

    So a copied folder gives the same order of scans. Two folders may hold the same places.
    """

    def __init__(self) -> None:
        self._taken: dict[str, int] = defaultdict(int)

    def of(self, patient: str, relative: str) -> tuple[str, str]:
        """The place, and how many files had it until now."""
        place = f"{patient}/{relative}"
        self._taken[place] += 1
        return place, str(self._taken[place])


def _fingerprint(paths: Sequence[str], states: FileState) -> str:
    rows = sorted((path, *states[path]) for path in paths)
    return hashlib.sha256(json.dumps(rows).encode("utf-8", "surrogateescape")).hexdigest()[:16]
