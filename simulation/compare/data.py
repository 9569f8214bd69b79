"""The scans of one seed: who trains on what, who is held out, and all of it made ready."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from agssd_core.config import COHORT_OF, RunConfig, SiteFoldersConfig, dump_config
from agssd_core.console import Bar
from agssd_core.errors import ConfigError
from agssd_core.evaluation.labelled import LabelledSet
from agssd_core.weights import file_digest
from simulation.compare.plan import POOLED, Model, cohort_of, model_config
from simulation.datasets.known import ADAPTERS
from simulation.datasets.manifest import read_manifest
from simulation.datasets.rows import Row
from simulation.labelled import write_labelled
from simulation.materialise import unusable_scans, write_raw_site
from simulation.partition import partition
from simulation.phantom_rows import phantom_rows
from simulation.sites import Say, build_sites
from simulation.sites_csv import write_sites

PHANTOMS = "phantoms"


@dataclass(frozen=True)
class SeedData:
    """What every model of one seed trains on and is asked.

    Attributes:
        folder: ``runs/NAME/seed-S``.
        sites: prepared folder of each site, training patients only.
        pooled: prepared folder with the training patients of all sites.
        scans: labelled scans of both sides of the split.
        digest: of the split and of the preprocessing.
    """

    seed: int
    folder: Path
    sites: dict[str, Path]
    pooled: Path
    scans: LabelledSet
    digest: str


@dataclass(frozen=True)
class Scans:
    """Rows of the cohort that is compared, and the folder that they lie in."""

    root: Path
    rows: tuple[Row, ...]


def scans_of(settings: RunConfig, folder: Path, *, bar: Bar) -> Scans:
    """The scans of a comparison; phantoms are invented below ``folder``.

    Raises:
        ConfigError: there is no such data set, or it holds nothing for the cohort.
        DataError: the download is not as published.
    """
    wanted = settings.compare.data
    if not wanted.dataset:
        root = folder / PHANTOMS
        with bar("Inventing hospitals") as advance:
            found = phantom_rows(
                root, settings.simulation.phantoms, seed=settings.seed, progress=advance
            )
    elif wanted.dataset == "manifest":
        root = Path(wanted.root).expanduser()
        found = read_manifest(root, only=wanted.only)
    elif wanted.dataset in ADAPTERS:
        root = Path(wanted.root).expanduser()
        found = ADAPTERS[wanted.dataset].read(root)
    else:
        raise ConfigError(
            f"compare.data.dataset = {wanted.dataset!r} is not known. `agssd-sim datasets` lists "
            "those that are."
        )
    rows = tuple(row for row in found.rows if COHORT_OF[row.modality] == cohort_of(settings))
    if not rows:
        raise ConfigError(
            f"the data set holds no scan for cohort {cohort_of(settings)}. Name another cohort, or "
            "other patterns in compare.data.only."
        )
    return Scans(root, rows)


def prepare_seed(
    settings: RunConfig, folder: Path, scans: Scans, *, place: int, say: Say, bar: Bar
) -> SeedData:
    """Split, prepare and label the scans of one seed. What is ready is not done again.

    Args:
        settings: of the comparison.
        folder: the comparison's.
        scans: what there is.
        place: of the seed in ``compare.seeds``; says which fold is held out. The seed itself is
            that of the split's hands and of everything drawn later.
        say: writes a line.
        bar: opens a progress bar.

    Raises:
        ConfigError: fewer than two sites, or a task that no held-out scan can answer.
    """
    wanted, seed = settings.compare.data, settings.compare.seeds[place]
    placed = partition(
        scans.rows,
        by=wanted.by,
        sites=wanted.sites or None,
        seed=seed,
        folds=wanted.folds,
        fold=place % wanted.folds,
    )
    own = folder / f"seed-{seed}"
    write_sites(own / "sites.csv", placed)
    names = sorted({item.site for item in placed if item.split == "train"})
    if len(names) < 2:
        raise ConfigError(
            f"compare.data.by = {wanted.by} gives {len(names)} site(s), a federation needs two. "
            "Divide by something else."
        )
    raw = {}
    for name in names:
        raw[name] = own / "raw" / name
        rows = [item.row for item in placed if (item.site, item.split) == (name, "train")]
        write_raw_site(scans.root, rows, raw[name])
        for reason, count in Counter(unusable_scans(raw[name]).values()).items():
            say(f"seed {seed}, {name}: {count} scan(s) cannot train: {reason}")
    sites, pooled = _made_ready(settings, own, raw, seed=seed, say=say, bar=bar)
    labelled = [item for item in placed if item.site not in wanted.pretrain_only]
    with bar(f"Labelling the scans of seed {seed}") as advance:
        asked = write_labelled(
            scans.root, labelled, settings.data, own / "labelled", progress=advance
        )
    for reason, count in Counter(asked.skipped.values()).items():
        say(f"seed {seed}: {count} scan(s) are asked nothing: {reason}")
    return SeedData(
        seed=seed,
        folder=own,
        sites=sites,
        pooled=pooled,
        scans=asked,
        digest=_digest(own / "sites.csv", settings),
    )


def _made_ready(
    settings: RunConfig, folder: Path, raw: Mapping[str, Path], *, seed: int, say: Say, bar: Bar
) -> tuple[dict[str, Path], Path]:
    """Prepared folders of the sites by name, and the one of all of them together."""
    names = list(raw)
    entries = [SiteFoldersConfig(name=name, paths=(str(raw[name]),)) for name in names]
    federated = model_config(settings, Model(seed, "federated"), names)
    pooled = model_config(settings, Model(seed, "pooled"), names)
    everything = SiteFoldersConfig(
        name=POOLED, paths=tuple(path for entry in entries for path in entry.paths)
    )
    sites = build_sites(_on(federated, entries), folder / "sites", say=say, bar=bar)
    together = build_sites(_on(pooled, [everything]), folder / "together", say=say, bar=bar)
    return {name: sites[name] for name in names}, together[POOLED]


def _on(config: RunConfig, entries: Sequence[SiteFoldersConfig]) -> RunConfig:
    data = config.data.model_copy(update={"sites": tuple(entries)})
    return config.model_copy(update={"data": data})


def _digest(split: Path, settings: RunConfig) -> str:
    """Of the split and of all that decides what is in its scans, as far as settings do."""
    parts = [file_digest(split), dump_config(settings.data.model_copy(update={"sites": ()}))]
    if not settings.compare.data.dataset:
        phantoms = settings.simulation.phantoms
        parts += [str(settings.seed), *(dump_config(site) for site in phantoms)]
    return hashlib.sha256("/".join(parts).encode()).hexdigest()
