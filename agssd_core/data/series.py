"""From single DICOM files to volumes: grouping, geometry checks, reading a stack."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agssd_core.data.dicom import DicomHeader, Frame, read_pixels
from agssd_core.data.volume import MAX_SHEAR_DEGREES, Affine, Volume, canonical_volume
from agssd_core.errors import SeriesError

# Exports that round positions to 0.1 mm spread even gaps by as much as this.
MAX_SLICE_GAP_SPREAD_MM = 0.2
SAME_COSINE = 0.01
SAME_SPACING_MM = 0.001
MIN_SLICES = 3
SCOUT_SLICES = 3
COPY = "a copy of another file. Nothing needs doing."
Vector = NDArray[np.float64]
# From LPS to RAS: left and posterior become right and anterior.
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True)
class StoredFile:
    """One catalogued file of a series."""

    path: str
    header: DicomHeader


@dataclass(frozen=True)
class LeftOut:
    """Files that were not used, and why."""

    paths: tuple[str, ...]
    reason: str


def select_slices(files: Sequence[StoredFile]) -> tuple[list[StoredFile], list[LeftOut]]:
    """Choose the files of one series that form its volume.

    Copies of an instance are left out, and so are a few slices of another orientation (scouts
    stored with the series).

    Raises:
        SeriesError: the series mixes several stacks or patients.
    """
    patients = len({file.header.patient for file in files})
    if patients > 1:
        raise SeriesError(
            f"{patients} patients share one series number, one is allowed. Export their scans "
            "again with numbers of their own."
        )
    unique: dict[str, StoredFile] = {}
    copies = []
    for file in sorted(files, key=lambda each: each.path):
        if file.header.instance in unique:
            copies.append(file.path)
        else:
            unique[file.header.instance] = file
    left_out = [LeftOut(tuple(copies), COPY)]
    stacks = sorted(_stacks(list(unique.values())), key=_slice_count, reverse=True)
    for scouts in stacks[1:]:
        if _slice_count(scouts) > SCOUT_SLICES:
            raise SeriesError(
                f"the series mixes {len(stacks)} image sizes, spacings or orientations, one is "
                "allowed. Export each stack as a series of its own."
            )
        paths = tuple(file.path for file in scouts)
        reason = "of another orientation or size than the series (a scout). Nothing needs doing."
        left_out.append(LeftOut(paths, reason))
    return stacks[0], [each for each in left_out if each.paths]


def stack_affine(headers: Iterable[DicomHeader]) -> tuple[Affine, list[tuple[int, int]]]:
    """Place a stack of slices and check that it is even.

    Returns:
        (4, 4) affine of an array indexed (column, row, slice) -> RAS millimetres, and the slices
        in order as (file, frame) indices.

    Raises:
        SeriesError: slices are missing, doubled, uneven, or shifted against each other.
    """
    frames = [
        (frame, (file, index))
        for file, header in enumerate(headers)
        for index, frame in enumerate(header.frames)
    ]
    along_row, along_column, normal = _directions(frames[0][0])
    _require_one_plane([frame for frame, _ in frames])
    frames.sort(key=lambda item: float(np.dot(item[0].position, normal)))
    positions = np.array([frame.position for frame, _ in frames], dtype=np.float64)
    step = _slice_step(positions, normal)
    row_spacing, column_spacing = frames[0][0].spacing
    affine = np.eye(4)
    affine[:3, 0] = along_row * column_spacing
    affine[:3, 1] = along_column * row_spacing
    affine[:3, 2] = step
    affine[:3, 3] = positions[0]
    return LPS_TO_RAS @ affine, [place for _, place in frames]


def read_series(files: Sequence[StoredFile]) -> Volume:
    """Read the voxels of a checked series.

    Raises:
        SeriesError, VolumeError: pixels or geometry are unusable.
    """
    affine, order = stack_affine(file.header for file in files)
    first = files[0].header
    loaded = [read_pixels(Path(file.path)) for file in files]
    if any(pixels.shape[1:] != (first.rows, first.columns) for pixels in loaded):
        raise SeriesError("a slice has changed its size since it was indexed. Index again.")
    stack = np.stack([loaded[file][frame] for file, frame in order])
    return canonical_volume(
        stack.transpose(2, 1, 0), affine, modality=first.modality, vendor=first.vendor
    )


def _stacks(files: Sequence[StoredFile]) -> list[list[StoredFile]]:
    """Files of one size, spacing and orientation each; the last digits of a header may differ."""
    stacks: list[list[StoredFile]] = []
    for file in files:
        for stack in stacks:
            if _alike(stack[0].header, file.header):
                stack.append(file)
                break
        else:
            stacks.append([file])
    return stacks


def _alike(one: DicomHeader, other: DicomHeader) -> bool:
    a, b = one.frames[0], other.frames[0]
    return (
        (one.rows, one.columns) == (other.rows, other.columns)
        and _near(a.orientation, b.orientation, SAME_COSINE)
        and _near(a.spacing, b.spacing, SAME_SPACING_MM)
    )


def _near(one: Sequence[float], other: Sequence[float], limit: float) -> bool:
    return all(abs(a - b) <= limit for a, b in zip(one, other, strict=True))


def _slice_count(files: Sequence[StoredFile]) -> int:
    return sum(len(file.header.frames) for file in files)


def _directions(frame: Frame) -> tuple[Vector, Vector, Vector]:
    row, column = np.array(frame.orientation[:3]), np.array(frame.orientation[3:])
    lengths = np.linalg.norm(row), np.linalg.norm(column)
    if abs(lengths[0] - 1) > 0.01 or abs(lengths[1] - 1) > 0.01 or abs(row @ column) > 0.01:
        raise SeriesError(
            "the slices' row and column directions are not of length 1 at right angles. Export "
            "the series again from the PACS."
        )
    return row / lengths[0], column / lengths[1], np.cross(row, column)


def _require_one_plane(frames: Sequence[Frame]) -> None:
    orientations = np.array([frame.orientation for frame in frames])
    spacings = np.array([frame.spacing for frame in frames])
    turned = np.ptp(orientations, axis=0).max() > 2 * SAME_COSINE
    if turned or np.ptp(spacings, axis=0).max() > 2 * SAME_SPACING_MM:
        raise SeriesError(
            "the frames differ in orientation or pixel spacing, one of each is allowed. Export "
            "each stack as a series of its own."
        )


def _slice_step(positions: Vector, normal: Vector) -> Vector:
    """The vector from one slice to the next, once the stack is known to be even."""
    if len(positions) < MIN_SLICES:
        raise SeriesError(
            f"the series has {len(positions)} slice(s), at least {MIN_SLICES} are needed. Leave "
            "it out."
        )
    gaps = np.diff(positions @ normal)
    doubled = int(np.count_nonzero(gaps < 1e-3))
    if doubled:
        raise SeriesError(
            f"{doubled} slice position(s) are taken more than once (several time points, echoes or "
            "reconstructions). Export each of them as a series of its own."
        )
    spread = float(np.ptp(gaps))
    if spread > MAX_SLICE_GAP_SPREAD_MM + 1e-6:
        missing = int(np.sum(np.round(gaps / np.median(gaps)) - 1))
        raise SeriesError(
            f"slice gaps range from {gaps.min():.2f} to {gaps.max():.2f} mm, the allowed spread is "
            f"{MAX_SLICE_GAP_SPREAD_MM} mm; about {max(missing, 0)} slice(s) look missing. Export "
            "the series again from the PACS, or leave it out."
        )
    step = (positions[-1] - positions[0]) / (len(positions) - 1)
    tilt = float(np.degrees(np.arccos(np.clip(step @ normal / np.linalg.norm(step), -1, 1))))
    if tilt > MAX_SHEAR_DEGREES:
        raise SeriesError(
            f"the slices are stacked {tilt:.1f} degrees off their normal (gantry tilt), "
            f"{MAX_SHEAR_DEGREES} are allowed. Export the series resampled to an upright grid."
        )
    return np.asarray(step)
