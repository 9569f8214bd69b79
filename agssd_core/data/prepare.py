"""Fill a site's cache: every volume of the catalogue, once, in parallel.

Volumes that are ready are skipped, so a killed run goes on where it stopped. A volume that
cannot be used is noted with its reason and does not stop the others.
"""

import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

from agssd_core.config.data import DataConfig
from agssd_core.data.cache_file import (
    cache_folder,
    data_stamp,
    read_entry,
    voxels_intact,
    write_entry,
)
from agssd_core.data.catalogue import (
    Catalogue,
    Skipped,
    VolumeRecord,
    database,
    open_catalogue,
    site_lock,
    source_paths,
    true_path,
)
from agssd_core.data.headers import dicom_header
from agssd_core.data.nifti import read_nifti
from agssd_core.data.preprocess import preprocess
from agssd_core.data.series import StoredFile, read_series
from agssd_core.data.volume import Volume
from agssd_core.errors import CacheError, CatalogueError, DataError, SeriesError, VolumeError

Progress = Callable[[int, int], None]
PARENT_SECONDS = 0.5
CHANGED = (
    "a source file has vanished or changed since it was indexed. Run `agssd-site index` again."
)
CRASHED = "the image reader crashed on this scan. Export it again, or leave it out."


@dataclass(frozen=True)
class PrepareReport:
    """What one run of ``prepare_site`` did; ``skipped`` names volumes by their pseudonyms."""

    prepared: int
    unchanged: int
    skipped: tuple[Skipped, ...]

    @property
    def ready(self) -> int:
        """Volumes that training can read now."""
        return self.prepared + self.unchanged


@dataclass(frozen=True)
class Job:
    """What a worker needs for one volume."""

    site_dir: Path
    record: VolumeRecord
    sources: tuple[tuple[str, int, int], ...]
    headers: tuple[str, ...]
    config: DataConfig


def prepare_site(
    site_dir: Path,
    config: DataConfig,
    *,
    workers: int = 1,
    progress: Progress | None = None,
    verify: bool = False,
) -> PrepareReport:
    """Bring a site's cache up to date with its catalogue.

    Args:
        site_dir: an indexed site.
        config: the preprocessing.
        workers: processes; with 1 the work is done in this one.
        progress: told (volumes done, volumes to do).
        verify: compare the checksums of volumes that are ready, and redo damaged ones.

    Raises:
        CatalogueError: the folder holds no catalogue, or one without a volume.
        CacheError: the disk is full or the folder cannot be written.
    """
    catalogue = open_catalogue(site_dir)
    if not catalogue.records:
        raise CatalogueError(
            "the catalogue holds no volume, at least one is needed. Index folders with CT or MR "
            "scans; `agssd-site skipped SITE` lists what was left out and why."
        )
    stamp = data_stamp(config)
    with site_lock(site_dir), database(site_dir) as table:
        _sweep(site_dir, catalogue)
        with table:
            table.execute("DELETE FROM refused WHERE stamp != ?", (stamp,))
        known = [r for r in catalogue.records if catalogue.refusal(r, stamp) is not None]
        todo = [
            record
            for record in catalogue.records
            if record not in known and not _ready(site_dir, record, stamp, verify=verify)
        ]
        skipped = [Skipped(r.volume, catalogue.refusal(r, stamp) or "") for r in known]
        jobs = [_job(table, site_dir, record, config) for record in todo]
        for done, (record, reason) in enumerate(_run(jobs, workers), start=1):
            if reason is not None:
                skipped.append(Skipped(record.volume, reason))
                # A changed source may be back tomorrow, so it is tried again.
                if reason != CHANGED:
                    _refuse(table, record, stamp, reason)
            if progress is not None:
                progress(done, len(jobs))
    failed = len(skipped) - len(known)
    return PrepareReport(
        prepared=len(jobs) - failed,
        unchanged=len(catalogue.records) - len(jobs) - len(known),
        skipped=tuple(sorted(skipped, key=lambda item: (item.reason, item.reference))),
    )


def load_volume(record: VolumeRecord, paths: Sequence[str], headers: Sequence[str]) -> Volume:
    """Read one catalogued volume from its source files.

    Raises:
        DataError: the files cannot be read or their geometry is unusable.
    """
    if record.kind == "nifti":
        return read_nifti(Path(paths[0]), modality=record.modality, vendor=record.vendor)
    pairs = zip(paths, headers, strict=True)
    return read_series([StoredFile(path, dicom_header(text)) for path, text in pairs])


def prepare_one(job: Job) -> str | None:
    """Read, preprocess and cache one volume.

    Returns:
        Why the scan cannot be used, or None when it is ready.

    Raises:
        CacheError: the cache cannot be written, which concerns all volumes.
    """
    for path, size, mtime in job.sources:
        with suppress(OSError):
            status = Path(path).stat()
            if (status.st_size, status.st_mtime_ns) == (size, mtime):
                continue
        return CHANGED
    try:
        volume = load_volume(job.record, [source[0] for source in job.sources], job.headers)
        prepared = preprocess(volume, job.config)
    except CacheError:
        raise
    except (SeriesError, VolumeError, DataError) as error:
        return str(error)
    except OSError:
        return CHANGED
    except MemoryError:
        return "the scan does not fit into memory. Use fewer --workers, or a machine with more."
    write_entry(job.site_dir, job.record, prepared, config=job.config)
    return None


def _ready(site_dir: Path, record: VolumeRecord, stamp: str, *, verify: bool) -> bool:
    entry = read_entry(site_dir, record.volume)
    if entry is None or (entry.stamp, entry.fingerprint) != (stamp, record.fingerprint):
        return False
    return not verify or voxels_intact(site_dir, entry)


def _job(
    table: sqlite3.Connection, site_dir: Path, record: VolumeRecord, config: DataConfig
) -> Job:
    sources, headers = [], []
    for path in source_paths(table, record.volume):
        query = "SELECT size, mtime, header FROM files WHERE path = ?"
        # The row is gone where a run of index found the source gone, with everything else.
        size, mtime, header = table.execute(query, (path,)).fetchone() or (-1, -1, "")
        sources.append((true_path(path), size, mtime))
        headers.append(header)
    return Job(site_dir, record, tuple(sources), tuple(headers), config)


def _run(jobs: Sequence[Job], workers: int) -> Iterator[tuple[VolumeRecord, str | None]]:
    left = {job.record.volume: job for job in jobs}
    if workers > 1 and len(jobs) > 1:
        try:
            for job, reason in _pooled(jobs, min(workers, len(jobs))):
                del left[job.record.volume]
                yield job.record, reason
        except BrokenProcessPool:
            yield from _one_by_one(list(left.values()))
            return
    for job in left.values():
        yield job.record, prepare_one(job)


def _one_by_one(left: list[Job]) -> Iterator[tuple[VolumeRecord, str | None]]:
    """Where a decoder kills its process, only the volume to blame is lost.

    Where no process comes up at all (a program read from a pipe), the work is done in this one.
    """
    while left:
        with _pool(1) as pool:
            try:
                pool.submit(bool).result()
            except BrokenProcessPool:
                break
            try:
                while left:
                    reason = pool.submit(prepare_one, left[0]).result()
                    yield left.pop(0).record, reason
            except BrokenProcessPool:
                yield left.pop(0).record, CRASHED
    for job in left:
        yield job.record, prepare_one(job)


def _pooled(jobs: Sequence[Job], workers: int) -> Iterator[tuple[Job, str | None]]:
    pool = _pool(workers)
    try:
        futures = {pool.submit(prepare_one, job): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _pool(workers: int) -> ProcessPoolExecutor:
    context = get_context("spawn")
    return ProcessPoolExecutor(
        workers, mp_context=context, initializer=_end_with, initargs=(os.getpid(),)
    )


def _end_with(parent: int) -> None:
    """Let a worker end when its parent was killed; it would wait for work for ever."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _refuse(table: sqlite3.Connection, record: VolumeRecord, stamp: str, reason: str) -> None:
    row = (record.volume, stamp, record.fingerprint, reason)
    with table:
        table.execute("INSERT OR REPLACE INTO refused VALUES (?, ?, ?, ?)", row)


def _sweep(site_dir: Path, catalogue: Catalogue) -> None:
    """Remove what killed runs and volumes no longer catalogued have left in the cache."""
    wanted = {record.volume for record in catalogue.records}
    for path in cache_folder(site_dir).glob("*"):
        if path.name.endswith(".tmp") or path.stem not in wanted:
            path.unlink(missing_ok=True)
