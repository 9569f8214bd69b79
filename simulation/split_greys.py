"""Grey values of simulated sites, from a few scans of each."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from agssd_core.config import DataConfig, FramesConfig
from agssd_core.config.node import ScanModality
from agssd_core.data.clips import ClipKind, load_clip
from agssd_core.errors import DataError
from agssd_core.views.seeds import rng_for
from simulation.datasets.reading import read_volume
from simulation.datasets.reading_images import write_frames_from
from simulation.datasets.rows import Row
from simulation.partition import Placed

SCANS, BINS, VALUES = 8, 64, 50_000
Progress = Callable[[int, int], None]
Histogram = NDArray[np.float64]
# Air round a body, and the black that MR scanners leave round theirs, say nothing of a site.
AIR_HU, BLACK = -900.0, 0.02


@dataclass(frozen=True)
class Range:
    """What is drawn of a modality, and over which values."""

    title: str
    limits: tuple[float, float]


RANGES: dict[ScanModality, Range] = {
    "CT": Range("CT without air, HU", (-1000.0, 1000.0)),
    "MR": Range("MR foreground, 0.5 to 99.5 %", (0.0, 1.0)),
    "US": Range("ultrasound in the sector", (0.0, 255.0)),
}
_CLIPS: dict[str, ClipKind] = {"image": "image", "video": "video", "dicom": "us-dicom"}


def site_greys(
    root: Path,
    placed: Sequence[Placed],
    sites: Sequence[str],
    *,
    progress: Progress | None = None,
) -> dict[ScanModality, dict[str, Histogram]]:
    """Histograms of each modality and site over ``RANGES``.

    Read from at most 8 scans of a site, drawn by its name; scans that cannot be read are passed
    over.

    Returns:
        Modality -> site -> (64,) density, each scan with the same weight. Sites without a
        readable scan of a modality are missing.
    """
    found: dict[ScanModality, dict[str, Histogram]] = {}
    for done, site in enumerate(sites, start=1):
        own = sorted((item.row for item in placed if item.site == site), key=lambda row: row.scan)
        drawn = rng_for(0, "picture", site).permutation(len(own))[:SCANS]
        scans: dict[ScanModality, list[Histogram]] = {}
        for row in (own[int(place)] for place in drawn):
            one = _histogram(root, row)
            if one is not None:
                scans.setdefault(row.modality, []).append(one)
        for modality, each in scans.items():
            found.setdefault(modality, {})[site] = np.mean(each, axis=0)
        if progress is not None:
            progress(done, len(sites))
    return dict(sorted(found.items()))


def _histogram(root: Path, row: Row) -> Histogram | None:
    try:
        values = _values(root, row)
    except (DataError, OSError):
        return None
    if not values.size:
        return None
    counts, _ = np.histogram(
        np.clip(values, *RANGES[row.modality].limits), BINS, RANGES[row.modality].limits
    )
    return np.asarray(counts / counts.sum(), dtype=np.float64)


def _values(root: Path, row: Row) -> NDArray[np.float64]:
    """Some of a scan's values, in the units of ``RANGES``."""
    if row.modality == "US":
        clip = _clip(root, row)
        return np.asarray(_some(clip[0][:, clip[1]]), dtype=np.float64)
    values = np.asarray(_some(read_volume(root, row).array), dtype=np.float64)
    if row.modality == "CT":
        return values[values > AIR_HU]
    low, high = float(values.min()), float(values.max())
    values = values[values > low + BLACK * (high - low)]
    low, high = np.percentile(values, DataConfig().mr_percentiles) if values.size else (0.0, 1.0)
    return np.asarray(np.clip((values - low) / max(float(high - low), 1e-9), 0, 1))


def _some(values: NDArray[np.generic]) -> NDArray[np.generic]:
    flat = values.ravel()
    return flat[:: max(1, flat.size // VALUES)]


def _clip(root: Path, row: Row) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Frames and sector of a clip."""
    with tempfile.TemporaryDirectory() as folder:
        kind = _CLIPS.get(row.source.kind)
        path = root / row.source.path if kind else write_frames_from(root, row, Path(folder))
        clip = load_clip(path, kind or "image", FramesConfig())
    return clip.frames, clip.sector
