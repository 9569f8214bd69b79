"""The teacher's half of a step: one pass over the unmasked global crops, and its targets."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from agssd_core.config import AgssdConfig
from agssd_core.losses.centring import centred_softmax, sinkhorn
from agssd_core.models.heads import DistillationHead
from agssd_core.models.precision import full
from agssd_core.models.standardise import AllSum, Moments, moments, standardise, updated_moments
from agssd_core.models.student_teacher import AgssdNetwork, ModelState
from agssd_core.training.build import Resolved
from agssd_core.training.distributed import ProcessGroup
from agssd_core.training.hiding import Hidden
from agssd_core.training.mixed_precision import EncoderPrecision
from agssd_core.views.batch import ViewBatch, token_grid

CLS_STATISTICS_MOMENTUM = 0.98


@dataclass(frozen=True)
class Targets:
    """What the student has to match, and what the running state needs; nothing has a gradient.

    Attributes:
        cls_probs: (T, B, K). patch_probs: (P, K). fused_probs: (F, K), None without CVAA.
        cls: (T, B, E) float32. tokens: (T, B, N, E). fused: the same after CVAA, or None.
        cls_logits: (T, B, K). patch_logits: (P, K).
        cls_moments: running moments that include this batch (``input_norm_cls = ema``), or None.
    """

    cls_probs: Tensor
    patch_probs: Tensor
    fused_probs: Tensor | None
    cls: Tensor
    tokens: Tensor
    fused: Tensor | None
    cls_logits: Tensor
    patch_logits: Tensor
    cls_moments: Moments | None

    def narrow(self, start: int, length: int, hidden: Hidden) -> "Targets":
        """The targets of the volumes ``start`` to ``start + length``; ``hidden`` is the whole's."""
        rows, shared = hidden.rows(start, length)
        mine = slice(start, start + length)
        return replace(
            self,
            cls_probs=self.cls_probs[:, mine],
            patch_probs=self.patch_probs[rows],
            fused_probs=None if self.fused_probs is None else self.fused_probs[shared],
            cls=self.cls[:, mine],
            tokens=self.tokens[:, mine],
            fused=None if self.fused is None else self.fused[:, mine],
            cls_logits=self.cls_logits[:, mine],
            patch_logits=self.patch_logits[rows],
        )


@dataclass(frozen=True)
class TargetRule:
    """How logits become targets at this step."""

    agssd: AgssdConfig
    resolved: Resolved
    temperature: float
    step: int
    parts: int
    group: ProcessGroup


@torch.no_grad()
def teacher_targets(
    teacher: AgssdNetwork,
    state: ModelState,
    *,
    batch: ViewBatch,
    hidden: Hidden,
    rule: TargetRule,
    autocast: EncoderPrecision,
) -> Targets:
    """Encode both global crops, unmasked, and turn heads' logits into targets.

    Heads see hidden tokens only: targets of visible tokens are never used, and the centre is
    that of the targets in use. Under gradient accumulation the encoder works in parts, but
    statistics, centres and Sinkhorn run over the whole batch.
    """
    with autocast:
        cls, tokens = _encode(teacher, batch, parts=rule.parts)
        fused = fuse(teacher, tokens, tokens, batch=batch, hidden=hidden, agssd=rule.agssd)
    cls = full(cls)
    all_sum = rule.group.sum

    running = None
    if rule.resolved.input_norm_cls == "ema":
        running = _running_moments(state, cls, step=rule.step, all_sum=all_sum)
    cls_logits = teacher.head_cls(
        standardise(cls, running or cls_moments(cls, rule.resolved, all_sum=all_sum))
    )
    patch_logits = patch_head(
        teacher.head_patch, tokens, hidden, mode=rule.resolved.input_norm_patch, all_sum=all_sum
    )
    centre = _patch_centre(state, patch_logits, hidden, rule.resolved)
    fused_probs = None
    if fused is not None:
        fused_logits = patch_head(
            teacher.head_patch,
            fused,
            hidden,
            mode=rule.resolved.input_norm_patch,
            all_sum=all_sum,
            shared_only=True,
        )
        fused_centre = centre[hidden.shared] if centre is not None and centre.ndim == 2 else centre
        fused_probs = _targets(fused_logits, fused_centre, rule, rule.resolved.target_patch)
    centre_cls = state.centre_cls if rule.resolved.target_cls == "center" else None
    return Targets(
        cls_probs=_targets(cls_logits, centre_cls, rule, rule.resolved.target_cls),
        patch_probs=_targets(patch_logits, centre, rule, rule.resolved.target_patch),
        fused_probs=fused_probs,
        cls=cls,
        tokens=tokens,
        fused=fused,
        cls_logits=cls_logits,
        patch_logits=patch_logits,
        cls_moments=running,
    )


def fuse(
    network: AgssdNetwork,
    tokens: Tensor,
    other: Tensor,
    *,
    batch: ViewBatch,
    hidden: Hidden,
    agssd: AgssdConfig,
) -> Tensor | None:
    """Cross-view attention in both directions at once; None when the network has none.

    Args:
        network: student or teacher.
        tokens: (T, B, N, E) queries, both views.
        other: (T, B, N, E) the views' keys and values; view v attends to the one that is not v.
        batch: where each view's tokens lie in the other view.
        hidden: which tokens may be altered.
        agssd: the method's settings.
    """
    if network.cvaa is None:
        return None
    own, others, coords, fuse_at, keys = pair_views(tokens, other, batch, hidden)
    fused: Tensor = network.cvaa(own, others, coords, fuse_at, keys, token_grid(agssd))
    return fused.view(tokens.shape)


def pair_views(
    tokens: Tensor, other: Tensor, batch: ViewBatch, hidden: Hidden
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Line both directions up along the batch axis: (2B, ...) arguments of the attention."""
    return (
        tokens.flatten(0, 1),
        other.flip(0).flatten(0, 1),
        torch.cat([batch.q12, batch.q21]),
        hidden.fuse_at.flatten(0, 1),
        batch.key_mask.flip(0).flatten(0, 1),
    )


def cls_moments(cls: Tensor, resolved: Resolved, *, all_sum: AllSum) -> Moments | None:
    """Statistics of cls tokens over samples and views; None for ``none``."""
    if resolved.input_norm_cls == "none":
        return None
    return moments(cls, dims=(0, 1), all_sum=all_sum)


def patch_head(
    head: DistillationHead,
    tokens: Tensor,
    hidden: Hidden,
    *,
    mode: str,
    all_sum: AllSum,
    shared_only: bool = False,
) -> Tensor:
    """Scores of the hidden tokens, standardised over all hidden tokens of batch or volume.

    Args:
        head: the patch head.
        tokens: (T, B, N, E).
        hidden: which tokens.
        mode: ``batch``, ``volume`` or ``none``.
        all_sum: sum over processes, used by ``batch``.
        shared_only: score only those that may be fused; the statistics stay those of all.

    Returns:
        (P, K), or (F, K).
    """
    chosen = full(hidden.of(tokens))
    statistics = None
    if mode == "batch":
        statistics = moments(chosen, dims=(0,), all_sum=all_sum)
    elif mode == "volume":
        each = moments(tokens, dims=(0, 2), valid=hidden.mask)
        mean, var = each.mean[0, :, 0], each.var[0, :, 0]
        statistics = Moments(mean[hidden.volume], var[hidden.volume])
    if shared_only:
        chosen = chosen[hidden.shared]
        if mode == "volume" and statistics is not None:
            statistics = Moments(statistics.mean[hidden.shared], statistics.var[hidden.shared])
    logits: Tensor = head(standardise(chosen, statistics))
    return logits


def _encode(teacher: AgssdNetwork, batch: ViewBatch, *, parts: int) -> tuple[Tensor, Tensor]:
    views, count = batch.globals_seen.shape[:2]
    encoded = [
        teacher.encode(part.flatten(0, 1)) for part in batch.globals_seen.chunk(parts, dim=1)
    ]
    each = count // len(encoded)
    cls = torch.cat([cls.view(views, each, -1) for cls, _ in encoded], dim=1)
    tokens = torch.cat(
        [tokens.reshape(views, each, *tokens.shape[1:]) for _, tokens in encoded], dim=1
    )
    return cls, tokens


def _running_moments(state: ModelState, cls: Tensor, *, step: int, all_sum: AllSum) -> Moments:
    """EMA of the teacher's cls moments with this batch in it; a plain mean over the first steps."""
    momentum = min(CLS_STATISTICS_MOMENTUM, step / (step + 1))
    fresh = moments(cls, dims=(0, 1), all_sum=all_sum)
    return updated_moments(Moments(state.cls_mean, state.cls_var), fresh, momentum=momentum)


def _patch_centre(
    state: ModelState, logits: Tensor, hidden: Hidden, resolved: Resolved
) -> Tensor | None:
    """(K,) running centre, (P, K) centre of each token's own volume, or None."""
    if resolved.target_patch == "center":
        return state.centre_patch
    if resolved.target_patch != "volume":
        return None
    volumes = hidden.mask.shape[1]
    sums = logits.new_zeros(volumes, logits.shape[-1]).index_add_(0, hidden.volume, logits)
    counts = hidden.mask.sum(dim=(0, 2)).clamp_min(1)
    return (sums / counts[:, None])[hidden.volume]


def _targets(logits: Tensor, centre: Tensor | None, rule: TargetRule, kind: str) -> Tensor:
    if kind != "sinkhorn":
        return centred_softmax(logits, centre, temperature=rule.temperature)
    probs = sinkhorn(
        logits.flatten(0, -2),
        temperature=rule.temperature,
        iterations=rule.agssd.target.sinkhorn_iterations,
        all_sum=rule.group.sum,
    )
    return probs.view_as(logits)
