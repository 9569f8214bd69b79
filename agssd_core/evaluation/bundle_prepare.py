"""From an image file to what the network was trained on, and back to the image's own pixels.

A bundle carries a copy of this file and of the modules that it imports, so that its preprocessing
is not like that of pre-training but the same lines.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import nibabel as nib
import numpy as np
from nibabel import orientations
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from agssd_core.data.clip_survey import Survey
from agssd_core.data.frame_source import grey_frame, readable_clip
from agssd_core.data.preprocess import FOREGROUND_STEP, FULL_SCALE, preprocess
from agssd_core.data.shrink import AreaShrink
from agssd_core.data.still import ImageFrames
from agssd_core.data.volume import Affine, Modality, canonical_volume
from agssd_core.evaluation.bundle_settings import DataConfig

Reals = NDArray[np.float32]
Labels = NDArray[np.uint8]
# nibabel gives these modules no types.
_nib, _orient = cast(Any, nib), cast(Any, orientations)


class Ready(Protocol):
    """An image in the form of pre-training."""

    image: Reals
    inside: NDArray[np.bool_]

    def restore(self, probabilities: Reals) -> Labels:
        """The most probable structure of every pixel of the file."""

    def save(self, labels: Labels, stem: Path) -> Path:
        """Write labels on the file's pixels, in its geometry."""


class Preparation:
    """Reads image files.

    Args:
        spacing_mm: voxel edges of prepared volumes, in RAS order.
        ct_window_hu: CT values that map to 0 and 1.
        mr_percentiles: percentiles of the MR body that map to 0 and 1.
        max_side: pixels of a prepared ultrasound sector's longer side, at most.
    """

    def __init__(
        self,
        *,
        spacing_mm: Sequence[float],
        ct_window_hu: Sequence[float],
        mr_percentiles: Sequence[float],
        max_side: int,
    ) -> None:
        x, y, z = spacing_mm
        low, high = ct_window_hu
        least, most = mr_percentiles
        self._config = DataConfig((x, y, z), (low, high), (least, most), 0, max_side)

    def __call__(self, file: str | Path, modality: Literal["CT", "MR", "US"]) -> Ready:
        """Read and prepare one image.

        Args:
            file: NIfTI of a CT (Hounsfield units) or MR volume; PNG, JPEG, BMP or TIFF of an
                ultrasound screen.
            modality: of the image.

        Raises:
            DataError: the image cannot be used; says why.
        """
        if modality == "US":
            return PreparedFrame(Path(file), self._config)
        return PreparedVolume(Path(file), modality, self._config)


class PreparedVolume:
    """A volume; see ``Ready``."""

    def __init__(self, file: Path, modality: Modality, config: DataConfig) -> None:
        stored = _nib.load(file)
        self._affine = np.asarray(stored.affine, dtype=np.float64)
        values = np.asarray(stored.dataobj, dtype=np.float32)
        volume = canonical_volume(values, self._affine, modality=modality)
        prepared = preprocess(volume, cast(Any, config))
        self.image: Reals = np.multiply(prepared.array, np.float32(1 / FULL_SCALE))
        inside = prepared.mask
        for axis, extent in enumerate(self.image.shape):
            inside = inside.repeat(FOREGROUND_STEP, axis=axis).take(range(extent), axis=axis)
        self.inside = inside
        self._canonical, self._shape = volume.affine, volume.array.shape
        self._prepared: Affine = prepared.affine

    def restore(self, probabilities: Reals) -> Labels:
        """(K, ...) of the prepared grid -> structures (I, J, K) as the file stores voxels."""
        # Spacing changes along each axis only, so this matrix has a diagonal and no other part.
        step = np.linalg.inv(self._prepared) @ self._canonical
        best = np.full(self._shape, -1.0, dtype=np.float32)
        found = np.zeros(self._shape, dtype=np.uint8)
        for number, layer in enumerate(probabilities):
            moved = ndimage.affine_transform(
                layer,
                np.diagonal(step)[:3].copy(),
                offset=step[:3, 3],
                output_shape=self._shape,
                order=1,
                mode="nearest",
            )
            found[moved > best] = number
            np.maximum(best, moved, out=best)
        turn = _orient.ornt_transform(
            _orient.io_orientation(self._canonical), _orient.io_orientation(self._affine)
        )
        return np.ascontiguousarray(_orient.apply_orientation(found, turn))

    def save(self, labels: Labels, stem: Path) -> Path:
        """Write NIfTI with the image's affine."""
        file = stem.with_name(f"{stem.name}.nii.gz")
        _nib.save(_nib.Nifti1Image(labels, self._affine), file)
        return file


class PreparedFrame:
    """One ultrasound screen; see ``Ready``. The sector is found in this frame alone."""

    def __init__(self, file: Path, config: DataConfig) -> None:
        with readable_clip():
            survey = Survey(ImageFrames(file))
            sector = survey.sector
            rows, columns = np.flatnonzero(sector.any(1)), np.flatnonzero(sector.any(0))
            cut = (slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1))
            shrink = AreaShrink(sector[cut], config.max_side)
            frame = next(iter(survey.frames(survey.numbers[:1])))
            grey = shrink(grey_frame(frame[cut], tinted=survey.tinted))
        self.image: Reals = np.multiply(grey, np.float32(1 / 255), dtype=np.float32)
        self.inside = shrink.sector
        self._sector, self._cut = sector, cut

    def restore(self, probabilities: Reals) -> Labels:
        """(K, h, w) of the prepared sector -> structures (H, W) of the screen, 0 outside it."""
        rows, columns = (part.stop - part.start for part in self._cut)
        layers = [
            np.asarray(Image.fromarray(layer).resize((columns, rows), Image.Resampling.BILINEAR))
            for layer in probabilities
        ]
        found = np.zeros(self._sector.shape, dtype=np.uint8)
        found[self._cut] = np.stack(layers).argmax(0)
        found[~self._sector] = 0
        return found

    def save(self, labels: Labels, stem: Path) -> Path:
        """Write PNG whose grey values are the structures' numbers."""
        file = stem.with_name(f"{stem.name}.png")
        Image.fromarray(labels).save(file)
        return file
