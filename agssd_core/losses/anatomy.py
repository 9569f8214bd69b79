"""ANAUS's two terms: anatomy-separating alignment and core-region prediction.

Rows are sampled anatomies: B frames, K draws each, C channels. Id 0 marks a draw that found no
anatomy; it is neither positive nor negative and weighs nothing.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from agssd_core.errors import ShapeError

_FAR = -1e9


def alignment_loss(
    predictions: Tensor,
    targets: Tensor,
    ids: Tensor,
    *,
    temperature: float,
    drop_same_id: bool = False,
) -> Tensor:
    """InfoNCE over anatomies: the same one in the other view attracts, all others repel.

    For a row of view a, positives are the other view's rows of the same frame and id. Rows of
    its own view with the same frame and id are left out, everything else is a negative. A row
    weighs 1 / (times its id was drawn in its own view), and nothing without a positive, but it
    counts in the denominator.

    Args:
        predictions: (2, B, K, C) student, both views; normalised here.
        targets: (2, B, K, C) teacher; normalised here, no gradient.
        ids: (2, B, K) long, drawn once for student and teacher.
        temperature: above 0, dimensionless.
        drop_same_id: leave out rows of other frames with the same id, for ids that mean the
            same anatomy everywhere.

    Returns:
        Scalar in nats, the mean over B * K rows of each view, summed over the two views.

    Raises:
        ShapeError: shapes differ, or there are not two views.

    Source:
        Henaff et al. 2021, arXiv:2103.10957, Eq. 3, in the form of ANAUS. One product gives the
        logits of both views; the cross-entropy is logsumexp less the mean positive logit.
    """
    if predictions.shape != targets.shape or predictions.shape[:3] != ids.shape or len(ids) != 2:
        raise ShapeError(
            f"predictions {tuple(predictions.shape)}, targets {tuple(targets.shape)} and ids "
            f"{tuple(ids.shape)} do not fit. Give two views of (B, K, C) with (B, K) ids."
        )
    views, frames, draws = ids.shape
    student = functional.normalize(predictions.flatten(0, 2), dim=1)
    teacher = functional.normalize(targets.detach().flatten(0, 2), dim=1)
    logits = student @ teacher.T / temperature
    place = torch.arange(views * frames, device=ids.device).repeat_interleave(draws)
    frame, flat = place % frames, ids.flatten()
    same_view = (place // frames)[:, None] == (place // frames)[None]
    same_id = flat[:, None] == flat[None]
    same_frame = frame[:, None] == frame[None]
    real = flat > 0
    own = same_view & same_frame & same_id
    positive = ~same_view & same_frame & same_id & real[:, None]
    left_out = own | ~real[None]
    if drop_same_id:
        left_out |= ~same_frame & same_id
    logits = logits.masked_fill(left_out, _FAR)
    count = positive.sum(dim=1)
    attract = torch.where(positive, logits, torch.zeros_like(logits)).sum(dim=1)
    cost = logits.logsumexp(dim=1) - attract / count.clamp_min(1)
    alive = (count > 0) & real
    weight = alive.to(cost.dtype) / own.sum(dim=1).to(cost.dtype)
    return torch.where(alive, cost * weight, torch.zeros_like(cost)).sum() / (frames * draws)


def core_region_loss(
    predictions: Tensor,
    targets: Tensor,
    valid: Tensor,
    *,
    form: Literal["squared", "cosine"] = "squared",
) -> Tensor:
    """Predict the clean overlap's anatomies from the damaged overlap.

    Args:
        predictions: (B, K, C) student on the damaged crop.
        targets: (B, K, C) teacher on the clean crop, the same ids; no gradient.
        valid: (B, K) bool, False where there is no overlap or a side lacks the anatomy.
        form: ``squared`` is the mean squared difference of the vectors as they are; ``cosine``
            is 2 - 2 cos.

    Returns:
        Scalar, the mean over valid rows (and channels); 0 with a gradient of 0 without any.

    Raises:
        ShapeError: shapes differ.

    Source:
        ANAUS, core-region prediction, with regions pooled in the overlap's own geometry and the
        same ids on both sides, as its paper has it.
    """
    if predictions.shape != targets.shape or predictions.shape[:2] != valid.shape:
        raise ShapeError(
            f"predictions {tuple(predictions.shape)}, targets {tuple(targets.shape)} and valid "
            f"{tuple(valid.shape)} do not fit. Give (B, K, C) twice and (B, K)."
        )
    goal = targets.detach()
    if form == "squared":
        cost = (predictions - goal).square().mean(dim=2)
    else:
        cost = 2 - 2 * functional.cosine_similarity(predictions, goal, dim=2)
    return torch.where(valid, cost, torch.zeros_like(cost)).sum() / valid.sum().clamp_min(1)
