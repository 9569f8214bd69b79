"""The verbs of a site's keys: ``enrol``, ``renew``, ``journal``."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from agssd_core.console import say
from agssd_core.enrolment import EnrolmentRequest, fingerprint
from agssd_core.errors import ConfigError
from agssd_core.journal_cli import journal_app
from client.connection import keys_folder
from client.enrol import REQUEST_FILE, accept_answer, journal_key, load_coordinator
from client.enrol import enrol as enrol_site
from client.enrol import renew as renew_keys


def register(app: typer.Typer) -> None:
    """Add the verbs to ``agssd-site``."""
    for verb in (enrol, renew):
        app.command()(verb)
    app.add_typer(journal_app(journal_key), name="journal")


def enrol(
    site: Annotated[Path, typer.Option("--site", "-s", help="The site's folder.")],
    kit: Annotated[
        Path | None, typer.Argument(help="Zip from the coordinator.", show_default=False)
    ] = None,
    answer: Annotated[
        Path | None, typer.Option(help="The coordinator's answer to the request.")
    ] = None,
) -> None:
    """Make this site's keys and a request from a KIT; with --answer put them into use.

    Private keys stay in SITE/keys. Only SITE/keys/request.json is sent, and it holds nothing
    secret.

    Example: agssd-site enrol north.zip --site /srv/site
    """
    if (kit is None) == (answer is None):
        raise ConfigError("give either a KIT or --answer FILE.")
    now = datetime.now(UTC)
    if kit is not None:
        request = enrol_site(site, kit, now=now)
        coordinator = load_coordinator(site)
        say(f"federation {request.federation} at {coordinator.server}, this site is {request.site}")
        say(f"coordinator's key: {fingerprint(coordinator.server_key)}  (compare by telephone)")
        _say_request(site, request)
    elif answer is not None:
        connection = accept_answer(site, answer, now=now)
        say(
            f"enrolled: site {connection.site}, key {connection.key_id}, until "
            f"{connection.expires[:10]}; renew it before with `agssd-site renew {site}`"
        )


def renew(
    site: Annotated[Path, typer.Argument(help="The site's folder.", show_default=False)],
) -> None:
    """Make the next keys and a request that the present key vouches for.

    The present key stays in use until `agssd-site enrol --answer`; a running `agssd-site run`
    then takes the new one up by itself.

    Example: agssd-site renew /srv/site
    """
    _say_request(site, renew_keys(site, now=datetime.now(UTC)))


def _say_request(site: Path, request: EnrolmentRequest) -> None:
    counts = ", ".join(f"{cohort} {count}" for cohort, count in sorted(request.cohorts.items()))
    say(f"patients: {counts}")
    say(f"this site's key {request.key_id}: {fingerprint(request.signing_key)}")
    say(f"send to the coordinator: {keys_folder(site) / REQUEST_FILE}")
