"""Public frames for fitting LP-SAM: kept small in memory, changed at random, prompted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from agssd_core.config.frames import FramesConfig
from agssd_core.config.lpsam import LpsamAugmentConfig, LpsamConfig
from agssd_core.data.pairs import ImageMaskPairs, LabelledFrame, read_pair, shrink_labels
from agssd_core.errors import DataError
from agssd_core.models.lpsam import Prompts
from agssd_core.models.lpsam_input import inner_size, network_input, pad_masks, shrink_frame

Progress = Callable[[int, int], None]

MAX_PROMPTS = 4
BOX_SLACK = 0.05


@dataclass(frozen=True)
class FitFrame:
    """A frame at the network's size: grey (h, w) uint8 and structures (K, h, w) bool."""

    grey: Tensor
    structures: Tensor


@dataclass(frozen=True)
class Change:
    """One drawn augmentation; angles in degrees, the centre as a share of height and width."""

    angle: float = 0.0
    scale: float = 1.0
    centre: tuple[float, float] = (0.5, 0.5)
    contrast: float = 1.0
    gamma: float = 1.0
    flip: bool = False


@dataclass(frozen=True)
class FitBatch:
    """Input (B, 3, S, S) and the structures of every frame, (K, S, S) and on the masks' grid."""

    images: Tensor
    full: list[Tensor]
    structures: list[Tensor]


def fit_frame(labelled: LabelledFrame, size: int) -> FitFrame:
    """Shrink a labelled frame so that its longer side has ``size`` pixels."""
    height, width = labelled.frame.shape
    inner = inner_size((height, width), size)
    grey = (255 * shrink_frame(labelled.frame, size)).round().to(torch.uint8)
    layers = [torch.from_numpy(shrink_labels(layer, inner)) for layer in labelled.structures]
    kept = [layer for layer in layers if layer.any()]
    return FitFrame(grey, torch.stack(kept) if kept else torch.zeros((0, *inner), dtype=torch.bool))


def read_fit_frames(
    pairs: ImageMaskPairs, config: LpsamConfig, frames: FramesConfig, *, progress: Progress
) -> list[FitFrame]:
    """Read all pairs; what cannot be used is added to ``pairs.skipped``.

    Raises:
        DataError: nothing is left, or no frame has a structure.
    """
    kept = []
    for done, pair in enumerate(pairs.pairs):
        try:
            labelled = read_pair(pair, frames, structures=config.structures)
            kept.append(fit_frame(labelled, config.size))
        except DataError as error:
            pairs.skipped[pair.name] = str(error)
        progress(done + 1, len(pairs.pairs))
    if not any(len(frame.structures) for frame in kept):
        raise DataError(
            f"none of {len(pairs.pairs)} public image(s) has a structure that can be used, at "
            "least one is needed. Mend what is listed as skipped."
        )
    return kept


def draw_change(rng: np.random.Generator, augment: LpsamAugmentConfig) -> Change:
    """Draw one frame's augmentation; the number of draws is always the same."""
    use = rng.random(5) < (augment.p, augment.p, augment.p, augment.p, augment.flip_p)
    angle = rng.uniform(-augment.rotate, augment.rotate)
    scale, contrast, gamma = (
        rng.uniform(*span) for span in (augment.scale, augment.contrast, augment.gamma)
    )
    row, column = rng.uniform(0.25, 0.75, 2)
    return Change(
        angle=float(angle) if use[0] else 0.0,
        scale=float(scale) if use[1] else 1.0,
        centre=(float(row), float(column)) if use[1] else (0.5, 0.5),
        contrast=float(contrast) if use[2] else 1.0,
        gamma=float(gamma) if use[3] else 1.0,
        flip=bool(use[4]),
    )


def apply_change(frame: FitFrame, change: Change) -> tuple[Tensor, Tensor]:
    """Grey (h, w) in [0, 1] and structures (K, h, w) bool after a change; lost ones are left out.

    What turns in from outside is black.
    """
    grey, structures = frame.grey.float() / 255, frame.structures
    if change.angle or change.scale != 1 or change.flip:
        grid = _grid(grey.shape, change)
        layers = structures.float()[None]
        grey = F.grid_sample(grey[None, None], grid, mode="bilinear", align_corners=False)[0, 0]
        if len(structures):
            moved = F.grid_sample(layers, grid, mode="nearest", align_corners=False)[0] > 0.5
            structures = moved[moved.flatten(1).any(1)]
    if change.contrast != 1:
        grey = ((grey - grey.mean()) * change.contrast + grey.mean()).clamp(0, 1)
    return grey.clamp(0, 1) ** change.gamma, structures


def make_batch(
    frames: Sequence[FitFrame], rng: np.random.Generator, config: LpsamConfig
) -> FitBatch:
    """Change every frame at random; one that would lose all its structures stays as it is."""
    greys, layers = [], []
    for frame in frames:
        grey, structures = apply_change(frame, draw_change(rng, config.augment))
        if len(frame.structures) and not len(structures):
            grey, structures = apply_change(frame, Change())
        greys.append(grey)
        layers.append(structures)
    size = config.size
    full = [F.pad(item, (0, size - item.shape[-1], 0, size - item.shape[-2])) for item in layers]
    return FitBatch(network_input(greys, size), full, [pad_masks(item, size) for item in layers])


def draw_prompts(
    structures: Sequence[Tensor], rng: np.random.Generator
) -> tuple[Prompts, list[list[int]]]:
    """A click or a box for up to four structures of every frame.

    Args:
        structures: B tensors (K, S, S) bool, K at least 1.
        rng: of this step.

    Returns:
        Prompts of P = the most in any frame, and which structures they stand for; a frame with
        fewer repeats its last one, which then has no entry in its list.
    """
    chosen = [sorted(rng.permutation(len(layers))[:MAX_PROMPTS].tolist()) for layers in structures]
    most = max(map(len, chosen))
    rows = [
        [_draw_prompt(layers[index], rng) for index in (picks + picks[-1:] * most)[:most]]
        for layers, picks in zip(structures, chosen, strict=True)
    ]
    points, boxes = (
        torch.tensor([[prompt[part] for prompt in row] for row in rows]) for part in (0, 1)
    )
    use_box = torch.from_numpy(rng.random((len(rows), most)) < 0.5)
    return Prompts(points, boxes, use_box), chosen


def _draw_prompt(
    mask: Tensor, rng: np.random.Generator
) -> tuple[tuple[float, float], tuple[float, float, float, float]]:
    rows, columns = torch.nonzero(mask, as_tuple=True)
    pick = int(rng.integers(len(rows)))
    slack = rng.uniform(-BOX_SLACK, BOX_SLACK, 4)
    height = float(rows.max() - rows.min() + 1)
    width = float(columns.max() - columns.min() + 1)
    box = (
        float(columns.min()) + slack[0] * width,
        float(rows.min()) + slack[1] * height,
        float(columns.max()) + slack[2] * width,
        float(rows.max()) + slack[3] * height,
    )
    return (float(columns[pick]), float(rows[pick])), box


def _grid(shape: torch.Size, change: Change) -> Tensor:
    """Where every pixel comes from, (1, h, w, 2), in grid_sample's coordinates."""
    height, width = shape
    turn = np.deg2rad(change.angle)
    cos, sin = np.cos(turn) / change.scale, np.sin(turn) / change.scale
    mirror = -1.0 if change.flip else 1.0
    # Turn in pixels, so that a frame that is not square is not sheared.
    matrix = np.array([[mirror * cos, -sin * height / width], [mirror * sin * width / height, cos]])
    centre = 2 * np.array([change.centre[1], change.centre[0]]) - 1
    shift = centre - matrix @ (centre * np.array([mirror, 1.0]))
    theta = torch.tensor(np.column_stack([matrix, shift]), dtype=torch.float32)[None]
    return F.affine_grid(theta, [1, 1, height, width], align_corners=False)
