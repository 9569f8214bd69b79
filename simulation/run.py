"""One federation on one machine, from nothing to a merged checkpoint and a report."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

from agssd_core.config import RunConfig, dump_config
from agssd_core.console import Bar
from agssd_core.errors import CheckpointError, ConfigError
from agssd_core.tracking import require_packages
from agssd_core.training.anaus_build import build_pair
from agssd_core.training.build import build_model
from agssd_core.weights import Weights, file_digest, write_text
from server.cohorts import cohort_stores
from server.manifest import RoundRecord
from server.outcome import RoundOutcome
from server.start import start_weights, with_start
from server.store import RunStore
from server.tracking import tracking_cohorts
from simulation.engines import federate
from simulation.report import write_report
from simulation.sites import Say, build_sites, site_folders
from simulation.split import SITES, with_split


def run_folder(config: RunConfig) -> Path:
    """Where a run keeps everything: ``output/name``."""
    return Path(config.output) / config.name


def initialise(config: RunConfig) -> tuple[Path, bool]:
    """Write the round-0 checkpoint of every cohort that has none yet.

    Returns:
        The run's folder, and whether a checkpoint was written now.

    Raises:
        CheckpointError: the run exists with another configuration, ``init.checkpoint`` cannot be
            used, or the disk is full.
    """
    config = with_start(config)
    folder = run_folder(config)
    stores = cohort_stores(folder, config)
    begun = [_begin(config.for_cohort(name), store) for name, store in stores.items()]
    return folder, any(begun)


def _begin(config: RunConfig, store: RunStore) -> bool:
    """Write a cohort's round-0 checkpoint; False when the run has begun already."""
    with store.writing():
        if store.resume(dump_config(config)) is not None:
            return False
        record = RoundRecord(
            run=_run_id(config),
            round=0,
            cohort=config.federation.cohort,
            config=dump_config(config),
        )
        store.save_round(record, _first_weights(config))
    return True


def _first_weights(config: RunConfig) -> Weights:
    cohort = config.federation.cohort
    if cohort == "us":
        fresh = build_pair(config.anaus, seed=config.seed).shared_weights()
    else:
        fresh = build_model(config.agssd, seed=config.seed).shared_weights()
    return start_weights(config.init, cohort, fresh)


def run_simulation(
    config: RunConfig,
    *,
    say: Say,
    bar: Bar,
    on_round: Callable[[RoundOutcome], None] | None = None,
) -> Path:
    """Make the sites, start or resume the federation, and write the report.

    Returns:
        Path of report.html.

    Raises:
        AgssdError: any of the parts cannot go on; what is finished is kept, and the same call
            goes on from there.
    """
    require_packages(config.tracking)
    config = with_start(with_split(config))
    folder, fresh = initialise(config)
    _require_same_sites(config, folder)
    if not fresh:
        say(f"going on with the run in {folder}")
    sites = build_sites(config, folder / "sites", say=say, bar=bar)
    stores = cohort_stores(folder, config)
    with tracking_cohorts(config.tracking, stores, run=config.name, on_round=on_round) as told:
        federate(config, sites, folder, on_round=told)
    return write_report(folder, sites=sites, config=config)


def rewrite_report(config: RunConfig) -> Path:
    """Write the report of a run as it stands; its sites must have been made.

    Raises:
        CatalogueError: a site's folder does not exist.
        CheckpointError: the run does not.
    """
    config, folder = with_split(config), run_folder(config)
    if not any(store.rounds() for store in cohort_stores(folder, config).values()):
        raise CheckpointError("the run has no checkpoint. Start it with `agssd-sim run CONFIG`.")
    return write_report(folder, sites=site_folders(config, folder / "sites"), config=config)


def _run_id(config: RunConfig) -> str:
    # A function of the configuration, so that two runs with one seed agree in every digest.
    text = f"{config.name}/{dump_config(config)}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _require_same_sites(config: RunConfig, folder: Path) -> None:
    """Keep the folders of ``data.sites`` from changing under a run; dumps do not hold them."""
    named = [
        {**json.loads(dump_config(site)), "paths": [str(Path(p).absolute()) for p in site.paths]}
        for site in config.data.sites
    ]
    if config.simulation.split:
        table = Path(config.simulation.split).expanduser() / SITES
        named.append({"split": file_digest(table)})
    text, file = json.dumps(named, indent=1), folder / "sites.json"
    if not file.is_file():
        write_text(file, text, private=True)
    elif file.read_text(encoding="utf-8") != text:
        raise ConfigError(
            "the run was started with other folders in data.sites. Use the same, or another name."
        )
