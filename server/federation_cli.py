"""The coordinator's verbs for keys: ``provision``, ``admit``, ``revoke``, ``sites``, ``journal``."""

import json
import os
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from agssd_core.config.deployment import DeploymentConfig
from agssd_core.config.load import load_node
from agssd_core.console import say, write_error
from agssd_core.enrolment import Enrolment, fingerprint
from agssd_core.errors import ConfigError
from agssd_core.journal_cli import journal_app
from server.admit import admit as admit_request
from server.admit import revoke as revoke_site
from server.enrolled import WARNING, SiteKey, site_keys, waiting_kits
from server.federation_folder import load_federation
from server.provision import provision as provision_folder
from server.provision_certificates import certificate_expiry

PASSPHRASE = "AGSSD_CA_PASSPHRASE"  # noqa: S105 - the variable's name
MIN_PASSPHRASE = 12

FederationOption = Annotated[
    Path, typer.Option("--federation", "-f", help="Folder made by `provision`.")
]


def register(app: typer.Typer) -> None:
    """Add the verbs to ``agssd-server``."""
    for verb in (provision, admit, revoke, sites):
        app.command()(verb)
    app.add_typer(journal_app(lambda folder: load_federation(folder).key), name="journal")


def provision(
    config: Annotated[Path, typer.Argument(help="federation.yaml.", show_default=False)],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder, made if new.")],
    again: Annotated[
        list[str] | None, typer.Option(help="Site that gets a new kit; the old one is void.")
    ] = None,
    renew_certificate: Annotated[
        bool, typer.Option("--renew-certificate", help="New key and certificate of the server.")
    ] = False,
) -> None:
    """Make certificates, the coordinator's key and a kit for every site that has none.

    Keys that exist are kept. The passphrase of ca.key comes from AGSSD_CA_PASSPHRASE or is asked
    for, when a certificate has to be made.

    Example: agssd-server provision federation.yaml --out federation
    """
    done = provision_folder(
        load_node(config, DeploymentConfig),
        out,
        passphrase=_passphrase,
        now=datetime.now(UTC),
        renew_certificate=renew_certificate,
        again=again or (),
    )
    if done.certificate_expires:
        say(f"server certificate made; it expires on {done.certificate_expires:%Y-%m-%d}")
    for site in done.kits:
        say(f"new kit: {out / 'kits' / site}.zip")
    if done.known:
        say(f"unchanged, had a kit before: {', '.join(done.known)}")
    for site in done.unlisted:
        say(f"{site} is a member but not in {config}; use `agssd-server revoke {site}` to end that")
    say(f"coordinator's key: {fingerprint(done.server_key)}  (sites compare it by telephone)")


def admit(
    request: Annotated[Path, typer.Argument(help="The site's request.json.", show_default=False)],
    federation: FederationOption,
    answer: Annotated[
        Path | None, typer.Option(help="File for the site; in FEDERATION/answers if left out.")
    ] = None,
) -> None:
    """Check a site's request, enrol its key and write the answer for the site.

    Example: agssd-server admit request.json --federation federation
    """
    enrolment, place = admit_request(request, federation, now=datetime.now(UTC), answer=answer)
    say(
        f"admitted: site {enrolment.site}, key {enrolment.key_id}, {_counts(enrolment)} "
        f"patients, until {enrolment.expires[:10]}"
    )
    say(f"site's key: {fingerprint(enrolment.signing_key)}")
    say(f"answer for the site: {place}")


def revoke(
    site: Annotated[str, typer.Argument(help="Name of the site.", show_default=False)],
    federation: FederationOption,
    reason: Annotated[str, typer.Option(help="One line for the journal.")] = "not given",
    key: Annotated[int, typer.Option(min=0, help="This key alone; 0 is all and the kit.")] = 0,
) -> None:
    """Take a site's keys away, and its kit if it was not used; it returns only by a new kit.

    Example: agssd-server revoke north --federation federation --reason "laptop stolen"
    """
    ids, voided = revoke_site(federation, site, reason=reason, now=datetime.now(UTC), key_id=key)
    for key_id in ids:
        say(f"revoked: key {key_id} of {site}")
    if voided:
        say(f"void: the kit of {site}")
    if not ids and not voided:
        say(f"nothing to revoke: {site} has no such key or kit in force")


def sites(
    federation: FederationOption,
    as_json: Annotated[bool, typer.Option("--json", help="Answer in JSON.")] = False,
) -> None:
    """List the members' keys: cohorts, when each ends, and its state.

    Example: agssd-server sites --federation federation --json
    """
    now = datetime.now(UTC)
    keys, kits = site_keys(federation, now), waiting_kits(federation, now)
    if as_json:
        say(json.dumps({"keys": [_row(key, now) for key in keys], "kits": kits}))
    else:
        for key in keys:
            say(_line(key))
        for site, state in kits.items():
            say(f"{site}  kit  {state}")
    newest = {key.site: key for key in keys}
    for key in newest.values():
        if key.state in ("ends soon", "expired"):
            write_error(_warning(key, now))
    _warn_of_certificate(federation, now)


def _passphrase(new: bool) -> bytes:
    given = os.environ.get(PASSPHRASE, "")
    if not given:
        if not sys.stdin.isatty():
            raise ConfigError(
                f"ca.key has to be opened, and there is no terminal to ask for its passphrase. Set "
                f"{PASSPHRASE}."
            )
        given = typer.prompt("Passphrase of ca.key", hide_input=True, confirmation_prompt=new)
    if new and len(given) < MIN_PASSPHRASE:
        raise ConfigError(
            f"the passphrase has {len(given)} signs, at least {MIN_PASSPHRASE} are needed. Choose "
            "a longer one and keep it apart from the folder."
        )
    return given.encode()


def _counts(enrolment: Enrolment) -> str:
    return ", ".join(f"{cohort} {count}" for cohort, count in sorted(enrolment.cohorts.items()))


def _line(key: SiteKey) -> str:
    if key.enrolment is None:
        return f"{key.site}  key {key.key_id}  damaged; restore its record, or make a new kit"
    ends = key.enrolment.expires[:10]
    return f"{key.site}  key {key.key_id}  {_counts(key.enrolment)}  until {ends}  {key.state}"


def _row(key: SiteKey, now: datetime) -> dict[str, Any]:
    row = {"site": key.site, "key_id": key.key_id, "state": key.state}
    if key.enrolment is None:
        return row
    about = asdict(key.enrolment)
    wanted = ("cohorts", "admitted", "expires", "node_key", "signing_key")
    days = (key.enrolment.expiry - now).days
    return row | {name: about[name] for name in wanted} | {"days_left": days}


def _warning(key: SiteKey, now: datetime) -> str:
    if key.state == "expired" or key.enrolment is None:
        return (
            f"the newest key of {key.site} has expired. Make a new kit with `agssd-server "
            f"provision --again {key.site}`."
        )
    days = (key.enrolment.expiry - now).days
    return f"the key of {key.site} ends in {days} day(s). Ask the site for `agssd-site renew`."


def _warn_of_certificate(folder: Path, now: datetime) -> None:
    left = certificate_expiry(folder / "server.pem") - now
    if left <= WARNING:
        write_error(
            f"the server's certificate ends in {left.days} day(s). Use `agssd-server provision "
            "--renew-certificate`, then restart the server."
        )
