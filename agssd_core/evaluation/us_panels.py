"""The numbers behind the ultrasound pictures: what one step of ANAUS sees of a few frames.

Views, overlaps and label maps are those of that very step, by the function that the step calls
and the same seeds. The networks are as they are now and run as in training: over the whole batch,
with its own statistics.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from agssd_core.config import AnausConfig
from agssd_core.evaluation.features import joint_colours
from agssd_core.evaluation.panels import StepOfRun
from agssd_core.evaluation.planes import Rectangle
from agssd_core.models.anaus import AnausNetwork, AnausPair
from agssd_core.views.regions import RegionScale, present_ids, region_pyramid
from agssd_core.views.us_batch import FrameReader, UsBatch, make_us_batch

FloatArray = NDArray[np.float64]
Grey = NDArray[np.uint8]
# p2, the finest map, and p3 with half as many cells a side.
LEVELS = (0, 1)


class LabelledFrames(FrameReader, Protocol):
    """A site's frames that know who drew their label maps; ``data.frames.SiteFrames`` does."""

    @property
    def label_source(self) -> str:
        """Such as ``lpsam`` or ``disk+superpixels``."""
        ...


@dataclass(frozen=True)
class LevelPanels:
    """One level of the pyramid, pairs are (view 1, view 2), maps (s, s).

    Attributes:
        student, teacher: (s, s, 3) colours, fitted once over both networks and both views.
        variance_held: by the three components.
        pooled: (s, s, 3), mean colour of each anatomy over both of the teacher's views, NaN where
            there is no anatomy.
        cosine: of each of the teacher's cells with the mean of its anatomy over both views, after
            the mean of all cells is taken off; NaN where there is no anatomy.
        own, other: mean cosine of cells with their own anatomy's mean, and with those of the other
            anatomies; NaN where there is none.
    """

    student: tuple[FloatArray, FloatArray]
    teacher: tuple[FloatArray, FloatArray]
    variance_held: float
    pooled: tuple[FloatArray, FloatArray]
    cosine: tuple[FloatArray, FloatArray]
    own: float
    other: float


@dataclass(frozen=True)
class FramePanels:
    """What is drawn of one frame; pairs are (view 1, view 2), rectangles (left, top) based.

    Attributes:
        frame_index: of the site's frames. step: global.
        label_source: who drew the label maps.
        frame, labels: (H, W). boxes: of both views on it. shared: what both show, or None.
        overlap: share of the smaller view. valid: whether it is large enough to be used.
        flipped: whether a view runs from right to left.
        views, view_labels: (S, S). shared_in_view: the overlap in each, None without one.
        clean, damaged, overlap_labels: (S, S), the teacher's and the student's overlap.
        levels: of p2 and p3.
    """

    frame_index: int
    step: int
    label_source: str
    frame: Grey
    labels: Grey
    boxes: tuple[Rectangle, Rectangle]
    shared: Rectangle | None
    overlap: float
    valid: bool
    flipped: tuple[bool, bool]
    views: tuple[FloatArray, FloatArray]
    view_labels: tuple[Grey, Grey]
    shared_in_view: tuple[Rectangle, Rectangle] | None
    clean: FloatArray
    damaged: FloatArray
    overlap_labels: Grey
    levels: tuple[LevelPanels, ...]


def frame_panels(
    pair: AnausPair, frames: LabelledFrames, *, anaus: AnausConfig, at: StepOfRun, count: int
) -> tuple[FramePanels, ...]:
    """Compute the panels of the first ``count`` frames of a step, of different clips if it can.

    Args:
        pair: student and teacher as they are now; modes and statistics are left as found.
        frames: the site's.
        anaus: the method's settings.
        at: the step whose views are shown.
        count: frames wanted; fewer when the step holds fewer.
    """
    batch = make_us_batch(
        frames, anaus, seed=at.seed, site=at.site, step=at.step, batch_size=at.batch_size
    )
    chosen = _different(frames, batch)[:count]
    device = next(pair.parameters()).device
    with _as_in_training(pair):
        views = batch.views.flatten(0, 1).to(device)
        maps = [
            _dense(network, views, len(batch), chosen) for network in (pair.student, pair.teacher)
        ]
    return tuple(
        _panels(frames, batch, place, student=student, teacher=teacher, step=at.step)
        for place, student, teacher in zip(chosen, *maps, strict=True)
    )


def _different(frames: LabelledFrames, batch: UsBatch) -> list[int]:
    """Places in the batch: one frame of each clip first, then the rest, none twice."""
    first: list[int] = []
    rest: list[int] = []
    clips: set[object] = set()
    seen: set[int] = set()
    for place, index in enumerate(batch.frame_index.tolist()):
        clip = getattr(frames.infos[index], "clip", index)
        if index in seen:
            continue
        (rest if clip in clips else first).append(place)
        clips.add(clip)
        seen.add(index)
    return first + rest


@contextmanager
def _as_in_training(pair: AnausPair) -> Iterator[None]:
    """Training mode without gradients; modes and running statistics are put back."""
    modes = [(module, module.training) for module in pair.modules()]
    kept = {name: buffer.clone() for name, buffer in pair.norm_buffers().items()}
    pair.train()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in modes:
            module.training = training
        for name, buffer in pair.norm_buffers().items():
            buffer.copy_(kept[name])


def _dense(
    network: AnausNetwork, views: Tensor, frames: int, chosen: list[int]
) -> list[tuple[Tensor, ...]]:
    """For each chosen frame its maps of ``LEVELS``, (2, s, s, C) float32 on the CPU each.

    The pyramid sees only the chosen frames: it has no statistics, and p2 of a batch is large.
    """
    maps = network.maps(views)
    found = []
    for place in chosen:
        both = [each[[place, frames + place]] for each in maps]
        dense = network.pyramid(both)
        found.append(tuple(dense[level].float().cpu().permute(0, 2, 3, 1) for level in LEVELS))
    return found


def _panels(
    frames: LabelledFrames,
    batch: UsBatch,
    place: int,
    *,
    student: tuple[Tensor, ...],
    teacher: tuple[Tensor, ...],
    step: int,
) -> FramePanels:
    index = int(batch.frame_index[place])
    boxes = (_rectangle(batch.boxes[0, place]), _rectangle(batch.boxes[1, place]))
    shared = _shared(*boxes)
    size = batch.views.shape[-1]
    flipped = (bool(batch.flipped[0, place]), bool(batch.flipped[1, place]))
    views, labels = batch.views[:, place, 0].double().numpy(), batch.view_labels[:, place]
    return FramePanels(
        frame_index=index,
        step=step,
        label_source=frames.label_source,
        frame=frames.read_frame(index),
        labels=frames.read_labels(index),
        boxes=boxes,
        shared=shared,
        overlap=float(batch.overlap[place]),
        valid=bool(batch.valid[place]),
        flipped=flipped,
        views=(views[0], views[1]),
        view_labels=(labels[0].numpy(), labels[1].numpy()),
        shared_in_view=None
        if shared is None
        else (
            _in_view(shared, boxes[0], size=size, flip=flipped[0]),
            _in_view(shared, boxes[1], size=size, flip=flipped[1]),
        ),
        clean=batch.clean[place, 0].double().numpy(),
        damaged=batch.damaged[place, 0].double().numpy(),
        overlap_labels=batch.overlap_labels[place].numpy(),
        levels=tuple(
            _level(ours, theirs, labels) for ours, theirs in zip(student, teacher, strict=True)
        ),
    )


def _level(student: Tensor, teacher: Tensor, labels: Tensor) -> LevelPanels:
    """Colours and cosines of one level.

    Args:
        student: (2, s, s, C) features.
        teacher: likewise.
        labels: (2, S, S) of the views.
    """
    side = student.shape[1]
    (scale,) = region_pyramid(labels, present_ids(labels), (side,))
    owner = _owners(scale)
    ours, theirs, held = joint_colours(student, teacher)
    pooled = np.full((*owner.shape, 3), np.nan)
    cosine = np.full(owner.shape, np.nan)
    own, other = [], []
    # What all cells have in common would make every cosine nearly 1.
    centred = (teacher - teacher.flatten(0, 2).mean(dim=0)).double()
    unit = functional.normalize(centred, dim=-1).numpy()
    for anatomy in sorted(set(owner.flatten().tolist()) - {0}):
        inside = owner == anatomy
        mean = functional.normalize(centred[torch.from_numpy(inside)].mean(dim=0), dim=0)
        found = unit @ mean.numpy()
        pooled[inside], cosine[inside] = theirs[inside].mean(axis=0), found[inside]
        own.append(found[inside])
        other.append(found[~inside & (owner > 0)])
    return LevelPanels(
        student=(ours[0], ours[1]),
        teacher=(theirs[0], theirs[1]),
        variance_held=held,
        pooled=(pooled[0], pooled[1]),
        cosine=(cosine[0], cosine[1]),
        own=_mean(own),
        other=_mean(other),
    )


def _owners(scale: RegionScale) -> NDArray[np.int64]:
    """(N, s, s): the anatomy of every cell instead of its row."""
    flat = scale.ids.gather(1, scale.owner.flatten(1))
    return flat.view_as(scale.owner).numpy()


def _mean(parts: list[FloatArray]) -> float:
    values = np.concatenate(parts) if parts else np.zeros(0)
    return float(values.mean()) if values.size else float("nan")


def _rectangle(row: Tensor) -> Rectangle:
    top, left, height, width = row.tolist()
    return Rectangle((left, top), (width, height))


def _shared(one: Rectangle, other: Rectangle) -> Rectangle | None:
    start = np.maximum(one.start, other.start)
    stop = np.minimum(np.add(one.start, one.size), np.add(other.start, other.size))
    if (stop <= start).any():
        return None
    size = stop - start
    return Rectangle((float(start[0]), float(start[1])), (float(size[0]), float(size[1])))


def _in_view(shared: Rectangle, box: Rectangle, *, size: int, flip: bool) -> Rectangle:
    """Where the overlap lies in a view of ``size`` pixels."""
    scale = size / np.asarray(box.size)
    start = (np.asarray(shared.start) - box.start) * scale
    extent = np.asarray(shared.size) * scale
    left = size - start[0] - extent[0] if flip else start[0]
    return Rectangle((float(left), float(start[1])), (float(extent[0]), float(extent[1])))
