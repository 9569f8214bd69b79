"""One picture of what privacy costs: quality over epsilon, a panel for each question."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from agssd_core.config import RunConfig
from agssd_core.evaluation.drawing import grid_of_axes, png_of, set_title
from agssd_core.evaluation.interval import mean_interval
from agssd_core.weights import write_bytes
from simulation.compare.judge import CONTROLS
from simulation.compare.private import CONTINUED, LEVELS, SCRATCH, SOURCES, name_of
from simulation.compare.private_table import UNTRAINED
from simulation.compare.results import Result
from simulation.compare.summary import Summary, summarise

_COLOURS = {SCRATCH: "#d55e00", CONTINUED: "#0072b2"}
_DASHES = {"position": ":", "intensity": "-."}
_GREY = "#7f7f7f"
_PER_ROW = 3


def draw_privacy(file: Path, results: Sequence[Result], settings: RunConfig) -> None:
    """Write the picture: marks for seeds, a line for the mean of each level and source."""
    summaries = [one for one in summarise(results, settings) if one.question[1] != "finetune"]
    columns = min(_PER_ROW, max(1, len(summaries)))
    figure, axes = grid_of_axes(-(-max(1, len(summaries)) // columns), columns, cell=4.2)
    places = [axis for row in axes for axis in row]
    for axis, summary in zip(places, summaries, strict=False):
        _draw(axis, summary)
    write_bytes(file, png_of(figure))


def _draw(axis: Axes, summary: Summary) -> None:
    for source in SOURCES:
        colour, shift = _COLOURS[source], 0.08 if source == CONTINUED else -0.08
        means = []
        for place, level in enumerate(LEVELS):
            own = summary.columns.get(name_of(level, source))
            values = [] if own is None else list(own.metrics.get(summary.main, {}).values())
            if values:
                interval = mean_interval(values)
                half = (interval.high - interval.low) / 2 if interval.count > 1 else 0.0
                means.append((place + shift, interval.mean, half))
                axis.plot([place + shift] * len(values), values, "o", color=colour, markersize=3)
        if means:
            at, middle, halves = zip(*means, strict=True)
            axis.errorbar(at, middle, yerr=halves, fmt="_-", color=colour, label=source, capsize=3)
        _level(axis, summary, UNTRAINED[source], colour, "--")
    for name in CONTROLS:
        _level(axis, summary, name, _GREY, _DASHES[name])
    # Every main metric lies from 0 to 1; of few seeds the interval may not.
    low, high = axis.get_ylim()
    axis.set_ylim(max(low, -0.02), min(high, 1.02))
    axis.set_xticks(range(len(LEVELS)), LEVELS, fontsize=7, rotation=30)
    axis.set_ylabel(summary.main.replace("_", " "), fontsize=8)
    axis.yaxis.set_major_locator(MaxNLocator(6))
    axis.tick_params(labelsize=8)
    for side in ("left", "bottom"):
        axis.spines[side].set_visible(True)
    axis.legend(fontsize=6, frameon=False)
    set_title(axis, summary.title + ("" if summary.informative else "\nnot informative"))


def _level(axis: Axes, summary: Summary, name: str, colour: str, dashes: str) -> None:
    own = summary.columns.get(name)
    values = [] if own is None else list(own.metrics.get(summary.main, {}).values())
    if values:
        mean = sum(values) / len(values)
        axis.axhline(mean, color=colour, linestyle=dashes, linewidth=1, label=name)
