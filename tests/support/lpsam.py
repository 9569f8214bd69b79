"""Synthetic frames with two kinds of ellipses, and a network that fits them within seconds."""

import numpy as np

from agssd_core.config.lpsam import (
    LpsamAugmentConfig,
    LpsamConfig,
    LpsamRulesConfig,
    LpsamStageConfig,
)
from agssd_core.data.pairs import LabelledFrame
from agssd_core.views.seeds import rng_for

QUICK = LpsamConfig(
    image_size=64,
    regions=3,
    blocks=2,
    adapters=LpsamStageConfig(steps=50, batch_size=4, learning_rate=2e-3),
    engine=LpsamStageConfig(steps=120, batch_size=4, learning_rate=2e-3),
    # So short a fit is not yet sure of itself.
    rules=LpsamRulesConfig(iou=0.3),
    augment=LpsamAugmentConfig(p=0.2, contrast=(0.8, 1.2), gamma=(1.0, 1.2)),
)
SHORT = QUICK.model_copy(
    update={"adapters": LpsamStageConfig(steps=2), "engine": LpsamStageConfig(steps=2)}
)


def ellipse_frame(number: int, shape: tuple[int, int] = (48, 64)) -> LabelledFrame:
    """A bright ellipse in the left half and a dark one in the right half, on speckle."""
    rng = rng_for(3, "ellipses", number)
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    grey = np.full(shape, 110.0)
    structures = []
    for place, level in ((0.27, 210.0), (0.73, 20.0)):
        row = shape[0] * rng.uniform(0.35, 0.65)
        column = shape[1] * (place + rng.uniform(-0.05, 0.05))
        tall, wide = shape[0] * rng.uniform(0.15, 0.25), shape[1] * rng.uniform(0.1, 0.16)
        inside = ((rows - row) / tall) ** 2 + ((columns - column) / wide) ** 2 < 1
        grey[inside] = level
        structures.append(inside)
    grey *= rng.gamma(20, 1 / 20, shape)
    frame = np.clip(grey, 1, 255).astype(np.uint8)
    return LabelledFrame(frame, np.ones(shape, dtype=bool), np.stack(structures))


def empty_frame(number: int) -> LabelledFrame:
    """Speckle alone."""
    grey = 110 * rng_for(4, "empty", number).gamma(20, 1 / 20, (48, 64))
    frame = np.clip(grey, 1, 255).astype(np.uint8)
    return LabelledFrame(frame, np.ones((48, 64), dtype=bool), np.zeros((0, 48, 64), dtype=bool))
