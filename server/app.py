"""The Flower ServerApp: reads what the run configuration names, and runs the rounds."""

from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from agssd_core.config import config_from_json
from agssd_core.errors import ConfigError
from server.cohorts import run_cohorts

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds of the run folder that ``run-folder`` names with the file ``config``.

    Both are paths on the coordinator's own machine; whoever may submit a run there may name them.

    Raises:
        ConfigError: a path is missing, or the file holds no configuration.
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
    run_cohorts(grid, config, Path(folder))
