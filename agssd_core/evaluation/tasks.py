"""What a task asks of labelled scans: which take part, their classes, and a share of patients."""

from collections.abc import Mapping, Sequence
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from agssd_core.config.tasks import TaskConfig
from agssd_core.errors import DataError
from agssd_core.views.seeds import rng_for


class Asked(Protocol):
    """What tasks need to know of a scan; ``LabelledScan`` has it."""

    @property
    def scan(self) -> str:
        """Its name."""
        ...

    @property
    def patient(self) -> str:
        """Whose it is."""
        ...

    @property
    def modality(self) -> str:
        """CT, MR or US."""
        ...

    @property
    def labels(self) -> Mapping[str, str]:
        """Class by the name of what is classified."""
        ...

    @property
    def outlined(self) -> tuple[int, ...] | None:
        """Values of its mask above 0; None where it has no mask."""
        ...


Scan = TypeVar("Scan", bound=Asked)


def answers(scan: Asked, task: TaskConfig) -> bool:
    """Whether a scan takes part in a task."""
    if scan.modality not in task.modalities:
        return False
    if task.kind == "classification":
        named = scan.labels.get(task.label, "")
        return bool(named) and (not task.classes or named in task.classes)
    if scan.outlined is None:
        return False
    wanted = set(task.structures or scan.outlined) & set(scan.outlined)
    return bool(wanted) or task.unlabelled


def structure_count(task: TaskConfig) -> int:
    """Structures that a segmentation tells apart, background not counted."""
    return max(1, len(task.structures))


def task_mask(mask: NDArray[np.uint8], task: TaskConfig) -> NDArray[np.uint8]:
    """A scan's mask in the numbers of the task: 0, then 1 to ``structure_count``."""
    if not task.structures:
        return (mask > 0).astype(np.uint8)
    table = np.zeros(256, dtype=np.uint8)
    for number, value in enumerate(task.structures, start=1):
        table[value] = number
    return table[mask]


def task_classes(scans: Sequence[Asked], task: TaskConfig) -> tuple[str, ...]:
    """The classes in the order of their numbers: as configured, else those found, sorted."""
    return task.classes or tuple(sorted({s.labels[task.label] for s in scans if answers(s, task)}))


def task_targets(
    scans: Sequence[Asked], task: TaskConfig, classes: Sequence[str]
) -> NDArray[np.int64]:
    """(N,) number of each scan's class.

    Raises:
        DataError: a scan has none of the classes.
    """
    numbers = {name: number for number, name in enumerate(classes)}
    try:
        return np.array([numbers[scan.labels[task.label]] for scan in scans], dtype=np.int64)
    except KeyError:
        raise DataError(
            f"a scan has none of the {len(classes)} classes of task {task.name}. Choose the scans "
            "with LabelledSet.of."
        ) from None


def share_of_patients(
    scans: Sequence[Scan], task: TaskConfig, *, fraction: float, seed: int
) -> tuple[Scan, ...]:
    """All scans of a seeded share of the patients; a larger share holds every smaller one.

    At least one patient is kept, of a classification at least one for each class that occurs; of
    a segmentation patients with an outline come first.

    Args:
        scans: that take part in the task.
        task: for its classes.
        fraction: of the patients, above 0, at most 1.
        seed: of the draw.

    Raises:
        DataError: the fraction is out of range.
    """
    if not 0 < fraction <= 1:
        raise DataError(f"a fraction of {fraction} of the patients must lie in (0, 1].")
    held: dict[str, set[str]] = {}
    for scan in scans:
        held.setdefault(scan.patient, set()).add(_kind(scan, task))
    names = sorted(held)
    order = [names[n] for n in rng_for(seed, "share", task.name).permutation(len(names))]
    first: list[str] = []
    for kind in sorted(set().union(*held.values()) - {""}):
        if not any(kind in held[name] for name in first):
            first.append(next(name for name in order if kind in held[name]))
    order = first + [name for name in order if name not in first]
    kept = set(order[: max(len(first), 1, round(fraction * len(order)))])
    return tuple(scan for scan in scans if scan.patient in kept)


def _kind(scan: Asked, task: TaskConfig) -> str:
    if task.kind == "classification":
        return scan.labels[task.label]
    return "outlined" if scan.outlined else ""
