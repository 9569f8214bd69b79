"""Label maps that were made elsewhere, matched to a site's clips by the names of their files.

``LABELS/x/y.png`` or ``LABELS/x/y.npy`` belongs to the source file ``x/y.*`` below an indexed
folder; ``LABELS/y.png`` also does, when no other clip's file has that stem. Maps have the size of
the source; they are cut and shrunk as its frames were. PNG holds a still's map, ``.npy`` a
still's (H, W) or a clip's (frames, H, W), one map for each frame of the source.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from agssd_core.data.catalogue import database, open_catalogue, source_paths, true_path
from agssd_core.data.clip_cache import ClipEntry
from agssd_core.data.label_cache import LabelSource
from agssd_core.data.label_image import SUFFIXES, read_label_image
from agssd_core.data.pairs import fit_labels
from agssd_core.data.records import ClipRecord
from agssd_core.errors import ClipError, DataError
from agssd_core.weights import file_digest


@dataclass(frozen=True)
class _Source:
    """A clip's record and its file's path below the indexed folder. Private."""

    record: ClipRecord
    path: PurePosixPath

    @property
    def names(self) -> tuple[str, ...]:
        """What its label map may be called, best first; files without a suffix may hold dots."""
        whole = (str(self.path), str(self.path.with_suffix("")))
        return (*whole, self.path.name, self.path.stem)


class DiskLabels:
    """A folder of label maps.

    Raises:
        DataError: the folder is missing or holds no label map.
    """

    source: LabelSource = "disk"

    def __init__(self, site_dir: Path, folder: Path) -> None:
        files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)
        if not files:
            raise DataError(
                f"the folder of label maps is missing or holds no {' or '.join(SUFFIXES)} file. "
                "Name label maps like the source files, with one of these suffixes."
            )
        self._files = {file.relative_to(folder).with_suffix("").as_posix(): file for file in files}
        self._sources = _sources(site_dir)
        self._uses = Counter(
            name for source in self._sources.values() for name in set(source.names)
        )
        # One digest over the whole folder: a changed map has all maps read again, which is quick.
        total = hashlib.sha256()
        for name, file in sorted(self._files.items()):
            total.update(repr((name, file_digest(file))).encode())
        self.digest = total.hexdigest()

    def draw(
        self, clip: ClipEntry, _frames: object, /
    ) -> tuple[NDArray[np.uint8], tuple[Mapping[int, float], ...]]:
        """The maps of one clip; nothing is labelled outside its sector.

        Raises:
            ClipError: there is no label map for it, or one that does not fit.
        """
        source = self._sources[clip.clip]
        maps = read_label_image(self._file_of(source))
        _check_size(maps, source.record, clip)
        chosen = [maps[number] for number in clip.numbers]
        shape, sector = (clip.shape[1], clip.shape[2]), clip.sector()
        fitted = [np.where(sector, fit_labels(one, clip.box, shape), 0) for one in chosen]
        return np.stack(fitted).astype(np.uint8), ({},) * len(fitted)

    def _file_of(self, source: _Source) -> Path:
        for name in source.names:
            if name in self._files and self._uses[name] == 1:
                return self._files[name]
        raise ClipError(
            "no label map has this clip's name, or several clips share the name. Name it like the "
            "source file below the indexed folder, folders included, ending in .png or .npy."
        )


def _sources(site_dir: Path) -> dict[str, _Source]:
    records = {record.clip: record for record in open_catalogue(site_dir).clips}
    found = {}
    with database(site_dir, write=False) as table:
        for clip, record in records.items():
            for path in source_paths(table, clip)[:1]:
                row = table.execute("SELECT relative FROM files WHERE path = ?", (path,)).fetchone()
                name = true_path(row[0]) if row and row[0] else Path(true_path(path)).name
                found[clip] = _Source(record, PurePosixPath(name))
    return found


def _check_size(maps: NDArray[np.uint8], record: ClipRecord, clip: ClipEntry) -> None:
    frames = max(record.frames, 1 + max(clip.numbers))
    if maps.shape[1:] != (record.rows, record.columns):
        raise ClipError(
            f"the label map is {maps.shape[1]} x {maps.shape[2]} pixels, the source "
            f"{record.rows} x {record.columns}. Draw it on the source file, not on a prepared or "
            "resized frame."
        )
    if len(maps) != frames:
        raise ClipError(
            f"there are {len(maps)} label map(s) for {frames} frame(s) of the source. Save one map "
            "for each frame, as .npy of (frames, rows, columns)."
        )
