"""``agssd-server serve --loopback``: SuperLink and run on this machine, until the last round."""

import logging
from collections.abc import Callable
from pathlib import Path

from agssd_core.config import RunConfig, dump_config
from agssd_core.errors import AgssdError, CheckpointError, ConfigError
from agssd_core.processes import LOOPBACK, stopping_on_terminate
from agssd_core.tracking import require_packages
from server.manifest import require_same_config
from server.outcome import RoundOutcome
from server.report import REPORT_FILE, write_server_report
from server.store import RunStore
from server.superlink import run_on, superlink
from server.tracking import tracking_rounds

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
        config: the run's; ``federation.expected_sites`` says how many sites to wait for.
        port: where sites connect; 0 takes a free one.
        say: where a line for the operator goes.
        on_round: told of every closed round.

    Raises:
        ConfigError: it is not said how many sites to wait for, or a package that tracking needs
            is not installed.
        CheckpointError: the run has no round-0 checkpoint, or one of another configuration.
        EngineError: Flower did not start, or the run ended early.
    """
    if config.federation.expected_sites == 0:
        raise ConfigError(
            "federation.expected_sites is 0, so the first round could start before all sites are "
            "there. Set it to the number of sites."
        )
    require_packages(config.tracking)
    store = RunStore(Path(config.output) / config.name, keep=config.federation.keep)
    checkpoint = store.latest()
    if checkpoint is None:
        raise CheckpointError(
            "the run has no round-0 checkpoint. Write one with `agssd-sim init CONFIG`."
        )
    require_same_config(checkpoint.manifest, dump_config(config))
    if checkpoint.round >= config.federation.rounds:
        _write_page(store)
        say("the run is complete; nothing to do")
        return
    close_round = writing_page(store, on_round)
    logs = store.folder / "engine"
    with (
        stopping_on_terminate(),
        tracking_rounds(config.tracking, store, run=config.name, on_round=close_round) as told,
        superlink(config, logs, port=port) as link,
    ):
        say(f"listening on {LOOPBACK}:{link.port}; connect each site with")
        say(f"  agssd-site run SITE --server {LOOPBACK}:{link.port}")
        run_on(link, config, store, on_round=told)
    say(f"report: {_write_page(store)}")


def writing_page(
    store: RunStore, on_round: Callable[[RoundOutcome], None] | None
) -> Callable[[RoundOutcome], None]:
    """An ``on_round`` that writes the run's page anew, then tells the given one."""

    def close_round(outcome: RoundOutcome) -> None:
        _write_page(store)
        if on_round is not None:
            on_round(outcome)

    return close_round


def _write_page(store: RunStore) -> Path:
    """A page that cannot be written (a full disk, say) must not end a run of many days."""
    try:
        return write_server_report(store.folder)
    except (AgssdError, OSError) as error:
        log.warning("the report could not be written (%s)", type(error).__name__)
        return store.folder / REPORT_FILE
