"""The Flower ServerApp: reads what the run configuration names, and runs the rounds."""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from agssd_core.config import config_from_json
from agssd_core.errors import ConfigError
from server.cohorts import run_cohorts
from server.pulling import limit_pulls
from server.rounds import How
from server.signed_run import signed_run

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds of the run folder that ``run-folder`` names with the file ``config``.

    With ``federation``, the coordinator's folder, the run is signed and journalled. All are paths
    on the coordinator's own machine; whoever may submit a run there may name them.

    Raises:
        ConfigError: a path is missing, or the file holds no configuration.
        EngineError: another Flower is installed than this version needs.
    """
    file, folder = (str(context.run_config.get(key, "")) for key in ("config", "run-folder"))
    if not file or not folder:
        raise ConfigError(
            "the run was submitted without config and run-folder. Use `agssd-server serve CONFIG`."
        )
    try:
        text = Path(file).read_text(encoding="utf-8")
    except OSError:
        raise ConfigError("the run's configuration file cannot be read. Submit it again.") from None
    config = config_from_json(text)
    limit_pulls(grid)
    federation = str(context.run_config.get("federation", ""))
    how = signed_run(Path(federation), Path(folder)) if federation else How()
    run_cohorts(grid, config, Path(folder), **how)
