"""What training reads: a site's prepared volumes, crop by crop."""

import threading
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from agssd_core.config.data import DataConfig
from agssd_core.data.array_file import VOLUME, read_part
from agssd_core.data.cache_file import (
    CacheEntry,
    VolumeInfo,
    data_stamp,
    open_voxels,
    read_entry,
)
from agssd_core.data.catalogue import open_catalogue
from agssd_core.data.preprocess import FULL_SCALE
from agssd_core.errors import CacheError, CatalogueError, ShapeError

Size3 = tuple[int, int, int]

__all__ = ["SiteVolumes", "VolumeInfo"]

MAX_OPEN_VOLUMES = 256


class SiteVolumes:
    """A site's prepared volumes, sorted by their names. Safe to use from many threads.

    The checksum of a volume's file is compared when it is first opened in a process.
    """

    def __init__(self, site_dir: Path, entries: tuple[CacheEntry, ...]) -> None:
        self._site_dir = site_dir
        self._entries = entries
        self.infos: tuple[VolumeInfo, ...] = tuple(entry.info for entry in entries)
        self._guard = threading.Lock()
        self._opened: dict[int, Any] = {}

    @classmethod
    def open(cls, site_dir: Path, config: DataConfig) -> Self:
        """Open the volumes that were prepared with these settings.

        Raises:
            CatalogueError: the folder holds no catalogue, or none of its volumes can be used.
            CacheError: volumes are not prepared, or were with other settings.
        """
        stamp = data_stamp(config)
        catalogue = open_catalogue(site_dir)
        entries, stale = [], 0
        for record in catalogue.records:
            if catalogue.refusal(record, stamp) is not None:
                continue
            entry = read_entry(site_dir, record.volume)
            if entry is None or (entry.stamp, entry.fingerprint) != (stamp, record.fingerprint):
                stale += 1
            else:
                entries.append(entry)
        if stale:
            raise CacheError(
                f"{stale} of {len(catalogue.records)} volume(s) are not prepared with the settings "
                "of this run. Run `agssd-site prepare SITE` with the same configuration."
            )
        if not entries:
            raise CatalogueError(
                "the site has no prepared volume, at least one is needed. Index folders with "
                "usable scans; `agssd-site skipped SITE` lists what was left out and why."
            )
        return cls(site_dir, tuple(entries))

    def __len__(self) -> int:
        return len(self.infos)

    def __getstate__(self) -> dict[str, Any]:
        return {"site_dir": self._site_dir, "entries": self._entries}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # opened files stay behind in the old process

    def keep(self, patients: frozenset[str]) -> "SiteVolumes":
        """The volumes of these patients (pseudonyms) alone."""
        chosen = tuple(entry for entry in self._entries if entry.info.patient in patients)
        return SiteVolumes(self._site_dir, chosen)

    def read_crop(self, index: int, start: Size3, size: Size3) -> NDArray[np.float32]:
        """Read a box of one volume, decompressing only the chunks that it touches.

        Args:
            index: of the volume, as in ``infos``.
            start: first voxel; may lie outside the volume.
            size: voxels on each side, at least 1.

        Returns:
            ``size`` float32 in [0, 1]; parts outside the volume repeat its outermost voxels.

        Raises:
            CacheError: the volume's file is missing or damaged.
            ShapeError: a side of ``size`` is below 1.
        """
        if min(size) < 1:
            raise ShapeError(f"a crop of {size} voxels holds nothing. Ask for 1 or more a side.")
        shape = self.infos[index].shape
        inner, pad = [], []
        for first, side, extent in zip(start, size, shape, strict=True):
            low, high = max(0, min(first, extent - 1)), min(extent, max(first + side, 1))
            inner.append(slice(low, high))
            before = min(max(0, low - first), side - (high - low))
            pad.append((before, side - (high - low) - before))
        crop = self._read(index, (inner[0], inner[1], inner[2]))
        values = np.multiply(crop, np.float32(1.0 / FULL_SCALE), dtype=np.float32)
        return np.pad(values, pad, mode="edge") if any(map(any, pad)) else values

    def _read(self, index: int, box: tuple[slice, slice, slice]) -> NDArray[np.uint16]:
        return read_part(self._voxels(index), box, content=VOLUME)

    def _voxels(self, index: int) -> Any:
        with self._guard:
            found = self._opened.get(index)
            if found is None:
                found = open_voxels(self._site_dir, self._entries[index])
                while len(self._opened) >= MAX_OPEN_VOLUMES:
                    self._opened.pop(next(iter(self._opened)))
                self._opened[index] = found
            return found
