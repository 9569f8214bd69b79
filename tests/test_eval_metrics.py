from dataclasses import dataclass
from itertools import product

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from agssd_core.errors import ShapeError
from agssd_core.evaluation.interval import mean_interval, paired_difference
from agssd_core.evaluation.metrics import classification_outcome, segmentation_outcome


@dataclass(frozen=True)
class Scan:
    site: str
    spacing_mm: tuple[float, ...] | None = None


def _mask(shape, *boxes):
    found = np.zeros(shape, np.uint8)
    for value, corners in enumerate(boxes, start=1):
        found[tuple(slice(*pair) for pair in corners)] = value
    return found


def _surface(layer, spacing):
    points = []
    for place in product(*(range(side) for side in layer.shape)):
        near = [
            tuple(np.add(place, step * np.eye(layer.ndim, dtype=int)[axis]))
            for axis in range(layer.ndim)
            for step in (-1, 1)
        ]
        beside = [
            all(0 <= p < side for p, side in zip(n, layer.shape, strict=True)) and layer[n]
            for n in near
        ]
        if layer[place] and not all(beside):
            points.append(np.multiply(place, spacing))
    return points


def _plain_hd95(guess, truth, spacing):
    a, b = _surface(guess, spacing), _surface(truth, spacing)
    there = [min(np.linalg.norm(p - q) for q in b) for p in a]
    back = [min(np.linalg.norm(p - q) for q in a) for p in b]
    return max(np.percentile(there, 95), np.percentile(back, 95))


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.5, 2.0, 3.0)], ids=str)
def test_dice_and_distance_are_those_of_plain_loops(spacing):
    truth = _mask((9, 8, 7), [(1, 5), (1, 6), (2, 6)], [(6, 9), (2, 5), (0, 3)])
    guess = _mask((9, 8, 7), [(2, 6), (1, 5), (1, 6)], [(6, 8), (3, 7), (1, 4)])
    outcome = segmentation_outcome([guess], [Scan("a", spacing)], [truth], 2)
    layers = [(guess == k, truth == k) for k in (1, 2)]
    dice = [2 * (g & t).sum() / (g.sum() + t.sum()) for g, t in layers]
    assert outcome.metrics["dice"] == pytest.approx(np.mean(dice))
    far = [_plain_hd95(g, t, spacing) for g, t in layers]
    assert outcome.metrics["hd95_mm"] == pytest.approx(np.mean(far), rel=1e-5)


def test_sites_are_judged_apart_and_the_worst_is_named():
    truth = _mask((8, 8), [(2, 6), (2, 6)])
    half = _mask((8, 8), [(2, 6), (2, 4)])
    scans = [Scan("b"), Scan("a"), Scan("b")]
    outcome = segmentation_outcome([truth, half, half], scans, [truth] * 3, 1)
    assert outcome.per_site["a"]["dice"] == pytest.approx(2 / 3)
    assert outcome.per_site["b"]["dice"] == pytest.approx((1 + 2 / 3) / 2)
    assert outcome.metrics["dice"] == pytest.approx((1 + 2 / 3 + 2 / 3) / 3)
    assert outcome.scans == {"a": 1, "b": 2}
    assert outcome.worst_site == ("a", pytest.approx(2 / 3))


def test_a_missed_structure_is_as_far_as_the_image_is_wide():
    truth, nothing = _mask((6, 8), [(1, 3), (1, 3)]), np.zeros((6, 8), np.uint8)
    outcome = segmentation_outcome([nothing], [Scan("a", (2.0, 1.0))], [truth], 1)
    assert outcome.metrics == {"dice": 0.0, "hd95_mm": pytest.approx(np.hypot(12, 8))}


def test_a_scan_without_outlines_is_right_only_where_nothing_is_predicted():
    nothing, something = np.zeros((6, 8), np.uint8), _mask((6, 8), [(1, 3), (1, 3)])
    right = segmentation_outcome([nothing], [Scan("a")], [nothing], 1)
    wrong = segmentation_outcome([something], [Scan("a")], [nothing], 1)
    assert (right.metrics, wrong.metrics) == ({"dice": 1.0}, {"dice": 0.0})


def test_a_structure_that_a_scan_lacks_does_not_count_there():
    truth = _mask((6, 8), [(1, 3), (1, 3)])
    outcome = segmentation_outcome([truth], [Scan("a")], [truth], 3)
    assert outcome.metrics == {"dice": 1.0, "hd95_mm": 0.0}


def test_a_prediction_on_another_grid_is_refused():
    with pytest.raises(ShapeError, match="Predict on the grid"):
        segmentation_outcome([np.zeros((3, 3), np.uint8)], [Scan("a")], [_mask((4, 4))], 1)


def test_classes_are_judged_as_scikit_learn_does():
    rng = np.random.default_rng(0)
    scores = rng.dirichlet(np.ones(3), 40)
    targets = rng.integers(0, 3, 40)
    outcome = classification_outcome(scores, targets, [Scan(f"s{n % 2}") for n in range(40)])
    answers = scores.argmax(1)
    assert outcome.metrics["accuracy"] == pytest.approx((answers == targets).mean())
    assert outcome.metrics["balanced_accuracy"] == pytest.approx(
        balanced_accuracy_score(targets, answers)
    )
    assert outcome.metrics["auc"] == pytest.approx(
        roc_auc_score(targets, scores, multi_class="ovr")
    )
    even = np.arange(40) % 2 == 0
    assert outcome.per_site["s0"]["accuracy"] == pytest.approx(
        (answers[even] == targets[even]).mean()
    )


def test_a_site_with_one_class_has_accuracy_alone():
    scores = np.array([[0.9, 0.1], [0.2, 0.8], [0.7, 0.3]])
    scans = [Scan("a"), Scan("a"), Scan("b")]
    outcome = classification_outcome(scores, np.array([0, 1, 0]), scans)
    assert outcome.per_site["b"] == {"accuracy": 1.0}
    assert set(outcome.metrics) == {"accuracy", "balanced_accuracy", "auc"}
    assert outcome.worst_site is None


def test_the_interval_is_students():
    values = [0.71, 0.74, 0.69, 0.8]
    found = mean_interval(values)
    low, high = stats.t.interval(0.95, 3, loc=np.mean(values), scale=stats.sem(values))
    assert (found.mean, found.low, found.high) == pytest.approx((np.mean(values), low, high))
    assert found.count == 4


def test_a_paired_difference_is_that_of_the_paired_t_test():
    a, b = [0.71, 0.74, 0.69, 0.8], [0.7, 0.71, 0.69, 0.74]
    expected = stats.ttest_rel(a, b).confidence_interval(0.95)
    found = paired_difference(a, b)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    with pytest.raises(ShapeError, match="that both"):
        paired_difference(a, b[:2])


def test_one_seed_is_unsure_and_none_is_refused():
    assert mean_interval([0.5]).high == np.inf
    with pytest.raises(ShapeError, match="Leave out"):
        mean_interval([])
