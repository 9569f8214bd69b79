"""One way to run a federation on this machine, whichever engine carries it."""

from collections.abc import Callable, Mapping
from pathlib import Path

from agssd_core.config import RunConfig
from client.app import app
from client.site import close_sites
from server.outcome import RoundOutcome
from server.rounds import run_rounds
from server.store import RunStore
from simulation.grid import ElapsedTime, InProcessGrid
from simulation.ray_engine import federate_on_ray


def federate(
    config: RunConfig,
    sites: Mapping[str, Path],
    run_folder: Path,
    *,
    on_round: Callable[[RoundOutcome], None] | None = None,
) -> None:
    """Run, or go on with, all rounds of a run; ``simulation.engine`` says on what.

    Args:
        config: the run's; ``federation.expected_sites`` 0 becomes the number of sites.
        sites: site name -> prepared folder.
        run_folder: holds at least the round-0 checkpoint.
        on_round: told of every closed round.

    Raises:
        CheckpointError: no checkpoint, or one of another configuration.
        EngineError: Flower or Ray did not start, or the run ended early.
    """
    plan = config.federation
    if plan.expected_sites == 0:
        plan = plan.model_copy(update={"expected_sites": len(sites)})
        config = config.model_copy(update={"federation": plan})
    store = RunStore(run_folder, keep=plan.keep)
    if config.simulation.engine == "ray":
        federate_on_ray(config, sites, store, on_round=on_round)
        return
    timer = ElapsedTime()
    grid = InProcessGrid(app, sites, timer=timer)
    try:
        run_rounds(
            grid,
            config,
            store,
            clock=timer.clock,
            sleep=timer.sleep,
            threads=False,
            on_round=on_round,
        )
    finally:
        close_sites()
