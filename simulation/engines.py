"""One way to run a federation on this machine, whichever engine carries it."""

from collections.abc import Callable, Mapping
from pathlib import Path

from agssd_core.config import Cohort, FederationConfig, RunConfig
from client.app import app
from client.site import close_sites
from client.workbench import AgssdWorkbench
from server.cohorts import run_cohorts
from server.outcome import RoundOutcome
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
        config: the run's; where ``federation.expected_sites`` of a cohort is 0, it becomes the
            number of sites that have scans for it.
        sites: site name -> prepared folder.
        run_folder: its cohorts hold at least the round-0 checkpoint.
        on_round: told of every closed round.

    Raises:
        CheckpointError: no checkpoint, or one of another configuration.
        RoundError: a cohort failed.
        EngineError: Flower or Ray did not start, or the run ended early.
    """
    config = with_site_counts(config, sites)
    if config.simulation.engine == "ray":
        federate_on_ray(config, sites, run_folder, on_round=on_round)
        return
    timer = ElapsedTime()
    grid = InProcessGrid(app, sites, timer=timer)
    try:
        run_cohorts(
            grid,
            config,
            run_folder,
            clock=timer.clock,
            sleep=timer.sleep,
            threads=False,
            on_round=on_round,
        )
    finally:
        close_sites()


def with_site_counts(config: RunConfig, sites: Mapping[str, Path]) -> RunConfig:
    """Fill in, cohort by cohort, how many sites have scans where the configuration says 0."""
    counted: dict[Cohort, FederationConfig] = {}
    for name in config.cohorts:
        plan = config.for_cohort(name).federation
        if plan.expected_sites == 0:
            facts = [AgssdWorkbench().facts(folder, name) for folder in sites.values()]
            count = sum(each.patient_count > 0 for each in facts)
            if count >= plan.min_sites:  # otherwise no number would be a valid plan
                plan = plan.model_copy(update={"expected_sites": count})
        counted[name] = plan
    changed: dict[str, object] = {}
    if "us" in counted:
        changed["anaus"] = config.anaus.model_copy(update={"federation": counted["us"]})
    if "ct-mr" in counted:
        changed["federation"] = counted["ct-mr"]
    return config.model_copy(update=changed)
