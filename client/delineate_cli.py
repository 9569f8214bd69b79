"""The verb ``agssd-site delineate``."""

from pathlib import Path
from typing import Annotated

import typer

from agssd_core.config.load import load_config, parse_config
from agssd_core.console import progress_bar, say
from agssd_core.data.catalogue import database, source_paths, true_path


def delineate(
    site: Annotated[Path, typer.Argument(help="The site's folder.", show_default=False)],
    lpsam: Annotated[
        Path | None, typer.Option(help="Fitted LP-SAM, with its signature beside it.")
    ] = None,
    digest: Annotated[
        str, typer.Option(help="SHA-256 of that file, unless policy.yaml of the site lists it.")
    ] = "",
    labels: Annotated[
        Path | None, typer.Option(help="Folder of label maps named like the source files.")
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="Configuration of the run.")
    ] = None,
    override: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE laid over the configuration.")
    ] = None,
    paths: Annotated[
        bool, typer.Option("--paths", help="Show the paths of skipped clips. May name patients.")
    ] = False,
) -> None:
    """Draw the anatomies of prepared ultrasound, once; superpixels when nothing is named.

    Example: agssd-site delineate site --lpsam lpsam-a.safetensors --digest 5f77...
    """
    from client.delineate import delineate_site

    given = override or ()
    run = load_config(config, given) if config else parse_config({}, given)
    with progress_bar("Delineating") as advance:
        report = delineate_site(
            site, run, lpsam=lpsam, digest=digest, labels=labels, progress=advance
        )
    say(
        f"{report.done + report.unchanged} clip(s) have label maps from {report.source}: "
        f"{report.done} drawn now, {report.unchanged} before; {len(report.skipped)} skipped."
    )
    with database(site, write=False) as table:
        for item in report.skipped:
            say(f"skipped {item.reference}: {item.reason}")
            for path in source_paths(table, item.reference) if paths else ():
                say(f"    {true_path(path)!a}")
