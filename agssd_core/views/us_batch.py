"""One step's ultrasound views, overlaps and label maps as tensors.

A batch depends on its arguments alone: every random number comes from
``(seed, site, purpose, step, position)``, so any number of loader threads gives the same bits.

Source: the ANAUS paper's figure (arXiv:2605.25402): the student sees the damaged overlap as view
1 shows it, the teacher the clean one of view 2. Label maps stay whole numbers all the way.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agssd_core.config.anaus import AnausConfig
from agssd_core.errors import ShapeError
from agssd_core.views.batch import volume_order
from agssd_core.views.damage import apply_damage, draw_damage
from agssd_core.views.regions import present_ids
from agssd_core.views.seeds import rng_for
from agssd_core.views.us_crops import (
    BoxPair,
    Grey,
    cut_image,
    cut_labels,
    cut_shared,
    draw_pair,
)
from agssd_core.views.us_photometric import apply_us_photometric, draw_us_photometric

Rngs = list[np.random.Generator]  # one a frame
STAYS_ON_CPU = frozenset({"boxes", "flipped"})


class FrameLike(Protocol):
    """What is asked of a frame's description; ``FrameInfo`` has it."""

    @property
    def patient(self) -> str:
        """Pseudonym; every frame of one patient bears the same."""
        ...


class FrameReader(Protocol):
    """What views need of a site's frames; ``data.frames.SiteFrames`` provides it."""

    @property
    def infos(self) -> Sequence[FrameLike]:
        """One entry a frame."""
        ...

    def __len__(self) -> int:
        """Number of frames."""
        ...

    def read_frame(self, index: int) -> NDArray[np.uint8]:
        """(H, W) grey levels, 0 outside the sector."""
        ...

    def read_labels(self, index: int) -> NDArray[np.uint8]:
        """(H, W) anatomy of every pixel, 0 for none."""
        ...


@dataclass
class UsBatch:
    """Two views of each of B frames, and what both show.

    Attributes:
        views: (2, B, 1, S, S) float32 in [0, 1], augmented.
        view_labels: (2, B, S, S) uint8.
        view_ids: (2 * B, R) long, ``present_ids`` of the view-major label maps.
        damaged: (B, 1, S, S) float32 in [0, 1], the student's overlap.
        clean: (B, 1, S, S) float32 in [0, 1], the teacher's.
        overlap_labels: (B, S, S) uint8, the anatomies of both, un-flipped.
        overlap_ids: (B, R') long.
        valid: (B,) bool, the overlap is large enough. Other rows hold whole views without an
            anatomy.
        overlap: (B,) float32, share of the smaller view that both show.
        boxes: (2, B, 4) float64 (top, left, height, width), pixels of the frame.
        flipped: (2, B) bool.
        frame_index: (B,) int64, index in the site's frames.
    """

    views: Tensor
    view_labels: Tensor
    view_ids: Tensor
    damaged: Tensor
    clean: Tensor
    overlap_labels: Tensor
    overlap_ids: Tensor
    valid: Tensor
    overlap: Tensor
    boxes: Tensor
    flipped: Tensor
    frame_index: Tensor

    def __len__(self) -> int:
        """Frames in the batch, B."""
        return int(self.valid.shape[0])

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> "UsBatch":
        """Copy to a device; the record of the boxes stays where it is needed, on the CPU."""
        return self._map(
            lambda name, tensor: (
                tensor if name in STAYS_ON_CPU else tensor.to(device, non_blocking=non_blocking)
            )
        )

    def pin_memory(self) -> "UsBatch":
        """Page-lock the tensors, so that ``to(..., non_blocking=True)`` overlaps with the step."""
        return self._map(lambda _, tensor: tensor.pin_memory())

    def _map(self, change: Callable[[str, Tensor], Tensor]) -> "UsBatch":
        names = [field.name for field in fields(self)]
        return replace(self, **{name: change(name, getattr(self, name)) for name in names})


def make_us_batch(
    frames: FrameReader,
    anaus: AnausConfig,
    *,
    seed: int,
    site: str,
    step: int,
    batch_size: int,
) -> UsBatch:
    """Cut the views of one step.

    Args:
        frames: the site's frames; fewer than ``batch_size`` are shown repeatedly.
        anaus: crops, augmentation and damage.
        seed: of the run.
        site: name of the site; part of the seed.
        step: global step.
        batch_size: B.

    Raises:
        ShapeError: there are no frames, or a label map has another shape than its frame.
    """
    order = volume_order(len(frames), seed=seed, site=site, step=step, batch_size=batch_size)

    def rngs(purpose: str) -> Rngs:
        return [rng_for(seed, site, purpose, step, position) for position in range(batch_size)]

    return cut_us_batch(frames, anaus, order, rngs)


def cut_us_batch(
    frames: FrameReader,
    anaus: AnausConfig,
    order: Sequence[int],
    rngs: Callable[[str], Rngs],
) -> UsBatch:
    """Cut the views of these frames.

    Args:
        frames: the site's frames.
        anaus: crops, augmentation and damage.
        order: indices of the frames.
        rngs: purpose to generators, one a frame.
    """
    items = [
        _cut_frame(frames, index, anaus, rng)
        for index, rng in zip(order, rngs("us-boxes"), strict=True)
    ]
    pairs = [item.pair for item in items]
    views = _augmented_views(items, anaus, rngs("us-photometric"))
    seen, clean = _overlaps(items, views, anaus, rngs("us-overlap"))
    damage = draw_damage(rngs("us-damage"), anaus.overlap, size=anaus.augment.size)
    view_labels = torch.stack([torch.stack([item.labels[v] for item in items]) for v in (0, 1)])
    overlap_labels = torch.stack([item.shared_labels for item in items])
    return UsBatch(
        views=views,
        view_labels=view_labels,
        view_ids=present_ids(view_labels.flatten(0, 1)),
        damaged=apply_damage(seen, damage),
        clean=clean,
        overlap_labels=overlap_labels,
        overlap_ids=present_ids(overlap_labels),
        valid=torch.tensor([pair.valid for pair in pairs]),
        overlap=torch.tensor([pair.overlap for pair in pairs]).float(),
        boxes=_boxes(pairs),
        flipped=torch.tensor([pair.flipped for pair in pairs]).T.contiguous(),
        frame_index=torch.tensor(list(order)),
    )


@dataclass(frozen=True)
class _Item:
    """One frame's views before augmentation, and its overlap, undisturbed."""

    pair: BoxPair
    views: list[Tensor]
    labels: list[Tensor]
    shared: Tensor
    shared_labels: Tensor


def _cut_frame(
    frames: FrameReader, index: int, anaus: AnausConfig, rng: np.random.Generator
) -> _Item:
    frame, labels = frames.read_frame(index), frames.read_labels(index)
    _require_same_shape(frame, labels)
    size = anaus.augment.size
    pair = draw_pair((frame.shape[0], frame.shape[1]), anaus.augment, anaus.overlap, rng)
    both = list(zip(pair.boxes, pair.flipped, strict=True))
    views = [cut_image(frame, box, size=size, flip=flip) for box, flip in both]
    box = pair.shared if pair.valid and pair.shared is not None else pair.boxes[0]
    return _Item(
        pair=pair,
        views=views,
        labels=[cut_labels(labels, box, size=size, flip=flip) for box, flip in both],
        shared=cut_image(frame, box, size=size) if anaus.overlap.source == "image" else views[0],
        shared_labels=(
            cut_labels(labels, box, size=size)
            if pair.valid
            else torch.zeros((size, size), dtype=torch.uint8)
        ),
    )


def _augmented_views(items: list[_Item], anaus: AnausConfig, rngs: Rngs) -> Tensor:
    """(2, B, 1, S, S)."""
    return torch.stack(
        [
            apply_us_photometric(
                torch.stack([item.views[view] for item in items]),
                draw_us_photometric(rngs, anaus.augment, view=view),
            )
            for view in (0, 1)
        ]
    )


def _overlaps(
    items: list[_Item], views: Tensor, anaus: AnausConfig, rngs: Rngs
) -> tuple[Tensor, Tensor]:
    """What will be damaged and what stays clean, (B, 1, S, S) each; one and the same for ``image``.

    From an undisturbed frame there is one draw for both, as the first view's.
    """
    if anaus.overlap.source == "image":
        drawn = draw_us_photometric(rngs, anaus.augment, view=0)
        both = apply_us_photometric(torch.stack([item.shared for item in items]), drawn)
        return both, both
    pairs = [item.pair for item in items]
    return cut_shared(views[0], pairs, view=0), cut_shared(views[1], pairs, view=1)


def _require_same_shape(frame: Grey, labels: Grey) -> None:
    if frame.ndim != 2 or frame.shape != labels.shape or labels.dtype != np.uint8:
        raise ShapeError(
            f"a frame of shape {frame.shape} has a {labels.dtype} label map of {labels.shape}; "
            "both must be one (H, W), labels uint8. Delineate the site's clips again."
        )


def _boxes(pairs: list[BoxPair]) -> Tensor:
    rows = [[(b.top, b.left, b.height, b.width) for b in pair.boxes] for pair in pairs]
    return torch.tensor(rows, dtype=torch.float64).transpose(0, 1).contiguous()
