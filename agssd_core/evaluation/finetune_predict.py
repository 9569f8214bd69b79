"""Predict a whole prepared scan with a network that sees crops of a volume, or resized frames.

This file needs nothing but numpy, torch and MONAI: a bundle carries a copy of it.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import numpy as np
import torch
from monai.data.utils import dense_patch_slices
from monai.inferers import sliding_window_inference
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

Reals = NDArray[np.float32]


class Predictor:
    """Class or structure probabilities of a prepared image.

    Volumes are covered by windows of the encoder's size; where they overlap, probabilities of
    structures are weighted towards a window's middle. Frames are resized to one square.

    Args:
        network: of ``finetune_nets``; put into evaluation mode.
        size: (D, H, W) of a window, or (S, S) of a resized frame.
        overlap: of windows, as a share of their side.
        device: where the network is.
        precision: context of every pass, such as autocast; None is the weights' own.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        size: Sequence[int],
        overlap: float,
        device: torch.device | str = "cpu",
        precision: AbstractContextManager[Any] | None = None,
    ) -> None:
        self._network = network.eval()
        self._size, self._overlap = tuple(size), overlap
        self._device, self._precision = torch.device(device), precision or nullcontext()

    @torch.inference_mode()
    def segment(self, image: Reals) -> Reals:
        """(D, H, W) or (H, W) in [0, 1] -> (K, ...) probabilities, background first."""
        pixels = torch.from_numpy(np.ascontiguousarray(image))[None, None]
        if image.ndim == 2:
            logits = self._pass(resized(pixels, self._size))
            return _numpy(resized(logits, image.shape).softmax(1)[0])
        found = sliding_window_inference(
            pixels,
            roi_size=self._size,
            sw_batch_size=1,
            predictor=lambda crops: self._pass(crops).softmax(1),
            overlap=self._overlap,
            mode="gaussian",
            progress=False,
        )
        return _numpy(cast(Tensor, found)[0])

    @torch.inference_mode()
    def classify(self, image: Reals, inside: NDArray[np.bool_]) -> NDArray[np.float64]:
        """(D, H, W) or (H, W) in [0, 1] -> (C,) probabilities.

        Args:
            image: prepared.
            inside: same shape; windows of a volume that show none of it say nothing.
        """
        pixels = torch.from_numpy(np.ascontiguousarray(image))
        if image.ndim == 2:
            windows = [resized(pixels[None, None], self._size)]
        else:
            windows = [crop[None, None] for crop in self._windows(pixels, inside)]
        logits = torch.cat([self._pass(window) for window in windows]).double().mean(0)
        return np.asarray(logits.softmax(0).numpy(), dtype=np.float64)

    def _pass(self, crops: Tensor) -> Tensor:
        with self._precision:
            found: Tensor = self._network(crops.to(self._device))
        return found.float().cpu()

    def _windows(self, pixels: Tensor, inside: NDArray[np.bool_]) -> list[Tensor]:
        volume, body = padded(pixels, self._size), padded(torch.from_numpy(inside), self._size)
        step = [max(1, int(side * (1 - self._overlap))) for side in self._size]
        places = dense_patch_slices(tuple(volume.shape), self._size, step)
        chosen = [place for place in places if body[place].any()] or list(places)
        return [volume[place] for place in chosen]


def padded(volume: Tensor, size: Sequence[int]) -> Tensor:
    """At least of that size in the last axes, with zeros on both sides."""
    missing = [max(0, side - have) for side, have in zip(size, volume.shape, strict=True)]
    pads = [part for gap in reversed(missing) for part in (gap // 2, gap - gap // 2)]
    return functional.pad(volume, pads) if any(pads) else volume


def resized(frames: Tensor, size: Sequence[int]) -> Tensor:
    """(B, C, h, w) -> (B, C, H, W), smoothed where it gets smaller."""
    return functional.interpolate(
        frames, size=list(size), mode="bilinear", align_corners=False, antialias=True
    )


def _numpy(values: Tensor) -> Reals:
    return np.asarray(values.numpy(), dtype=np.float32)
