"""AG-SSD's loss of every patient on its own, from one pass for all of them.

Same terms as ``student_pass``, laid out so that axis 0 of every layer's input is the patient:
crops pass the encoder view by view, the heads see (B, tokens, E). A patient's loss equals what
``student_pass`` gives for a batch of that patient alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from agssd_core.config import AgssdConfig
from agssd_core.losses.distillation import fused_with_fallback, patch_cost
from agssd_core.losses.precision import full
from agssd_core.losses.reconstruction import edge_weights, masked_l1_rows, patchify
from agssd_core.losses.rows import RowMeans, row_means
from agssd_core.models.cross_view import CrossViewAttention
from agssd_core.models.heads import DistillationHead
from agssd_core.models.standardise import moments, standardise
from agssd_core.models.student_teacher import AgssdNetwork
from agssd_core.training.hiding import Hidden
from agssd_core.training.student_pass import MicroBatch, rec_target
from agssd_core.views.batch import ViewBatch, token_grid


@dataclass(frozen=True)
class PatientRule:
    """How the student is judged.

    Attributes:
        standardised: the patch head's inputs are, over a patient's own tokens.
    """

    agssd: AgssdConfig
    standardised: bool
    beta: float


def patient_losses(student: AgssdNetwork, micro: MicroBatch, rule: PatientRule) -> Tensor:
    """(B,) weighted sum of the terms of each patient of a batch; terms of weight 0 are left out.

    Args:
        student: the network that trains.
        micro: views, hidden tokens and targets, a volume a patient.
        rule: settings, and this step's beta.
    """
    weights, batch, hidden = rule.agssd.loss, micro.batch, micro.hidden
    encoded = [
        student.encode(crops, mask)
        for crops, mask in zip(batch.globals_seen, hidden.mask, strict=True)
    ]
    tokens = torch.stack([found for _, found in encoded])
    total = tokens.new_zeros(len(batch))
    if weights.cls > 0:
        cls = [found for found, _ in encoded] + [
            student.encode(crops)[0] for crops in batch.locals_seen
        ]
        total = total + weights.cls * _cls_term(student, torch.stack(cls, dim=1), micro, rule)
    if weights.patch > 0:
        total = total + weights.patch * _patch_term(student, tokens, micro, rule)
    if weights.rec > 0:
        total = total + weights.rec * _rec_term(student, tokens, micro, rule.agssd)
    return total


def some_patients(micro: MicroBatch, chosen: Sequence[int]) -> MicroBatch:
    """The batch of some of its patients; all of them in order is the batch itself."""
    count = len(micro.batch)
    if list(chosen) == list(range(count)):
        return micro
    if len(chosen) != 1:
        raise ValueError("one patient or all of them can be chosen")
    start = chosen[0]
    views = len(micro.batch.globals_seen)
    edge = micro.edge.view(views, count, *micro.edge.shape[1:])
    return MicroBatch(
        batch=micro.batch.narrow(start, 1),
        hidden=micro.hidden.narrow(start, 1),
        targets=micro.targets.narrow(start, 1, micro.hidden),
        edge=edge[:, start : start + 1].flatten(0, 1),
    )


def _cls_term(student: AgssdNetwork, cls: Tensor, micro: MicroBatch, rule: PatientRule) -> Tensor:
    """As ``losses.distillation.cls_distillation_loss``, of each patient: (B,)."""
    temperature = rule.agssd.target.student_temperature
    logits = student.head_cls(full(cls))  # (B, V, K)
    log_student = (full(logits) / temperature).log_softmax(dim=-1)
    teacher = full(micro.targets.cls_probs)  # (T, B, K)
    cost = -torch.einsum("tbk,bvk->btv", teacher, log_student)
    same_crop = torch.eye(*cost.shape[1:], dtype=torch.bool, device=cost.device)
    pairs = same_crop.numel() - len(teacher)
    return cost.masked_fill(same_crop, 0).sum(dim=(1, 2)) / pairs


def _patch_term(
    student: AgssdNetwork, tokens: Tensor, micro: MicroBatch, rule: PatientRule
) -> Tensor:
    """Plain and fused patch distillation, as ``patch_distillation_loss``, of each patient: (B,)."""
    hidden, targets = micro.hidden, micro.targets
    temperature = rule.agssd.target.student_temperature
    logits = _patch_logits(student.head_patch, tokens, hidden, rule)
    cost = patch_cost(logits, targets.patch_probs, temperature=temperature)
    plain = row_means(cost, hidden.crop, rows=hidden.crops)
    if student.cvaa is None or targets.fused_probs is None:
        return _mean_of_crops(plain, hidden)
    # The teacher's tokens carry no gradient; the student's own carry theirs.
    other = tokens if rule.agssd.cvaa.kv_source == "student" else targets.tokens
    fused_tokens = _fused(student.cvaa, tokens, other, micro, rule.agssd)
    fused_logits = _patch_logits(student.head_patch, fused_tokens, hidden, rule)[hidden.shared]
    cost = patch_cost(fused_logits, targets.fused_probs, temperature=temperature)
    own = row_means(cost, hidden.crop[hidden.shared], rows=hidden.crops)
    fused = fused_with_fallback(plain, own, hidden.fusible.flatten())
    return (1 - rule.beta) * _mean_of_crops(plain, hidden) + rule.beta * _mean_of_crops(
        fused, hidden
    )


def _fused(
    attention: CrossViewAttention,
    tokens: Tensor,
    other: Tensor,
    micro: MicroBatch,
    agssd: AgssdConfig,
) -> Tensor:
    """(T, B, N, E): each view's tokens, compensated by the other view's."""
    batch, hidden, grid = micro.batch, micro.hidden, token_grid(agssd)
    places = (batch.q12, batch.q21)
    return torch.stack(
        [
            attention(
                tokens[view],
                other[1 - view],
                places[view],
                hidden.fuse_at[view],
                batch.key_mask[1 - view],
                grid,
            )
            for view in (0, 1)
        ]
    )


def _patch_logits(
    head: DistillationHead, tokens: Tensor, hidden: Hidden, rule: PatientRule
) -> Tensor:
    """(P, K) scores of the hidden tokens, computed as (B, most hidden of a patient, K).

    Rows that fill up a patient with fewer hidden tokens are 0 and never looked at again.
    """
    statistics = moments(tokens, dims=(0, 2), valid=hidden.mask) if rule.standardised else None
    chosen = hidden.of(standardise(tokens, statistics))
    views, volumes, _ = hidden.mask.shape
    rank = (hidden.mask.flatten(0, 1).cumsum(dim=1) - 1).flatten()[hidden.index]
    most = int(hidden.mask.sum(dim=2).max()) if volumes else 0
    place = (hidden.volume, hidden.crop // max(1, volumes) * most + rank)
    padded = chosen.new_zeros(volumes, views * most, chosen.shape[-1]).index_put(place, chosen)
    logits: Tensor = head(padded)[place]
    return logits


def _rec_term(
    student: AgssdNetwork, tokens: Tensor, micro: MicroBatch, agssd: AgssdConfig
) -> Tensor:
    """Masked reconstruction of each patient: (B,)."""
    if student.decoder is None:
        raise ValueError("a student without a decoder cannot reconstruct")
    hidden, grid = micro.hidden, token_grid(agssd)
    rebuilt = torch.stack([student.decoder(view, grid) for view in tokens])
    weights = None
    if agssd.loss.edge_weight > 0:
        edges = patchify(micro.edge, agssd.model.patch_size).flatten(0, 1)[hidden.index]
        weights = edge_weights(edges, strength=agssd.loss.edge_weight)
    target = rec_target(micro.batch, hidden, agssd)
    error = masked_l1_rows(
        hidden.of(rebuilt), target, hidden.crop, rows=hidden.crops, weights=weights
    )
    return _mean_of_crops(error, hidden)


def _mean_of_crops(rows: RowMeans, hidden: Hidden) -> Tensor:
    """Each patient's mean over those of its crops that have hidden tokens: (B,)."""
    shape = hidden.mask.shape[:2]
    present = rows.present.view(shape).sum(dim=0)
    return rows.means.view(shape).sum(dim=0) / present.clamp_min(1)


def only_finite(batch: ViewBatch) -> ViewBatch:
    """Voxels that are not finite become 0, so that a damaged volume stops nobody's step."""
    names = ("globals_clean", "globals_seen", "locals_seen")
    return replace(
        batch,
        **{name: getattr(batch, name).nan_to_num(nan=0, posinf=0, neginf=0) for name in names},
    )
