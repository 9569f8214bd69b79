"""Who has what: scans by label, scanner, modality and side, and the sites' grey values."""

import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from agssd_core.config import FramesConfig
from agssd_core.data.clips import ClipKind, load_clip
from agssd_core.errors import DataError
from agssd_core.evaluation.drawing import grid_of_axes, png_of, set_title
from agssd_core.views.seeds import rng_for
from simulation.datasets.reading import read_volume
from simulation.datasets.reading_images import write_frames_from
from simulation.datasets.rows import Row
from simulation.partition import Placed

SAMPLED, BINS, VOXELS = 4, 48, 40_000
MOST_NAMES = 8
Progress = Callable[[int, int], None]
_WHITE = 99.5


def split_picture(
    root: Path, placed: Sequence[Placed], *, progress: Progress | None = None
) -> bytes:
    """Bars of scans for each site, and the distribution of its grey values.

    Grey values are scaled to each scan's own darkest and brightest half percent, those of at most
    four scans a site.
    """
    sites = sorted({item.site for item in placed})
    counted: dict[str, Callable[[Placed], str]] = {
        "held out or training": lambda item: item.split,
        "modality": lambda item: item.row.modality,
        "scanner": lambda item: item.row.vendor or "unknown",
    }
    labels = sorted({name for item in placed for name in item.row.labels})[:3]
    panels = len(counted) + len(labels) + 1
    columns = 2 if panels < 6 else 3
    figure, axes = grid_of_axes(-(-panels // columns), columns, cell=max(4.4, 0.16 * len(sites)))
    places = [axis for row in axes for axis in row]
    for axis, (title, kind) in zip(places, counted.items(), strict=False):
        _bars(axis, sites, placed, title, kind)
    for axis, label in zip(places[len(counted) :], labels, strict=False):
        _bars(axis, sites, placed, label, partial(_class_of, label=label))
    _greys(places[panels - 1], root, sites, placed, progress)
    for axis in places[panels:]:
        axis.set_visible(False)
    return png_of(figure)


def _class_of(item: Placed, *, label: str) -> str:
    return item.row.labels.get(label, "-")


def _bars(
    axis: Axes,
    sites: Sequence[str],
    placed: Sequence[Placed],
    title: str,
    kind: Callable[[Placed], str],
) -> None:
    totals = Counter(kind(item) for item in placed)
    names = [name for name, _ in totals.most_common(MOST_NAMES)]
    counts = {site: Counter(kind(item) for item in placed if item.site == site) for site in sites}
    below = np.zeros(len(sites))
    rows = [(name, np.array([counts[site][name] for site in sites], dtype=float)) for name in names]
    if len(totals) > len(names):
        rest = [sum(counts[site].values()) - sum(counts[site][n] for n in names) for site in sites]
        rows.append((f"{len(totals) - len(names)} others", np.array(rest, dtype=float)))
    for name, values in rows:
        axis.bar(range(len(sites)), values, bottom=below, label=name)
        below += values
    _finish(axis, f"scans by {title}")
    axis.set_xticks(range(len(sites)), sites, rotation=90 if len(sites) > 4 else 0, fontsize=7)
    axis.legend(fontsize=6, frameon=False)


def _greys(
    axis: Axes,
    root: Path,
    sites: Sequence[str],
    placed: Sequence[Placed],
    progress: Progress | None,
) -> None:
    for done, site in enumerate(sites, start=1):
        own = [item.row for item in placed if item.site == site]
        picked = rng_for(0, "picture", site).permutation(len(own))[:SAMPLED]
        values = [found for n in picked if (found := _scaled(root, own[int(n)])) is not None]
        if values:
            heights, edges = np.histogram(
                np.concatenate(values), bins=BINS, range=(0, 1), density=True
            )
            axis.plot((edges[1:] + edges[:-1]) / 2, heights, linewidth=1, label=site)
        if progress is not None:
            progress(done, len(sites))
    _finish(axis, "grey values, each scan scaled to itself")
    axis.set_yscale("log")
    if len(sites) <= 12:
        axis.legend(fontsize=6, frameon=False)


def _finish(axis: Axes, title: str) -> None:
    from matplotlib.ticker import AutoLocator

    axis.xaxis.set_major_locator(AutoLocator())
    axis.yaxis.set_major_locator(AutoLocator())
    axis.tick_params(labelsize=7)
    for side in ("left", "bottom"):
        axis.spines[side].set_visible(True)
    set_title(axis, title)


def _scaled(root: Path, row: Row) -> NDArray[np.float64] | None:
    """Some grey values of a scan in [0, 1]; None where it cannot be read."""
    try:
        values = np.asarray(_pixels(root, row), dtype=np.float64).ravel()
    except (DataError, OSError):
        return None
    values = values[:: max(1, values.size // VOXELS)]
    low, high = np.percentile(values, [100 - _WHITE, _WHITE])
    return np.asarray(np.clip((values - low) / max(high - low, 1e-9), 0, 1))


def _pixels(root: Path, row: Row) -> NDArray[np.generic]:
    if row.modality != "US":
        return read_volume(root, row).array
    kinds: dict[str, ClipKind] = {"image": "image", "video": "video", "dicom": "us-dicom"}
    if row.source.kind in kinds:
        file, kind = root / row.source.path, kinds[row.source.kind]
        return np.asarray(load_clip(file, kind, FramesConfig()).frames[0])
    with tempfile.TemporaryDirectory() as folder:
        file = write_frames_from(root, row, Path(folder))
        return np.asarray(load_clip(file, "image", FramesConfig()).frames[0])
