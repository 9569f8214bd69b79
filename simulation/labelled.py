"""Labelled scans of public data sets, prepared exactly as pre-training prepares scans."""

from collections.abc import Callable, Sequence
from pathlib import Path

from agssd_core.config import DataConfig
from agssd_core.evaluation import labelled_scans
from agssd_core.evaluation.labelled import LabelledSet
from simulation.partition import Placed
from simulation.row_source import RowSource

Progress = Callable[[int, int], None]


def row_sources(root: Path, placed: Sequence[Placed]) -> list[RowSource]:
    """Rows of a data set below ``root``, with site and side of the split."""
    return [RowSource(root, one.row, one.site, one.split) for one in placed]


def write_labelled(
    root: Path,
    placed: Sequence[Placed],
    data: DataConfig,
    folder: Path,
    *,
    progress: Progress | None = None,
) -> LabelledSet:
    """Prepare a data set's scans (see ``agssd_core.evaluation.labelled_scans.write_labelled``)."""
    sources = row_sources(root, placed)
    return labelled_scans.write_labelled(sources, data, folder, progress=progress)
