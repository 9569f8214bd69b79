"""What a site gets out of taking part: ``agssd-site fetch``."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from agssd_core.console import say


def register(app: typer.Typer) -> None:
    """Add the verbs to ``agssd-site``."""
    app.command()(fetch)


def fetch(
    what: Annotated[
        str,
        typer.Argument(
            metavar="RUN",
            help="Name or id of a run, or a file made by `agssd-server deliver`.",
            show_default=False,
        ),
    ],
    site: Annotated[Path, typer.Argument(help="The site's folder.", show_default=False)],
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="Folder for the checkpoint; left out, it is checked."),
    ] = None,
    cohort: Annotated[
        Literal["ct-mr", "us"] | None, typer.Option(help="Where both have that name.")
    ] = None,
) -> None:
    """Check the final checkpoint of a run against the coordinator's key, and write it to a folder.

    It comes by itself when the last round is over and the site is on line. A site that was away
    takes a file from the coordinator in place of RUN.

    Example: agssd-site fetch lung-2030 /srv/site --out encoder
    """
    from client.fetch import fetch_checkpoint

    found = fetch_checkpoint(what, site, out=out, cohort=cohort)
    said = found.certificate
    state = "final" if said.round == said.rounds else f"of {said.rounds}, not the last"
    say(
        f"{found.folder}: {said.name}, cohort {said.cohort}, round {said.round} ({state}); the "
        "coordinator's signature and all digests hold"
    )
