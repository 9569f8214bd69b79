"""From LP-SAM's masks to one label map a frame, and how well it fits what somebody drew."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from agssd_core.config.lpsam import LpsamRulesConfig
from agssd_core.errors import ShapeError
from agssd_core.models.lpsam import LpSam
from agssd_core.models.lpsam_input import network_input, restore_masks, shrink_frame

LabelMap = NDArray[np.uint8]


@dataclass(frozen=True)
class Delineation:
    """Anatomies of one frame.

    Attributes:
        labels: uint8 (H, W); 0 is no anatomy, the others are 1, 2, ... without a gap.
        confidence: predicted IoU of each label, in [0, 1].
    """

    labels: LabelMap
    confidence: dict[int, float]


def label_map(
    logits: Tensor, predicted_iou: Tensor, sector: NDArray[np.bool_], rules: LpsamRulesConfig
) -> Delineation:
    """One label a pixel.

    Prompts whose predicted IoU does not pass are left out; a pixel belongs to the prompt with the
    highest logit if its probability passes; connected pieces that are too small are removed;
    nothing is labelled outside the sector.

    Args:
        logits: (R, H, W) at the frame's size.
        predicted_iou: (R,).
        sector: (H, W).
        rules: the thresholds.

    Raises:
        ShapeError: masks, predicted IoUs and sector do not belong together.
    """
    if logits.shape[1:] != sector.shape or predicted_iou.shape != logits.shape[:1]:
        raise ShapeError(
            f"masks {tuple(logits.shape)}, {len(predicted_iou)} predicted IoUs and a sector of "
            f"{sector.shape} do not belong together. Restore the masks to the frame's size first."
        )
    passing = torch.nonzero(predicted_iou > rules.iou)[:, 0]
    labels = np.zeros(sector.shape, dtype=np.uint8)
    if not len(passing):
        return Delineation(labels, {})
    best, which = logits[passing].max(dim=0)
    inside = (best.sigmoid() > rules.mask).numpy() & sector
    drawn = np.where(inside, which.numpy() + 1, 0)
    least = rules.component * np.count_nonzero(sector)
    confidence: dict[int, float] = {}
    for place, prompt in enumerate(passing.tolist()):
        kept = without_specks(drawn == place + 1, least)
        if kept.any():
            number = len(confidence) + 1
            labels[kept] = number
            confidence[number] = min(1.0, max(0.0, float(predicted_iou[prompt])))
    return Delineation(labels, confidence)


def without_specks(mask: NDArray[np.bool_], least: float) -> NDArray[np.bool_]:
    """A mask without its 4-connected pieces of fewer than ``least`` pixels."""
    pieces, count = ndimage.label(mask)
    if not count:
        return mask
    sizes = np.bincount(pieces.ravel(), minlength=count + 1)
    keep = sizes >= least
    keep[0] = False
    return np.asarray(keep[pieces])


@torch.no_grad()
def delineate_frames(
    network: LpSam,
    frames: Sequence[NDArray[np.uint8]],
    sectors: Sequence[NDArray[np.bool_]],
    rules: LpsamRulesConfig,
    *,
    prompts: Tensor | None = None,
) -> list[Delineation]:
    """Delineate a batch of frames of any sizes: encoded once, all prompts in one decoder call.

    Args:
        network: LP-SAM.
        frames: uint8 (H, W) each.
        sectors: bool (H, W) each.
        rules: from masks to labels.
        prompts: (R, T, C) in place of the engine's; for controls.
    """
    size, device = network.shape.image_size, next(network.parameters()).device
    images = network_input([shrink_frame(frame, size) for frame in frames], size).to(device)
    embedding = network.encode(images)
    if prompts is None:
        sparse = network.latent_prompts(images, embedding)
    else:
        sparse = prompts.to(device).expand(len(images), *prompts.shape)
    logits, iou = network.decode(embedding, sparse)
    found = []
    for index, sector in enumerate(sectors):
        shape = (sector.shape[0], sector.shape[1])
        restored = restore_masks(logits[index].float().cpu(), shape, size)
        found.append(label_map(restored, iou[index].float().cpu(), sector, rules))
    return found


def structure_dice(labels: LabelMap, structures: NDArray[np.bool_]) -> list[float]:
    """Dice of every structure (K, H, W) with the label that is its own, 0 where none is left.

    Labels go to structures one to one so that the sum of their Dice is greatest.
    """
    found = [labels == number for number in range(1, int(labels.max(initial=0)) + 1)]
    scores = np.zeros((len(structures), len(found)))
    for row, truth in enumerate(structures):
        for column, mask in enumerate(found):
            both = np.count_nonzero(truth & mask)
            scores[row, column] = 2 * both / (np.count_nonzero(truth) + np.count_nonzero(mask))
    best = np.zeros(len(structures))
    rows, columns = linear_sum_assignment(scores, maximize=True)
    best[rows] = scores[rows, columns]
    return [float(score) for score in best]
