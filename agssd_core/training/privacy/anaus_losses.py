"""ANAUS's loss of every patient on its own, from one pass for all of them.

Same terms as ``anaus_step``, with a frame a patient: negatives come from the patient's own frame
and normalisers count its own anatomies. The pyramid is computed as dense maps by its own layers:
``FeaturePyramid.pooled`` multiplies by their weights without calling them, which hooks on layers
cannot see. Both give the same means.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from agssd_core.config import AnausConfig
from agssd_core.losses.anatomy import alignment_loss, core_region_loss
from agssd_core.models.anaus import COARSEST, AnausNetwork, AnausPair, level_of
from agssd_core.training.anaus_step import Regions, draw_regions
from agssd_core.views.regions import RegionScale, SampledRegions, pooling_weights
from agssd_core.views.us_batch import UsBatch


@dataclass(frozen=True)
class Anatomies:
    """The anatomies drawn of some views: pooling weights (B, K, S * S) and ids (B, K)."""

    weights: Tensor
    ids: Tensor


@dataclass(frozen=True)
class PatientFrame:
    """One patient's part of a step.

    Attributes:
        batch: its frame alone.
        views: at every scale, the anatomies of its two views, (2, K, ...).
        overlap: at every scale, those of the overlap, (1, K, ...).
    """

    batch: UsBatch
    views: tuple[Anatomies, ...]
    overlap: tuple[Anatomies, ...]


def patient_frame(batch: UsBatch, anaus: AnausConfig, generator: torch.Generator) -> PatientFrame:
    """Draw the anatomies of one patient's frame.

    Args:
        batch: one frame.
        anaus: settings.
        generator: the patient's own, on the CPU.
    """
    drawn = draw_regions(batch, anaus, generator)
    kind = batch.views.dtype

    def of(each: Regions) -> tuple[Anatomies, Anatomies]:
        return (
            _anatomies(each.views, each.drawn, kind),
            _anatomies(each.overlap, each.drawn_overlap, kind),
        )

    views, overlap = zip(*(of(each) for each in drawn), strict=True)
    return PatientFrame(batch, views, overlap)


def frame_losses(pair: AnausPair, frames: Sequence[PatientFrame], anaus: AnausConfig) -> Tensor:
    """Weighted sum of the terms of each patient, (B,); only the student gets gradients."""
    terms = [
        weight * term(pair, frames, anaus)
        for weight, term in (
            (anaus.loss.align, _align_terms),
            (anaus.loss.context, _context_terms),
        )
        if weight > 0
    ]
    return torch.stack(terms).sum(dim=0)


def _align_terms(pair: AnausPair, frames: Sequence[PatientFrame], anaus: AnausConfig) -> Tensor:
    """Alignment of each patient's two views, summed over the scales: (B,)."""
    views = torch.cat([each.batch.views for each in frames], dim=1)
    with torch.no_grad():
        goals = [_dense(pair.teacher, view) for view in views]
    found = [_dense(pair.student, view) for view in views]
    total = views.new_zeros(len(frames))
    for number, scale in enumerate(anaus.regions.scales):
        level = level_of(scale, views.shape[-1])
        drawn = [_stacked([each.views[number] for each in frames], view) for view in (0, 1)]
        with torch.no_grad():
            target = torch.stack(
                [
                    _rows(pair.teacher, maps, part, level)
                    for maps, part in zip(goals, drawn, strict=True)
                ]
            )
        guess = torch.stack(
            [
                _rows(pair.student, maps, part, level)
                for maps, part in zip(found, drawn, strict=True)
            ]
        )
        ids = torch.stack([part.ids for part in drawn])
        costs = [
            alignment_loss(
                guess[:, own], target[:, own], ids[:, own], temperature=anaus.loss.temperature
            )
            for own in _each(frames)
        ]
        total = total + torch.stack(costs)
    return total


def _context_terms(pair: AnausPair, frames: Sequence[PatientFrame], anaus: AnausConfig) -> Tensor:
    """Core-region prediction of each patient, summed over the scales: (B,)."""
    clean = torch.cat([each.batch.clean for each in frames])
    damaged = torch.cat([each.batch.damaged for each in frames])
    usable = torch.cat([each.batch.valid for each in frames])
    with torch.no_grad():
        goals = _dense(pair.teacher, clean)
    found = _dense(pair.student, damaged)
    total = clean.new_zeros(len(frames))
    for number, scale in enumerate(anaus.regions.scales):
        level = level_of(scale, clean.shape[-1])
        drawn = _stacked([each.overlap[number] for each in frames], 0)
        with torch.no_grad():
            goal = _rows(pair.teacher, goals, drawn, level)
        guess = _rows(pair.student, found, drawn, level)
        valid = usable[:, None] & (drawn.ids > 0)
        costs = [
            core_region_loss(guess[own], goal[own], valid[own], form=anaus.loss.context_form)
            for own in _each(frames)
        ]
        total = total + torch.stack(costs)
    return total


def idle_parameters(student: AnausNetwork, anaus: AnausConfig) -> list[nn.Parameter]:
    """What no scale of this configuration reaches; noise would only shake it."""
    levels = {level_of(scale, anaus.augment.size) for scale in anaus.regions.scales}
    finer = [level for level in levels if level < COARSEST]
    idle: list[nn.Module] = [
        student.pyramid.smooth[level] for level in range(COARSEST) if level not in levels
    ]
    # A lateral layer serves its own map and every finer one.
    idle += [
        student.pyramid.lateral[level]
        for level in range(COARSEST + 1)
        if not finer or level < min(finer)
    ]
    if COARSEST not in levels:
        idle.append(student.projector_coarse)
    if not finer:
        idle.append(student.projector_fine)
    return [parameter for module in idle for parameter in module.parameters()]


def _anatomies(scale: RegionScale, drawn: SampledRegions, kind: torch.dtype) -> Anatomies:
    weights = pooling_weights(scale, kind)
    chosen = drawn.rows[..., None].expand(-1, -1, weights.shape[2])
    return Anatomies(weights.gather(1, chosen), drawn.ids)


def _stacked(parts: Sequence[Anatomies], row: int) -> Anatomies:
    """One row of every patient's anatomies: (B, K, ...)."""
    return Anatomies(
        torch.stack([each.weights[row] for each in parts]),
        torch.stack([each.ids[row] for each in parts]),
    )


def _each(frames: Sequence[PatientFrame]) -> list[slice]:
    return [slice(place, place + 1) for place in range(len(frames))]


def _dense(network: AnausNetwork, frames: Tensor) -> list[Tensor]:
    """p2, p3, p4 and c5 of (B, 1, S, S) frames, every layer called as a layer."""
    found: list[Tensor] = network.pyramid(network.maps(frames))
    return found


def _rows(network: AnausNetwork, maps: list[Tensor], drawn: Anatomies, level: int) -> Tensor:
    """(B, K, C) projections of the drawn anatomies, through the predictor where there is one."""
    pooled = drawn.weights @ maps[level].flatten(2).transpose(1, 2)
    projected: Tensor = network.projector(level)(pooled)
    return projected if network.predictor is None else network.predictor(projected)
