"""One optimiser step of ANAUS; read this file first.

Order is the argument: one pass of each network over each set of images, every loss from those
maps, the finite check, and only then the student and, from the moved student, the teacher. A
NaN reaches neither.

Source: the ANAUS paper (arXiv:2605.25402); docs/method.md says where its code is not followed.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from agssd_core.config import AnausConfig
from agssd_core.errors import TrainingError
from agssd_core.losses.anatomy import alignment_loss, core_region_loss
from agssd_core.models.anaus import AnausNetwork, AnausPair, level_of
from agssd_core.models.precision import full
from agssd_core.training.lars import Lars
from agssd_core.training.mixed_precision import EncoderPrecision
from agssd_core.views.regions import (
    RegionScale,
    SampledRegions,
    pooling_weights,
    region_pyramid,
    sample_regions,
)
from agssd_core.views.us_batch import UsBatch

Maps = list[Tensor]


@dataclass
class AnausLearner:
    """Everything that a step changes or is governed by.

    Attributes:
        pair: student and teacher. optimiser: of the student. anaus: settings.
        bf16: run the backbone under autocast; pooling, heads and losses stay float32.
        anchor: FedProx, the student's parameters at the start of the round; None without.
        prox_mu: FedProx, strength of the pull towards them.
    """

    pair: AnausPair
    optimiser: Lars
    anaus: AnausConfig
    bf16: bool = False
    anchor: list[Tensor] | None = None
    prox_mu: float = 0.0

    def maps(self, network: AnausNetwork, frames: Tensor) -> Maps:
        """c2 to c5 of one network, float32 at least."""
        with EncoderPrecision(frames.device, bf16=self.bf16):
            found = network.maps(frames)
        return [full(each) for each in found]


@dataclass(frozen=True)
class ScaleRows:
    """The teacher's projections at one scale, for the monitor; nothing has a gradient.

    Attributes:
        projections: (2, B, K, C). ids: (2, B, K), 0 where nothing was drawn.
    """

    projections: Tensor
    ids: Tensor


@dataclass(frozen=True)
class AnausResult:
    """What a step leaves for metrics and monitor.

    Attributes:
        align, context: unweighted terms, summed over the scales; a term of weight 0 is 0.
        anatomies: mean number of anatomies of a view at the finest scale.
        valid: share of the frames with a usable overlap.
    """

    loss: Tensor
    align: Tensor
    context: Tensor
    grad_norm: Tensor
    anatomies: Tensor
    valid: Tensor
    rows: tuple[ScaleRows, ...]


@dataclass(frozen=True)
class Regions:
    """One scale's anatomies and the ones drawn, of the views (2B) and of the overlaps (B)."""

    scale: int
    views: RegionScale
    drawn: SampledRegions
    overlap: RegionScale
    drawn_overlap: SampledRegions


@dataclass
class _Terms:
    align: Tensor
    context: Tensor
    rows: list[ScaleRows] = field(default_factory=list)


def train_step(
    learner: AnausLearner,
    batch: UsBatch,
    *,
    learning_rate: float,
    ema_momentum: float,
    generator: torch.Generator,
) -> AnausResult:
    """Take one step.

    Args:
        learner: what is changed.
        batch: views and overlaps, on the model's device.
        learning_rate: of this step.
        ema_momentum: of this step; the teacher moves once, after the student.
        generator: on the CPU, for the anatomies drawn; student and teacher share them.

    Raises:
        TrainingError: the loss or a gradient is not finite; weights were left as they were.
    """
    learner.optimiser.zero_grad(set_to_none=True)
    regions = draw_regions(batch, learner.anaus, generator)
    terms = loss_terms(learner, batch, regions)
    weights = learner.anaus.loss
    loss = weights.align * terms.align + weights.context * terms.context
    loss.backward()  # type: ignore[no-untyped-call]
    grad_norm = _finish_gradients(learner)
    _require_finite(learner, loss.detach(), grad_norm)
    for group in learner.optimiser.param_groups:
        group["lr"] = learning_rate
    learner.optimiser.step()
    learner.pair.update_teacher(ema_momentum=ema_momentum)
    finest = regions[-1].views
    return AnausResult(
        loss=loss.detach(),
        align=terms.align.detach(),
        context=terms.context.detach(),
        grad_norm=grad_norm,
        anatomies=((finest.cells > 0) & (finest.ids > 0)).sum(dim=1).float().mean(),
        valid=batch.valid.float().mean(),
        rows=tuple(terms.rows),
    )


def draw_regions(
    batch: UsBatch, anaus: AnausConfig, generator: torch.Generator
) -> tuple[Regions, ...]:
    """Who owns each cell at every scale, and K anatomies of each view and each overlap."""
    settings = anaus.regions
    views = region_pyramid(batch.view_labels.flatten(0, 1), batch.view_ids, settings.scales)
    overlaps = region_pyramid(batch.overlap_labels, batch.overlap_ids, settings.scales)

    def drawn(scale: RegionScale) -> SampledRegions:
        return sample_regions(
            scale, settings.per_view, sampling=settings.sampling, generator=generator
        )

    return tuple(
        Regions(side, view, drawn(view), overlap, drawn(overlap))
        for side, view, overlap in zip(settings.scales, views, overlaps, strict=True)
    )


def loss_terms(learner: AnausLearner, batch: UsBatch, regions: tuple[Regions, ...]) -> _Terms:
    """Both terms over all scales, from one pass of each network over each set of images."""
    student, teacher, settings = learner.pair.student, learner.pair.teacher, learner.anaus.loss
    views = batch.views.flatten(0, 1)
    size = views.shape[-1]
    zero = views.new_zeros(())
    terms = _Terms(zero, zero)
    frames = len(batch)
    with torch.no_grad():
        teacher_maps = learner.maps(teacher, views)
        clean_maps = learner.maps(teacher, batch.clean) if settings.context else None
    student_maps = learner.maps(student, views) if settings.align else None
    damaged_maps = learner.maps(student, batch.damaged) if settings.context else None
    for each in regions:
        level = level_of(each.scale, size)
        ids = each.drawn.ids.view(2, frames, -1)
        with torch.no_grad():
            target = _rows(teacher, teacher_maps, each.views, each.drawn, level)
        target = target.view(*ids.shape, -1)
        terms.rows.append(ScaleRows(target, ids))
        if student_maps is not None:
            found = _rows(student, student_maps, each.views, each.drawn, level)
            terms.align = terms.align + alignment_loss(
                found.view(*ids.shape, -1),
                target,
                ids,
                temperature=settings.temperature,
                drop_same_id=settings.drop_same_id,
            )
        if damaged_maps is not None and clean_maps is not None:
            with torch.no_grad():
                goal = _rows(teacher, clean_maps, each.overlap, each.drawn_overlap, level)
            guess = _rows(student, damaged_maps, each.overlap, each.drawn_overlap, level)
            valid = batch.valid[:, None] & (each.drawn_overlap.ids > 0)
            terms.context = terms.context + core_region_loss(
                guess, goal, valid, form=settings.context_form
            )
    return terms


def _rows(
    network: AnausNetwork, maps: Maps, scale: RegionScale, drawn: SampledRegions, level: int
) -> Tensor:
    """(N, K, C): projections of the drawn anatomies, through the predictor where there is one.

    Anatomies are pooled once each and then repeated as drawn, so that the heads' statistics are
    over the rows that enter the loss. A frame with more anatomies than draws pools the draws.
    """
    weights = pooling_weights(scale, maps[0].dtype)
    few = weights.shape[1] <= drawn.rows.shape[1]
    if not few:
        weights = weights.gather(1, drawn.rows[..., None].expand(-1, -1, weights.shape[2]))
    pooled = network.pooled(maps, weights, level)
    if few:
        pooled = pooled.gather(1, drawn.rows[..., None].expand(-1, -1, pooled.shape[2]))
    projected: Tensor = network.projector(level)(pooled)
    return projected if network.predictor is None else network.predictor(projected)


def _finish_gradients(learner: AnausLearner) -> Tensor:
    """Add FedProx; returns the total norm."""
    student = learner.pair.student
    if learner.anchor is not None:
        for parameter, origin in zip(student.parameters(), learner.anchor, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - origin, alpha=learner.prox_mu)
    gradients = [item.grad for item in student.parameters() if item.grad is not None]
    norm: Tensor = nn.utils.get_total_norm(gradients)
    return norm


def _require_finite(learner: AnausLearner, loss: Tensor, grad_norm: Tensor) -> None:
    """The step's one deliberate wait for the device: nothing moves before this passes."""
    if not bool(torch.isfinite(loss) & torch.isfinite(grad_norm)):
        learner.optimiser.zero_grad(set_to_none=True)
        raise TrainingError(
            f"loss is {loss.item():g} and the gradient's norm {grad_norm.item():g}; both must be "
            "finite. Weights were left as they were. Lower anaus.optimiser.learning_rate, look for "
            "damaged frames, then resume."
        )
