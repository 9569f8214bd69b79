"""Predictions of held-out scans beside the truth."""

from typing import cast

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from agssd_core.config.tasks import TaskConfig
from agssd_core.evaluation.drawing import FIRST, SECOND, grid_of_axes, png_of, set_frame, set_title
from agssd_core.evaluation.finetune_predict import Predictor
from agssd_core.evaluation.labelled import LabelledArrays, LabelledScan, LabelledSet
from agssd_core.evaluation.tasks import structure_count, task_mask

SHOWN = 6
_COLOURS = "tab10"
Plane = NDArray[np.float32]
Labels = NDArray[np.uint8]


def draw_predictions(
    predictor: Predictor, scans: LabelledSet, task: TaskConfig, classes: tuple[str, ...]
) -> bytes:
    """PNG bytes: for each of a few held-out scans the image, what is true and what was predicted.

    Of a volume the axial slice is shown that holds most of the truth.

    Args:
        predictor: of the fine-tuned network.
        scans: held-out ones of the task; those shown are spread over them.
        task: what was asked.
        classes: of a classification.
    """
    places = np.linspace(0, len(scans) - 1, min(SHOWN, len(scans))).round().astype(int)
    chosen = [scans.scans[int(place)] for place in dict.fromkeys(places.tolist())]
    columns = 3 if task.kind == "segmentation" else 1
    figure, axes = grid_of_axes(len(chosen), columns)
    for row, scan in zip(axes, chosen, strict=True):
        if task.kind == "segmentation":
            _draw_structures(row, scan.load(), predictor, task)
        else:
            _draw_class(row[0], scan, predictor, task, classes)
    return png_of(figure)


def _draw_structures(
    axes: list[Axes], arrays: LabelledArrays, predictor: Predictor, task: TaskConfig
) -> None:
    truth = task_mask(cast(Labels, arrays.mask), task)
    found = predictor.segment(arrays.image).argmax(0).astype(np.uint8)
    level = _level(truth)
    image = _plane(arrays.image, level)
    layers = (None, _plane(truth, level), _plane(found, level))
    for axis, layer, title in zip(axes, layers, ("image", "truth", "predicted"), strict=True):
        axis.imshow(image, cmap="gray", vmin=0, vmax=1)
        if layer is not None:
            shown = np.ma.masked_equal(layer - 1.0, -1.0)
            top = max(9, structure_count(task) - 1)
            axis.imshow(shown, cmap=_COLOURS, vmin=0, vmax=top, alpha=0.55, interpolation="nearest")
        set_title(axis, title)


def _draw_class(
    axis: Axes,
    scan: LabelledScan,
    predictor: Predictor,
    task: TaskConfig,
    classes: tuple[str, ...],
) -> None:
    arrays = scan.load()
    shares = predictor.classify(arrays.image, arrays.inside)
    best, truth = classes[int(shares.argmax())], scan.labels[task.label]
    axis.imshow(_plane(arrays.image, _level(arrays.inside)), cmap="gray", vmin=0, vmax=1)
    set_frame(axis, FIRST if best == truth else SECOND)
    set_title(axis, f"{truth}; predicted {best} ({shares.max():.0%})")


def _level(truth: NDArray[np.generic]) -> int | None:
    """The axial slice with most of the truth; None of a frame."""
    if truth.ndim == 2:
        return None
    return int(np.count_nonzero(truth, axis=(0, 1)).argmax())


def _plane(array: NDArray[np.generic], level: int | None) -> Plane:
    """Of a volume in RAS order an axial slice with the front of the body above."""
    plane = array if level is None else array[:, :, level].T[::-1]
    return np.asarray(plane, dtype=np.float32)
