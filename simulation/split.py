"""A division of a data set on disk: ``sites.csv``, raw folders of the sites, and a picture."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from agssd_core.errors import ConfigError, DataError
from agssd_core.weights import file_digest, write_bytes, write_text
from simulation.datasets.known import ADAPTERS
from simulation.leakage import refuse_leakage
from simulation.materialise import write_raw_site
from simulation.partition import Placed, partition
from simulation.sites_csv import read_sites, write_sites
from simulation.split_picture import split_picture

SITES, ABOUT, PICTURE, RAW = "sites.csv", "split.json", "split.png", "raw"
Bar = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]


@dataclass(frozen=True)
class Division:
    """How a data set is divided; as the options of `agssd-sim split`."""

    name: str
    root: Path
    by: str
    sites: int | None = None
    seed: int = 0
    folds: int = 5
    fold: int = 0


@dataclass(frozen=True)
class Divided:
    """What was written, and what the adapter noted."""

    placed: tuple[Placed, ...]
    notes: tuple[str, ...]
    left_out: int


def write_split(
    division: Division, out: Path, *, downstream: Path | None = None, bar: Bar
) -> Divided:
    """Divide a data set and write the folder that other commands read.

    Args:
        division: how.
        out: folder to write; written again where it exists.
        downstream: folder of another division, whose held-out patients must not be among the
            patients that train here.
        bar: opens a progress bar.

    Raises:
        ConfigError: no such data set or division, or patients would leak into the test.
        DataError: the download is not as published.
    """
    adapter = ADAPTERS.get(division.name)
    if adapter is None:
        raise ConfigError(
            f"there is no data set {division.name!r}. `agssd-sim datasets` lists those there are."
        )
    if not division.root.is_dir():
        raise DataError("the data set's folder does not exist. Check its name.")
    found = adapter.read(division.root)
    placed = partition(
        found.rows,
        by=division.by,
        sites=division.sites,
        seed=division.seed,
        folds=division.folds,
        fold=division.fold,
    )
    if downstream is not None:
        about = json.loads((downstream / ABOUT).read_text(encoding="utf-8"))
        refuse_leakage(
            placed,
            read_sites(downstream / SITES),
            names=(division.name, about["dataset"]),
            roots=(division.root, Path(about["root"])),
        )
    write_sites(out / SITES, placed)
    _write_about(division, out)
    for site in sorted({item.site for item in placed if item.split == "train"}):
        rows = [item.row for item in placed if (item.site, item.split) == (site, "train")]
        with bar(f"Gathering {site}") as advance:
            write_raw_site(division.root, rows, out / RAW / site, progress=advance)
    with bar("Drawing") as advance:
        write_bytes(out / PICTURE, split_picture(division.root, placed, progress=advance))
    return Divided(placed, found.notes, len(found.rows) - len(placed))


def _write_about(division: Division, out: Path) -> None:
    about = {
        "dataset": division.name,
        "root": str(division.root.resolve()),
        "by": division.by,
        "sites": division.sites,
        "seed": division.seed,
        "folds": division.folds,
        "fold": division.fold,
        "digest": file_digest(out / SITES),
    }
    write_text(out / ABOUT, json.dumps(about, indent=1), private=True)
