"""Two random boxes of an ultrasound frame, their overlap, and cutting images and label maps.

Boxes hold whole pixels of the un-flipped frame, so a flip never moves the overlap. A view is its
box stretched to a square; pixel centres stand at half-integers throughout.

Source: the crops of Grill et al. 2020, arXiv:2006.07733 (BYOL), with the ANAUS paper's scale.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from agssd_core.config.anaus import OverlapConfig, UsAugmentConfig

Grey = NDArray[np.uint8]
LEAST_RATIO, GREATEST_RATIO = 3 / 4, 4 / 3  # width over height
CANDIDATES = 10  # shapes tried before a box is fitted to a long frame


@dataclass(frozen=True)
class FrameBox:
    """A box of whole pixels in the un-flipped frame."""

    top: int
    left: int
    height: int
    width: int

    @property
    def area(self) -> int:
        """Pixels of the frame."""
        return self.height * self.width

    def cut(self, image: Grey) -> Grey:
        """The part of an image (H, W), not copied."""
        return image[self.top : self.top + self.height, self.left : self.left + self.width]


@dataclass(frozen=True)
class BoxPair:
    """Where the two views of one frame lie.

    Attributes:
        boxes: of both views.
        flipped: whether a view runs from right to left.
        shared: what both show; ``None`` when they share nothing.
        valid: the overlap is large enough to learn from.
    """

    boxes: tuple[FrameBox, FrameBox]
    flipped: tuple[bool, bool]
    shared: FrameBox | None
    valid: bool

    @property
    def overlap(self) -> float:
        """Share of the smaller view that both show, 0 to 1."""
        smaller = min(box.area for box in self.boxes)
        return 0.0 if self.shared is None else self.shared.area / smaller


def draw_pair(
    shape: tuple[int, int],
    augment: UsAugmentConfig,
    overlap: OverlapConfig,
    rng: np.random.Generator,
) -> BoxPair:
    """Draw two views of a frame, again while they share too little, ``overlap.tries`` times.

    Args:
        shape: (H, W) of the frame, pixels.
        augment: scale and flips.
        overlap: least share of the smaller view, and redraws.
        rng: of this frame at this step.
    """
    flips = rng.uniform(size=2) < augment.flip_p
    flipped = (bool(flips[0]), bool(flips[1]))
    for _ in range(1 + overlap.tries):
        boxes = (draw_box(shape, augment, rng), draw_box(shape, augment, rng))
        pair = BoxPair(boxes, flipped, shared_box(*boxes), valid=True)
        if pair.shared is not None and pair.overlap >= overlap.min_share:
            return pair
    return BoxPair(pair.boxes, flipped, pair.shared, valid=False)


def draw_box(
    shape: tuple[int, int], augment: UsAugmentConfig, rng: np.random.Generator
) -> FrameBox:
    """Draw one box; every call uses the same number of random numbers.

    In a frame too long for every drawn shape, the largest box of the nearest allowed ratio is put
    at a random place; it may cover less than ``min_scale``.
    """
    height, width = shape
    area = height * width * rng.uniform(augment.min_scale, augment.max_scale, size=CANDIDATES)
    ratio = np.exp(rng.uniform(math.log(LEAST_RATIO), math.log(GREATEST_RATIO), size=CANDIDATES))
    place = rng.uniform(size=2)
    wide, high = np.rint(np.sqrt(area * ratio)), np.rint(np.sqrt(area / ratio))
    fits = (wide >= 1) & (wide <= width) & (high >= 1) & (high <= height)
    chosen = int(fits.argmax())
    h, w = (int(high[chosen]), int(wide[chosen])) if fits[chosen] else _fitted(shape)
    return FrameBox(int(place[0] * (height - h + 1)), int(place[1] * (width - w + 1)), h, w)


def shared_box(a: FrameBox, b: FrameBox) -> FrameBox | None:
    """What two boxes share, or ``None`` when they share nothing."""
    top, left = max(a.top, b.top), max(a.left, b.left)
    bottom = min(a.top + a.height, b.top + b.height)
    right = min(a.left + a.width, b.left + b.width)
    if bottom <= top or right <= left:
        return None
    return FrameBox(top, left, bottom - top, right - left)


def cut_image(image: Grey, box: FrameBox, *, size: int, flip: bool = False) -> Tensor:
    """Stretch a box to a square, bicubic and antialiased.

    Args:
        image: (H, W) grey levels.
        box: what is shown.
        size: edge of the result, pixels.
        flip: mirror left and right.

    Returns:
        (1, S, S) float32 in [0, 1].
    """
    levels = torch.from_numpy(box.cut(image).astype(np.float32))[None, None]
    square = functional.interpolate(levels, (size, size), mode="bicubic", antialias=True)[0]
    square = square.div_(255).clamp_(0, 1)
    return square.flip(-1) if flip else square


def cut_labels(labels: Grey, box: FrameBox, *, size: int, flip: bool = False) -> Tensor:
    """The label under each pixel centre of the same square: (S, S) uint8, never interpolated."""
    centres = np.arange(size) + 0.5
    rows = (centres * box.height / size).astype(np.int64)
    columns = (centres * box.width / size).astype(np.int64)
    square = box.cut(labels)[rows[:, None], columns[::-1] if flip else columns]
    return torch.from_numpy(np.ascontiguousarray(square))


def cut_shared(views: Tensor, pairs: Sequence[BoxPair], *, view: int) -> Tensor:
    """Cut what both views show out of one of them, un-flipped and stretched to its size.

    Args:
        views: (B, 1, S, S) the views, augmented or not.
        pairs: where each lies. A row that is not valid gives the whole view, un-flipped: its
            usual statistics do not disturb BatchNorm as a blank image would.
        view: 0 or 1, which of the pair ``views`` is.

    Returns:
        (B, 1, S, S), bilinear: the overlap is never shrunk.
    """
    affine = np.stack([_shared_affine(pair, view) for pair in pairs])
    theta = torch.from_numpy(affine).to(views)
    grid = functional.affine_grid(theta, list(views.shape), align_corners=False)
    return functional.grid_sample(views, grid, padding_mode="border", align_corners=False)


def _shared_affine(pair: BoxPair, view: int) -> NDArray[np.float64]:
    """(2, 3) map from the overlap's [-1, 1] frame (x, y) to the view's."""
    box = pair.boxes[view]
    shared = pair.shared if pair.valid and pair.shared is not None else box
    scale = np.array([shared.width / box.width, shared.height / box.height])
    middle = np.array(
        [
            (2 * (shared.left - box.left) + shared.width) / box.width - 1,
            (2 * (shared.top - box.top) + shared.height) / box.height - 1,
        ]
    )
    affine = np.column_stack([np.diag(scale), middle])
    if pair.flipped[view]:
        affine[0] *= -1
    return affine


def _fitted(shape: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the largest box of the nearest allowed ratio."""
    height, width = shape
    return (
        min(height, max(1, round(width / LEAST_RATIO))),
        min(width, max(1, round(height * GREATEST_RATIO))),
    )
