"""The same apps on Flower's Ray simulation: a SuperLink of our own, and nothing left behind."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from agssd_core.config import RunConfig
from agssd_core.weights import write_text
from server.outcome import RoundOutcome
from server.superlink import Submission, run_on, superlink

SITES_VARIABLE = "AGSSD_SIMULATION_SITES"
_CLIENT_APP = "simulation.ray_app:app"


def federate_on_ray(
    config: RunConfig,
    sites: Mapping[str, Path],
    folder: Path,
    *,
    on_round: Callable[[RoundOutcome], None] | None = None,
) -> None:
    """Run all rounds with a virtual node for each site.

    Args:
        config: the run's; ``simulation.workers`` sites train at once, on ``threads`` CPUs each.
        sites: site name -> prepared folder.
        folder: the run's, whose cohorts have a checkpoint.
        on_round: told of every closed round.

    Raises:
        EngineError: Flower or Ray did not start, or the run ended early.
    """
    logs = folder / "engine"
    table = logs / "sites.json"
    rows = [
        {"site": str(sites[name].resolve()), "name": name, "ledger": "run"}
        for name in sorted(sites)
    ]
    write_text(table, json.dumps(rows), private=True)
    settings = {
        "num-supernodes": len(rows),
        "client-resources-num-cpus": config.threads,
        "init-args-num-cpus": config.threads * min(config.simulation.workers, len(rows)),
    }
    variables = {SITES_VARIABLE: str(table.resolve())}
    with superlink(config, logs, simulation=True, variables=variables) as link:
        how = Submission(component=_CLIENT_APP, simulation=settings)
        run_on(link, config, folder, how=how, on_round=on_round)
