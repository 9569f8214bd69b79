"""Grey frames into LP-SAM and its masks back out, as SAM's own processor does it.

The longer side becomes S, the rest is padded at the right and below after normalising. Written
out here, because that processor wants torchvision.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

# Of SAM's training images, in grey levels of 0 to 255.
MEAN = (123.675, 116.28, 103.53)
STD = (58.395, 57.12, 57.375)


def inner_size(shape: tuple[int, int], size: int) -> tuple[int, int]:
    """(height, width) of a frame within the padded S x S input."""
    longer = max(shape)
    height, width = (max(1, round(side * size / longer)) for side in shape)
    return height, width


def shrink_frame(frame: NDArray[np.uint8], size: int) -> Tensor:
    """A grey frame (H, W) at its size within the input, (h, w) float32 in [0, 1]."""
    shape = (frame.shape[0], frame.shape[1])
    levels = torch.from_numpy(np.ascontiguousarray(frame)).float()[None, None] / 255
    inner = inner_size(shape, size)
    if inner == shape:
        return levels[0, 0]
    small = F.interpolate(levels, size=inner, mode="bilinear", antialias=True)
    return small[0, 0].clamp(0, 1)


def network_input(frames: Sequence[Tensor], size: int) -> Tensor:
    """Normalise and pad (h, w) frames in [0, 1] to (B, 3, S, S)."""
    mean, std = (torch.tensor(part)[:, None, None] for part in (MEAN, STD))
    padded = torch.zeros(len(frames), 3, size, size)
    for target, frame in zip(padded, frames, strict=True):
        height, width = frame.shape
        target[:, :height, :width] = (255 * frame - mean) / std
    return padded


def pad_masks(masks: Tensor, size: int) -> Tensor:
    """Masks (K, h, w) of a frame on the grid of the network's own masks, (K, S / 2, S / 2) bool.

    A cell belongs to a structure when at least half of its pixels do.
    """
    height, width = masks.shape[-2:]
    padded = F.pad(masks.float(), (0, size - width, 0, size - height))
    if not len(padded):
        return padded.new_zeros((0, size // 2, size // 2), dtype=torch.bool)
    return F.avg_pool2d(padded[:, None], 2)[:, 0] >= 0.5


def restore_masks(logits: Tensor, shape: tuple[int, int], size: int) -> Tensor:
    """Logits (R, M, M) of one padded input at the size of its frame, (R, H, W)."""
    scale = logits.shape[-1] / size
    height, width = (max(1, round(side * scale)) for side in inner_size(shape, size))
    inner = logits[None, :, :height, :width]
    restored = F.interpolate(inner, size=shape, mode="bilinear", align_corners=False)
    return restored[0]
