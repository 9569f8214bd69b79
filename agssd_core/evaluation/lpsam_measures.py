"""How well LP-SAM delineates images with known masks, beside two controls."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean

import numpy as np
import torch
from numpy.typing import NDArray

from agssd_core.config.lpsam import LpsamConfig
from agssd_core.data.pairs import LabelledFrame
from agssd_core.evaluation.delineation import delineate_frames, structure_dice
from agssd_core.models.lpsam import LpSam
from agssd_core.training.lpsam_fit import build_lpsam
from agssd_core.views.seeds import torch_generator_for

NAMES = ("LP-SAM", "LP-SAM, no IoU threshold", "random prompts", "untrained")


@dataclass(frozen=True)
class DelineationScore:
    """Means over one set of frames; nan where there is nothing to average.

    Attributes:
        dice: over structures, each with the label that is its own.
        union_dice: over frames with structures: all labels against all structures.
        false_area: labelled share of the sector of frames without structures.
    """

    frames: int
    structures: int
    dice: float
    union_dice: float
    empty_frames: int
    false_area: float


def score(
    network: LpSam,
    frames: Iterable[LabelledFrame],
    config: LpsamConfig,
    *,
    prompts: torch.Tensor | None = None,
) -> DelineationScore:
    """Delineate labelled frames one by one and compare."""
    dice: list[float] = []
    union: list[float] = []
    false: list[float] = []
    for item in frames:
        rules = config.rules
        (found,) = delineate_frames(network, [item.frame], [item.sector], rules, prompts=prompts)
        if len(item.structures):
            dice += structure_dice(found.labels, item.structures)
            union.append(_dice(found.labels > 0, np.logical_or.reduce(item.structures)))
        else:
            sector = max(1, int(np.count_nonzero(item.sector)))
            false.append(int(np.count_nonzero(found.labels)) / sector)
    return DelineationScore(
        len(union), len(dice), _mean(dice), _mean(union), len(false), _mean(false)
    )


def score_with_controls(
    network: LpSam, frames: Iterable[LabelledFrame], config: LpsamConfig, *, seed: int
) -> Mapping[str, DelineationScore]:
    """Scores by ``NAMES``.

    ``random prompts`` puts noise of the engine's scale in the place of its prompts: what encoder
    and decoder do when nobody points. ``untrained`` is the network before the fit. Both go without
    the threshold of the predicted IoU, which would give them no label at all.
    """
    listed = list(frames)
    free = config.model_copy(update={"rules": config.rules.model_copy(update={"iou": 0.0})})
    untrained, _ = build_lpsam(config.model_copy(update={"weights_digest": ""}), seed=seed)
    noise = torch.randn(
        network.engine.tokens.shape, generator=torch_generator_for(seed, "lpsam", "control")
    )
    scale = float(network.engine.tokens.detach().std())
    return dict(
        zip(
            NAMES,
            (
                score(network, listed, config),
                score(network, listed, free),
                score(network, listed, free, prompts=noise * scale),
                score(untrained, listed, free),
            ),
            strict=True,
        )
    )


def score_table(rows: Mapping[str, Mapping[str, DelineationScore]]) -> str:
    """Markdown; ``rows`` is set -> who -> score."""
    lines = [
        "| images | who | structures | Dice | union Dice | images without | labelled there |",
        "|---|---|---|---|---|---|---|",
    ]
    for images, scores in rows.items():
        for who, found in scores.items():
            lines.append(
                f"| {images} | {who} | {found.structures} | {_number(found.dice)} | "
                f"{_number(found.union_dice)} | {found.empty_frames} | "
                f"{_number(found.false_area)} |"
            )
    return "\n".join(lines)


def _dice(found: NDArray[np.bool_], truth: NDArray[np.bool_]) -> float:
    both, areas = int((found & truth).sum()), int(found.sum()) + int(truth.sum())
    return 2 * both / max(1, areas)


def _mean(values: list[float]) -> float:
    return fmean(values) if values else float("nan")


def _number(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.3f}"
