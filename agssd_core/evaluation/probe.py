"""What a frozen encoder's features tell: nearest neighbours, a linear and a pixel-wise probe.

Every source, controls included, goes through the same code. Nothing is drawn at random but the
share of patients, so the same features give the same outcome.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from agssd_core.config.tasks import TaskConfig
from agssd_core.errors import DataError
from agssd_core.evaluation.encoders import FeatureSource
from agssd_core.evaluation.labelled import LabelledScan, LabelledSet
from agssd_core.evaluation.metrics import classification_outcome, segmentation_outcome
from agssd_core.evaluation.outcome import Outcome
from agssd_core.evaluation.pixel_probe import PixelCase, PixelProbe
from agssd_core.evaluation.scan_probe import knn_probabilities, linear_probabilities
from agssd_core.evaluation.tasks import (
    share_of_patients,
    structure_count,
    task_classes,
    task_mask,
    task_targets,
)

ProbeKind = Literal["knn", "linear", "pixel"]
Reals = NDArray[np.float32]
# Maps are held in half precision up to this size; what is beyond it is computed again.
HELD_BYTES = 2 << 30


class Features:
    """Features of a set's scans, each computed when it is first asked for and then kept.

    Args:
        scans: the set.
        source: where features come from.
    """

    def __init__(self, scans: LabelledSet, source: FeatureSource) -> None:
        self.scans = scans
        self._source = source
        self._pooled: dict[str, Reals] = {}
        self._maps: dict[str, NDArray[np.float16]] = {}
        self._held = 0

    def pooled(self, scan: LabelledScan) -> Reals:
        """(F,) features of a whole scan."""
        found = self._pooled.get(scan.scan)
        if found is None:
            found = self._pooled[scan.scan] = _finite(self._source.pooled(scan.load()))
        return found

    def maps(self, scan: LabelledScan) -> Reals:
        """(C, *cells) of a scan, rounded to half precision whether they were kept or not."""
        found = self._maps.get(scan.scan)
        if found is None:
            exact = _finite(self._source.maps(scan.load()))
            limit = np.finfo(np.float16).max
            found = np.clip(exact, -limit, limit).astype(np.float16)
            if self._held + found.nbytes <= HELD_BYTES:
                self._maps[scan.scan] = found
                self._held += found.nbytes
        return found.astype(np.float32)


def extract(scans: LabelledSet, source: FeatureSource) -> Features:
    """Features that several probes of the same scans can share."""
    return Features(scans, source)


def run_probe(
    kind: ProbeKind,
    scans: LabelledSet,
    task: TaskConfig,
    source: FeatureSource | Features,
    *,
    fraction: float = 1.0,
    seed: int = 0,
) -> Outcome:
    """Fit a probe on training scans and judge it on the held-out ones.

    Args:
        kind: ``knn`` (k = 10, cosine) and ``linear`` (logistic regression) for a classification,
            ``pixel`` (1x1 convolution on the maps, judged at full resolution) for a segmentation.
        scans: both sides of the split; those that do not take part are passed over.
        task: what is asked.
        source: an encoder or control, or features that ``extract`` made from one.
        fraction: share of the training patients, see ``share_of_patients``.
        seed: of that share.

    Raises:
        DataError: the kind does not fit the task, a side of the split is empty, or the training
            scans show one class alone.
    """
    if (kind == "pixel") != (task.kind == "segmentation"):
        raise DataError(
            f"a {kind} probe cannot answer a {task.kind}. Use pixel for a segmentation, knn or "
            "linear for a classification."
        )
    asked = scans.of(task)
    train = share_of_patients(asked.train.scans, task, fraction=fraction, seed=seed)
    test = asked.test.scans
    if not train or not test:
        raise DataError(
            f"task {task.name} has {len(train)} training and {len(test)} held-out scan(s), both "
            "need one. Check its label, structures and modalities, and the split."
        )
    features = source if isinstance(source, Features) else extract(scans, source)
    if kind == "pixel":
        return _pixel(features, train, test, task)
    classes = task_classes(asked.scans, task)
    return _scan(_PROBES[kind], features, (train, test), task, classes)


_Scans = tuple[LabelledScan, ...]
_PROBES: dict[str, Callable[..., NDArray[np.float64]]] = {
    "knn": knn_probabilities,
    "linear": linear_probabilities,
}


def _scan(
    probe: Callable[..., NDArray[np.float64]],
    features: Features,
    sides: tuple[_Scans, _Scans],
    task: TaskConfig,
    classes: tuple[str, ...],
) -> Outcome:
    train, test = sides
    targets = task_targets(train, task, classes)
    if len(np.unique(targets)) < 2:
        raise DataError(
            f"the training scans of task {task.name} show one class alone. Add scans of another, "
            "or raise the fraction."
        )
    probabilities = probe(
        np.stack([features.pooled(scan) for scan in train]),
        targets,
        np.stack([features.pooled(scan) for scan in test]),
        classes=len(classes),
        patients=[scan.patient for scan in train],
    )
    return classification_outcome(probabilities, task_targets(test, task, classes), test)


def _pixel(features: Features, train: _Scans, test: _Scans, task: TaskConfig) -> Outcome:
    count = structure_count(task)

    def case(scan: LabelledScan) -> PixelCase:
        return PixelCase(features.maps(scan), _mask(scan, task), scan.patient)

    probe = PixelProbe.fit([partial(case, scan) for scan in train], count)
    masks = [_mask(scan, task) for scan in test]
    predictions = [
        probe.predict(features.maps(scan), mask.shape)
        for scan, mask in zip(test, masks, strict=True)
    ]
    return segmentation_outcome(predictions, test, masks, count)


def _mask(scan: LabelledScan, task: TaskConfig) -> NDArray[np.uint8]:
    mask = scan.load().mask
    if mask is None:
        raise DataError("a scan of a segmentation has no mask. Choose scans with LabelledSet.of.")
    return task_mask(mask, task)


def _finite(values: Reals) -> Reals:
    if not np.isfinite(values).all():
        raise DataError("an encoder's features are not finite. Use the weights of another round.")
    return values
