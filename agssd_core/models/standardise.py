"""Standardisation of what enters a head: affine-free, with explicit statistics.

``batch``: ``moments`` over every axis but the last. ``volume``: over one volume's own tokens.
``ema``: running moments of teacher features, kept in the model's state. Without it the heads
settle on the uniform answer at the batch sizes of 3D work (docs/method.md).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from agssd_core.models.precision import full

AllSum = Callable[[Tensor], Tensor]
EPSILON = 1e-5


@dataclass(frozen=True)
class Moments:
    """Mean and (biased) variance, broadcastable against the tokens they describe."""

    mean: Tensor
    var: Tensor


def moments(
    x: Tensor,
    *,
    dims: tuple[int, ...],
    valid: Tensor | None = None,
    all_sum: AllSum | None = None,
) -> Moments:
    """Mean and variance over some axes, differentiable.

    Args:
        x: (..., E), at least one element along ``dims``.
        dims: axes to take them over; those stay as size 1.
        valid: bool, shape of ``x`` without its last axis; tokens that count. A group without
            any valid token gets mean 0 and variance 0.
        all_sum: differentiable sum over processes; None is one process. Both the sums and the
            counts pass through it, so processes may hold different numbers of tokens.

    Returns:
        Moments in float32.

    Source:
        Ioffe & Szegedy 2015, arXiv:1502.03167, Algorithm 1, without the affine part.
    """
    x = full(x)
    keep = torch.ones_like(x[..., :1]) if valid is None else valid[..., None].to(x.dtype)
    total = all_sum if all_sum is not None else _itself
    count = total(keep.sum(dim=dims, keepdim=True)).clamp_min(1)
    mean = total((x * keep).sum(dim=dims, keepdim=True)) / count
    # Two passes: E[x^2] - E[x]^2 loses all digits when the mean is large.
    var = total(((x - mean).square() * keep).sum(dim=dims, keepdim=True)) / count
    return Moments(mean, var)


def standardise(x: Tensor, statistics: Moments | None) -> Tensor:
    """(x - mean) / sqrt(var + 1e-5) in float32; None only casts (``input_norm = none``)."""
    x = full(x)
    if statistics is None:
        return x
    return (x - statistics.mean) * torch.rsqrt(statistics.var + EPSILON)


def updated_moments(running: Moments, fresh: Moments, *, momentum: float) -> Moments:
    """Exponential moving moments: ``momentum`` of the old, the rest of the new; no gradient.

    The variance is that of the mixture of both, so it also counts how far the means lie apart.

    Args:
        running: (E,) each.
        fresh: E elements each, of any shape.
        momentum: in [0, 1]; 1 changes nothing.
    """
    with torch.no_grad():
        new_mean = fresh.mean.reshape(running.mean.shape)
        new_var = fresh.var.reshape(running.var.shape)
        mean = momentum * running.mean + (1 - momentum) * new_mean
        spread = momentum * (1 - momentum) * (running.mean - new_mean).square()
        return Moments(mean, momentum * running.var + (1 - momentum) * new_var + spread)


def _itself(x: Tensor) -> Tensor:
    return x
