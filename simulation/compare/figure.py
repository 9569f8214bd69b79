"""One picture of a comparison: a panel for each question, a mark for each seed."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from agssd_core.config import RunConfig
from agssd_core.evaluation.drawing import grid_of_axes, png_of, set_title
from agssd_core.evaluation.interval import mean_interval
from agssd_core.weights import write_bytes
from simulation.compare.judge import CONTROLS
from simulation.compare.results import Result
from simulation.compare.summary import Summary, summarise

COLOURS = {
    "federated": "#0072b2",
    "pooled": "#009e73",
    "alone": "#d55e00",
    "random": "#7f7f7f",
}
_OTHER = "#56b4e9"
_DASHES = {"position": ":", "intensity": "--"}
_PER_ROW = 3


def draw_comparison(file: Path, results: Sequence[Result], settings: RunConfig) -> None:
    """Write the picture: probes as marks, fine-tuning as lines over the share of labels."""
    summaries = summarise(results, settings)
    probes = [one for one in summaries if one.question[1] != "finetune"]
    tuned: dict[str, list[Summary]] = {}
    for one in summaries:
        if one.question[1] == "finetune":
            tuned.setdefault(one.question[0], []).append(one)
    count = max(1, len(probes) + len(tuned))
    columns = min(_PER_ROW, count)
    figure, axes = grid_of_axes(-(-count // columns), columns, cell=4.2)
    places = [axis for row in axes for axis in row]
    for axis, summary in zip(places, probes, strict=False):
        _draw_probe(axis, summary)
    for axis, task in zip(places[len(probes) :], tuned, strict=False):
        _draw_fractions(axis, task, tuned[task])
    write_bytes(file, png_of(figure))


def _draw_probe(axis: Axes, summary: Summary) -> None:
    names = [name for name in summary.columns if name not in CONTROLS]
    for place, name in enumerate(names):
        values = list(summary.columns[name].metrics.get(summary.main, {}).values())
        if not values:
            continue
        colour = COLOURS.get(name, _OTHER)
        interval = mean_interval(values)
        half = (interval.high - interval.low) / 2 if interval.count > 1 else 0.0
        axis.errorbar(
            place, interval.mean, yerr=half, fmt="_", color=colour, markersize=22, capsize=4
        )
        spread = place + 0.08 * (np.arange(len(values)) - (len(values) - 1) / 2)
        axis.plot(spread, values, "o", color=colour, markersize=4, alpha=0.8)
    for name in CONTROLS:
        values = list(summary.columns[name].metrics.get(summary.main, {}).values())
        if values:
            mean = sum(values) / len(values)
            axis.axhline(mean, color="#444444", linestyle=_DASHES[name], linewidth=1, label=name)
    axis.set_xlim(-0.6, len(names) - 0.4)
    axis.set_xticks(range(len(names)), names, fontsize=8, rotation=0 if len(names) < 6 else 60)
    _finish(axis, summary.main)
    axis.legend(fontsize=7, frameon=False)
    told = "" if summary.informative else "\nnot informative"
    set_title(axis, f"{summary.title}{told}")


def _draw_fractions(axis: Axes, task: str, summaries: Sequence[Summary]) -> None:
    names = dict.fromkeys(name for summary in summaries for name in summary.columns)
    for name in names:
        points = []
        for summary in summaries:
            values = summary.columns[name].metrics.get(summary.main, {})
            if values:
                interval = mean_interval(list(values.values()))
                half = (interval.high - interval.low) / 2 if interval.count > 1 else 0.0
                points.append((summary.question[2] * 100, interval.mean, half))
        table = np.array(points).reshape(-1, 3)
        colour = COLOURS.get(name, _OTHER)
        at, means, halves = table.T
        axis.errorbar(at, means, yerr=halves, fmt="o-", color=colour, label=name, capsize=3)
    axis.set_xscale("log")
    shares = sorted({summary.question[2] * 100 for summary in summaries})
    axis.set_xticks(shares, [f"{share:g} %" for share in shares], fontsize=8)
    axis.minorticks_off()
    _finish(axis, summaries[0].main)
    axis.set_xlabel("labelled training patients", fontsize=8)
    axis.legend(fontsize=7, frameon=False)
    set_title(axis, f"{task}, fine-tuned")


def _finish(axis: Axes, metric: str) -> None:
    axis.set_ylabel(metric.replace("_", " "), fontsize=8)
    axis.yaxis.set_major_locator(MaxNLocator(6))
    axis.tick_params(labelsize=8)
    for side in ("left", "bottom"):
        axis.spines[side].set_visible(True)
