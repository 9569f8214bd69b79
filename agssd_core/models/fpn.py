"""A feature pyramid without norm or activation, dense for export and folded into pooling.

Because it is linear, the mean of a smoothed map over a mask is a small product of backbone
features pooled under shifted masks: no map of the finest scale is ever made.

Source: Lin et al. 2017, arXiv:1612.03144, without their activation-free P5 smoothing; c5 is
used as it is.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from agssd_core.errors import ShapeError

_SHIFTS = tuple((row, column) for row in range(3) for column in range(3))


class FeaturePyramid(nn.Module):
    """Top-down pyramid over c2 to c5.

    Args:
        channels: of c2, c3, c4 and c5.
        width: channels of p2, p3 and p4.
    """

    def __init__(self, channels: Sequence[int], width: int = 256) -> None:
        super().__init__()
        self.lateral = nn.ModuleList(nn.Conv2d(each, width, 1) for each in channels)
        self.smooth = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in channels[:-1])

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Dense maps, for detection and segmentation.

        Args:
            maps: c2 to c5, each half the side of the one before.

        Returns:
            p2, p3, p4 (B, width, S, S) and c5 as it is.
        """
        _require_halving(maps)
        down = self.lateral[-1](maps[-1])
        found = [maps[-1]]
        for level in (2, 1, 0):
            doubled = functional.interpolate(down, scale_factor=2.0, mode="nearest")
            down = self.lateral[level](maps[level]) + doubled
            found.append(self.smooth[level](down))
        return found[::-1]

    def pooled(self, maps: Sequence[Tensor], weights: Tensor, level: int) -> Tensor:
        """Means of one dense map over masks, without making the map.

        Args:
            maps: c2 to c5.
            weights: (B, R, S * S), rows as of ``regions.pooling_weights`` (sum 1, or all 0).
            level: 0 for p2, 1 for p3, 2 for p4, 3 for c5.

        Returns:
            (B, R, C); 0 for an empty mask.

        Raises:
            ShapeError: the weights are not of that level's cells.
        """
        _require_halving(maps)
        side = maps[level].shape[-1]
        if weights.shape[-1] != side * side or weights.shape[0] != maps[level].shape[0]:
            raise ShapeError(
                f"pooling weights {tuple(weights.shape)} are not those of {side} x {side} cells. "
                "Take the masks of the same scale."
            )
        if level == len(maps) - 1:
            return _pool(maps[level], weights)
        frames, rows = weights.shape[:2]
        shifted = _shifted(weights.view(frames, rows, side, side)).flatten(1, 2)
        summed = self._summed(maps, shifted, level).view(frames, rows, -1)
        smooth = cast(nn.Conv2d, self.smooth[level])
        kernel = smooth.weight.permute(0, 2, 3, 1).flatten(1)
        mass = weights.sum(dim=2, keepdim=True)
        return summed @ kernel.T + _bias(smooth) * mass

    def _summed(self, maps: Sequence[Tensor], masks: Tensor, level: int) -> Tensor:
        """(B, Q, width): sum of the unsmoothed map under (B, Q, S, S) masks."""
        mass = masks.flatten(2).sum(dim=2, keepdim=True)
        total = torch.zeros((), dtype=masks.dtype, device=masks.device)
        for depth in range(level, len(maps)):
            if depth > level:  # nearest upsampling, transposed
                masks = functional.avg_pool2d(masks, 2, divisor_override=1)
            lateral = cast(nn.Conv2d, self.lateral[depth])
            pooled = _pool(maps[depth], masks.flatten(2))
            total = total + pooled @ lateral.weight.flatten(1).T + _bias(lateral) * mass
        return total


def _bias(layer: nn.Conv2d) -> Tensor:
    return cast(Tensor, layer.bias)


def _pool(features: Tensor, weights: Tensor) -> Tensor:
    return weights @ features.flatten(2).transpose(1, 2)


def _shifted(masks: Tensor) -> Tensor:
    """(B, R, 9, S, S): what each tap of the 3x3 kernel sees of a mask; zero outside the map."""
    side = masks.shape[-1]
    padded = functional.pad(masks, (1, 1, 1, 1))
    taps = [
        padded[..., 2 - row : 2 - row + side, 2 - column : 2 - column + side]
        for row, column in _SHIFTS
    ]
    return torch.stack(taps, dim=2)


def _require_halving(maps: Sequence[Tensor]) -> None:
    sides = [each.shape[-1] for each in maps]
    if len(sides) != 4 or any(a != 2 * b for a, b in pairwise(sides)):
        raise ShapeError(f"maps of sides {sides} do not halve from c2 to c5. Give a ResNet's maps.")
