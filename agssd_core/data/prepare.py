"""Fill a site's cache: every volume and clip of the catalogue, once, in parallel.

Scans that are ready are skipped, so a killed run goes on where it stopped. A scan that cannot be
used is noted with its reason and does not stop the others.
"""

import sqlite3
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from agssd_core.config.data import DataConfig
from agssd_core.data.array_file import cache_folder
from agssd_core.data.cache_file import data_stamp, read_entry, voxels_intact, write_entry
from agssd_core.data.catalogue import (
    LABELS_STAMP,
    Catalogue,
    database,
    open_catalogue,
    refuse,
    site_lock,
    source_paths,
    true_path,
)
from agssd_core.data.clip_cache import frames_intact, frames_stamp, read_clip_entry, write_clip
from agssd_core.data.clips import load_clip
from agssd_core.data.headers import dicom_header
from agssd_core.data.nifti import read_nifti
from agssd_core.data.preprocess import preprocess
from agssd_core.data.records import ClipRecord, ScanRecord, Skipped, VolumeRecord
from agssd_core.data.series import StoredFile, read_series
from agssd_core.data.volume import Volume
from agssd_core.data.workers import CRASHED, run_jobs
from agssd_core.errors import CacheError, CatalogueError, DataError

__all__ = ["CHANGED", "CRASHED", "Job", "PrepareReport", "prepare_one", "prepare_site"]

Progress = Callable[[int, int], None]
CHANGED = (
    "a source file has vanished or changed since it was indexed. Run `agssd-site index` again."
)


@dataclass(frozen=True)
class PrepareReport:
    """What one run of ``prepare_site`` did.

    Attributes:
        volumes, clips: that training can read now.
        prepared, unchanged: volumes and clips together, done by this run and before it.
        skipped: names scans by their pseudonyms.
    """

    volumes: int
    clips: int
    prepared: int
    unchanged: int
    skipped: tuple[Skipped, ...]

    @property
    def ready(self) -> int:
        """Volumes and clips that training can read now."""
        return self.prepared + self.unchanged


@dataclass(frozen=True)
class Job:
    """What a worker needs for one volume or clip."""

    site_dir: Path
    record: ScanRecord
    sources: tuple[tuple[str, int, int], ...]
    headers: tuple[str, ...]
    config: DataConfig

    @property
    def name(self) -> str:
        """The scan's pseudonym."""
        return self.record.name


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
        progress: told (scans done, scans to do).
        verify: compare the checksums of scans that are ready, and redo damaged ones.

    Raises:
        CatalogueError: the folder holds no catalogue, or one without a scan.
        CacheError: the disk is full or the folder cannot be written.
    """
    catalogue = open_catalogue(site_dir)
    if not catalogue.scans:
        raise CatalogueError(
            "the catalogue holds no volume, and no ultrasound clip; at least one is needed. Index "
            "folders with CT, MR or ultrasound; `agssd-site skipped SITE` lists what was left out "
            "and why."
        )
    stamps = _Stamps(data_stamp(config), frames_stamp(config.frames))
    with site_lock(site_dir), database(site_dir) as table:
        _sweep(site_dir, catalogue)
        _forget_refusals(table, stamps)
        reasons = {r.name: catalogue.refusal(r, stamps.of(r)) for r in catalogue.scans}
        skipped = [Skipped(name, why) for name, why in reasons.items() if why is not None]
        todo = [
            record
            for record in catalogue.scans
            if reasons[record.name] is None
            and not _ready(site_dir, record, stamps.of(record), verify=verify)
        ]
        jobs = [_job(table, site_dir, record, config) for record in todo]
        known = len(skipped)
        for done, (job, reason) in enumerate(run_jobs(jobs, prepare_one, workers=workers), start=1):
            if reason is not None:
                skipped.append(Skipped(job.name, reason))
                # A changed source may be back tomorrow, so it is tried again.
                if reason != CHANGED:
                    refuse(
                        table,
                        job.record.name,
                        stamp=stamps.of(job.record),
                        fingerprint=job.record.fingerprint,
                        reason=reason,
                    )
            if progress is not None:
                progress(done, len(jobs))
    return _report(catalogue, skipped, jobs=len(jobs), known=known)


def _report(
    catalogue: Catalogue, skipped: Sequence[Skipped], *, jobs: int, known: int
) -> PrepareReport:
    without = {item.reference for item in skipped}
    return PrepareReport(
        volumes=sum(record.name not in without for record in catalogue.records),
        clips=sum(record.name not in without for record in catalogue.clips),
        prepared=jobs - (len(skipped) - known),
        unchanged=len(catalogue.scans) - jobs - known,
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
    """Read, preprocess and cache one volume or clip.

    Returns:
        Why the scan cannot be used, or None when it is ready.

    Raises:
        CacheError: the cache cannot be written, which concerns all scans.
    """
    for path, size, mtime in job.sources:
        with suppress(OSError):
            status = Path(path).stat()
            if (status.st_size, status.st_mtime_ns) == (size, mtime):
                continue
        return CHANGED
    try:
        if isinstance(job.record, ClipRecord):
            _prepare_clip(job, job.record)
        else:
            _prepare_volume(job, job.record)
    except CacheError:
        raise
    except DataError as error:
        return str(error)
    except OSError:
        return CHANGED
    except MemoryError:
        return "the scan does not fit into memory. Use fewer --workers, or a machine with more."
    return None


def _prepare_volume(job: Job, record: VolumeRecord) -> None:
    volume = load_volume(record, [source[0] for source in job.sources], job.headers)
    write_entry(job.site_dir, record, preprocess(volume, job.config), config=job.config)


def _prepare_clip(job: Job, record: ClipRecord) -> None:
    clip = load_clip(Path(job.sources[0][0]), record.kind, job.config.frames)
    write_clip(job.site_dir, record, clip, config=job.config)


@dataclass(frozen=True)
class _Stamps:
    """Of the settings for volumes and of those for clips: one may change without the other."""

    volume: str
    clip: str

    def of(self, record: ScanRecord) -> str:
        return self.clip if isinstance(record, ClipRecord) else self.volume


def _ready(site_dir: Path, record: ScanRecord, stamp: str, *, verify: bool) -> bool:
    if isinstance(record, ClipRecord):
        clip = read_clip_entry(site_dir, record.clip)
        if clip is None or (clip.stamp, clip.fingerprint) != (stamp, record.fingerprint):
            return False
        return not verify or frames_intact(site_dir, clip)
    entry = read_entry(site_dir, record.volume)
    if entry is None or (entry.stamp, entry.fingerprint) != (stamp, record.fingerprint):
        return False
    return not verify or voxels_intact(site_dir, entry)


def _job(table: sqlite3.Connection, site_dir: Path, record: ScanRecord, config: DataConfig) -> Job:
    sources, headers = [], []
    for path in source_paths(table, record.name):
        query = "SELECT size, mtime, header FROM files WHERE path = ?"
        # The row is gone where a run of index found the source gone, with everything else.
        size, mtime, header = table.execute(query, (path,)).fetchone() or (-1, -1, "")
        sources.append((true_path(path), size, mtime))
        headers.append(header)
    return Job(site_dir, record, tuple(sources), tuple(headers), config)


def _forget_refusals(table: sqlite3.Connection, stamps: _Stamps) -> None:
    """Those under other settings; the scans are tried again."""
    with table:
        given = (stamps.volume, stamps.clip, LABELS_STAMP)
        table.execute("DELETE FROM refused WHERE stamp NOT IN (?, ?, ?)", given)


def _sweep(site_dir: Path, catalogue: Catalogue) -> None:
    """Remove what killed runs and scans no longer catalogued have left in the cache.

    A clip's label maps carry its name, and stay as long as it does.
    """
    wanted = {record.name for record in catalogue.scans}
    for path in cache_folder(site_dir).glob("*"):
        if path.name.endswith(".tmp") or path.name.split(".")[0] not in wanted:
            path.unlink(missing_ok=True)
