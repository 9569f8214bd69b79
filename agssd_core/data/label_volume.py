"""Label maps over volumes: whole numbers in a NIfTI file that lies where its scan lies."""

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel import orientations
from numpy.typing import NDArray

from agssd_core.data.quiet import quiet_readers
from agssd_core.data.volume import Affine, Volume, check_affine, check_shape
from agssd_core.errors import DataError

MAX_VALUE = 255
_nib: Any = nib
_orient: Any = orientations


def read_label_volume(path: Path, volume: Volume) -> NDArray[np.uint8]:
    """Read the label map of a scan.

    Args:
        path: a .nii or .nii.gz file, in any orientation.
        volume: the scan, in RAS order.

    Returns:
        (D, H, W) uint8 in the order of ``volume.array``; 0 is nothing.

    Raises:
        DataError: it is damaged, has another shape or place, or holds numbers that are no labels.
    """
    try:
        with quiet_readers():
            image = _nib.load(path)
            check_shape(tuple(int(side) for side in image.shape))
            array = np.asarray(image.dataobj)
            affine = np.asarray(image.affine, dtype=np.float64)
            placed = int(image.header["sform_code"]) > 0 or int(image.header["qform_code"]) > 0
    except DataError:
        raise
    except MemoryError:
        raise DataError("a label map does not fit into memory. Free some, then go on.") from None
    except Exception as error:  # noqa: BLE001 - a damaged file may break the reader anywhere
        raise DataError(
            f"a label map is no readable NIfTI file ({type(error).__name__}). Save it again as "
            ".nii.gz with whole numbers."
        ) from None
    if not placed:
        raise DataError(
            "a label map's header places it nowhere (sform and qform codes are 0), so left and "
            "right are unknown. Save it with the scan's own geometry."
        )
    check_affine(affine)
    values, where = canonical_grid(array, affine)
    if values.shape != volume.array.shape:
        raise DataError(
            f"a label map has {values.shape} voxels and its scan {volume.array.shape}, they must "
            "be equal. Draw it on the scan itself, not on a resampled copy."
        )
    require_same_place(where, volume)
    return whole_labels(values)


def canonical_grid(array: NDArray[Any], affine: Affine) -> tuple[NDArray[Any], Affine]:
    """Turn axes to the nearest RAS order, as ``volume.canonical_volume`` does, for any numbers."""
    turn = _orient.io_orientation(affine)
    placed = affine @ _orient.inv_ornt_aff(turn, array.shape)
    turned = np.ascontiguousarray(_orient.apply_orientation(array, turn))
    return turned, np.asarray(placed, dtype=np.float64)


def require_same_place(placed: Affine, volume: Volume) -> None:
    """Check that a mask of the scan's shape lies where the scan lies, within one voxel.

    Raises:
        DataError: it does not.
    """
    last = np.asarray(volume.array.shape, dtype=np.float64) - 1
    corners = np.array([[0.0, 0.0, 0.0, 1.0], [*last, 1.0]])
    apart = float(np.abs(corners @ (placed - volume.affine).T).max())
    if apart > max(volume.spacing_mm):
        raise DataError(
            f"a mask lies {apart:.1f} mm beside its scan, one voxel ({max(volume.spacing_mm):.1f} "
            "mm) is allowed. Mend its header, or leave the scan out."
        )


def whole_labels(values: NDArray[np.generic]) -> NDArray[np.uint8]:
    """Numbers of structures.

    Raises:
        DataError: they are not whole, below 0 or above 255.
    """
    chosen = np.asarray(values, dtype=np.float64)
    whole = np.rint(chosen)
    fits = np.isfinite(chosen).all() and np.abs(whole - chosen).max(initial=0) <= 1e-3
    if not fits or whole.min(initial=0) < 0 or whole.max(initial=0) > MAX_VALUE:
        raise DataError(
            f"a mask holds numbers that are no structures (whole numbers up to {MAX_VALUE}). "
            "Save it again, or leave the scan out."
        )
    return whole.astype(np.uint8)
