"""Nobody who is tested downstream may have been seen in pre-training."""

from collections.abc import Sequence
from pathlib import Path

from agssd_core.errors import ConfigError
from agssd_core.weights import file_digest
from simulation.datasets.known import ADAPTERS
from simulation.partition import Placed


def refuse_leakage(
    pretraining: Sequence[Placed],
    downstream: Sequence[Placed],
    *,
    names: tuple[str, str] = ("", ""),
    roots: tuple[Path, Path] | None = None,
) -> None:
    """Compare the training side of one division with the held-out side of another.

    Args:
        pretraining: whose training scans are learnt from.
        downstream: whose held-out scans are tested.
        names: of the two data sets.
        roots: their folders, to find equal files under other names; None compares none.

    Raises:
        ConfigError: a patient, a file, or two data sets that show the same people are on both
            sides.
    """
    seen = [item for item in pretraining if item.split == "train"]
    tested = [item for item in downstream if item.split == "test"]
    if names[0] == names[1]:
        both = {item.row.patient for item in seen} & {item.row.patient for item in tested}
        if both:
            raise _leak(f"{len(both)} patient(s) are")
    elif _related(*names):
        raise ConfigError(
            f"{names[0]} and {names[1]} show the same people under other names, so a test on one "
            "says nothing after pre-training on the other. Pre-train on another data set."
        )
    if roots is not None:
        equal = _digests(seen, roots[0]) & _digests(tested, roots[1])
        if equal:
            raise _leak(f"{len(equal)} file(s) are")


def _leak(what: str) -> ConfigError:
    return ConfigError(
        f"{what} both in pre-training and in the downstream test, none may be. Use the same seed, "
        "folds and fold for both divisions, or leave these patients out of pre-training."
    )


def _related(first: str, second: str) -> bool:
    def shares(one: str, other: str) -> bool:
        return one in ADAPTERS and other in ADAPTERS[one].info.shares_patients_with

    return shares(first, second) or shares(second, first)


def _digests(placed: Sequence[Placed], root: Path) -> set[str]:
    files = {root / item.row.source.path for item in placed}
    return {file_digest(file) for file in files if file.is_file()}
