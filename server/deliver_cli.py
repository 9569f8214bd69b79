"""``agssd-server deliver``: the newest checkpoint as a signed file, for a site that was away."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from agssd_core.console import say
from agssd_core.errors import ConfigError
from agssd_core.journal import Fact
from server.cohorts import run_folders
from server.delivery import write_delivery
from server.federation_folder import load_federation, open_journal, signing_key
from server.store import RunStore


def deliver(
    run: Annotated[Path, typer.Argument(help="The run's folder.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write.")],
    federation: Annotated[
        Path, typer.Option("--federation", "-f", help="Folder made by `provision`.")
    ],
    cohort: Annotated[
        Literal["ct-mr", "us"] | None,
        typer.Option(help="Whose checkpoint; may be left out where there is one."),
    ] = None,
) -> None:
    """Write the newest checkpoint of a run to one signed file, which any of its sites can take.

    Sites on line at the end of the run get it without this.

    Example: agssd-server deliver runs/lung-2030 --out lung.safetensors --federation federation
    """
    own = signing_key(federation)
    folders = run_folders(run)
    if len(folders) > 1 and cohort is None:
        raise ConfigError(f"the run has cohorts {', '.join(folders)}. Name one with --cohort.")
    if len(folders) > 1 and cohort not in folders:
        raise ConfigError(f"the run has no cohort {cohort}, only {', '.join(folders)}.")
    store = RunStore(folders.get(cohort or "", next(iter(folders.values()))))
    newest = store.latest()
    if newest is not None and cohort not in (None, newest.manifest.cohort):
        raise ConfigError(f"the run is of cohort {newest.manifest.cohort}, not {cohort}.")
    journal = open_journal(federation, own, load_federation(federation).settings.name)
    said = write_delivery(store, own, out)
    facts: dict[str, Fact] = {"run": said.run, "cohort": said.cohort, "round": said.round}
    journal.append("export", {"event": "delivery file", **facts, "weights": said.weights_digest})
    state = "final" if said.round == said.rounds else f"{said.rounds} planned, not the last"
    say(f"{out}: {said.name}, cohort {said.cohort}, round {said.round} ({state})")
    say("send it to the site by any channel; `agssd-site fetch FILE SITE` checks its signature")
