"""The student's half of a step: masked global crops, local crops, and the loss terms."""

from dataclasses import dataclass

import torch
from torch import Tensor

from agssd_core.config import AgssdConfig, LossConfig
from agssd_core.losses.distillation import (
    cls_distillation_loss,
    fused_with_fallback,
    patch_cost,
    patch_distillation_loss,
)
from agssd_core.losses.reconstruction import (
    edge_weights,
    masked_l1,
    normalised_patches,
    patchify,
)
from agssd_core.losses.regularisers import (
    align_loss,
    attention_supervision,
    koleo,
    trilinear_weights,
    variance_hinge,
)
from agssd_core.losses.rows import RowMeans, row_means
from agssd_core.models.standardise import standardise
from agssd_core.models.student_teacher import AgssdNetwork
from agssd_core.training.build import Resolved
from agssd_core.training.distributed import ProcessGroup
from agssd_core.training.hiding import Hidden
from agssd_core.training.mixed_precision import EncoderPrecision
from agssd_core.training.teacher_pass import Targets, cls_moments, fuse, pair_views, patch_head
from agssd_core.views.batch import ViewBatch, token_grid
from agssd_core.views.geometry import sample_tokens

Terms = dict[str, Tensor]


@dataclass(frozen=True)
class StudentRule:
    """How the student is judged at this step."""

    agssd: AgssdConfig
    resolved: Resolved
    beta: float
    group: ProcessGroup


@dataclass(frozen=True)
class MicroBatch:
    """Some volumes of a step with their hidden tokens, targets and edges."""

    batch: ViewBatch
    hidden: Hidden
    targets: Targets
    edge: Tensor


@dataclass(frozen=True)
class Encoded:
    """Student tokens: cls (V, B, E) of all views, tokens (T, B, N, E) of the global ones."""

    cls: Tensor
    tokens: Tensor
    fused: Tensor | None
    attention: Tensor | None


def student_terms(
    student: AgssdNetwork,
    micro: MicroBatch,
    rule: StudentRule,
    *,
    autocast: EncoderPrecision,
    generator: torch.Generator,
) -> Terms:
    """Every loss term of a micro-batch; ``loss`` is their weighted sum.

    Args:
        student: the network that trains.
        micro: views, hidden tokens, targets.
        rule: settings, and this step's beta.
        autocast: precision of the encoder, the cross-view attention and the decoder's blocks.
        generator: of stochastic depth.

    Returns:
        0-d tensors by name; optional terms only where their weight is not 0.
    """
    with autocast:
        encoded = _encode(student, micro, rule.agssd, generator)
        rebuilt = _rebuilt(student, encoded, micro, rule.agssd)
    terms = _distillation_terms(student, encoded, micro, rule)
    terms["loss_rec"] = _reconstruction(rebuilt, micro, rule.agssd)
    terms |= _optional_terms(student, encoded, micro, rule)
    weights = rule.agssd.loss
    names = {"loss_patch": "patch", "loss_cls": "cls", "loss_rec": "rec", **_OPTIONAL}
    terms["loss"] = sum(
        (getattr(weights, field) * terms[name] for name, field in names.items() if name in terms),
        start=terms["loss_rec"].new_zeros(()),
    )
    return terms


def _encode(
    student: AgssdNetwork, micro: MicroBatch, agssd: AgssdConfig, generator: torch.Generator
) -> Encoded:
    """One pass over the masked global crops, one over the local crops, then the fusion."""
    batch, hidden, targets = micro.batch, micro.hidden, micro.targets
    views, count = batch.globals_seen.shape[:2]
    cls, tokens = student.encode(
        batch.globals_seen.flatten(0, 1), hidden.mask.flatten(0, 1), generator=generator
    )
    tokens = tokens.view(views, count, *tokens.shape[1:])
    cls = cls.view(views, count, -1)
    if len(batch.locals_seen):
        cls_local, _ = student.encode(batch.locals_seen.flatten(0, 1), generator=generator)
        cls = torch.cat([cls, cls_local.view(-1, count, cls.shape[-1])])
    # The teacher's tokens carry no gradient; the student's own carry theirs.
    other = tokens if agssd.cvaa.kv_source == "student" else targets.tokens
    if student.cvaa is not None and agssd.loss.attn_sup > 0:
        own, others, coords, fuse_at, keys = pair_views(tokens, other, batch, hidden)
        fused, rows = student.cvaa.forward_with_rows(
            own, others, coords, fuse_at, keys, token_grid(agssd)
        )
        return Encoded(cls, tokens, fused.view(tokens.shape), rows)
    fused_tokens = fuse(student, tokens, other, batch=batch, hidden=hidden, agssd=agssd)
    return Encoded(cls, tokens, fused_tokens, None)


def _distillation_terms(
    student: AgssdNetwork, encoded: Encoded, micro: MicroBatch, rule: StudentRule
) -> Terms:
    """L_cls between views; L_patch within a view, plain and fused."""
    temperature = rule.agssd.target.student_temperature
    targets, all_sum = micro.targets, rule.group.sum_with_gradient
    statistics = targets.cls_moments or cls_moments(encoded.cls, rule.resolved, all_sum=all_sum)
    cls_logits = student.head_cls(standardise(encoded.cls, statistics))
    plain = _patch_means(student, encoded.tokens, micro, rule)
    fused: RowMeans | None = None
    if encoded.fused is not None:
        own = _patch_means(student, encoded.fused, micro, rule, shared_only=True)
        fused = fused_with_fallback(plain, own, micro.hidden.fusible.flatten())
    terms = {
        "loss_cls": cls_distillation_loss(cls_logits, targets.cls_probs, temperature=temperature),
        "loss_patch": patch_distillation_loss(plain, fused, beta=rule.beta),
    }
    if fused is not None:
        terms["loss_patch_fused"] = fused.mean()
    return terms


def _patch_means(
    student: AgssdNetwork,
    tokens: Tensor,
    micro: MicroBatch,
    rule: StudentRule,
    *,
    shared_only: bool = False,
) -> RowMeans:
    hidden, targets = micro.hidden, micro.targets
    logits = patch_head(
        student.head_patch,
        tokens,
        hidden,
        mode=rule.resolved.input_norm_patch,
        all_sum=rule.group.sum_with_gradient,
        shared_only=shared_only,
    )
    probs = targets.fused_probs if shared_only else targets.patch_probs
    crop = hidden.crop[hidden.shared] if shared_only else hidden.crop
    if probs is None:
        probs = logits.detach()
    cost = patch_cost(logits, probs, temperature=rule.agssd.target.student_temperature)
    return row_means(cost, crop, rows=hidden.crops)


def rec_target(batch: ViewBatch, hidden: Hidden, agssd: AgssdConfig) -> Tensor:
    """Clean voxels of the hidden tokens, (P, p^3), normalised per patch where configured."""
    patches = patchify(batch.globals_clean.flatten(0, 1), agssd.model.patch_size)
    chosen = patches.flatten(0, 1)[hidden.index]
    return normalised_patches(chosen) if agssd.loss.norm_pix else chosen


def _rebuilt(
    student: AgssdNetwork, encoded: Encoded, micro: MicroBatch, agssd: AgssdConfig
) -> Tensor | None:
    """Voxels of the hidden tokens, (P, p^3) float32; None where nothing is reconstructed."""
    if student.decoder is None or agssd.loss.rec == 0:
        return None
    tokens = encoded.tokens.flatten(0, 1)
    voxels: Tensor = student.decoder(tokens, token_grid(agssd), micro.hidden.index)
    return voxels


def _reconstruction(rebuilt: Tensor | None, micro: MicroBatch, agssd: AgssdConfig) -> Tensor:
    hidden = micro.hidden
    if rebuilt is None:
        return micro.batch.globals_seen.new_zeros(())
    weights = None
    if agssd.loss.edge_weight > 0:
        edges = patchify(micro.edge, agssd.model.patch_size).flatten(0, 1)[hidden.index]
        weights = edge_weights(edges, strength=agssd.loss.edge_weight)
    target = rec_target(micro.batch, hidden, agssd)
    return masked_l1(rebuilt, target, hidden.crop, rows=hidden.crops, weights=weights)


_OPTIONAL = {
    "loss_koleo": "koleo",
    "loss_variance": "variance",
    "loss_align": "align",
    "loss_attn_sup": "attn_sup",
}


def _optional_terms(
    student: AgssdNetwork, encoded: Encoded, micro: MicroBatch, rule: StudentRule
) -> Terms:
    """Terms that are off by default; computed only where they weigh something."""
    weights: LossConfig = rule.agssd.loss
    terms: Terms = {}
    views = len(micro.batch.globals_seen)
    if weights.koleo > 0:
        terms["loss_koleo"] = koleo(encoded.cls[:views])
    if weights.variance > 0:
        terms["loss_variance"] = variance_hinge(encoded.cls[:views].float().flatten(0, 1))
    if weights.align > 0 and student.align is not None:
        terms["loss_align"] = _alignment(student, encoded, micro, rule.agssd)
    if encoded.attention is not None:
        coords = torch.cat([micro.batch.q12, micro.batch.q21])
        usable = micro.batch.inner & micro.hidden.fusible[..., None]
        terms["loss_attn_sup"] = attention_supervision(
            encoded.attention,
            trilinear_weights(coords, token_grid(rule.agssd)),
            usable.flatten(0, 1),
        )
    return terms


def _alignment(
    student: AgssdNetwork, encoded: Encoded, micro: MicroBatch, agssd: AgssdConfig
) -> Tensor:
    """Predict the other view's teacher token at the same place (``cvaa.mode = align``)."""
    batch, grid = micro.batch, token_grid(agssd)
    assert student.align is not None  # noqa: S101 - the caller has looked
    other = micro.targets.tokens.flip(0).flatten(0, 1)
    target = sample_tokens(other, torch.cat([batch.q12, batch.q21]), grid)
    usable = batch.inner & micro.hidden.fusible[..., None]
    predicted = student.align(encoded.tokens.flatten(0, 1))
    return align_loss(predicted, target, usable.flatten(0, 1))
