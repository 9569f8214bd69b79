"""Draw the anatomies of a site's prepared ultrasound, once, without anybody annotating.

The label maps come from a fitted LP-SAM, from files that somebody made elsewhere, or, without
either, from superpixels. Training only ever reads the maps.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import yaml
from numpy.typing import NDArray

from agssd_core.config import RunConfig
from agssd_core.data.catalogue import LABELS_STAMP, database, refuse, site_lock
from agssd_core.data.clip_cache import ClipEntry, read_clip_entry
from agssd_core.data.frames import SiteFrames
from agssd_core.data.label_cache import ClipLabels, LabelSource, missing_labels, write_labels
from agssd_core.data.records import Skipped
from agssd_core.errors import CacheError, ConfigError, DataError
from client.disk_labels import DiskLabels

Progress = Callable[[int, int], None]
Frames = Sequence[NDArray[np.uint8]]
Drawn = tuple[NDArray[np.uint8], tuple[Mapping[int, float], ...]]

POLICY = "policy.yaml"
BATCH = 16
# Part of every digest; raise it when the way from frames to labels changes.
RULES = 1


@dataclass(frozen=True)
class DelineateReport:
    """What one run did.

    Attributes:
        done, unchanged: clips with label maps from this run, and from before it.
        skipped: clips that could not be delineated, by their pseudonyms.
    """

    done: int
    unchanged: int
    source: LabelSource
    skipped: tuple[Skipped, ...]


class Delineator(Protocol):
    """Draws the label maps of one clip; ``digest`` changes when they would."""

    source: LabelSource
    digest: str

    def draw(self, clip: ClipEntry, frames: Frames, /) -> Drawn:
        """Maps (F, H, W) and confidences.

        Raises:
            DataError: this clip cannot be delineated.
        """
        ...


def delineate_site(
    site_dir: Path,
    config: RunConfig,
    *,
    lpsam: Path | None = None,
    digest: str = "",
    labels: Path | None = None,
    progress: Progress = lambda _done, _total: None,
) -> DelineateReport:
    """Give every prepared clip label maps; what has them already is left alone.

    A killed run goes on at the clip where it stopped.

    Args:
        site_dir: an indexed and prepared site.
        config: the preprocessing that the clips were prepared with.
        lpsam: a fitted and signed file.
        digest: SHA-256 that it must have, unless ``policy.yaml`` of the site lists it.
        labels: folder of label maps, named like the source files; see ``DiskLabels``.
        progress: told (clips done, clips to do).

    Raises:
        ConfigError: LP-SAM and label files are both named, or the policy cannot be read.
        WeightsError: the LP-SAM file is not signed or not trusted.
        CacheError: clips are not prepared, or the disk is full.
    """
    if lpsam is not None and labels is not None:
        raise ConfigError("--lpsam and --labels are both given, one at most can be. Drop one.")
    delineator = _delineator(site_dir, config, lpsam=lpsam, digest=digest, labels=labels)
    frames = SiteFrames.open(site_dir, config.data, need_labels=False)
    with site_lock(site_dir):
        todo = missing_labels(
            site_dir, config.data, source=delineator.source, digest=delineator.digest
        )
        skipped = []
        for number, clip in enumerate(todo):
            try:
                made = _labels_of(site_dir, clip, frames, delineator)
                write_labels(site_dir, made, config=config.data)
                _forget_skipped(site_dir, clip)
            except CacheError:
                raise
            except DataError as error:
                skipped.append(Skipped(clip, str(error)))
                _note_skipped(site_dir, skipped[-1])
            progress(number + 1, len(todo))
    clips = len({info.clip for info in frames.infos})
    done = len(todo) - len(skipped)
    return DelineateReport(done, clips - len(todo), delineator.source, tuple(skipped))


def _note_skipped(site_dir: Path, item: Skipped) -> None:
    """Let training do without the clip, and `agssd-site skipped` list it."""
    entry = read_clip_entry(site_dir, item.reference)
    if entry is None:
        return
    with database(site_dir) as table:
        refuse(
            table,
            item.reference,
            stamp=LABELS_STAMP,
            fingerprint=entry.fingerprint,
            reason=item.reason,
        )


def _forget_skipped(site_dir: Path, clip: str) -> None:
    """What another source could not delineate has label maps now."""
    with database(site_dir) as table, table:
        query = "DELETE FROM refused WHERE volume = ? AND stamp = ?"
        table.execute(query, (clip, LABELS_STAMP))


def trusted_digests(site_dir: Path, digest: str) -> frozenset[str]:
    """Digests of LP-SAM files that this site accepts: the named one, and those of its policy.

    Raises:
        ConfigError: ``policy.yaml`` cannot be read, or a digest is not one.
    """
    listed: object = []
    path = site_dir / POLICY
    if path.is_file():
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
            listed = (content.get("lpsam") or {}).get("digests") or []
        except (yaml.YAMLError, UnicodeDecodeError, AttributeError):
            listed = None
    found = listed if isinstance(listed, list) else [None]
    named = [digest.strip().lower()] if digest else []
    every = [*named, *(item.lower() if isinstance(item, str) else "" for item in found)]
    if not all(len(item) == 64 and set(item) <= set("0123456789abcdef") for item in every):
        raise ConfigError(
            "--digest or policy.yaml of the site's folder holds something that is no SHA-256 of 64 "
            "hexadecimal digits. Write policy.yaml as `lpsam: {digests: [...]}`."
        )
    return frozenset(every)


def _delineator(
    site_dir: Path, config: RunConfig, *, lpsam: Path | None, digest: str, labels: Path | None
) -> Delineator:
    if lpsam is not None:
        return _Lpsam(lpsam, trusted_digests(site_dir, digest), threads=config.threads)
    if labels is not None:
        return DiskLabels(site_dir, labels)
    return _Superpixels(config.data.frames.superpixels)


def _labels_of(site_dir: Path, clip: str, frames: SiteFrames, delineator: Delineator) -> ClipLabels:
    entry = read_clip_entry(site_dir, clip)
    if entry is None:
        raise CacheError(
            "a prepared clip has vanished. Run `agssd-site prepare SITE` with the same "
            "configuration."
        )
    pixels = [frames.read_frame(index) for index in frames.indices_of(clip)]
    maps, confidence = delineator.draw(entry, pixels)
    return ClipLabels(clip, maps, confidence, delineator.source, delineator.digest)


class _Lpsam:
    source: LabelSource = "lpsam"

    def __init__(self, path: Path, trusted: frozenset[str], *, threads: int) -> None:
        # transformers takes seconds to import, and the other sources do not need it.
        import torch

        from agssd_core.training.lpsam_file import read_lpsam

        torch.set_num_threads(threads)  # part of the bits
        self._file = read_lpsam(path, trusted=trusted)
        self.digest = settings_digest("lpsam", self._file.digest)

    def draw(self, clip: ClipEntry, frames: Frames, /) -> Drawn:
        from agssd_core.evaluation.delineation import delineate_frames

        network, rules, sector = self._file.network, self._file.config.rules, clip.sector()
        found = [
            drawn
            for batch in _batches(frames)
            for drawn in delineate_frames(network, batch, [sector] * len(batch), rules)
        ]
        return np.stack([item.labels for item in found]), tuple(item.confidence for item in found)


class _Superpixels:
    source: LabelSource = "superpixels"

    def __init__(self, regions: int) -> None:
        self._regions = regions
        self.digest = settings_digest("superpixels", regions)

    def draw(self, clip: ClipEntry, frames: Frames, /) -> Drawn:
        from agssd_core.evaluation.superpixels import superpixels

        sector = clip.sector()
        maps = [superpixels(frame, sector, regions=self._regions) for frame in frames]
        return np.stack(maps), ({},) * len(maps)


def settings_digest(*parts: object) -> str:
    """SHA-256 of what label maps depend on."""
    return hashlib.sha256(json.dumps([RULES, *parts]).encode()).hexdigest()


def _batches(frames: Frames) -> Iterator[Frames]:
    for first in range(0, len(frames), BATCH):
        yield frames[first : first + BATCH]
