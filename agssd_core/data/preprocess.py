"""From a scan to what is cached: resample to the spacing, scale to [0, 1], find the body."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from agssd_core.config.data import DataConfig
from agssd_core.data.volume import Affine, FloatArray, Volume, check_shape, spacing_of
from agssd_core.errors import VolumeError

Size3 = tuple[int, int, int]

MIN_SIDE = 8
FOREGROUND_STEP = 4
FULL_SCALE = 65535
BODY_HU = -500.0
HU_RANGE = (-1024.0, 3071.0)
MR_BACKGROUND_SHARE = 0.1
SMALL_PART_SHARE = 0.1
PERCENTILE_SAMPLES = 4_000_000
SAME_SPACING = 1e-3


@dataclass(frozen=True)
class Prepared:
    """A volume ready for the cache.

    Attributes:
        array: (D, H, W) uint16, 0..65535 for [0, 1].
        affine: (4, 4) voxel index -> RAS millimetres.
        mask: body, down-sampled by ``FOREGROUND_STEP`` (last cells may be partial).
        foreground_start, foreground_size: the body's box in voxels with its margin.
    """

    array: NDArray[np.uint16]
    affine: Affine
    spacing_mm: tuple[float, float, float]
    mask: NDArray[np.bool_]
    foreground_start: Size3
    foreground_size: Size3


def preprocess(volume: Volume, config: DataConfig) -> Prepared:
    """Resample, scale and quantise one volume.

    Raises:
        VolumeError: it is too small, or holds no body or no contrast.
    """
    bounded = volume.array
    if volume.modality == "CT":
        if float(bounded.min()) >= 0:
            raise VolumeError(
                "no voxel of the CT lies below 0, so its values are no Hounsfield units (fat and "
                "air are negative): shifted or rescaled. Convert it again from its DICOM series."
            )
        # Scanners mark what lies outside their field of view with values far below air.
        bounded = np.clip(bounded, *HU_RANGE)
    array, affine = resample(bounded, volume.affine, spacing_mm=config.spacing_mm)
    if min(array.shape) < MIN_SIDE:
        raise VolumeError(
            f"the volume is {array.shape} voxels at the configured spacing, every side needs "
            f"{MIN_SIDE}. Choose a finer data.spacing_mm, or leave the scan out."
        )
    mask = foreground_mask(array, modality=volume.modality)
    low, high = _limits(array, mask, volume.modality, config)
    scaled = np.clip((array - low) * np.float32(1.0 / (high - low)), 0.0, 1.0)
    start, size = foreground_box(mask, array.shape, margin=config.foreground_margin)
    return Prepared(
        array=np.rint(scaled * FULL_SCALE).astype(np.uint16),
        affine=affine,
        spacing_mm=spacing_of(affine),
        mask=mask,
        foreground_start=start,
        foreground_size=size,
    )


def resample(
    array: FloatArray, affine: Affine, *, spacing_mm: tuple[float, float, float]
) -> tuple[FloatArray, Affine]:
    """Bring a volume to a spacing, keeping its axes and the centre of its field of view.

    Each axis is one matrix product: linear interpolation where the grid gets finer; where it gets
    coarser, the mean of that interpolation over a box that widens the old voxel to the new one,
    so that little aliases. Both keep a field linear in millimetres exactly where it was (a
    triangle stretched to the new voxel, as image libraries use it, does not at ratios such as
    1.25). Borders repeat the outermost voxel.

    Args:
        array: (D, H, W).
        affine: (4, 4) voxel index -> RAS millimetres.
        spacing_mm: wanted voxel edges, in RAS order.

    Returns:
        The new array and its exact affine.
    """
    old = np.linalg.norm(affine[:3, :3], axis=0)
    result, moved = array, np.eye(4)
    for axis, wanted in enumerate(spacing_mm):
        ratio = wanted / float(old[axis])
        count = array.shape[axis]
        new_count = count if abs(ratio - 1) < SAME_SPACING else max(1, round(count / ratio))
        if abs(ratio - 1) < SAME_SPACING:
            continue
        first = ((count - 1) - (new_count - 1) * ratio) / 2
        moved[axis, axis], moved[axis, 3] = ratio, first
        check_shape((*result.shape[:axis], new_count, *result.shape[axis + 1 :]))
        result = _along(result, _weights(count, new_count, ratio=ratio, first=first), axis)
    return np.ascontiguousarray(result), affine @ moved


def _weights(count: int, new_count: int, *, ratio: float, first: float) -> FloatArray:
    """(new_count, count) rows that sum to 1 and whose centre of mass is the new voxel's centre."""
    centres = first + ratio * np.arange(new_count)
    # The box that widens a voxel of width 1 to one of width ratio, second moments taken alike.
    half = 0.5 * float(np.sqrt(max(ratio**2 - 1, 0.0)))
    reach = int(np.ceil(half)) + 1
    taps = np.floor(centres)[:, None] + np.arange(-reach, reach + 2)
    away = centres[:, None] - taps
    if half > 0:
        share = (_tent_integral(away + half) - _tent_integral(away - half)) / (2 * half)
    else:
        share = np.maximum(0.0, 1.0 - np.abs(away))
    rows = np.zeros((new_count, count), dtype=np.float64)
    places = np.clip(taps, 0, count - 1).astype(np.intp)
    np.add.at(rows, (np.arange(new_count)[:, None], places), share)
    return rows.astype(np.float32)


def _tent_integral(away: NDArray[np.float64]) -> NDArray[np.float64]:
    """Integral of the linear interpolation's tent from minus infinity."""
    inside = np.clip(away, -1.0, 1.0)
    return np.where(inside < 0, (1 + inside) ** 2 / 2, 1 - (1 - inside) ** 2 / 2)


def _along(array: FloatArray, rows: FloatArray, axis: int) -> FloatArray:
    if axis == 0:
        flat = rows @ array.reshape(array.shape[0], -1)
        return flat.reshape(rows.shape[0], *array.shape[1:])
    return np.asarray(np.matmul(rows, array) if axis == 1 else np.matmul(array, rows.T))


def foreground_mask(array: FloatArray, *, modality: str) -> NDArray[np.bool_]:
    """Where the body is, on a grid coarser by ``FOREGROUND_STEP``.

    The body is what is denser than air (CT) or brighter than a tenth of the brightest tissue
    (MR), reduced to its large connected parts, with lungs and bowel gas filled in slice by slice.
    """
    coarse = _block_mean(array, FOREGROUND_STEP)
    if modality == "CT":
        above = coarse > BODY_HU
    else:
        low, high = np.percentile(coarse, [0, 99.5])
        above = coarse > low + MR_BACKGROUND_SHARE * (high - low)
    parts, count = ndimage.label(above)
    if count > 1:
        sizes = np.bincount(parts.ravel())[1:]
        large = np.flatnonzero(sizes >= SMALL_PART_SHARE * sizes.max()) + 1
        above = np.isin(parts, large)
    filled = [ndimage.binary_fill_holes(above[:, :, level]) for level in range(above.shape[2])]
    return np.stack(filled, axis=2)


def foreground_box(
    mask: NDArray[np.bool_], shape: tuple[int, ...], *, margin: int
) -> tuple[Size3, Size3]:
    """Box of a coarse mask in voxels of the full grid, with a margin, within the volume.

    Raises:
        VolumeError: the mask is empty.
    """
    if not mask.any():
        message = "no body was found in the scan. Check its modality, or leave it out."
        raise VolumeError(message)
    starts, sizes = [], []
    for axis, extent in enumerate(shape):
        others = tuple(other for other in range(3) if other != axis)
        seen = np.flatnonzero(mask.any(axis=others))
        start = max(0, int(seen[0]) * FOREGROUND_STEP - margin)
        stop = min(extent, (int(seen[-1]) + 1) * FOREGROUND_STEP + margin)
        starts.append(start)
        sizes.append(stop - start)
    return (starts[0], starts[1], starts[2]), (sizes[0], sizes[1], sizes[2])


def _limits(
    array: FloatArray, mask: NDArray[np.bool_], modality: str, config: DataConfig
) -> tuple[float, float]:
    if modality == "CT":
        return config.ct_window_hu
    fine = mask
    for axis, extent in enumerate(array.shape):
        fine = np.repeat(fine, FOREGROUND_STEP, axis=axis).take(range(extent), axis=axis)
    values = array[fine]
    values = values[:: max(1, values.size // PERCENTILE_SAMPLES)]
    low, high = np.percentile(values, config.mr_percentiles) if values.size else (0.0, 0.0)
    if not high > low:
        raise VolumeError("the body shows no contrast. Check the scan, or leave it out.")
    return float(low), float(high)


def _block_mean(array: FloatArray, step: int) -> FloatArray:
    pad = [(0, -side % step) for side in array.shape]
    padded = np.pad(array, pad, mode="edge")
    depth, height, width = (side // step for side in padded.shape)
    blocks = padded.reshape(depth, step, height, step, width, step)
    return np.asarray(blocks.mean(axis=(1, 3, 5)), dtype=np.float32)
