"""The verb ``agssd-site report``."""

from pathlib import Path
from typing import Annotated

import typer

from agssd_core.console import say


def report(
    site: Annotated[Path, typer.Argument(help="The site's folder.", show_default=False)],
    pictures: Annotated[bool, typer.Option(help="Draw two of the site's own scans.")] = True,
) -> None:
    """Write SITE/report.html: this site's own curves and pictures. The page stays here.

    Example: agssd-site report site
    """
    from client.report import write_site_report

    say(f"{write_site_report(site, pictures=pictures)} written; it stays at this site")
