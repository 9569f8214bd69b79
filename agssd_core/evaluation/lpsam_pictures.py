"""A picture of LP-SAM at work: frames, what somebody drew, what was found."""

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from numpy.typing import NDArray

from agssd_core.data.pairs import LabelledFrame
from agssd_core.evaluation.delineation import Delineation
from agssd_core.evaluation.drawing import grid_of_axes, png_of, set_title

_COLOURS = colormaps["tab10"]
_OPACITY = 0.55


def draw_delineations(frames: Sequence[LabelledFrame], found: Sequence[Delineation]) -> bytes:
    """PNG with a row of frame, structures and label map for each frame.

    Structures and labels have a colour each by their own order; the number beside a label's is
    its confidence.
    """
    figure, axes = grid_of_axes(len(frames), 3)
    for row, frame, drawn in zip(axes, frames, found, strict=True):
        truth = np.zeros(frame.frame.shape, dtype=np.uint8)
        for number, structure in enumerate(frame.structures, start=1):
            truth[structure] = number
        _show(row[0], frame.frame, np.zeros_like(truth))
        _show(row[1], frame.frame, truth)
        _show(row[2], frame.frame, drawn.labels)
        sure = ", ".join(f"{number}: {value:.2f}" for number, value in drawn.confidence.items())
        set_title(row[2], f"found ({sure})" if sure else "found nothing")
        set_title(row[0], "frame")
        set_title(row[1], f"drawn by hand ({len(frame.structures)})")
    return png_of(figure)


def _show(axis: Axes, frame: NDArray[np.uint8], labels: NDArray[np.uint8]) -> None:
    axis.imshow(frame, cmap="gray", vmin=0, vmax=255)
    if labels.any():
        colours = _COLOURS((labels.astype(int) - 1) % 10)
        colours[..., 3] = np.where(labels > 0, _OPACITY, 0)
        axis.imshow(colours)
