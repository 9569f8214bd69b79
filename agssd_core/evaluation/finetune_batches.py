"""Training batches of fine-tuning: cubes cut from volumes, resized and mirrored frames."""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from agssd_core.config.finetune import FinetuneConfig
from agssd_core.config.tasks import TaskConfig
from agssd_core.errors import DataError
from agssd_core.evaluation.finetune_predict import padded, resized
from agssd_core.evaluation.labelled import LabelledArrays, LabelledScan
from agssd_core.evaluation.tasks import task_mask
from agssd_core.views.seeds import rng_for

# Scans that stay in memory: a data set of a few hundred volumes does not fit.
SCANS_HELD = 24
_BRIGHTNESS, _CONTRAST = 0.1, 0.1


class Batches:
    """Draws the batch of any step from nothing but seed and step.

    Args:
        scans: to learn from, all of one kind.
        targets: class of each scan; None for a segmentation.
        task: says which numbers of a mask are which structure.
        size: (D, H, W) of a cube, or (S, S) of a frame.
        settings: batch and cubes.
        seed: of the draws.

    Raises:
        DataError: there is no scan.
    """

    def __init__(
        self,
        scans: Sequence[LabelledScan],
        targets: NDArray[np.int64] | None,
        task: TaskConfig,
        *,
        size: Sequence[int],
        settings: FinetuneConfig,
        seed: int,
    ) -> None:
        if not scans:
            raise DataError(
                "no scan to learn from is left for this task. Check its label, structures and "
                "modalities, and that the split holds training scans."
            )
        self._scans, self._targets, self._task = tuple(scans), targets, task
        self._size, self._settings, self._seed = tuple(size), settings, seed
        self._load = lru_cache(SCANS_HELD)(lambda number: self._scans[number].load())

    def draw(self, step: int) -> tuple[Tensor, Tensor]:
        """The images of a step, and what is true of them.

        Returns:
            (B, 1, ...) float32 in [0, 1]; and (B, 1, ...) structures, or (scans,) classes. Of a
            classification ``B`` is scans x cubes, cubes of one scan one after another.
        """
        rng = rng_for(self._seed, "finetune", "batch", step)
        numbers = self._numbers(step)
        pairs = [self._pair(number, rng) for number in numbers]
        images = torch.cat([image for image, _ in pairs])
        if self._targets is not None:
            return images, torch.from_numpy(self._targets[list(numbers)])
        return images, torch.cat([truth for _, truth in pairs])

    def _numbers(self, step: int) -> list[int]:
        """Scans of a step: one seeded order after another, so that all are seen equally often."""
        first, count = step * self._settings.batch, len(self._scans)
        orders: dict[int, NDArray[np.int64]] = {}
        found = []
        for place in range(first, first + self._settings.batch):
            turn = place // count
            if turn not in orders:
                orders[turn] = rng_for(self._seed, "finetune", "order", turn).permutation(count)
            found.append(int(orders[turn][place % count]))
        return found

    def _pair(self, number: int, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        arrays = self._load(number)
        if arrays.image.ndim == 2:
            return self._frame(arrays, rng)
        return self._cubes(arrays, rng)

    def _frame(self, arrays: LabelledArrays, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        image = resized(torch.from_numpy(arrays.image)[None, None], self._size)
        truth = torch.from_numpy(self._truth(arrays))[None, None].float()
        truth = torch.nn.functional.interpolate(truth, size=self._size, mode="nearest-exact")
        if rng.random() < 0.5:
            image, truth = image.flip(-1), truth.flip(-1)
        return _varied(image, rng), truth

    def _cubes(self, arrays: LabelledArrays, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        truth = self._truth(arrays)
        layers = [
            padded(torch.from_numpy(np.ascontiguousarray(array)).float(), self._size)
            for array in (arrays.image, truth, arrays.inside)
        ]
        inside = layers[2] if layers[2].any() else torch.ones_like(layers[2])
        # Of a classification any place in the body will do.
        wanted = inside if self._targets is not None else layers[1]
        others = (wanted == 0) & (inside > 0)
        images, truths = [], []
        for _ in range(self._settings.crops):
            hit = rng.random() < self._settings.positive
            layer = wanted if wanted.any() and (hit or not others.any()) else others
            place = _cube(layer, self._size, rng)
            images.append(layers[0][place][None])
            truths.append(layers[1][place][None])
        return _varied(torch.stack(images), rng), torch.stack(truths)

    def _truth(self, arrays: LabelledArrays) -> NDArray[np.uint8]:
        if self._targets is not None or arrays.mask is None:
            return np.zeros(arrays.image.shape, dtype=np.uint8)
        return task_mask(arrays.mask, self._task)


def _cube(layer: Tensor, size: Sequence[int], rng: np.random.Generator) -> tuple[slice, ...]:
    """A cube round one of the voxels above 0, moved inwards where it would leave the volume."""
    voxels = np.flatnonzero(layer.numpy())
    centre = np.unravel_index(int(voxels[rng.integers(len(voxels))]), tuple(layer.shape))
    starts = [
        min(max(0, int(middle) - side // 2), extent - side)
        for middle, side, extent in zip(centre, size, layer.shape, strict=True)
    ]
    return tuple(slice(start, start + side) for start, side in zip(starts, size, strict=True))


def _varied(images: Tensor, rng: np.random.Generator) -> Tensor:
    """Each image a little brighter or darker, harder or softer; no side of the body is mirrored."""
    count = len(images)
    factors = 1 + _CONTRAST * rng.uniform(-1, 1, count)
    shifts = _BRIGHTNESS * rng.uniform(-1, 1, count) * (rng.random(count) < 0.5)
    shape = (count, *[1] * (images.dim() - 1))
    scaled = images * torch.tensor(factors, dtype=torch.float32).view(shape)
    return (scaled + torch.tensor(shifts, dtype=torch.float32).view(shape)).clamp(0, 1)
