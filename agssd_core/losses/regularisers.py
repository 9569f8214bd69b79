"""Optional terms, off by default: KoLeo, variance hinge, alignment, attention supervision."""

import torch
from torch import Tensor
from torch.nn import functional as F

from agssd_core.losses.precision import full, no_autocast
from agssd_core.losses.rows import row_means

_SMALL = 1e-8


def koleo(cls_tokens: Tensor) -> Tensor:
    """Spread unit vectors evenly: minus the mean log distance to the nearest neighbour.

    Args:
        cls_tokens: (V, B, E), one group of B volumes per crop; crops of one volume are never
            compared with each other. Not compatible with per-sample gradients.

    Returns:
        Scalar in nats, mean over groups; 0 when B is 1.

    Source:
        Sablayrolles et al. 2019, arXiv:1806.03198, Eq. 2; per crop group as Oquab et al. 2023
        (DINOv2), arXiv:2304.07193, section 4.
    """
    if cls_tokens.shape[1] < 2:
        return full(cls_tokens).sum() * 0
    unit = F.normalize(full(cls_tokens), dim=-1)
    with torch.no_grad(), no_autocast(unit):
        cosine = unit @ unit.transpose(1, 2)
        cosine.diagonal(dim1=1, dim2=2).fill_(-2)
        nearest = cosine.argmax(dim=-1)
    neighbours = unit.gather(1, nearest[..., None].expand_as(unit))
    distance: Tensor = torch.linalg.vector_norm(unit - neighbours + _SMALL, dim=-1)
    return -(distance + _SMALL).log().mean()


def variance_hinge(tokens: Tensor, *, target_std: float = 1.0) -> Tensor:
    """Keep every channel's standard deviation over the batch above a floor.

    Args:
        tokens: (n, E), n at least 2; fewer give 0.
        target_std: floor.

    Returns:
        Scalar, mean over channels.

    Source:
        Bardes et al. 2022 (VICReg), arXiv:2105.04906, Eq. 1-2.
    """
    if len(tokens) < 2:
        return full(tokens).sum() * 0
    deviation = (full(tokens).var(dim=0) + 1e-4).sqrt()
    return F.relu(target_std - deviation).mean()


def align_loss(predicted: Tensor, target: Tensor, inner: Tensor) -> Tensor:
    """2 - 2 cos between predicted and sampled teacher tokens over inner tokens.

    Args:
        predicted: (B, N, E) predictor output for one view.
        target: (B, N, E) the other view's teacher tokens, sampled at the same places; constant.
        inner: (B, N) bool, tokens whose sample needs no extrapolation.

    Returns:
        Scalar in [0, 4], mean over tokens, then over volumes that have any; 0 without any.

    Source:
        Grill et al. 2020 (BYOL), arXiv:2006.07733, Eq. 2; as a fourth term it is our ablation.
    """
    cosine = F.cosine_similarity(full(predicted), full(target.detach()), dim=-1)
    return _mean_over(2 - 2 * cosine, inner)


def trilinear_weights(coords: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """Weights with which trilinear sampling at ``coords`` would mix the tokens of a grid.

    Args:
        coords: (B, N, 3) in the grid's [-1, 1] frame.
        grid: S tokens along (depth, height, width).

    Returns:
        (B, N, S); rows sum to 1 for inner tokens.
    """
    parts = []
    for axis, side in enumerate(grid):
        place = (coords[..., axis : axis + 1] + 1) * side / 2 - 0.5
        steps = torch.arange(side, dtype=coords.dtype, device=coords.device)
        parts.append(F.relu(1 - (place - steps).abs()))
    depth, height, breadth = parts
    planes = (depth[..., :, None] * height[..., None, :]).flatten(2)
    return (planes[..., :, None] * breadth[..., None, :]).flatten(2)


def attention_supervision(rows: Tensor, weights: Tensor, inner: Tensor) -> Tensor:
    """Cross-entropy of attention, averaged over heads, with the true correspondence.

    Args:
        rows: (B, h, N, S) attention rows, each summing to 1. Heads are averaged first, so
            they may specialise.
        weights: (B, N, S) ``trilinear_weights`` of the same tokens.
        inner: (B, N) bool.

    Returns:
        Scalar in nats, mean over tokens, then over volumes that have any; 0 without any.
    """
    log_mean = full(rows).mean(dim=1).clamp_min(_SMALL).log()
    with no_autocast(log_mean):
        cost = -torch.einsum("bns,bns->bn", full(weights), log_mean)
    return _mean_over(cost, inner)


def _mean_over(values: Tensor, chosen: Tensor) -> Tensor:
    volumes, tokens = values.shape
    row = torch.arange(volumes, device=values.device).repeat_interleave(tokens)
    weights = chosen.flatten().to(values.dtype)
    return row_means(values.flatten(), row, rows=volumes, weights=weights).mean()
