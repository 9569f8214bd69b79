"""Dice, surface distance, accuracy and AUC of held-out scans: per site and over all.

Dice and surface distance are MONAI's, accuracy and AUC scikit-learn's.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import torch
from monai.metrics import compute_dice, compute_hausdorff_distance
from numpy.typing import NDArray
from sklearn.metrics import accuracy_score, recall_score, roc_auc_score
from torch import Tensor

from agssd_core.errors import ShapeError
from agssd_core.evaluation.outcome import Outcome

Labels = NDArray[np.uint8]
Reals = NDArray[np.float64]
Values = dict[str, float]
_PERCENTILE = 95


class Judged(Protocol):
    """What metrics need to know of a scan; ``LabelledScan`` has it."""

    @property
    def site(self) -> str:
        """Where it is from."""
        ...

    @property
    def spacing_mm(self) -> tuple[float, ...] | None:
        """Edges of a voxel or pixel; None where unknown."""
        ...


def segmentation_outcome(
    predictions: Sequence[Labels],
    scans: Sequence[Judged],
    masks: Sequence[Labels],
    structures: int,
) -> Outcome:
    """Judge predicted structures 1 to ``structures`` against the truth, scan by scan.

    A structure that a scan's truth lacks is left out of that scan. A scan whose truth is empty
    has Dice 1 where nothing was predicted, else 0, and no distance. A structure that was missed
    altogether has the image's diagonal as its distance, so missing it is never an advantage.

    Args:
        predictions: (D, H, W) or (H, W) each, 0 is background.
        scans: for their sites and spacings; where a spacing is unknown, distances are in pixels.
        masks: the truth, shapes as ``predictions``.
        structures: their number.

    Returns:
        Means over scans of each scan's mean over its structures.

    Raises:
        ShapeError: counts or shapes differ, or a label exceeds ``structures``.
    """
    _require_equal_counts(len(scans), predictions=len(predictions), masks=len(masks))
    found = [
        _scan_values(prediction, mask, scan.spacing_mm, structures)
        for prediction, scan, mask in zip(predictions, scans, masks, strict=True)
    ]

    def means(chosen: list[int]) -> Values:
        named: dict[str, list[float | None]] = {
            "dice": [found[n][0] for n in chosen],
            "hd95_mm": [found[n][1] for n in chosen],
        }
        known = {name: [v for v in values if v is not None] for name, values in named.items()}
        return {name: float(np.mean(values)) for name, values in known.items() if values}

    return _outcome(scans, means)


def classification_outcome(
    probabilities: Reals, targets: NDArray[np.int64], scans: Sequence[Judged]
) -> Outcome:
    """Judge class probabilities; the most probable class is the answer.

    Balanced accuracy is the mean recall, and AUC the mean one-against-rest area, of the classes
    that occur; neither is defined where a single class does.

    Args:
        probabilities: (N, C), rows sum to 1.
        targets: (N,) classes 0 to C - 1.
        scans: N, for their sites.

    Raises:
        ShapeError: counts differ, or a target is no class.
    """
    _require_equal_counts(len(scans), probabilities=len(probabilities), targets=len(targets))
    if len(targets) and not 0 <= targets.min() <= targets.max() < probabilities.shape[1]:
        raise ShapeError(
            f"targets lie outside 0..{probabilities.shape[1] - 1}, the classes that have a "
            "probability. Give every class a column."
        )
    return _outcome(scans, lambda chosen: _class_values(probabilities[chosen], targets[chosen]))


def _outcome(scans: Sequence[Judged], values: Callable[[list[int]], Values]) -> Outcome:
    """Values over all scans and over those of each site."""
    places: dict[str, list[int]] = {}
    for number, scan in enumerate(scans):
        places.setdefault(scan.site, []).append(number)
    sites = sorted(places)
    return Outcome(
        metrics=values(list(range(len(scans)))) if len(scans) else {},
        per_site={site: values(places[site]) for site in sites},
        scans={site: len(places[site]) for site in sites},
    )


def _scan_values(
    prediction: Labels, mask: Labels, spacing: tuple[float, ...] | None, structures: int
) -> tuple[float, float | None]:
    """Dice and 95 % surface distance of one scan; no distance where nothing is outlined."""
    if prediction.shape != mask.shape or max(prediction.max(), mask.max()) > structures:
        raise ShapeError(
            f"a prediction {prediction.shape} does not fit its truth {mask.shape}, or holds more "
            f"than {structures} structure(s). Predict on the grid and with the task of the truth."
        )
    present = [k for k in range(1, structures + 1) if (mask == k).any()]
    if not present:
        return float(not prediction.any()), None
    truth, guess = _layers(mask, present), _layers(prediction, present)
    dice = compute_dice(guess, truth, include_background=True)
    edges = spacing or (1.0,) * mask.ndim
    diagonal = float(np.linalg.norm(np.multiply(mask.shape, edges)))
    distances = [
        _distance(guess[:, k : k + 1], truth[:, k : k + 1], edges, diagonal)
        for k in range(len(present))
    ]
    return float(dice.mean()), float(np.mean(distances))


def _layers(labels: Labels, values: list[int]) -> Tensor:
    """(1, K, ...) binary, one layer a structure."""
    return torch.from_numpy(np.stack([labels == value for value in values])[None]).float()


def _distance(guess: Tensor, truth: Tensor, edges: tuple[float, ...], diagonal: float) -> float:
    if not guess.any():
        return diagonal
    with warnings.catch_warnings():
        # MONAI 1.6 calls itself with an argument that it has deprecated.
        warnings.filterwarnings("ignore", ".*always_return_as_numpy", FutureWarning)
        found = compute_hausdorff_distance(
            guess, truth, include_background=True, percentile=_PERCENTILE, spacing=list(edges)
        )
    return float(found)


def _class_values(probabilities: Reals, targets: NDArray[np.int64]) -> Values:
    answers = probabilities.argmax(axis=1)
    found = {"accuracy": float(accuracy_score(targets, answers))}
    classes = [int(value) for value in np.unique(targets)]
    if len(classes) < 2:
        return found
    recalls = recall_score(targets, answers, labels=classes, average=None, zero_division=0)
    areas = [roc_auc_score(targets == value, probabilities[:, value]) for value in classes]
    return found | {"balanced_accuracy": float(np.mean(recalls)), "auc": float(np.mean(areas))}


def _require_equal_counts(scans: int, **counts: int) -> None:
    for name, count in counts.items():
        if count != scans:
            raise ShapeError(f"{count} {name} for {scans} scan(s). Give one for each scan.")
