"""What fine-tuning needs of a scan that somebody has labelled, wherever it is stored."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from agssd_core.config.node import ScanModality
from agssd_core.data.volume import Volume
from agssd_core.evaluation.labelled import Split

Mask = NDArray[np.uint8]


class ScanSource(Protocol):
    """One scan at its source, with labels and outlines; errors name no path and no patient."""

    @property
    def scan(self) -> str:
        """Unique in its set; a name that files may have."""
        ...

    @property
    def patient(self) -> str:
        """Equal for scans of one person."""
        ...

    @property
    def site(self) -> str:
        """Where it comes from."""
        ...

    @property
    def split(self) -> Split:
        """Learned from, or held out."""
        ...

    @property
    def modality(self) -> ScanModality:
        """CT and MR are volumes, US is a clip or a still."""
        ...

    @property
    def labels(self) -> Mapping[str, str]:
        """Classes by the name of what is classified."""
        ...

    @property
    def outlined(self) -> bool:
        """Whether there is a mask."""
        ...

    def facts(self) -> list[Any]:
        """Plain values that change whenever the scan or what is said of it does."""
        ...

    def volume(self) -> Volume:
        """Read a volume.

        Raises:
            DataError: it cannot be read.
        """
        ...

    def volume_mask(self, volume: Volume) -> Mask:
        """(D, H, W) in the order of ``volume.array``, 0 where nothing is outlined.

        Raises:
            DataError: it cannot be read, or does not lie over the scan.
        """
        ...

    def nifti(self) -> Path | None:
        """The NIfTI file that holds this volume and nothing else; None of any other form."""
        ...

    def clip(self, folder: Path) -> Path:
        """A file of frames: the stored one, or one that is written into ``folder``.

        Raises:
            DataError: it cannot be read.
        """
        ...

    def is_still(self) -> bool:
        """Whether ``clip`` is a stored picture, such as a PNG, which may be linked to."""
        ...

    def frame_masks(self, shape: tuple[int, int], frames: int) -> Mask:
        """(F, H, W): a mask for each stored frame.

        Args:
            shape: (H, W) of the stored frames, pixels.
            frames: how many there are.

        Raises:
            DataError: it cannot be read, or does not fit.
        """
        ...
