"""Nobody who is tested downstream may have been seen in pre-training."""

import hashlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from agssd_core.errors import ConfigError
from agssd_core.weights import file_digest
from simulation.datasets.known import ADAPTERS
from simulation.datasets.rows import Source
from simulation.partition import Placed

Progress = Callable[[int, int], None]
# A file, and which row or volume of it.
Part = tuple[Path, int | None, str]
_SAMPLE_BYTES = 4096


def refuse_leakage(
    pretraining: Sequence[Placed],
    downstream: Sequence[Placed],
    *,
    names: tuple[str, str] = ("", ""),
    roots: tuple[Path, Path] | None = None,
    progress: Progress | None = None,
) -> None:
    """Compare the training side of one division with the held-out side of another.

    Args:
        pretraining: whose training scans are learnt from.
        downstream: whose held-out scans are tested.
        names: of the two data sets.
        roots: their folders, to find equal files under other names; None compares none. Of a
            folder of slices the middle file is compared.
        progress: told (files compared, files in all).

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
        equal = equal_scans(
            [_part(roots[0], item.row.source) for item in seen],
            [_part(roots[1], item.row.source) for item in tested],
            progress=progress,
        )
        if equal:
            raise _leak(f"{equal} scan(s), byte for byte, are")


def equal_scans(
    some: Iterable[Part], others: Iterable[Part], *, progress: Progress | None = None
) -> int:
    """How many of the others' scans stand among some, byte for byte.

    Files of one length are compared by samples first, and read whole where these agree: most of
    two large data sets is never read.
    """
    one, two = _by_length(some), _by_length(others)
    lengths = sorted(one.keys() & two.keys(), key=repr)
    total = sum(len(one[key]) + len(two[key]) for key in lengths)
    found = done = 0
    for key in lengths:
        samples = {path: _sampled(path, key[0]) for path in {*one[key], *two[key]}}
        alike = {samples[path] for path in one[key]} & {samples[path] for path in two[key]}
        digests = {path: file_digest(path) for path, mark in samples.items() if mark in alike}
        known = {digests[path] for path in one[key] if path in digests}
        found += sum(digests.get(path) in known for path in two[key])
        done += len(one[key]) + len(two[key])
        if progress is not None:
            progress(done, total)
    return found


def _leak(what: str) -> ConfigError:
    return ConfigError(
        f"{what} both in pre-training and in the downstream test, none may be. Use the same seed, "
        "folds and fold for both divisions, or leave these patients out of pre-training."
    )


def _related(first: str, second: str) -> bool:
    def shares(one: str, other: str) -> bool:
        return one in ADAPTERS and other in ADAPTERS[one].info.shares_patients_with

    return shares(first, second) or shares(second, first)


def _part(root: Path, source: Source) -> Part:
    path = root / source.path
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.is_file())
        path = files[len(files) // 2] if files else path
    return path, source.index, source.key


def _by_length(parts: Iterable[Part]) -> dict[tuple[int, int | None, str], list[Path]]:
    """Files by length and by what is used of them: two rows of one array are two scans."""
    found: dict[tuple[int, int | None, str], list[Path]] = defaultdict(list)
    for path, index, key in parts:
        if path.is_file():
            found[path.stat().st_size, index, key].append(path)
    return found


def _sampled(path: Path, size: int) -> bytes:
    with path.open("rb") as stream:
        digest = hashlib.sha256(stream.read(_SAMPLE_BYTES))
        for place in (size // 3, 2 * size // 3, max(0, size - _SAMPLE_BYTES)):
            stream.seek(place)
            digest.update(stream.read(_SAMPLE_BYTES))
    return digest.digest()
