"""``agssd-server serve --loopback``: SuperLink and run on this machine, until the last round."""

import logging
from collections.abc import Callable
from pathlib import Path

from agssd_core.config import RunConfig, dump_config
from agssd_core.errors import AgssdError, CheckpointError, ConfigError
from agssd_core.processes import LOOPBACK, stopping_on_terminate
from agssd_core.tracking import require_packages
from server.cohorts import cohort_stores
from server.control import set_state
from server.live_page import live_page
from server.manifest import require_same_config
from server.outcome import RoundOutcome
from server.report import REPORT_FILE, write_server_report
from server.store import RunStore
from server.superlink import run_on, superlink
from server.tracking import tracking_cohorts

log = logging.getLogger(__name__)


def serve_on_loopback(
    config: RunConfig,
    *,
    port: int = 0,
    say: Callable[[str], None],
    on_round: Callable[[RoundOutcome], None] | None = None,
) -> None:
    """Run all rounds with real SuperNodes of this machine; the same call resumes a run.

    ``report.html`` in the run's folder is written again after every round.

    Args:
        config: the run's; each cohort's ``federation.expected_sites`` says how many sites to wait
            for.
        port: where sites connect; 0 takes a free one.
        say: where a line for the operator goes.
        on_round: told of every closed round.

    Raises:
        ConfigError: it is not said how many sites to wait for, or a package that tracking needs
            is not installed.
        CheckpointError: the run has no round-0 checkpoint, or one of another configuration.
        EngineError: Flower did not start, or the run ended early.
    """
    require_site_counts(config)
    require_packages(config.tracking)
    folder = Path(config.output) / config.name
    stores = cohort_stores(folder, config)
    left = [rounds_left(store, config.for_cohort(name)) for name, store in stores.items()]
    if not any(number > 0 for number in left):
        write_page(folder)
        say("the run is complete; nothing to do")
        return
    close_round = writing_page(folder, on_round)
    with (
        stopping_on_terminate(),
        tracking_cohorts(config.tracking, stores, run=config.name, on_round=close_round) as told,
        superlink(config, folder / "engine", port=port) as link,
        live_page(folder) as address,
    ):
        set_state([store.folder for store in stores.values()], "go")
        say(f"listening on {LOOPBACK}:{link.port}; connect each site with")
        say(f"  agssd-site run SITE --server {LOOPBACK}:{link.port}")
        say(f"live page: {address}")
        run_on(link, config, folder, on_round=told)
    say(f"report: {write_page(folder)}")


def require_site_counts(config: RunConfig) -> None:
    """Check that each cohort says how many sites to wait for.

    Raises:
        ConfigError: one does not.
    """
    for name in config.cohorts:
        if config.for_cohort(name).federation.expected_sites == 0:
            own = name == "us" and config.anaus.federation is not None
            key = f"{'anaus.' if own else ''}federation.expected_sites"
            raise ConfigError(
                f"{key} is 0, so the first round could start before all sites are there. Set it "
                "to the number of sites."
            )


def rounds_left(store: RunStore, config: RunConfig) -> int:
    """How many rounds a cohort's newest checkpoint leaves to do.

    Raises:
        CheckpointError: there is none, or it is of another configuration.
    """
    checkpoint = store.latest()
    if checkpoint is None:
        raise CheckpointError(
            "the run has no round-0 checkpoint. Write one with `agssd-sim init CONFIG`."
        )
    require_same_config(checkpoint.manifest, dump_config(config))
    return config.federation.rounds - checkpoint.round


def writing_page(
    folder: Path, on_round: Callable[[RoundOutcome], None] | None
) -> Callable[[RoundOutcome], None]:
    """An ``on_round`` that writes the run's page anew, then tells the given one."""

    def close_round(outcome: RoundOutcome) -> None:
        write_page(folder)
        if on_round is not None:
            on_round(outcome)

    return close_round


def write_page(folder: Path) -> Path:
    """A page that cannot be written (a full disk, say) must not end a run of many days."""
    try:
        return write_server_report(folder)
    except (AgssdError, OSError) as error:
        log.warning("the report could not be written (%s)", type(error).__name__)
        return folder / REPORT_FILE
