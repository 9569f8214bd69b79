"""One scan in memory: an array in RAS order and the affine that places it in the body."""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from nibabel import orientations
from numpy.typing import NDArray

from agssd_core.errors import VolumeError

Modality = Literal["CT", "MR"]
FloatArray = NDArray[np.float32]
Affine = NDArray[np.float64]

MAX_SIDE = 4096
MAX_VOXELS = 1 << 30
# nibabel gives this module no types.
_orient: Any = orientations
SPACING_LIMITS_MM = (0.05, 30.0)
MAX_SHEAR_DEGREES = 1.0


@dataclass(frozen=True)
class Volume:
    """A scan whose geometry has been checked.

    Attributes:
        array: (D, H, W) float32 in nibabel's canonical order (D runs right, H anterior, W
            superior); HU for CT, arbitrary units for MR.
        affine: (4, 4) voxel index -> RAS millimetres.
        vendor: maker of the scanner, one of ``deidentify.VENDORS``.
    """

    array: FloatArray
    affine: Affine
    modality: Modality
    vendor: str = "other"

    @property
    def spacing_mm(self) -> tuple[float, float, float]:
        """Edge lengths of a voxel."""
        return spacing_of(self.affine)


def spacing_of(affine: Affine) -> tuple[float, float, float]:
    """Lengths of an affine's three columns, millimetres."""
    x, y, z = np.linalg.norm(affine[:3, :3], axis=0)
    return float(x), float(y), float(z)


def canonical_volume(
    array: NDArray[np.generic], affine: Affine, *, modality: Modality, vendor: str = "other"
) -> Volume:
    """Check a scan and turn its axes to the nearest RAS order, without interpolation.

    Args:
        array: (I, J, K) stored voxels in units of the modality.
        affine: (4, 4) voxel index -> RAS millimetres.
        modality: CT or MR.
        vendor: maker of the scanner.

    Raises:
        VolumeError: the array is not a finite, varying 3D image, or the affine is unusable.
    """
    check_shape(array.shape)
    check_affine(affine)
    values = np.asarray(array, dtype=np.float32)
    broken = values.size - int(np.count_nonzero(np.isfinite(values)))
    if broken:
        raise VolumeError(
            f"{broken} voxel(s) are NaN or infinite, none are allowed. Replace them with the "
            "background's value in the source, or leave the scan out."
        )
    if float(values.min()) == float(values.max()):
        message = "every voxel has the same value. Export the scan again, or leave it out."
        raise VolumeError(message)
    turn = _orient.io_orientation(affine)
    turned = np.ascontiguousarray(_orient.apply_orientation(values, turn))
    placed = affine @ _orient.inv_ornt_aff(turn, values.shape)
    return Volume(turned, np.asarray(placed, dtype=np.float64), modality, vendor)


def check_shape(shape: tuple[int, ...]) -> None:
    """Refuse what is not one 3D image of a believable size; looks at no voxel.

    Raises:
        VolumeError: the array is not 3D, is empty or is absurdly large.
    """
    if len(shape) != 3:
        raise VolumeError(
            f"the image has {len(shape)} dimensions, only 3 are allowed. Split a time series or "
            "a multi-channel image into one file for each volume."
        )
    if min(shape) < 1:
        raise VolumeError("the image holds no voxel. Export it again, or leave it out.")
    if max(shape) > MAX_SIDE or shape[0] * shape[1] * shape[2] > MAX_VOXELS:
        raise VolumeError(
            f"the header claims more than {MAX_SIDE} voxels on a side or {MAX_VOXELS} in all. "
            "Check the file, or leave it out."
        )


def check_affine(affine: Affine) -> None:
    """Refuse an affine that is singular, sheared or of unbelievable spacing.

    Raises:
        VolumeError: with the limit that was exceeded.
    """
    if affine.shape != (4, 4) or not np.isfinite(affine).all():
        raise VolumeError("the header's geometry is not finite. Export the scan again.")
    spacing = spacing_of(affine)
    low, high = SPACING_LIMITS_MM
    if not all(low <= side <= high for side in spacing):
        raise VolumeError(
            f"voxel spacing lies outside [{low}, {high}] mm. Mend the header, or leave the scan "
            "out."
        )
    axes = affine[:3, :3] / np.asarray(spacing)
    cosine = float(np.abs(axes.T @ axes - np.eye(3)).max())
    shear = float(np.degrees(np.arcsin(min(cosine, 1.0))))
    if shear > MAX_SHEAR_DEGREES:
        raise VolumeError(
            f"the axes deviate {shear:.1f} degrees from right angles (gantry tilt or a sheared "
            f"transform), {MAX_SHEAR_DEGREES} are allowed. Resample the scan to an upright grid."
        )
