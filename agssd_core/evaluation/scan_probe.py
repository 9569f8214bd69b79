"""Probes of whole scans: weighted nearest neighbours, and logistic regression."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression

Reals = NDArray[np.float64]
Targets = NDArray[np.int64]
NEIGHBOURS = 10
# Wu et al. 2018, arXiv:1805.01978: votes are weighted by exp(cosine / 0.07).
TEMPERATURE = 0.07
FOLDS = 5
STRENGTHS = tuple(10.0**power for power in range(-5, 3))
DEFAULT_STRENGTH = 1e-2


def knn_probabilities(
    train: NDArray[np.float32],
    targets: Targets,
    test: NDArray[np.float32],
    *,
    classes: int,
    patients: Sequence[str] = (),  # noqa: ARG001 - both probes are called alike
) -> Reals:
    """Shares of the votes of the 10 nearest training scans, or of all where there are fewer.

    Args:
        train: (N, F) features.
        targets: (N,) classes.
        test: (M, F).
        classes: C.
        patients: not needed.

    Returns:
        (M, C), rows sum to 1.

    Source:
        Wu et al. 2018, arXiv:1805.01978, Sec. 3.4, on standardised features.
    """
    known, asked = (_unit(each) for each in standardised(train, test))
    similar = asked @ known.T
    count = min(NEIGHBOURS, len(known))
    # A stable order, so that ties go to the first training scan.
    nearest = np.argsort(-similar, axis=1, kind="stable")[:, :count]
    best = np.take_along_axis(similar, nearest, axis=1)
    votes = np.exp((best - best[:, :1]) / TEMPERATURE)
    found = np.zeros((len(test), classes))
    for value in range(classes):
        found[:, value] = np.where(targets[nearest] == value, votes, 0).sum(axis=1)
    return np.asarray(found / found.sum(axis=1, keepdims=True))


def linear_probabilities(
    train: NDArray[np.float32],
    targets: Targets,
    test: NDArray[np.float32],
    *,
    classes: int,
    patients: Sequence[str],
) -> Reals:
    """Class-balanced logistic regression, its strength chosen by folds of training patients.

    Args:
        train: (N, F) features.
        targets: (N,) classes, two or more.
        test: (M, F).
        classes: C; one without a training scan has probability 0.
        patients: N names; a patient's scans stay in one fold.

    Returns:
        (M, C), rows sum to 1.
    """
    strength = _chosen_strength(train, targets, patients)
    known, asked = standardised(train, test)
    return _fitted(known, targets, asked, strength, classes)


def standardised(train: NDArray[np.float32], test: NDArray[np.float32]) -> tuple[Reals, Reals]:
    """Both with mean 0 and deviation 1 of the training rows; features that never vary become 0."""
    known, asked = train.astype(np.float64), test.astype(np.float64)
    mean, spread = known.mean(axis=0), known.std(axis=0)
    varies = spread > 1e-6 * np.maximum(1e-6, np.abs(mean))
    scale = np.where(varies, 1 / np.where(varies, spread, 1), 0)
    return (known - mean) * scale, (asked - mean) * scale


def _chosen_strength(
    train: NDArray[np.float32], targets: Targets, patients: Sequence[str]
) -> float:
    """Inverse L2 strength with the least balanced cross-entropy over the folds."""
    folds = _folds(targets, patients)
    costs: dict[float, list[float]] = {strength: [] for strength in STRENGTHS}
    for fold in np.unique(folds):
        inside = folds != fold
        if len(np.unique(targets[inside])) < len(np.unique(targets)):
            continue
        known, asked = standardised(train[inside], train[~inside])
        own = targets[~inside]
        weights = 1.0 / np.bincount(targets)[own]
        for strength in STRENGTHS:
            found = _fitted(known, targets[inside], asked, strength, int(targets.max()) + 1)
            chance = np.maximum(found[np.arange(len(own)), own], 1e-12)
            costs[strength].append(float(-(weights * np.log(chance)).sum()))
    if not costs[DEFAULT_STRENGTH]:
        return DEFAULT_STRENGTH
    return min(STRENGTHS, key=lambda strength: sum(costs[strength]))


def _folds(targets: Targets, patients: Sequence[str]) -> NDArray[np.int64]:
    """Fold of every scan: patients in the order of class and name take turns."""
    first: dict[str, int] = {}
    for patient, target in sorted(zip(patients, targets.tolist(), strict=True)):
        first.setdefault(patient, target)
    order = sorted(first, key=lambda patient: (first[patient], patient))
    place = {patient: number % min(FOLDS, len(order)) for number, patient in enumerate(order)}
    return np.array([place[patient] for patient in patients], dtype=np.int64)


def _fitted(known: Reals, targets: Targets, asked: Reals, strength: float, classes: int) -> Reals:
    model = LogisticRegression(C=strength, class_weight="balanced", max_iter=10_000, tol=1e-5)
    model.fit(known, targets)
    found = np.zeros((len(asked), classes))
    found[:, model.classes_] = model.predict_proba(asked)
    return found


def _unit(rows: Reals) -> Reals:
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.asarray(rows / np.maximum(lengths, 1e-12))
