"""Delineation loss of LP-SAM: which prompt stands for which structure, and how well.

R prompts give R masks of a frame; public sets name other structures each, so prompts are
assigned to structures by the cheapest one-to-one matching. A prompt without a structure
learns "nothing here" through its predicted IoU alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from agssd_core.errors import ShapeError

_EPS = 1e-5
# Share of the predicted IoU in the matching. Without it prompts that fit a structure equally well
# take turns, and none of them ever learns that it is the one.
_CONFIDENCE = 0.5


@dataclass(frozen=True)
class DelineationWeights:
    """Shares of the two mask terms; ``positive`` weighs foreground pixels in the BCE."""

    alpha: float = 0.15
    positive: float = 1.0
    iou: float = 1.0


PAPER = DelineationWeights()
CODE = DelineationWeights(alpha=0.8, positive=2.0)


def pair_costs(logits: Tensor, masks: Tensor, weights: DelineationWeights = PAPER) -> Tensor:
    """Mask loss of every prompt against every structure of one frame.

    Args:
        logits: (R, H, W), one mask a prompt.
        masks: (K, H, W), bool or 0/1, one structure each.
        weights: shares of the terms.

    Returns:
        (R, K): ``(1 - alpha) BCE + alpha Dice``, BCE averaged over pixels, Dice with
        squared denominators.

    Raises:
        ShapeError: the masks have another size than the logits.

    Source:
        Supplement of ANAUS (arXiv:2605.25402), alpha = 0.15; squared Dice as Milletari et
        al. 2016, arXiv:1606.04797. Each mask has its own Dice, not one of the whole batch.
    """
    if logits.shape[-2:] != masks.shape[-2:]:
        raise ShapeError(
            f"masks are {tuple(masks.shape[-2:])}, logits {tuple(logits.shape[-2:])}; both must "
            "have one size. Resize the masks by nearest neighbour first."
        )
    flat, truth = logits.flatten(1), masks.to(logits.dtype).flatten(1)
    inside = weights.positive * F.softplus(-flat) @ truth.T
    bce = (inside + F.softplus(flat) @ (1 - truth).T) / flat.shape[1]
    share = flat.sigmoid()
    total = share.square().sum(1, keepdim=True) + truth.square().sum(1)
    dice = 1 - (2 * share @ truth.T + _EPS) / (total + _EPS)
    return (1 - weights.alpha) * bce + weights.alpha * dice


def match_prompts(costs: Tensor) -> tuple[Tensor, Tensor]:
    """Indices (prompts, structures) of the cheapest one-to-one matching of (R, K) costs."""
    known = costs.detach().cpu().double().nan_to_num(nan=1e9, posinf=1e9)
    rows, columns = linear_sum_assignment(known.numpy())
    return (
        torch.as_tensor(rows, device=costs.device),
        torch.as_tensor(columns, device=costs.device),
    )


def delineation_loss(
    logits: Tensor,
    predicted_iou: Tensor,
    structures: Sequence[Tensor],
    *,
    weights: DelineationWeights = PAPER,
) -> Tensor:
    """Mean mask loss of the matched prompts plus the squared error of every predicted IoU.

    Args:
        logits: (B, R, H, W).
        predicted_iou: (B, R).
        structures: B tensors (K, H, W), K may differ and may be 0.
        weights: shares of the terms.

    Returns:
        Scalar. A batch without any structure gives the IoU term alone.

    Raises:
        ShapeError: frames, prompts or sizes do not belong together.
    """
    if logits.shape[:2] != predicted_iou.shape or len(logits) != len(structures):
        raise ShapeError(
            f"logits {tuple(logits.shape)}, predicted IoU {tuple(predicted_iou.shape)} and "
            f"{len(structures)} mask sets must agree in frames and prompts. Pass one set a frame."
        )
    achieved = torch.zeros_like(predicted_iou)
    matched: list[Tensor] = []
    for index, masks in enumerate(structures):
        costs = pair_costs(logits[index], masks, weights)
        confident = predicted_iou[index, :, None].detach().clamp(0, 1)
        prompts, chosen = match_prompts(costs - _CONFIDENCE * confident)
        matched.append(costs[prompts, chosen])
        achieved[index, prompts] = _iou(logits[index, prompts] > 0, masks[chosen] > 0).to(
            achieved.dtype
        )
    mask_costs = torch.cat(matched)
    mask_term = mask_costs.sum() / max(len(mask_costs), 1)
    return mask_term + weights.iou * F.mse_loss(predicted_iou, achieved)


def prompted_loss(
    logits: Tensor,
    predicted_iou: Tensor,
    masks: Tensor,
    *,
    weights: DelineationWeights = PAPER,
) -> Tensor:
    """Loss of prompts that are known to stand for a structure each, as clicks and boxes do.

    Args:
        logits: (N, H, W).
        predicted_iou: (N,).
        masks: (N, H, W), the structure of each prompt.
        weights: shares of the terms.

    Returns:
        Scalar: mean mask loss plus the squared error of the predicted IoU.

    Raises:
        ShapeError: the numbers or sizes differ.
    """
    if len(logits) != len(masks) or predicted_iou.shape != logits.shape[:1]:
        raise ShapeError(
            f"{len(logits)} masks, {len(predicted_iou)} predicted IoUs and {len(masks)} "
            "structures must be equally many. Pass one structure a prompt."
        )
    costs = torch.stack(
        [
            pair_costs(logit[None], mask[None], weights)[0, 0]
            for logit, mask in zip(logits, masks, strict=True)
        ]
    )
    achieved = _iou(logits > 0, masks > 0).to(predicted_iou.dtype)
    return costs.mean() + weights.iou * F.mse_loss(predicted_iou, achieved)


def _iou(found: Tensor, truth: Tensor) -> Tensor:
    common = (found & truth).flatten(1).sum(1)
    return common / (found | truth).flatten(1).sum(1).clamp(min=1)
