"""The part of a run's configuration that travels to its sites."""

from agssd_core.config import FederationConfig, RunConfig, SimulationConfig, TrackingConfig
from agssd_core.config.federation import WAITING


def site_config(config: RunConfig) -> RunConfig:
    """The part of a configuration that a site trains with; where it runs is none of its concern.

    Settings of time are left out as well: a run that resumes with a longer deadline keeps its
    sites' optimisers. The other cohort's settings have no part in it.
    """
    config = config.for_cohort(config.federation.cohort)
    defaults = FederationConfig()
    federation = {name: getattr(defaults, name) for name in WAITING}
    plain = {
        "federation": config.federation.model_copy(update=federation),
        "name": "run",
        "output": "runs",
        "simulation": SimulationConfig(),
        "tracking": TrackingConfig(),
    }
    return config.model_copy(update=plain)
