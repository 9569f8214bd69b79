"""The verb ``agssd-site report``."""

from pathlib import Path
from typing import Annotated

import typer

from agssd_core.console import say


def report(
    site: Annotated[Path, typer.Argument(help="The site's folder.", show_default=False)],
) -> None:
    """Write SITE/report.html: this site's own curves of every run. The page stays here.

    Example: agssd-site report site
    """
    from client.report import write_site_report

    say(f"{write_site_report(site)} written; it stays at this site")
