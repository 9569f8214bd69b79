"""``agssd-server``: the coordinator's commands."""

from pathlib import Path
from typing import Annotated

import typer

from agssd_core.config import load_config
from agssd_core.console import new_app, say
from agssd_core.errors import ConfigError
from server import federation_cli, privacy_cli
from server.deliver_cli import deliver
from server.federation_folder import load_federation
from server.proxy import SUPERLINK_PORT, write_federation_proxy
from server.report import write_server_report
from server.rounds_cli import page, pause, require_rounds, resume, rounds, say_round, stop
from server.serve import serve_on_loopback
from server.serve_federation import Door, serve_federation
from server.start import with_start

app = new_app("Coordinate a federation. The server never sees an image.")
for command in (rounds, pause, resume, stop, page, deliver):
    app.command()(command)
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
    port: Annotated[
        int,
        typer.Option(min=0, max=65535, help="Of the engine on 127.0.0.1; 0 takes a free one."),
    ] = 0,
    federation: Annotated[
        Path | None,
        typer.Option(
            "--federation", "-f", help="Folder made by `provision`: enrolled sites over TLS."
        ),
    ] = None,
    listen: Annotated[
        str,
        typer.Option(help="ADDRESS:PORT of the proxy; all interfaces, at the federation's port."),
    ] = "",
    no_proxy: Annotated[
        bool, typer.Option("--no-proxy", help="The machine's own nginx is the door.")
    ] = False,
) -> None:
    """Run the rounds with enrolled sites, or with sites of this machine; the same call resumes.

    Example: agssd-server serve configs/agssd-base.yaml --federation /srv/federation
    """
    if loopback == (federation is not None):
        raise ConfigError(
            "say for whom: --federation DIR for enrolled sites over TLS, or --loopback for sites "
            "on this machine without certificates."
        )
    settings = with_start(load_config(config, overrides or ()))
    if federation is None:
        serve_on_loopback(settings, port=port, say=say, on_round=say_round)
    else:
        door = Door(listen=listen, own_proxy=not no_proxy, port=port)
        serve_federation(settings, federation, door, say=say, on_round=say_round)


@app.command()
def check(config: ConfigArgument, overrides: OverridesArgument = None) -> None:
    """Validate a configuration without running it; every fault is reported.

    Example: agssd-server check configs/simulation.yaml federation.rounds=50
    """
    load_config(config, overrides or ())
    say(f"{config}: valid")


@app.command()
def report(run: Annotated[Path, typer.Argument(help="The run's folder.")]) -> None:
    """Write report.html of a run as it stands; `serve` does so after every round.

    Curves, sites and verdicts without pictures: a server holds no image.

    Example: agssd-server report runs/demo
    """
    require_rounds(run)
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


privacy_cli.register(app)


def main() -> None:
    """Entry point of ``agssd-server``."""
    app()
