"""``agssd-server``: the coordinator's commands."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from agssd_core.config import load_config
from agssd_core.console import new_app, say
from agssd_core.errors import ConfigError
from server import federation_cli
from server.cohorts import run_folders
from server.federation_folder import load_federation
from server.outcome import RoundOutcome, outcomes_of
from server.proxy import SUPERLINK_PORT, write_federation_proxy
from server.report import write_server_report
from server.run_record import METRICS_FILE
from server.serve import serve_run
from server.store import RunStore

app = new_app("Coordinate a federation. The server never sees an image.")
federation_cli.register(app)

ConfigArgument = Annotated[Path, typer.Argument(help="Configuration of the run.")]
OverridesArgument = Annotated[
    list[str] | None, typer.Argument(help="KEY=VALUE laid over the configuration.")
]


@app.command()
def serve(
    config: ConfigArgument,
    overrides: OverridesArgument = None,
    loopback: Annotated[
        bool, typer.Option("--loopback", help="Listen on 127.0.0.1 only, without certificates.")
    ] = False,
    federation: Annotated[
        Path | None,
        typer.Option("--federation", "-f", help="Folder made by `provision`: serve its sites."),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=65535,
            help="Port on 127.0.0.1. Left out: 9092 with --federation, a free one with --loopback.",
        ),
    ] = None,
) -> None:
    """Run the rounds with a federation's sites, or with sites on this machine; resumes a run.

    Example: agssd-server serve configs/agssd-small.yaml --federation /srv/federation
    """
    if loopback == (federation is not None):
        raise ConfigError(
            "say whom to serve: the sites of a federation, which come in through the proxy "
            "(--federation FOLDER), or sites on this machine without certificates (--loopback)."
        )
    settings = load_config(config, overrides or ())
    chosen = port if port is not None else 0 if loopback else SUPERLINK_PORT
    serve_run(settings, federation=federation, port=chosen, say=say, on_round=_say_round)


@app.command()
def check(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Validate a configuration without running it; every fault is reported.

    Example: agssd-server check configs/simulation.yaml federation.rounds=50
    """
    load_config(config, overrides or ())
    say(f"{config}: valid")


@app.command()
def rounds(
    run: Annotated[Path, typer.Argument(help="The run's folder.")],
    as_json: Annotated[bool, typer.Option("--json", help="Answer in JSON.")] = False,
) -> None:
    """List the rounds of a run, cohort by cohort: who was merged, who was refused and why.

    Example: agssd-server rounds runs/demo
    """
    _require_rounds(run)
    for folder in run_folders(run).values():
        for outcome in outcomes_of(RunStore(folder).metrics.rows(), rounds=0, first=0):
            if as_json:
                say(json.dumps(_row(outcome)))
            else:
                _say_round(outcome)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="The run's folder.")]) -> None:
    """Write report.html of a run as it stands; `serve` does so after every round.

    Curves, sites and verdicts without pictures: a server holds no image.

    Example: agssd-server report runs/demo
    """
    _require_rounds(run)
    say(str(write_server_report(run)))


@app.command("proxy-config")
def proxy_config(
    federation: Annotated[Path, typer.Argument(help="The federation's folder.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="nginx's folder, made if new.")],
    listen: Annotated[
        str,
        typer.Option(help="ADDRESS:PORT to open; the port of federation.yaml if left out."),
    ] = "",
    port: Annotated[
        int, typer.Option(min=1, max=65535, help="Port of `serve` on this machine.")
    ] = SUPERLINK_PORT,
) -> None:
    """Write nginx.conf for the one open port: what a site's node calls, and nothing else.

    Example: agssd-server proxy-config /srv/federation --out /srv/proxy --listen 0.0.0.0:443
    """
    listen = listen or str(load_federation(federation).settings.server.port)
    written = write_federation_proxy(federation, out, listen=listen, upstream_port=port)
    say(f"{written}: start it with `nginx -e stderr -p {out.resolve()} -c {written.name}`")


def main() -> None:
    """Entry point of ``agssd-server``."""
    app()


def _require_rounds(run: Path) -> None:
    if not any((folder / METRICS_FILE).is_file() for folder in run_folders(run).values()):
        raise ConfigError(f"{run} holds no run with closed rounds. Name a folder under runs/.")


def _row(outcome: RoundOutcome) -> dict[str, Any]:
    return {
        "cohort": outcome.cohort,
        "round": outcome.round,
        "merged": outcome.merged,
        "sites": outcome.sites,
        "refusals": dict(outcome.refusals),
    }


def _say_round(outcome: RoundOutcome) -> None:
    what = "merged" if outcome.merged else "weights unchanged"
    refused = "".join(f"; {site}: {why}" for site, why in sorted(outcome.refusals.items()))
    sites = ", ".join(outcome.sites) or "no site"
    say(
        f"{outcome.cohort} round {outcome.round}: {what} ({sites}{refused}) in "
        f"{outcome.seconds:.1f} s"
    )
