"""Pictures of what a step sees: crop pairs, edges and masks, reconstruction, token colours.

Numbers are computed by ``panels``; here they are only drawn, with matplotlib's Agg canvas and no
global state. Planes are shown as radiologists are used to: the patient's right on the left of the
picture, anterior up, unless a view is flipped, which its heading then says.
"""

from collections.abc import Sequence

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
from agssd_core.evaluation.panels import VolumePanels
from agssd_core.evaluation.planes import Rectangle

LOCAL, HIDDEN = "#009e73", "#cc79a7"
# Errors this large or larger are drawn white.
_WHITE_ERROR = 0.3


def draw_pictures(panels: VolumePanels) -> tuple[Picture, ...]:
    """All pictures of one volume."""
    return (_pair(panels), _masks(panels), _reconstruction(panels), _colours(panels))


def _pair(panels: VolumePanels) -> Picture:
    figure, axes = grid_of_axes(1, 3)
    plane = panels.plane
    spacing = panels.spacing_mm
    _show(axes[0][0], panels.volume_plane, aspect=spacing[1] / spacing[0])
    for box in panels.local_boxes:
        _outline(axes[0][0], box, LOCAL, width=1.0)
    for box, colour in zip(plane.boxes, (FIRST, SECOND), strict=True):
        _outline(axes[0][0], box, colour, width=2.0)
    if plane.shared is not None:
        _fill(axes[0][0], plane.shared)
    set_title(axes[0][0], "volume")
    for view, colour in enumerate((FIRST, SECOND)):
        _view(axes[0][view + 1], panels, view, panels.clean[view], colour=colour)
    share = f"{100 * panels.overlap:.0f} % of the smaller global crop is shared"
    return Picture(
        "pair",
        "Crop pair",
        "One plane of the volume with the two global crops (blue, orange), their overlap (yellow) "
        "and the local crops that it cuts (green); then the same plane of each crop with the same "
        f"overlap drawn. {share}.",
        png_of(figure),
    )


def _masks(panels: VolumePanels) -> Picture:
    figure, axes = grid_of_axes(2, 3)
    for view in range(2):
        _view(axes[view][0], panels, view, panels.clean[view])
        _show(axes[view][1], panels.edges[view], colours="magma")
        set_title(axes[view][1], "edge strength")
        _show(axes[view][2], panels.seen[view])
        _veil(axes[view][2], panels.hidden[view], panels.seen[view].shape)
        set_title(
            axes[view][2], f"hidden tokens ({100 * panels.hidden_share[view]:.0f} % of the view)"
        )
    return Picture(
        "mask",
        "Edges and mask",
        f"For each view: the clean crop, its edge strength, and the student's input of step "
        f"{panels.step} with the tokens that this step hides veiled in pink. The preference for "
        f"edges (alpha) was {panels.alpha:.2g}.",
        png_of(figure),
    )


def _reconstruction(panels: VolumePanels) -> Picture:
    figure, axes = grid_of_axes(2, 4)
    headings = ("student's input", "prediction", "target", "error at hidden tokens")
    for view in range(2):
        hidden = panels.hidden[view]
        _show(axes[view][0], panels.seen[view])
        _veil(axes[view][0], hidden, panels.seen[view].shape, opacity=1.0)
        _show(axes[view][1], panels.prediction[view])
        _veil(axes[view][1], hidden, panels.seen[view].shape, opacity=0.0)
        _show(axes[view][2], panels.clean[view])
        _show(axes[view][3], panels.error[view], colours="magma", white=_WHITE_ERROR)
        for axis, heading in zip(axes[view], headings, strict=True):
            set_title(axis, heading)
    return Picture(
        "reconstruction",
        "Reconstruction",
        "For each view: the input without its hidden tokens (pink), the clean crop with the "
        "prediction set in at hidden tokens (outlined), the clean target, and the absolute error "
        "at hidden tokens, white from 0.3 up. Masked L1 over the whole crop: "
        f"{panels.masked_l1[0]:.3g} and {panels.masked_l1[1]:.3g}.",
        png_of(figure),
    )


def _colours(panels: VolumePanels) -> Picture:
    figure, axes = grid_of_axes(2, 3)
    for view in range(2):
        _view(axes[view][0], panels, view, panels.clean[view])
        for column, (heading, colours) in enumerate(
            (("student's tokens", panels.student), ("teacher's tokens", panels.teacher)), start=1
        ):
            axis = axes[view][column]
            _show(axis, colours[view], extent=panels.clean[view].shape)
            if panels.plane.shared_in_view is not None:
                _outline(axis, panels.plane.shared_in_view[view], "#111111", width=1.4)
            set_title(axis, heading)
    return Picture(
        "tokens",
        "Patch tokens",
        "Patch tokens of student and teacher on the same unmasked views, coloured by the first "
        "three principal components, fitted once over both networks and both views: equal colours "
        f"are equal features. They hold {100 * panels.variance_held:.0f} % of the variance.",
        png_of(figure),
    )


def _view(
    axis: Axes, panels: VolumePanels, view: int, image: NDArray[np.float64], *, colour: str = ""
) -> None:
    """A view's plane with the overlap that it shares with the other view."""
    _show(axis, image)
    shared = panels.plane.shared_in_view
    if shared is not None and colour:
        _fill(axis, shared[view])
    elif shared is not None:
        _outline(axis, shared[view], SHARED, width=1.4)
    if colour:
        set_frame(axis, colour)
    flipped = ", flipped" if panels.plane.flipped[view] else ""
    set_title(axis, f"view {view + 1}{flipped}")


def _show(
    axis: Axes,
    plane: NDArray[np.float64],
    *,
    colours: str = "gray",
    white: float = 1.0,
    aspect: float = 1.0,
    extent: Sequence[int] | None = None,
) -> None:
    """Draw a (depth, height) or (depth, height, 3) plane; 0 is black, NaN pale grey."""
    depth, height = (extent or plane.shape)[:2]
    image = plane.swapaxes(0, 1)
    palette = colormaps[colours].with_extremes(bad="#e6e8eb")
    # Depth runs to the patient's right, which radiologists expect on the left.
    axis.imshow(
        image,
        cmap=palette,
        vmin=0,
        vmax=white,
        origin="lower",
        extent=(0, depth, 0, height),
        interpolation="nearest",
        aspect=aspect,
    )
    axis.set_xlim(depth, 0)


def _outline(axis: Axes, box: Rectangle, colour: str, *, width: float) -> None:
    axis.add_patch(
        Patch(box.start, *box.size, fill=False, edgecolor=colour, linewidth=width, clip_on=False)
    )


def _fill(axis: Axes, box: Rectangle) -> None:
    axis.add_patch(Patch(box.start, *box.size, facecolor=SHARED, alpha=0.12, linewidth=0))
    axis.add_patch(
        Patch(box.start, *box.size, fill=False, edgecolor=SHARED, linewidth=1.6, linestyle="--")
    )


def _veil(
    axis: Axes, hidden: NDArray[np.bool_], extent: Sequence[int], *, opacity: float = 0.62
) -> None:
    """Cover hidden tokens; ``hidden`` is the token layer (g, g) that the plane cuts."""
    pitch = (extent[0] / hidden.shape[0], extent[1] / hidden.shape[1])
    edge = "white" if opacity else HIDDEN
    for d, h in np.argwhere(hidden):
        corner = (d * pitch[0], h * pitch[1])
        if opacity:
            axis.add_patch(Patch(corner, *pitch, facecolor=HIDDEN, alpha=opacity, linewidth=0))
        axis.add_patch(Patch(corner, *pitch, fill=False, edgecolor=edge, linewidth=0.6))
