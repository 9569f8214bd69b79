"""What the pictures of both cohorts share: a grid of axes without ticks, and PNG bytes.

Drawn with matplotlib's Agg canvas and no global state.
"""

import io
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

FIRST, SECOND, SHARED = "#0072b2", "#d55e00", "#ffd400"
_DPI = 100
_CELL_INCHES = 2.35
_INK = "#16202b"


@dataclass(frozen=True)
class Picture:
    """One picture: a short file-name part, a heading, what it shows in words, PNG bytes."""

    name: str
    title: str
    text: str
    png: bytes


def grid_of_axes(
    rows: int, columns: int, *, cell: float = _CELL_INCHES
) -> tuple[Figure, list[list[Axes]]]:
    """A figure and its axes, row by row; ``cell`` is the width of one, inches."""
    figure = Figure(
        figsize=(columns * cell, rows * cell * 1.1),
        dpi=_DPI,
        layout="constrained",
        facecolor="white",
    )
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        for spine in axis.spines.values():
            spine.set_visible(False)
    return figure, [list(row) for row in axes]


def set_title(axis: Axes, text: str) -> None:
    """A heading over one of the axes."""
    axis.set_title(text, fontsize=9, color=_INK)


def set_frame(axis: Axes, colour: str) -> None:
    """A coloured frame round one of the axes."""
    for spine in axis.spines.values():
        spine.set(visible=True, color=colour, linewidth=2.5)


def png_of(figure: Figure) -> bytes:
    """The figure's PNG file; the same figure gives the same bytes."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", metadata={"Software": None})
    return stream.getvalue()
