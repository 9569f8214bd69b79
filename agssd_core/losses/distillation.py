"""Cross-entropy between teacher and student: cls tokens across views, patch tokens within one."""

import torch
from torch import Tensor
from torch.nn import functional as F

from agssd_core.errors import ShapeError
from agssd_core.losses.precision import full, no_autocast
from agssd_core.losses.rows import RowMeans


def cls_distillation_loss(
    student_logits: Tensor, teacher_probs: Tensor, *, temperature: float
) -> Tensor:
    """Cross-entropy between every teacher view and every *other* student view.

    Global crops come first in both tensors, so view ``i`` of the teacher and view ``i`` of the
    student are the same crop; that pair is left out.

    Args:
        student_logits: (V, B, K) prototype scores of all V views.
        teacher_probs: (T, B, K) centred, sharpened, rows sum to 1; T global crops.
        temperature: student softmax temperature, dimensionless, above 0.

    Returns:
        Scalar in nats, the mean over T * V - T view pairs and B volumes.

    Raises:
        ShapeError: B or K differ, or no cross-view pair exists.

    Source:
        Caron et al. 2021, arXiv:2104.14294, Eq. 3. We average where the paper sums, so the
        value does not grow with the number of crops.
    """
    _require_matching_views(student_logits, teacher_probs)
    log_student = F.log_softmax(full(student_logits) / temperature, dim=-1)
    with no_autocast(log_student):
        pair_cost = -(full(teacher_probs).flatten(1) @ log_student.flatten(1).T)
    same_crop = torch.eye(*pair_cost.shape, dtype=torch.bool, device=pair_cost.device)  # (T, V)
    pairs = pair_cost.numel() - len(teacher_probs)
    return pair_cost.masked_fill(same_crop, 0).sum() / (pairs * student_logits.shape[1])


def patch_cost(student_logits: Tensor, teacher_probs: Tensor, *, temperature: float) -> Tensor:
    """Cross-entropy of each masked token with its teacher target.

    Args:
        student_logits: (P, K) scores of the P masked tokens of all crops.
        teacher_probs: (P, K) targets of the same tokens, rows sum to 1.
        temperature: student softmax temperature, above 0.

    Returns:
        (P,) in nats. Take ``row_means`` and then ``mean``: per crop first, then over the crops.

    Raises:
        ShapeError: shapes differ.

    Source:
        Zhou et al. 2022 (iBOT), arXiv:2111.07832, Eq. 2.
    """
    if student_logits.shape != teacher_probs.shape or student_logits.ndim != 2:
        raise ShapeError(
            f"student logits {tuple(student_logits.shape)} and teacher targets "
            f"{tuple(teacher_probs.shape)} must be the same (tokens, prototypes) array. Select "
            "both with the same token index."
        )
    scaled = full(student_logits) / temperature
    # -sum q (s - lse) = lse - q.s as q sums to 1: no (P, K) array of log-probabilities is kept.
    with no_autocast(scaled):
        return scaled.logsumexp(dim=-1) - torch.einsum("pk,pk->p", full(teacher_probs), scaled)


def patch_distillation_loss(
    plain: RowMeans, fused: RowMeans | None = None, *, beta: float = 0.0
) -> Tensor:
    """Blend of the plain and the fused patch term.

    Args:
        plain: per-crop means of ``patch_cost`` over all masked tokens.
        fused: the fused term as ``fused_with_fallback`` gives it; None without cross-view
            attention.
        beta: share of the fused term, in [0, 0.5]: the plain term is the shortcut guard.

    Returns:
        Scalar in nats. At beta 0 the fused term still gets a gradient, of 0.

    Source:
        After Yu & Dai 2026 (abstract); the blend is ours (docs/method.md, L_patch).
    """
    if fused is None:
        return plain.mean()
    return (1 - beta) * plain.mean() + beta * fused.mean()


def fused_with_fallback(plain: RowMeans, fused: RowMeans, usable: Tensor | None = None) -> RowMeans:
    """The fused term, with a crop's plain term where it has no fused one.

    Args:
        plain: per-crop means over all masked tokens.
        fused: per-crop means over masked tokens in the overlap.
        usable: (R,) bool, False for crops whose overlap holds too few inner tokens or whose
            fusion was dropped; None means all.

    Returns:
        Per-crop means; a crop is present where its plain term is.
    """
    taken = fused.present if usable is None else fused.present & usable
    return RowMeans(torch.where(taken, fused.means, plain.means), plain.counts)


def _require_matching_views(student_logits: Tensor, teacher_probs: Tensor) -> None:
    if student_logits.shape[1:] != teacher_probs.shape[1:] or student_logits.ndim != 3:
        raise ShapeError(
            f"student logits {tuple(student_logits.shape)} and teacher targets "
            f"{tuple(teacher_probs.shape)} differ in volumes or prototypes. Pass (views, volumes, "
            "prototypes) arrays of the same batch and head size."
        )
    views, targets = len(student_logits), len(teacher_probs)
    if not 0 < targets <= views or views < 2:
        raise ShapeError(
            f"{targets} teacher and {views} student views leave no cross-view pair. Give at least "
            "two student views, the teacher's own first among them."
        )
