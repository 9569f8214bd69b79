"""Who has what: patients and scans by side, modality, scanner and label, and the grey values."""

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from agssd_core.evaluation.drawing import png_of, set_title
from simulation.partition import Placed
from simulation.split_greys import RANGES, site_greys

MOST_SITES, MOST_NAMES, MOST_LABELS = 60, 8, 2
Progress = Callable[[int, int], None]
Kind = Callable[[Placed], str]
# Okabe and Ito's colours, told apart by colour-blind readers too; grey is for the rest.
COLOURS = (
    *("#0072b2", "#e69f00", "#009e73", "#cc79a7"),
    *("#56b4e9", "#d55e00", "#f0e442", "#444444"),
)
REST = "#bbbbbb"
_PANEL_INCHES, _ROW_INCHES, _LEAST_INCHES = 2.7, 0.2, 2.2


def split_picture(
    root: Path, placed: Sequence[Placed], *, label: str = "", progress: Progress | None = None
) -> bytes:
    """One line a site: bars of patients above, of scans below, and its grey values beside them.

    A patient whose scans differ counts where most of them are. Of more than 60 sites those with
    the most scans are drawn.

    Args:
        root: of the data set.
        placed: its scans.
        label: shown first; by default the first by name. Two are shown.
        progress: told (sites whose grey values were read, sites in all).

    Returns:
        A PNG file; the same division gives the same bytes.
    """
    sites, more = _shown(placed)
    kinds = _kinds(placed, label)
    greys = site_greys(root, placed, sites, progress=progress)
    columns = len(kinds) + len(greys)
    high = 2 * max(_LEAST_INCHES, len(sites) * _ROW_INCHES + 1.0)
    figure = Figure(
        figsize=(columns * _PANEL_INCHES + 1.2, high),
        dpi=100,
        layout="constrained",
        facecolor="white",
    )
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, columns)
    for column, (title, kind) in enumerate(kinds.items()):
        names = _names(placed, kind)
        for line, what in enumerate(("patients", "scans")):
            axis = figure.add_subplot(grid[line, column])
            _bars(axis, _counts(placed, sites, kind, patients=line == 0), names)
            _finish(axis, sites if column == 0 else [""] * len(sites), f"{what} by {title}")
            if line == 1:
                axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, fontsize=7,
                            frameon=False)  # fmt: skip
    for column, (modality, found) in enumerate(greys.items(), start=len(kinds)):
        axis = figure.add_subplot(grid[:, column])
        _ridges(axis, [found.get(site) for site in sites], RANGES[modality].limits)
        _finish(axis, sites, RANGES[modality].title)
    if more:
        figure.suptitle(f"the {len(sites)} sites with the most scans; {more} more are not shown")
    return png_of(figure)


def _shown(placed: Sequence[Placed]) -> tuple[list[str], int]:
    sizes = Counter(item.site for item in placed)
    largest = sorted(sizes, key=lambda site: (-sizes[site], site))[:MOST_SITES]
    return sorted(largest, key=_in_numbers), len(sizes) - len(largest)


def _in_numbers(site: str) -> list[tuple[int, str]]:
    """``centre-2`` before ``centre-10``."""
    parts = re.findall(r"\d+|\D+", site)
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in parts]


def _kinds(placed: Sequence[Placed], first: str) -> dict[str, Kind]:
    labels = sorted({name for item in placed for name in item.row.labels})
    labels.sort(key=lambda name: name != first)
    return {
        "side": lambda item: "held out" if item.split == "test" else "training",
        "modality": lambda item: item.row.modality,
        "scanner": lambda item: item.row.vendor or "unknown",
        **{name: partial(_class_of, label=name) for name in labels[:MOST_LABELS]},
    }


def _class_of(item: Placed, *, label: str) -> str:
    return item.row.labels.get(label, "not said")


def _names(placed: Sequence[Placed], kind: Kind) -> list[str]:
    """The most frequent kinds in the order of their names, so that colours stay."""
    totals = Counter(kind(item) for item in placed)
    return sorted(sorted(totals, key=lambda name: (-totals[name], name))[:MOST_NAMES])


def _counts(
    placed: Sequence[Placed], sites: Sequence[str], kind: Kind, *, patients: bool
) -> list[Counter[str]]:
    found: dict[str, dict[str, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    for item in placed:
        found[item.site][item.row.patient if patients else item.row.scan][kind(item)] += 1
    return [Counter(_most(own) for own in found[site].values()) for site in sites]


def _most(own: Mapping[str, int]) -> str:
    return max(sorted(own), key=lambda name: own[name])


def _bars(axis: Axes, counts: Sequence[Counter[str]], names: Sequence[str]) -> None:
    places, left = np.arange(len(counts)), np.zeros(len(counts))
    rows = [(name, [own[name] for own in counts]) for name in names]
    rest = [own.total() - sum(own[name] for name in names) for own in counts]
    rows += [("others", rest)] if any(rest) else []
    for (name, values), colour in zip(rows, (*COLOURS[: len(names)], REST), strict=False):
        axis.barh(places, values, left=left, color=colour, label=name, height=0.75)
        left += np.asarray(values)
    for place, total in zip(places, left, strict=True):
        axis.text(total, float(place), f" {int(total)}", fontsize=6, va="center")
    axis.set_xlim(0, max(left.max(initial=1) * 1.15, 1))
    axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))


def _ridges(
    axis: Axes, heights: Sequence[NDArray[np.float64] | None], limits: tuple[float, float]
) -> None:
    """A histogram a site on a line of its own, each scaled to its highest bin."""
    for place, values in enumerate(heights):
        axis.axhline(place + 0.4, color=REST, linewidth=0.5)
        if values is not None:
            edges = np.linspace(*limits, len(values) + 1)
            top = place + 0.4 - 0.8 * values / max(float(values.max()), 1e-12)
            axis.fill_between(edges, np.append(top, top[-1]), place + 0.4, step="post",
                              color=COLOURS[0], linewidth=0)  # fmt: skip
    axis.set_xlim(*limits)


def _finish(axis: Axes, sites: Sequence[str], title: str) -> None:
    axis.set_yticks(range(len(sites)), sites, fontsize=7)
    axis.set_ylim(len(sites) - 0.5, -0.5)
    axis.tick_params(axis="y", length=0)
    axis.tick_params(axis="x", labelsize=7)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    set_title(axis, title)
