"""Pictures of what an ultrasound step sees: views and anatomies, the overlap, feature maps.

Numbers are computed by ``us_panels``; here they are only drawn. Frames stand as on the scanner's
screen, unless a view is flipped, which its heading then says.
"""

import colorsys

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle as Patch
from numpy.typing import NDArray

from agssd_core.evaluation.drawing import (
    FIRST,
    SECOND,
    SHARED,
    Picture,
    grid_of_axes,
    png_of,
    set_frame,
    set_title,
)
from agssd_core.evaluation.planes import Rectangle
from agssd_core.evaluation.us_panels import FramePanels, LevelPanels

_SOURCES = {
    "lpsam": "LP-SAM",
    "disk": "maps from disk",
    "superpixels": "superpixels (the fall-back without an anatomy model)",
}
# Successive ids lie far apart on the colour circle.
_GOLDEN = 0.61803398875
_NONE = (0.9, 0.91, 0.92)
_VEIL = 0.45


def draw_frame_pictures(panels: FramePanels) -> tuple[Picture, ...]:
    """All pictures of one frame."""
    return (_pair(panels), _anatomies(panels), _features(panels), _overlap(panels))


def sources_in_words(label_source: str) -> str:
    """Who drew the label maps, such as ``LP-SAM`` for ``lpsam``."""
    return " and ".join(_SOURCES.get(part, part) for part in label_source.split("+"))


def label_colours(labels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Colour a label map: every id has its own colour, 0 is pale grey; (..., 3) in [0, 1]."""
    table = [_NONE] + [
        colorsys.hsv_to_rgb((number * _GOLDEN) % 1, 0.75 - 0.25 * (number % 2), 0.95)
        for number in range(1, 256)
    ]
    return np.asarray(table)[labels]


def _pair(panels: FramePanels) -> Picture:
    figure, axes = grid_of_axes(2, 3)
    for row, show in enumerate((_grey, _veiled)):
        show(axes[row][0], panels.frame, panels.labels)
        for box, colour in zip(panels.boxes, (FIRST, SECOND), strict=True):
            _outline(axes[row][0], box, colour, width=2.0)
        if panels.shared is not None:
            _outline(axes[row][0], panels.shared, SHARED, width=1.6, dashed=True)
        for view, colour in enumerate((FIRST, SECOND)):
            axis = axes[row][view + 1]
            show(axis, panels.views[view], panels.view_labels[view])
            set_frame(axis, colour)
            _outline_shared(axis, panels, view)
            set_title(axis, _view_title(panels, view) if row == 0 else "anatomies")
    set_title(axes[0][0], "frame")
    set_title(axes[1][0], "anatomies")
    return Picture(
        "pair",
        "Two views and their anatomies",
        "Above, the frame with both views (blue, orange) and what they share (yellow), then each "
        f"view as step {panels.step} sees it. Below, the same with the anatomies laid over in "
        f"colour; labels by {sources_in_words(panels.label_source)}. {_share(panels)}",
        png_of(figure),
    )


def _overlap(panels: FramePanels) -> Picture:
    figure, axes = grid_of_axes(1, 3)
    _grey(axes[0][0], panels.clean, panels.overlap_labels)
    _grey(axes[0][1], panels.damaged, panels.overlap_labels)
    axes[0][2].imshow(label_colours(panels.overlap_labels), interpolation="nearest")
    headings = ("clean, from view 2", "damaged, from view 1", "its anatomies")
    for axis, heading in zip(axes[0], headings, strict=True):
        set_title(axis, heading)
    what = (
        "What both views show, un-flipped and stretched to a square"
        if panels.valid
        else "The views overlap too little, so this row is left out of core-region prediction"
    )
    return Picture(
        "overlap",
        "Core region",
        f"{what}: the teacher's clean input, the student's damaged one (shuffled blocks, changed "
        "intensities, boxes of noise), and the anatomies whose features the student predicts.",
        png_of(figure),
    )


def _features(panels: FramePanels) -> Picture:
    figure, axes = grid_of_axes(2, 1 + 2 * len(panels.levels), cell=1.9)
    for view, colour in enumerate((FIRST, SECOND)):
        _grey(axes[view][0], panels.views[view], panels.view_labels[view])
        set_frame(axes[view][0], colour)
        _outline_shared(axes[view][0], panels, view)
        set_title(axes[view][0], _view_title(panels, view))
        place = 1
        for name, level in zip(("p2", "p3"), panels.levels, strict=True):
            for whose, found in (("student", level.student), ("teacher", level.teacher)):
                axis = axes[view][place]
                axis.imshow(found[view], interpolation="nearest", extent=_extent(panels))
                _outline_shared(axis, panels, view, colour="#111111")
                set_title(axis, f"{whose}'s {name}")
                place += 1
    held = ", ".join(f"{100 * level.variance_held:.0f} %" for level in panels.levels)
    return Picture(
        "features",
        "Feature pyramid",
        "Maps p2 and p3 of student and teacher on the two views, coloured by the first three "
        "principal components, fitted for each map once over both networks and both views: equal "
        f"colours are equal features. They hold {held} of the variance.",
        png_of(figure),
    )


def _anatomies(panels: FramePanels) -> Picture:
    figure, axes = grid_of_axes(2, 4)
    level = panels.levels[0]
    for view in range(2):
        axes[view][0].imshow(
            label_colours(panels.view_labels[view]), interpolation="nearest", extent=_extent(panels)
        )
        set_title(axes[view][0], f"anatomies, {_view_title(panels, view)}")
        axes[view][1].imshow(level.teacher[view], interpolation="nearest", extent=_extent(panels))
        set_title(axes[view][1], "teacher's p2")
        pooled = np.where(np.isnan(level.pooled[view]), _NONE, level.pooled[view])
        axes[view][2].imshow(pooled, interpolation="nearest", extent=_extent(panels))
        set_title(axes[view][2], "mean of each anatomy")
        _cosines(axes[view][3], level.cosine[view], _extent(panels))
        set_title(axes[view][3], "cosine with that mean")
    return Picture(
        "anatomies",
        "Anatomies in feature space",
        "The label map, the teacher's p2, each anatomy in the mean colour of its cells over both "
        "views, and for each cell the cosine with the mean of its anatomy (black 0 or less, white "
        f"1; the mean of all cells is taken off first). {_apart(level)} "
        f"Labels by {sources_in_words(panels.label_source)}.",
        png_of(figure),
    )


def _apart(level: LevelPanels) -> str:
    if np.isnan(level.own):
        return "No cell belongs to an anatomy."
    if np.isnan(level.other):
        return f"On average it is {level.own:.2f}; there is no other anatomy to compare with."
    return (
        f"On average it is {level.own:.2f}, and {level.other:.2f} with other anatomies: the "
        "further apart, the better they are told apart."
    )


def _share(panels: FramePanels) -> str:
    share = f"{100 * panels.overlap:.0f} % of the smaller view is shared"
    return f"{share}." if panels.valid else f"{share}, too little to be used."


def _view_title(panels: FramePanels, view: int) -> str:
    return f"view {view + 1}{', flipped' if panels.flipped[view] else ''}"


def _extent(panels: FramePanels) -> tuple[float, float, float, float]:
    """Left, right, bottom, top, so that coarse maps share the views' pixels."""
    side = panels.views[0].shape[0]
    return (0.0, float(side), float(side), 0.0)


def _grey(axis: Axes, image: NDArray[np.generic], labels: NDArray[np.uint8]) -> None:
    """An image in [0, 1] or of grey levels; ``labels`` only fixes its size."""
    white = 255 if image.dtype == np.uint8 else 1
    rows, columns = labels.shape
    axis.imshow(
        image,
        cmap="gray",
        vmin=0,
        vmax=white,
        extent=(0, columns, rows, 0),
        interpolation="nearest",
    )


def _veiled(axis: Axes, image: NDArray[np.generic], labels: NDArray[np.uint8]) -> None:
    """The image with its anatomies in colour over it."""
    grey = np.asarray(image, dtype=np.float64) / (255 if image.dtype == np.uint8 else 1)
    colours = label_colours(labels)
    mixed = (1 - _VEIL) * grey[..., None] + _VEIL * colours
    rows, columns = labels.shape
    axis.imshow(
        np.where((labels > 0)[..., None], mixed, grey[..., None]),
        extent=(0, columns, rows, 0),
        interpolation="nearest",
    )


def _cosines(
    axis: Axes, cosine: NDArray[np.float64], extent: tuple[float, float, float, float]
) -> None:
    palette = colormaps["magma"].with_extremes(bad=_NONE)
    axis.imshow(cosine, cmap=palette, vmin=0, vmax=1, interpolation="nearest", extent=extent)


def _outline_shared(axis: Axes, panels: FramePanels, view: int, *, colour: str = SHARED) -> None:
    if panels.shared_in_view is not None:
        _outline(axis, panels.shared_in_view[view], colour, width=1.6, dashed=True)


def _outline(
    axis: Axes, box: Rectangle, colour: str, *, width: float, dashed: bool = False
) -> None:
    style = "--" if dashed else "-"
    axis.add_patch(
        Patch(box.start, *box.size, fill=False, edgecolor=colour, linewidth=width, linestyle=style)
    )
