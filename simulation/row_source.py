"""A row of a public data set as a source of labelled scans."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from agssd_core.config.node import ScanModality
from agssd_core.data.volume import Volume
from simulation.datasets.grids import source_file
from simulation.datasets.reading import read_volume, read_volume_mask
from simulation.datasets.reading_images import read_image_masks, write_frames_from
from simulation.datasets.rows import Row
from simulation.partition import Split

_STORED = ("image", "video", "dicom")


@dataclass(frozen=True)
class RowSource:
    """See ``agssd_core.evaluation.sources.ScanSource``; ``root`` is the data set's folder."""

    root: Path
    row: Row
    site: str = ""
    split: Split = "train"

    @property
    def scan(self) -> str:
        """Of the row."""
        return self.row.scan

    @property
    def patient(self) -> str:
        """Of the row."""
        return self.row.patient

    @property
    def modality(self) -> ScanModality:
        """Of the row."""
        return self.row.modality

    @property
    def labels(self) -> Mapping[str, str]:
        """Of the row."""
        return self.row.labels

    @property
    def outlined(self) -> bool:
        """Whether the row names masks."""
        return bool(self.row.masks)

    def facts(self) -> list[Any]:
        """The row and where it was placed; pixels by the size of their file."""
        path = self.root / self.row.source.path
        size = path.stat().st_size if path.is_file() else 0
        return [asdict(self.row), self.site, self.split, size]

    def volume(self) -> Volume:
        """Read a volume."""
        return read_volume(self.root, self.row)

    def volume_mask(self, volume: Volume) -> NDArray[np.uint8]:
        """Read its outlines."""
        return read_volume_mask(self.root, self.row, volume)

    def nifti(self) -> Path | None:
        """The NIfTI file of one volume."""
        path, source = source_file(self.root, self.row.source), self.row.source
        return path if source.kind == "nifti" and source.index is None else None

    def clip(self, folder: Path) -> Path:
        """The stored file of frames, or one made of a kind that the house does not index."""
        if self.row.source.kind in _STORED:
            return source_file(self.root, self.row.source)
        return write_frames_from(self.root, self.row, folder)

    def is_still(self) -> bool:
        """Whether it is stored as a picture."""
        return self.row.source.kind == "image"

    def frame_masks(self, shape: tuple[int, int], frames: int) -> NDArray[np.uint8]:
        """Read the outlines of each frame."""
        return read_image_masks(self.root, self.row, shape=shape, frames=frames)
