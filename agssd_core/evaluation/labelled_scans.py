"""Labelled scans, prepared exactly as pre-training prepares scans."""

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agssd_core.config import DataConfig
from agssd_core.data.cine import video_size
from agssd_core.data.clips import ClipKind, PreparedClip, clip_kind, load_clip
from agssd_core.data.frame_source import FrameCount, readable_clip
from agssd_core.data.pairs import fit_labels
from agssd_core.data.preprocess import FOREGROUND_STEP, preprocess, resample
from agssd_core.data.still import image_size
from agssd_core.data.us_dicom import dicom_size, read_us_dataset
from agssd_core.data.volume import Volume
from agssd_core.errors import ClipError, DataError, ShapeError
from agssd_core.evaluation.labelled import LabelledScan, LabelledSet, read_scan, store_scan
from agssd_core.evaluation.sources import Mask, ScanSource
from agssd_core.weights import write_text

Progress = Callable[[int, int], None]
FRAMES_OF_A_CLIP = 3
# Of a clip with outlines every frame is looked at, as the outlined ones may be few.
FRAMES_READ = 512
_FORM = 1


@dataclass(frozen=True)
class _Pixels:
    """What is stored of one scan, or of one frame of a clip."""

    scan: str
    image: NDArray[np.uint8] | NDArray[np.uint16]
    inside: NDArray[np.bool_]
    mask: Mask | None
    spacing_mm: tuple[float, ...] | None


def write_labelled(
    sources: Sequence[ScanSource],
    data: DataConfig,
    folder: Path,
    *,
    progress: Progress | None = None,
) -> LabelledSet:
    """Prepare scans with their labels and outlines; what is ready is not done again.

    Volumes are resampled and scaled as for pre-training, and each structure on the same grid: a
    voxel is inside where at least half of it is. Of an ultrasound clip up to three frames are
    kept, outlined ones where there are any, and their masks cut and shrunk with them.

    Args:
        sources: the scans, with site and side of the split.
        data: preprocessing of pre-training.
        folder: where the scans go, one file each.
        progress: called with (done, total).

    Returns:
        The scans, and which could not be used and why.

    Raises:
        DataError: none can be used.
        CacheError: the disk is full or the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    found: list[LabelledScan] = []
    skipped: dict[str, str] = {}
    for done, item in enumerate(sources, start=1):
        stamp = _stamp(item, data)
        ready = _ready(folder, item.scan, stamp)
        if ready is None:
            try:
                pixels = _read(item, data, folder)
            except (DataError, ShapeError) as error:
                skipped[item.scan] = str(error)
            else:
                ready = _store(folder, item, pixels, stamp)
        found.extend(ready or ())
        if progress is not None:
            progress(done, len(sources))
    if not found:
        reason = f" The first: {next(iter(skipped.values()))}" if skipped else ""
        raise DataError(
            f"none of {len(sources)} labelled scan(s) can be used. Check the data set.{reason}"
        )
    return LabelledSet(tuple(sorted(found, key=lambda scan: scan.scan)), skipped)


def _stamp(item: ScanSource, data: DataConfig) -> str:
    """Digest of all that a scan's file depends on."""
    plain = [_FORM, *item.facts(), data.model_dump(mode="json")]
    return hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()


def _ready(folder: Path, scan: str, stamp: str) -> list[LabelledScan] | None:
    """The stored scans of a row; None unless all are there as the stamp says."""
    try:
        names = json.loads((folder / f"{scan}.json").read_text(encoding="utf-8"))["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    found = [read_scan(folder / str(name), stamp=stamp) for name in names]
    scans = [scan for scan in found if scan is not None]
    return scans if scans and len(scans) == len(found) else None


def _store(
    folder: Path, item: ScanSource, pixels: Sequence[_Pixels], stamp: str
) -> list[LabelledScan]:
    stored = []
    for each in pixels:
        scan = LabelledScan(
            scan=each.scan,
            patient=item.patient,
            site=item.site,
            split=item.split,
            modality=item.modality,
            labels=dict(item.labels),
            file=folder / f"{each.scan}.npz",
            spacing_mm=each.spacing_mm,
        )
        stored.append(store_scan(scan, each.image, inside=each.inside, mask=each.mask, stamp=stamp))
    # Written last: a row counts as ready when all of its frames are.
    names = {"files": [scan.file.name for scan in stored]}
    write_text(folder / f"{item.scan}.json", json.dumps(names))
    return stored


def _read(item: ScanSource, data: DataConfig, folder: Path) -> list[_Pixels]:
    if item.modality != "US":
        return [_volume(item, data)]
    with tempfile.TemporaryDirectory(dir=folder, prefix=".") as temporary:
        return _clip(item, item.clip(Path(temporary)), data)


def _volume(item: ScanSource, data: DataConfig) -> _Pixels:
    volume = item.volume()
    prepared = preprocess(volume, data)
    inside = prepared.mask
    for axis, extent in enumerate(prepared.array.shape):
        inside = inside.repeat(FOREGROUND_STEP, axis=axis).take(range(extent), axis=axis)
    mask = None
    if item.outlined:
        mask = _resampled(item.volume_mask(volume), volume, data)
    return _Pixels(item.scan, prepared.array, inside, mask, prepared.spacing_mm)


def _resampled(mask: Mask, volume: Volume, data: DataConfig) -> Mask:
    """Each structure by itself on the grid of the prepared volume."""
    empty = np.zeros(mask.shape, dtype=np.float32)
    shape = resample(empty, volume.affine, spacing_mm=data.spacing_mm)[0].shape
    found = np.zeros(shape, dtype=np.uint8)
    for value in np.unique(mask[mask > 0]):
        layer = (mask == value).astype(np.float32)
        share, _ = resample(layer, volume.affine, spacing_mm=data.spacing_mm)
        found[share >= 0.5] = value
    return found


def _clip(item: ScanSource, path: Path, data: DataConfig) -> list[_Pixels]:
    kind = _kind(path)
    frames = data.frames
    if item.outlined:
        frames = frames.model_copy(update={"similarity": 1.0, "max_frames": FRAMES_READ})
    clip = load_clip(path, kind, frames)
    masks = _clip_masks(item, clip, _size(path, kind)) if item.outlined else None
    chosen = _chosen(len(clip.frames), masks)
    several = len(chosen) > 1
    return [
        _Pixels(
            scan=f"{item.scan}.f{clip.numbers[place]:04d}" if several else item.scan,
            image=clip.frames[place],
            inside=clip.sector,
            mask=None if masks is None else masks[place],
            spacing_mm=None,
        )
        for place in chosen
    ]


def _clip_masks(item: ScanSource, clip: PreparedClip, size: FrameCount) -> list[Mask]:
    """The mask of every kept frame, cut out and shrunk as it was, 0 outside the sector."""
    # A header may promise fewer frames than a video holds, or say nothing of them.
    count = max(size.frames, clip.numbers[-1] + 1)
    masks = item.frame_masks((size.rows, size.columns), count)
    shape = (clip.sector.shape[0], clip.sector.shape[1])
    cut = [fit_labels(masks[number], clip.box, shape) for number in clip.numbers]
    return [np.where(clip.sector, mask, 0).astype(np.uint8) for mask in cut]


def _chosen(count: int, masks: Sequence[Mask] | None) -> list[int]:
    """Up to three places, evenly spaced over outlined frames, or over all where none is."""
    outlined = [place for place, mask in enumerate(masks or ()) if mask.any()]
    places = outlined or list(range(count))
    if len(places) <= FRAMES_OF_A_CLIP:
        return places
    spaced = np.linspace(0, len(places) - 1, FRAMES_OF_A_CLIP).round()
    return [places[int(number)] for number in spaced]


def _kind(path: Path) -> ClipKind:
    if path.suffix.casefold() == ".dcm":
        return "us-dicom"
    with readable_clip():
        return clip_kind(path) or "us-dicom"


def _size(path: Path, kind: ClipKind) -> FrameCount:
    with readable_clip():
        if kind == "us-dicom":
            return dicom_size(read_us_dataset(path))
        if kind == "image":
            return image_size(path)
        try:
            return video_size(path)
        except ClipError:
            return image_size(path)  # an animated GIF
