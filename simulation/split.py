"""A division of a data set on disk: ``sites.csv``, raw folders of the sites, and a picture."""

import json
from dataclasses import dataclass
from pathlib import Path

from agssd_core.config import RunConfig, SiteFoldersConfig
from agssd_core.console import Bar
from agssd_core.errors import ConfigError, DataError
from agssd_core.weights import file_digest, write_bytes, write_text
from simulation.datasets.known import ADAPTERS
from simulation.leakage import refuse_leakage
from simulation.materialise import remove_raw_site, unusable_scans, write_raw_site
from simulation.partition import Placed, partition
from simulation.sites_csv import read_sites, write_sites
from simulation.split_picture import split_picture

SITES, ABOUT, PICTURE, RAW = "sites.csv", "split.json", "split.png", "raw"


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
    official: bool = True


@dataclass(frozen=True)
class Divided:
    """What was written, and what the adapter noted.

    Attributes:
        left_out: scans that belong to no site of the division.
        unusable: training scan -> why it cannot be used.
    """

    placed: tuple[Placed, ...]
    notes: tuple[str, ...]
    left_out: int
    unusable: dict[str, str]


def write_split(
    division: Division, out: Path, *, downstream: Path | None = None, bar: Bar
) -> Divided:
    """Divide a data set and write the folder that other commands read.

    Args:
        division: how.
        out: folder to write. An earlier division in it is replaced, other files are not touched.
        downstream: folder of another division or its ``sites.csv``, whose held-out patients must
            not be among the patients that train here.
        bar: opens a progress bar.

    Raises:
        ConfigError: no such data set or division, or patients would leak into the test.
        DataError: the download is not as published, no scan can be used, or a folder of a site
            holds somebody's own files.
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
        official=division.official,
    )
    if downstream is not None:
        _refuse_leakage(division, placed, downstream, bar=bar)
    # Without it the folder is no division, so a killed call leaves none that is half of two.
    (out / ABOUT).unlink(missing_ok=True)
    write_sites(out / SITES, placed)
    unusable = _write_raw(division.root, placed, out / RAW, bar=bar)
    label = division.by.partition(":")[2].partition(":")[2]
    with bar("Drawing") as advance:
        picture = split_picture(division.root, placed, label=label, progress=advance)
    write_bytes(out / PICTURE, picture)
    write_about(division, out)
    return Divided(placed, found.notes, len(found.rows) - len(placed), unusable)


def read_split(folder: Path) -> tuple[Division, tuple[Placed, ...]]:
    """A division that `agssd-sim split` wrote.

    Raises:
        DataError: there is none, it is damaged, or its table was changed afterwards.
    """
    try:
        plain = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
        digest = plain.pop("digest")
        name, root = plain.pop("dataset"), Path(plain.pop("root"))
        division = Division(name, root, **plain)
        same = file_digest(folder / SITES) == digest
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise DataError(
            "the folder holds no division of a data set. Make one with `agssd-sim split`."
        ) from None
    if not same:
        raise DataError(
            "sites.csv was changed after the division was made, so its raw folders may differ. "
            "Make the division again."
        )
    return division, read_sites(folder / SITES)


def with_split(config: RunConfig) -> RunConfig:
    """The configuration with the sites of ``simulation.split`` as its ``data.sites``.

    Raises:
        ConfigError: both are given.
        DataError: there is no such division, or its raw folders are not finished.
    """
    if not config.simulation.split:
        return config
    if config.data.sites:
        raise ConfigError("simulation.split and data.sites both name sites. Leave one of them out.")
    folder = Path(config.simulation.split).expanduser().absolute()
    _, placed = read_split(folder)
    names = sorted({item.site for item in placed if item.split == "train"})
    usable = [name for name in names if (folder / RAW / name).is_dir()]
    entries = [SiteFoldersConfig(name=n, paths=(str(folder / RAW / n),)) for n in usable]
    if not entries:
        raise DataError("the division's raw folders are gone. Make the division again.")
    data = config.data.model_copy(update={"sites": tuple(entries)})
    return config.model_copy(update={"data": data})


def _refuse_leakage(
    division: Division, placed: tuple[Placed, ...], downstream: Path, *, bar: Bar
) -> None:
    other, tested = read_split(downstream.parent if downstream.is_file() else downstream)
    with bar("Comparing files") as advance:
        refuse_leakage(
            placed,
            tested,
            names=(division.name, other.name),
            roots=(division.root, other.root),
            progress=advance,
        )


def _write_raw(root: Path, placed: tuple[Placed, ...], raw: Path, *, bar: Bar) -> dict[str, str]:
    """Write the sites' folders; a site without a usable scan gets none.

    Returns:
        Training scan -> why it cannot be used.
    """
    names = sorted({item.site for item in placed if item.split == "train"})
    for old in sorted(raw.glob("*/")):
        if old.name not in names:
            remove_raw_site(old)
    unusable: dict[str, str] = {}
    empty: list[DataError] = []
    for site in names:
        rows = [item.row for item in placed if (item.site, item.split) == (site, "train")]
        try:
            with bar(f"Gathering {site}") as advance:
                write_raw_site(root, rows, raw / site, progress=advance)
        except DataError as error:
            if len(unusable_scans(raw / site)) < len(rows):
                raise
            empty.append(error)
        unusable |= unusable_scans(raw / site)
        if unusable.keys() >= {row.scan for row in rows}:
            remove_raw_site(raw / site)
    if len(empty) == len(names):
        raise empty[0] if empty else DataError("no scan trains. Hold out fewer patients.")
    return unusable


def write_about(division: Division, out: Path) -> None:
    """Write ``split.json`` beside a finished ``sites.csv``; with it the folder is a division."""
    about = {
        "dataset": division.name,
        "root": str(division.root.resolve()),
        "by": division.by,
        "sites": division.sites,
        "seed": division.seed,
        "folds": division.folds,
        "fold": division.fold,
        "official": division.official,
        "digest": file_digest(out / SITES),
    }
    write_text(out / ABOUT, json.dumps(about, indent=1), private=True)
