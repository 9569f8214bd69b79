"""A site's own scans at their sources, with the labels that the hospital has given them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agssd_core.config.node import ScanModality
from agssd_core.data.label_image import read_label_image
from agssd_core.data.label_volume import read_label_volume
from agssd_core.data.prepare import CHANGED, load_volume
from agssd_core.data.records import ClipRecord, ScanRecord
from agssd_core.data.volume import Volume
from agssd_core.errors import DataError
from agssd_core.evaluation.labelled import Split

HERE = "site"


@dataclass(frozen=True)
class SiteScan:
    """See ``agssd_core.evaluation.sources.ScanSource``; names are pseudonyms.

    Attributes:
        record: of the catalogue. paths, headers: of its files, in the order of reading; private.
        mask: file of its label map; None where nobody outlined anything.
    """

    record: ScanRecord
    paths: tuple[str, ...] = field(repr=False)
    headers: tuple[str, ...] = field(repr=False)
    labels: Mapping[str, str]
    split: Split
    mask: Path | None = field(default=None, repr=False)
    site: str = HERE

    @property
    def scan(self) -> str:
        """The scan's pseudonym."""
        return self.record.name

    @property
    def patient(self) -> str:
        """The patient's pseudonym."""
        return self.record.patient

    @property
    def modality(self) -> ScanModality:
        """Of the catalogue."""
        return self.record.modality

    @property
    def outlined(self) -> bool:
        """Whether the table names a label map."""
        return self.mask is not None

    def facts(self) -> list[Any]:
        """The scan's fingerprint, its labels and side, and its label map by size and time."""
        status = self.mask.stat() if self.mask is not None and self.mask.is_file() else None
        mask = None if status is None else [status.st_size, status.st_mtime_ns]
        return [self.record.fingerprint, dict(self.labels), self.split, self.outlined, mask]

    def volume(self) -> Volume:
        """Read a volume."""
        if isinstance(self.record, ClipRecord):
            raise DataError("an ultrasound clip is no volume.")
        try:
            return load_volume(self.record, self.paths, self.headers)
        except OSError:
            raise DataError(CHANGED) from None

    def volume_mask(self, volume: Volume) -> NDArray[np.uint8]:
        """Read its label map, NIfTI."""
        return read_label_volume(self._mask(), volume)

    def nifti(self) -> Path | None:
        """Its own file, where that is NIfTI."""
        return Path(self.paths[0]) if self.record.kind == "nifti" else None

    def clip(self, folder: Path) -> Path:
        """Its own file."""
        del folder
        if not Path(self.paths[0]).is_file():
            raise DataError(CHANGED)
        return Path(self.paths[0])

    def is_still(self) -> bool:
        """Whether it is a picture."""
        return self.record.kind == "image"

    def frame_masks(self, shape: tuple[int, int], frames: int) -> NDArray[np.uint8]:
        """Read its label map, PNG or ``.npy``: one map for each stored frame."""
        maps = read_label_image(self._mask())
        if maps.shape != (frames, *shape):
            raise DataError(
                f"a label map is (frames, rows, columns) = {maps.shape}, its scan "
                f"{(frames, *shape)}, they must be equal. Draw it on the source file; save a "
                "clip's as .npy with one map for each frame."
            )
        return maps

    def _mask(self) -> Path:
        if self.mask is None or not self.mask.is_file():
            raise DataError("its label map is missing. Mend the table's column `mask`.")
        return self.mask
