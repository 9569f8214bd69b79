"""The verb ``agssd-server privacy-report``."""

from pathlib import Path
from typing import Annotated

import typer

from agssd_core.console import say
from agssd_core.errors import ConfigError
from server.cohorts import run_folders
from server.privacy_report import write_privacy_report
from server.run_record import METRICS_FILE


def register(app: typer.Typer) -> None:
    """Add the verb to ``agssd-server``."""
    app.command("privacy-report")(privacy_report)


def privacy_report(
    run: Annotated[Path, typer.Argument(help="The run's folder.", show_default=False)],
) -> None:
    """Write one page in plain words: what a run protects, at which epsilon, and what it does not.

    Example: agssd-server privacy-report runs/demo
    """
    if not any((folder / METRICS_FILE).is_file() for folder in run_folders(run).values()):
        raise ConfigError(f"{run} holds no run with closed rounds. Name a folder under runs/.")
    for file in write_privacy_report(run):
        say(str(file))
