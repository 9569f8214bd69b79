"""Held-out scans as files that any reader opens: NIfTI and PNG, with label maps.

NIfTI volumes and ultrasound stills are linked to, not copied. Everything else is converted without
loss: other volumes to NIfTI, the chosen frames of clips to PNG of the whole screen.
"""

import os
import re
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import nibabel as nib
import numpy as np
from nibabel import orientations
from numpy.typing import NDArray
from PIL import Image

from agssd_core.config.tasks import TaskConfig
from agssd_core.data.cine import VideoFrames
from agssd_core.data.clips import clip_kind
from agssd_core.data.frame_source import FrameSource, Pixels, readable_clip
from agssd_core.data.still import ImageFrames
from agssd_core.data.us_dicom import DicomFrames
from agssd_core.data.volume import Affine, Volume
from agssd_core.errors import DataError
from agssd_core.evaluation.bundle_facts import BundleItem
from agssd_core.evaluation.labelled import LabelledScan
from agssd_core.evaluation.sources import ScanSource
from agssd_core.evaluation.tasks import task_mask

Progress = Callable[[int, int], None]
Labels = NDArray[np.uint8]
IMAGES, LABELS = "images", "labels"
_FRAME = re.compile(r"(.+)\.f(\d{4,})")
_NIFTI, _STILLS = (".nii", ".nii.gz"), (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
_nib, _orient = cast(Any, nib), cast(Any, orientations)


def write_bundle_data(
    sources: Sequence[ScanSource],
    scans: Sequence[LabelledScan],
    task: TaskConfig,
    folder: Path,
    *,
    classes: Sequence[str] = (),
    progress: Progress | None = None,
) -> list[BundleItem]:
    """Write images and truth of held-out scans.

    Args:
        sources: where they come from.
        scans: held-out ones, as ``write_labelled`` named them.
        task: which structures count, or which label.
        folder: gets ``images`` and ``labels``.
        classes: of a classification, in order.
        progress: called with (done, total).

    Raises:
        DataError: a scan that could be read before cannot be read now.
    """
    known = {source.scan: source for source in sources}
    items = []
    for place in (IMAGES, LABELS):
        (folder / place).mkdir(parents=True, exist_ok=True, mode=0o700)
    for done, scan in enumerate(scans, start=1):
        source, number = _source_of(scan, known)
        write = _write_frame if source.modality == "US" else _write_volume
        image, truth = write(source, number, scan.scan, folder, task)
        label = classes.index(scan.labels[task.label]) if classes else truth
        items.append(BundleItem(scan.scan, image, label, scan.modality, scan.site))
        if progress is not None:
            progress(done, len(scans))
    return items


def _source_of(scan: LabelledScan, known: dict[str, ScanSource]) -> tuple[ScanSource, int | None]:
    """The source of a scan, and which frame of a clip it is, where its name says so."""
    if scan.scan in known:
        return known[scan.scan], None
    matched = _FRAME.fullmatch(scan.scan)
    if matched is None or matched[1] not in known:
        raise DataError(
            "a labelled scan is of none of the sources. Delete the folder of labelled scans."
        )
    return known[matched[1]], int(matched[2])


def _write_volume(
    source: ScanSource, _number: int | None, name: str, folder: Path, task: TaskConfig
) -> tuple[str, str]:
    path, volume = source.nifti(), source.volume()
    image = folder / IMAGES / f"{name}.nii.gz"
    stored = None if path is None else _affine_of(path, volume)
    if path is not None and stored is not None:
        suffix = next(end for end in reversed(_NIFTI) if path.name.endswith(end))
        image = image.with_name(f"{name}{suffix}")
        _link(path, image)
    else:
        stored = volume.affine
        _save_volume(volume.array, volume.affine, image)
    truth = folder / LABELS / f"{name}.nii.gz"
    if task.kind == "segmentation":
        labels = task_mask(source.volume_mask(volume), task)
        _save_volume(_turned(labels, volume.affine, stored), stored, truth)
    return f"{IMAGES}/{image.name}", f"{LABELS}/{truth.name}"


def _affine_of(path: Path, volume: Volume) -> Affine | None:
    """The place of a NIfTI file that any reader sees as the house's does; None of all others."""
    if not path.name.endswith(_NIFTI):
        return None
    held = _nib.load(path)
    stored = np.asarray(held.affine, dtype=np.float64)
    if len(held.shape) != 3 or not np.isfinite(stored).all():
        return None
    turn = _orient.io_orientation(stored)
    placed = stored @ _orient.inv_ornt_aff(turn, held.shape)
    return stored if np.allclose(placed, volume.affine, atol=1e-3) else None


def _turned(labels: Labels, canonical: Affine, stored: Affine) -> Labels:
    """From RAS order to the order in which a file stores its voxels."""
    turn = _orient.ornt_transform(_orient.io_orientation(canonical), _orient.io_orientation(stored))
    return np.ascontiguousarray(_orient.apply_orientation(labels, turn))


def _save_volume(array: NDArray[Any], affine: Affine, file: Path) -> None:
    values = array
    if array.dtype == np.float32:
        whole = array.astype(np.int16) if np.abs(array).max() < 2**15 else None
        values = whole if whole is not None and (whole == array).all() else array
    temporary = file.with_name(f".{os.getpid()}.{file.name}")
    try:
        _nib.save(_nib.Nifti1Image(values, affine), temporary)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _write_frame(
    source: ScanSource, number: int | None, name: str, folder: Path, task: TaskConfig
) -> tuple[str, str]:
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as temporary, readable_clip():
        path = source.clip(Path(temporary))
        frames = _frames(path)
        count, shape = _extent(frames)
        masks = source.frame_masks(shape, count) if source.outlined else None
        if number is None:
            # A name without a number is that of a still, or of a clip's one outlined frame.
            number = 0 if masks is None else int(masks.any((1, 2)).argmax())
        image = folder / IMAGES / f"{name}.png"
        if source.is_still() and path.suffix.casefold() in _STILLS and count == 1:
            image = image.with_suffix(path.suffix.casefold())
            _link(path, image)
        else:
            _save_pixels(next(frame for n, frame in frames.frames({number}) if n == number), image)
    truth = folder / LABELS / f"{name}.png"
    if task.kind == "segmentation" and masks is not None:
        _save_pixels(task_mask(masks[number], task), truth)
    return f"{IMAGES}/{image.name}", f"{LABELS}/{truth.name}"


def _frames(path: Path) -> FrameSource:
    if path.suffix.casefold() == ".dcm":
        return DicomFrames(path)
    kind = clip_kind(path)
    if kind is None:
        return DicomFrames(path)
    with path.open("rb") as stream:
        animated = stream.read(4) == b"GIF8"
    return ImageFrames(path) if kind == "image" or animated else VideoFrames(path)


def _extent(source: FrameSource) -> tuple[int, tuple[int, int]]:
    """Number of frames and (H, W)."""
    count, shape = 0, (0, 0)
    for number, frame in source.frames():
        count, shape = number + 1, (frame.shape[0], frame.shape[1])
    return count, shape


def _save_pixels(pixels: Pixels, file: Path) -> None:
    temporary = file.with_name(f".{os.getpid()}.{file.name}")
    try:
        Image.fromarray(np.ascontiguousarray(pixels)).save(temporary, format="PNG")
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def _link(path: Path, link: Path) -> None:
    temporary = link.with_name(f".{os.getpid()}.{link.name}")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(path.resolve())
    temporary.replace(link)
