"""What training reads of ultrasound: a site's prepared frames and their label maps."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray

from agssd_core.config.data import DataConfig
from agssd_core.data.array_file import CLIP, LABELS, read_part
from agssd_core.data.catalogue import Catalogue, open_catalogue
from agssd_core.data.clip_cache import ClipEntry, frames_stamp, open_frames, read_clip_entry
from agssd_core.data.label_cache import (
    LABEL_SOURCES,
    LabelEntry,
    LabelSource,
    open_labels,
    read_confidence,
    read_labels_entry,
)
from agssd_core.errors import CacheError, CatalogueError

MAX_OPEN_FILES = 256
DELINEATE = "Run `agssd-site delineate SITE` with the same configuration."


@dataclass(frozen=True, slots=True)
class FrameInfo:
    """What is known of a frame without reading it.

    Attributes:
        clip: pseudonym of its clip.
        number: of the frame within the prepared clip, from 0.
        shape: (height, width), pixels.
    """

    clip: str
    number: int
    patient: str
    vendor: str
    shape: tuple[int, int]


class SiteFrames:
    """A site's prepared frames, sorted by the names of their clips. Safe to use from many threads.

    The checksum of a file is compared when it is first opened in a process.
    """

    def __init__(
        self,
        site_dir: Path,
        clips: Sequence[ClipEntry],
        labels: Sequence[LabelEntry | None],
    ) -> None:
        self._site_dir = site_dir
        self._clips, self._labels = tuple(clips), tuple(labels)
        self._places = tuple(
            (place, number)
            for place, clip in enumerate(self._clips)
            for number in range(clip.shape[0])
        )
        self.infos: tuple[FrameInfo, ...] = tuple(
            _info(self._clips[place], number) for place, number in self._places
        )
        ends = np.cumsum([clip.shape[0] for clip in self._clips]).tolist()
        self._spans = {
            clip.clip: range(end - clip.shape[0], end)
            for clip, end in zip(self._clips, ends, strict=True)
        }
        self._files = _OpenFiles()

    @classmethod
    def open(
        cls,
        site_dir: Path,
        config: DataConfig,
        *,
        labels: LabelSource | Literal["auto"] = "auto",
        need_labels: bool = True,
    ) -> Self:
        """Open the clips that were prepared with these settings.

        Args:
            site_dir: an indexed and prepared site.
            config: the preprocessing.
            labels: whose label maps to read; ``auto`` takes for each clip LP-SAM's, else those
                from disk, else superpixels.
            need_labels: leave out clips that were tried and could not be delineated, and refuse
                when others have no label maps yet. False for who draws the label maps.

        Raises:
            CatalogueError: the folder holds no catalogue, or none of its clips can be used.
            CacheError: clips are not prepared, or were with other settings, or label maps are
                needed and missing.
        """
        catalogue = open_catalogue(site_dir)
        clips = _prepared(site_dir, catalogue, frames_stamp(config.frames))
        wanted = LABEL_SOURCES if labels == "auto" else (labels,)
        found = [_first_labels(site_dir, clip, wanted) for clip in clips]
        pairs = list(zip(clips, found, strict=True))
        if need_labels:
            pairs = [(c, e) for c, e in pairs if e is not None or not _given_up(catalogue, c)]
        missing = sum(entry is None for _, entry in pairs)
        if need_labels and (missing or not pairs):
            whose = "" if labels == "auto" else f" of source {labels}"
            raise CacheError(
                f"{missing or len(clips)} of {len(clips)} clip(s) have no label maps{whose} for "
                "their frames as they are prepared now; the views of ultrasound need them. "
                f"{DELINEATE}"
            )
        return cls(site_dir, [clip for clip, _ in pairs], [entry for _, entry in pairs])

    def __len__(self) -> int:
        return len(self.infos)

    def __getstate__(self) -> dict[str, Any]:
        return {"site_dir": self._site_dir, "clips": self._clips, "labels": self._labels}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # opened files stay behind in the old process

    @property
    def label_source(self) -> str:
        """Who drew the label maps, such as ``lpsam+superpixels``; ``none`` without any."""
        given = {entry.source for entry in self._labels if entry is not None}
        return "+".join(source for source in LABEL_SOURCES if source in given) or "none"

    def keep(self, patients: frozenset[str]) -> "SiteFrames":
        """The frames of these patients (pseudonyms) alone."""
        pairs = zip(self._clips, self._labels, strict=True)
        chosen = [(clip, entry) for clip, entry in pairs if clip.patient in patients]
        return SiteFrames(
            self._site_dir, [clip for clip, _ in chosen], [entry for _, entry in chosen]
        )

    def read_frame(self, index: int) -> NDArray[np.uint8]:
        """The grey frame (height, width), 0 outside the sector.

        Raises:
            CacheError: the clip's file is missing or damaged.
        """
        place, number = self._places[index]
        clip = self._clips[place]
        opened = self._files.get(
            clip.clip, lambda check: open_frames(self._site_dir, clip, check=check)
        )
        return np.asarray(read_part(opened, number, content=CLIP), dtype=np.uint8)

    def read_sector(self, index: int) -> NDArray[np.bool_]:
        """The part of the frame that shows tissue, (height, width).

        Raises:
            CacheError: what was stored is damaged.
        """
        return self._clips[self._places[index][0]].sector()

    def read_labels(self, index: int) -> NDArray[np.uint8]:
        """The frame's label map (height, width), 0 where there is no anatomy.

        Raises:
            CacheError: there is none, or its file is missing or damaged.
        """
        entry = self._entry(index)
        opened = self._files.get(
            entry.stem, lambda check: open_labels(self._site_dir, entry, check=check)
        )
        number = self.infos[index].number
        return np.asarray(read_part(opened, number, content=LABELS), dtype=np.uint8)

    def read_confidence(self, index: int) -> dict[int, float]:
        """How sure the source is of each label of the frame; empty where it does not say.

        Raises:
            CacheError: the clip has no label maps, or what was stored is damaged.
        """
        entry = self._entry(index)
        return read_confidence(self._site_dir, entry)[self.infos[index].number]

    def indices_of(self, clip: str) -> range:
        """Where the frames of one clip stand in ``infos``; empty where there is no such clip."""
        return self._spans.get(clip, range(0))

    def _entry(self, index: int) -> LabelEntry:
        entry = self._labels[self._places[index][0]]
        if entry is None:
            raise CacheError(f"the clip of this frame has no label maps. {DELINEATE}")
        return entry


class _OpenFiles:
    """The files used last, and which of all were checked before."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._opened: OrderedDict[str, Any] = OrderedDict()
        self._checked: set[str] = set()

    def get(self, stem: str, opener: Callable[[bool], Any]) -> Any:
        """The opened file; ``opener`` is told whether to compare its checksum."""
        with self._guard:
            found = self._opened.get(stem)
            if found is None:
                found = opener(stem not in self._checked)
                self._checked.add(stem)
                self._opened[stem] = found
                while len(self._opened) > MAX_OPEN_FILES:
                    self._opened.popitem(last=False)
            self._opened.move_to_end(stem)
            return found


def _info(clip: ClipEntry, number: int) -> FrameInfo:
    return FrameInfo(clip.clip, number, clip.patient, clip.vendor, clip.shape[1:])


def _given_up(catalogue: Catalogue, clip: ClipEntry) -> bool:
    return catalogue.undelineated(clip.clip, clip.fingerprint)


def _prepared(site_dir: Path, catalogue: Catalogue, stamp: str) -> list[ClipEntry]:
    entries, stale = [], 0
    for record in catalogue.clips:
        if catalogue.refusal(record, stamp) is not None:
            continue
        entry = read_clip_entry(site_dir, record.clip)
        if entry is None or (entry.stamp, entry.fingerprint) != (stamp, record.fingerprint):
            stale += 1
        else:
            entries.append(entry)
    if stale:
        raise CacheError(
            f"{stale} of {len(catalogue.clips)} clip(s) are not prepared with the settings of "
            "this run. Run `agssd-site prepare SITE` with the same configuration."
        )
    if not entries:
        raise CatalogueError(
            "the site has no prepared ultrasound clip, at least one is needed. Index folders with "
            "usable ultrasound; `agssd-site skipped SITE` lists what was left out and why."
        )
    return entries


def _first_labels(
    site_dir: Path, clip: ClipEntry, wanted: Sequence[LabelSource]
) -> LabelEntry | None:
    for source in wanted:
        entry = read_labels_entry(site_dir, clip, source)
        if entry is not None:
            return entry
    return None
