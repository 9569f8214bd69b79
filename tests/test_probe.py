import numpy as np
import pytest
from scipy.special import log_softmax

from agssd_core.config import parse_config
from agssd_core.config.tasks import TaskConfig
from agssd_core.errors import DataError
from agssd_core.evaluation.cells import cell_means
from agssd_core.evaluation.controls import PositionControl
from agssd_core.evaluation.labelled import LabelledScan, LabelledSet, store_scan
from agssd_core.evaluation.pixel_probe import fit_softmax
from agssd_core.evaluation.probe import extract, run_probe

BLOB = TaskConfig(name="blob", kind="segmentation")
KINDS = TaskConfig(name="kinds", kind="segmentation", structures=(2, 5))
SIDE = TaskConfig(name="side", kind="classification", label="side")
SHAPE = (24, 32, 32)


class Source:
    """Features made from a scan's own mask or class, buried in noise, or noise alone."""

    def __init__(self, *, planted):
        self.planted, self.asked = planted, []

    def pooled(self, arrays):
        self.asked.append("pooled")
        rng = np.random.default_rng(int(arrays.image.sum() * 1000))
        found = rng.normal(size=12)
        found[:6] += 4 * self.planted * (arrays.mask == 2).any()
        return found.astype(np.float32)

    def maps(self, arrays):
        self.asked.append("maps")
        cells = tuple(side // 4 for side in arrays.image.shape)
        rng = np.random.default_rng(int(arrays.image.sum() * 1000))
        found = rng.normal(0, 0.3, (6, *cells))
        for channel, value in ((1, 2), (3, 5)):
            found[channel] += 3 * self.planted * cell_means(arrays.mask == value, cells)
        return found.astype(np.float32)


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """24 scans of 12 patients at two sites; a box of kind 2 or 5 lies anywhere."""
    folder, rng, found = tmp_path_factory.mktemp("scans"), np.random.default_rng(0), []
    for number in range(24):
        kind = 2 if number % 4 < 2 else 5
        mask = np.zeros(SHAPE, np.uint8)
        start = [int(rng.integers(0, side - 14)) for side in SHAPE]
        mask[tuple(slice(s, s + 14) for s in start)] = kind
        scan = LabelledScan(
            scan=f"s{number:02d}",
            patient=f"p{number // 2:02d}",
            site="ab"[number // 4 % 2],
            split="train" if number < 16 else "test",
            modality="CT",
            labels={"side": "left" if kind == 2 else "right"},
            file=folder / f"s{number:02d}.npz",
            spacing_mm=(2.0, 2.0, 2.0),
        )
        image = rng.integers(0, 65535, SHAPE, np.uint16)
        found.append(store_scan(scan, image, inside=np.ones(SHAPE, bool), mask=mask))
    return LabelledSet(tuple(found))


@pytest.mark.parametrize("kind", ["knn", "linear"])
def test_a_planted_class_is_found_and_noise_is_not(scans, kind):
    found = run_probe(kind, scans, SIDE, Source(planted=True))
    assert found.metrics["balanced_accuracy"] == 1.0
    assert found.metrics["auc"] == 1.0
    assert found.scans == {"a": 4, "b": 4}
    noise = run_probe(kind, scans, SIDE, Source(planted=False))
    assert noise.metrics["balanced_accuracy"] < 0.9


def test_a_planted_structure_is_outlined_and_noise_is_not(scans):
    found = run_probe("pixel", scans, BLOB, Source(planted=True))
    assert found.metrics["dice"] > 0.8
    assert found.metrics["hd95_mm"] < 12
    assert found.worst_site[1] == min(site["dice"] for site in found.per_site.values())
    # All that noise can do is to outline everything: 14^3 voxels of 24 * 32 * 32.
    noise = run_probe("pixel", scans, BLOB, Source(planted=False))
    assert noise.metrics["dice"] < 0.35


def test_structures_are_told_apart(scans):
    assert run_probe("pixel", scans, KINDS, Source(planted=True)).metrics["dice"] > 0.8


def test_position_does_not_find_what_lies_anywhere(scans):
    control = PositionControl(parse_config({"preset": "tiny"}))
    assert run_probe("pixel", scans, BLOB, control).metrics["dice"] < 0.4


@pytest.mark.parametrize(("kind", "task"), [("knn", SIDE), ("linear", SIDE), ("pixel", KINDS)])
def test_the_same_question_has_the_same_answer_to_the_bit(scans, kind, task):
    first, again = (run_probe(kind, scans, task, Source(planted=True)) for _ in range(2))
    assert first == again


def test_features_are_computed_once_for_all_probes(scans):
    source = Source(planted=True)
    features = extract(scans, source)
    shared = [run_probe(kind, scans, SIDE, features) for kind in ("knn", "linear")]
    assert source.asked == ["pooled"] * 24
    assert shared == [run_probe(k, scans, SIDE, Source(planted=True)) for k in ("knn", "linear")]
    run_probe("pixel", scans, BLOB, features)
    run_probe("pixel", scans, KINDS, features)
    assert source.asked.count("maps") == 24


def test_maps_that_do_not_fit_into_memory_give_the_same_answer(scans, monkeypatch):
    kept = run_probe("pixel", scans, BLOB, Source(planted=True))
    monkeypatch.setattr("agssd_core.evaluation.probe.HELD_BYTES", 0)
    assert run_probe("pixel", scans, BLOB, Source(planted=True)) == kept


def test_held_out_scans_do_not_change_what_is_learned(scans):
    whole = run_probe("pixel", scans, BLOB, Source(planted=True)).per_site["a"]
    alone = LabelledSet(tuple(s for s in scans.scans if s.split == "train" or s.site == "a"))
    assert run_probe("pixel", alone, BLOB, Source(planted=True)).per_site["a"] == whole


def test_one_patient_of_each_class_is_enough(scans):
    found = run_probe("linear", scans, SIDE, Source(planted=True), fraction=0.01, seed=1)
    assert set(found.metrics) == {"accuracy", "balanced_accuracy", "auc"}
    one = BLOB.model_copy(update={"structures": (2,)})
    found = run_probe("pixel", scans, one, Source(planted=True), fraction=0.01)
    assert found.metrics["dice"] > 0.6


def test_what_cannot_be_asked_is_refused(scans):
    source = Source(planted=True)
    with pytest.raises(DataError, match="Use pixel for a segmentation"):
        run_probe("knn", scans, BLOB, source)
    with pytest.raises(DataError, match="Check its label"):
        run_probe("knn", scans, SIDE.model_copy(update={"label": "age"}), source)
    one = LabelledSet(tuple(s for s in scans.scans if s.labels["side"] == "left"))
    with pytest.raises(DataError, match="Add scans of another"):
        run_probe("knn", one, SIDE, source)


def test_features_that_are_not_finite_are_refused(scans):
    class Broken(Source):
        def pooled(self, arrays):
            return super().pooled(arrays) * np.float32(np.nan)

    with pytest.raises(DataError, match="another round"):
        run_probe("knn", scans, SIDE, Broken(planted=True))


def test_the_pixel_fit_is_at_the_minimum_of_its_cost():
    rng = np.random.default_rng(0)
    rows, shares = rng.normal(size=(200, 3)), rng.dirichlet(np.ones(3) * 0.3, 200)
    shares[:, 0] += 4  # far more background
    shares /= shares.sum(1, keepdims=True)

    def cost(weights, bias):
        total = 0.0
        for row, share in zip(rows, shares, strict=True):
            logs = log_softmax(row @ weights + bias)
            for k in range(3):
                total -= share[k] * logs[k] / shares[:, k].sum() / 3
        return total + 0.01 / 2 * (weights**2).sum()

    weights, bias = fit_softmax(rows, shares, strength=0.01)
    least = cost(weights, bias)
    for _ in range(20):
        step = rng.normal(size=(4, 3)) * 0.03
        assert cost(weights + step[:3], bias + step[3]) > least - 1e-9
