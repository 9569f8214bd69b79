"""The verb ``agssd-site preflight``."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from agssd_core.config import Cohort, RunConfig, config_from_json
from agssd_core.config.load import load_config, parse_config
from agssd_core.console import progress_bar, say, stdout
from agssd_core.data.catalogue import open_catalogue
from agssd_core.errors import AgssdError, ConfigError
from client.connection import ca_file, load_connection
from client.memory import RunMemory
from client.preflight_keys import check_policy, key_rows
from client.preflight_machine import check_versions, machine_rows
from client.preflight_network import network_rows
from client.preflight_privacy import privacy_rows
from client.preflight_route import route_to
from client.preflight_row import Row, fail

EXIT_RED = 1
_COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def preflight(
    site: Annotated[Path, typer.Argument(help="The site's folder.", show_default=False)],
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="Configuration of the run; the newest run's here."),
    ] = None,
    override: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE laid over the configuration.")
    ] = None,
    constraints: Annotated[
        Path | None, typer.Option(help="List of tested package versions, constraints.txt.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Take no training step to measure memory.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Answer in JSON, for scripts.")] = False,
) -> None:
    """Check network, keys, machine and data before taking part. Exit code 1 when one is red.

    What is printed holds no secret, no path of a scan and nothing of a patient, so it can be sent
    to whoever helps.

    Example: agssd-site preflight site --config configs/agssd.yaml
    """
    if not site.is_dir():
        raise ConfigError("there is no such folder. Make the site with `agssd-site index` first.")
    run, begun = _run_config(site, config, override or ())
    rows: list[Row] = []
    with progress_bar("Checking") as advance:
        for row in chain(
            _joining_rows(site, constraints),
            privacy_rows(site, run, run=begun),
            machine_rows(site, run, measure=not quick),
        ):
            rows.append(row)
            advance(len(rows), len(rows) + 1)
    if as_json:
        say(json.dumps([asdict(row) for row in rows]))
    else:
        _show(rows)
    if any(row.level == "fail" for row in rows):
        raise typer.Exit(EXIT_RED)


def _joining_rows(site: Path, constraints: Path | None) -> Iterator[Row]:
    try:
        connection = load_connection(site)
    except AgssdError as error:
        fact, _, remedy = str(error).partition(". ")
        yield fail("enrolment", fact, remedy)
    else:
        yield from network_rows(route_to(connection.host, connection.port), ca_file(site))
        yield from key_rows(site, connection, now=datetime.now(UTC))
    yield check_policy(site)
    yield check_versions(constraints)


def _run_config(site: Path, config: Path | None, overrides: Sequence[str]) -> tuple[RunConfig, str]:
    """The named configuration, else that of the newest run here, else what stands by itself.

    Returns:
        The configuration, and the id of the newest run here if it is that one's.
    """
    if config is not None:
        return load_config(config, overrides), ""
    folders = [path for path in (site / "federation").glob("*") if (path / "config.json").is_file()]
    newest = max(folders, key=lambda path: (path / "config.json").stat().st_mtime, default=None)
    text = None if newest is None else RunMemory(newest).config()
    begun = "" if newest is None or text is None else newest.name
    if text is not None and not overrides:
        return config_from_json(text), begun
    return parse_config(_own_cohorts(site) if text is None else json.loads(text), overrides), begun


def _own_cohorts(site: Path) -> dict[str, list[Cohort]]:
    try:
        held = open_catalogue(site).cohorts
    except AgssdError:
        return {}
    return {"cohorts": list(held)} if held else {}


def _show(rows: Sequence[Row]) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    for kind in ("name", "state", "found"):
        table.add_column(kind, no_wrap=kind != "found", overflow="fold")
    for row in rows:
        colour = _COLOURS[row.level]
        text = escape(row.found)
        if row.remedy:
            text += f"\n[{colour}]-> {escape(row.remedy)}[/]"
        table.add_row(escape(row.name), f"[{colour}]{row.level}[/]", text)
    stdout.print(table)
    red = sum(row.level == "fail" for row in rows)
    doubtful = sum(row.level == "warn" for row in rows)
    if red:
        say(f"{red} red: the site cannot take part until they are mended.")
    else:
        say(f"ready{f', {doubtful} to look at' if doubtful else ''}.")
