"""``agssd-server provision``: the folder of a federation and a kit for every site."""

import hashlib
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from agssd_core.config.deployment import DeploymentConfig
from agssd_core.config.node import Node
from agssd_core.errors import ConfigError, KeyFileError
from agssd_core.folders import folder_lock, private_folder, require_private
from agssd_core.journal import Journal
from agssd_core.kit import Kit, write_kit
from agssd_core.protocol import PROTOCOL_VERSION
from agssd_core.signing import SigningKey
from agssd_core.weights import write_bytes
from server.federation_folder import (
    FEDERATION_FILE,
    Token,
    iso,
    key_ids,
    load_federation,
    load_token,
    open_journal,
    save_federation,
    save_token,
    signing_key,
)
from server.provision_certificates import (
    Authority,
    ca_certificate,
    new_ca_key,
    open_ca,
    open_ca_key,
    server_certificate,
)

KIT_DAYS = 30
ALWAYS = ("localhost", "127.0.0.1")

# Asks for the passphrase; told True when it is a new one, which is asked for twice.
Passphrase = Callable[[bool], bytes]


@dataclass(frozen=True)
class Provisioned:
    """What a run of ``provision`` did.

    Attributes:
        server_key: the coordinator's public key.
        certificate_expires: of a certificate made now; None when there was one.
        kits: sites that have a new kit.
        known: sites that had one before, or are enrolled.
        unlisted: members of the federation that the configuration does not name.
    """

    server_key: str
    certificate_expires: datetime | None
    kits: tuple[str, ...]
    known: tuple[str, ...]
    unlisted: tuple[str, ...]


def provision(
    given: DeploymentConfig,
    folder: Path,
    *,
    passphrase: Passphrase,
    now: datetime,
    renew_certificate: bool = False,
    again: Sequence[str] = (),
) -> Provisioned:
    """Make what is missing of a federation's folder; no key that exists is touched.

    Args:
        given: the content of federation.yaml.
        folder: made if new.
        passphrase: of ca.key; called only when a certificate has to be made.
        now: with time zone.
        renew_certificate: make a new key and certificate for the server.
        again: sites that get a new kit because the first was lost, or their keys were.

    Raises:
        ConfigError: the folder is another federation's, or ``again`` names no member.
        KeyFileError: a key does not open or is readable by others.
    """
    private_folder(folder, what="the federation's folder")
    with folder_lock(folder):
        settings, unlisted = _merged(given, folder, renewing=renew_certificate)
        expires = None
        if renew_certificate or not (folder / "server.pem").exists():
            expires = _certify(settings, folder, passphrase, now)
        key = _signing_key(folder)
        save_federation(folder, settings, key)
        journal = open_journal(folder, key, settings.name)
        if expires is not None:
            facts = {"event": "certificate issued", "expires": iso(expires)}
            journal.append("key", {**facts, "signing_key": key.public.text()})
        kits = _make_kits(settings, folder, key, journal, now=now, again=again)
    known = tuple(site.name for site in settings.sites if site.name not in kits)
    return Provisioned(key.public.text(), expires, kits, known, unlisted)


def _merged(
    given: DeploymentConfig, folder: Path, *, renewing: bool
) -> tuple[DeploymentConfig, tuple[str, ...]]:
    """The configuration with members that it names no longer; they leave by ``revoke`` only."""
    if not (folder / FEDERATION_FILE).exists():
        return given, ()
    before = load_federation(folder).settings
    if before.name != given.name:
        raise ConfigError(
            f"the folder is that of federation {before.name}, not of {given.name}. Use another "
            "--out."
        )
    old, new = before.server, given.server
    if (old.host, old.port) != (new.host, new.port):
        raise ConfigError(
            f"sites hold the address {old.host}:{old.port}, the configuration says "
            f"{new.host}:{new.port}. Keep the old one, or provision a new federation."
        )
    if old.names != new.names and not renewing:
        raise ConfigError("server.names has changed. Add --renew-certificate.")
    listed = {site.name for site in given.sites}
    missing = tuple(site for site in before.sites if site.name not in listed)
    merged = _updated(given, sites=(*given.sites, *missing))
    return merged, tuple(site.name for site in missing)


def _updated(settings: DeploymentConfig, **changes: tuple[Node, ...]) -> DeploymentConfig:
    return DeploymentConfig.model_validate({**dict(settings), **changes})


def _certify(
    settings: DeploymentConfig, folder: Path, passphrase: Passphrase, now: datetime
) -> datetime:
    """Make the server's key and certificate, and first the authority if there is none."""
    authority = _authority(settings, folder, passphrase, now)
    hosts = tuple(dict.fromkeys((settings.server.host, *settings.server.names, *ALWAYS)))
    made = server_certificate(
        authority, common_name=settings.server.host, hosts=hosts, days=settings.key_days, now=now
    )
    # The certificate goes first and comes last: without it a repeated command makes both anew.
    (folder / "server.pem").unlink(missing_ok=True)
    write_bytes(folder / "server.key", made.key, private=True)
    write_bytes(folder / "server.pem", made.certificate)
    return made.expires


def _authority(
    settings: DeploymentConfig, folder: Path, passphrase: Passphrase, now: datetime
) -> Authority:
    key_file, certificate_file = folder / "ca.key", folder / "ca.crt"
    if certificate_file.exists() and not key_file.exists():
        raise ConfigError(
            "a certificate has to be made, and ca.key is not in the folder. Bring it back from "
            "where it is kept offline for this command."
        )
    new = not key_file.exists()
    secret = passphrase(new)
    if new:
        write_bytes(key_file, new_ca_key(secret), private=True)
    require_private(key_file, what="ca.key")
    key = open_ca_key(key_file.read_bytes(), secret)
    if not certificate_file.exists():
        write_bytes(certificate_file, ca_certificate(key, settings.name, now))
    return open_ca(key, certificate_file.read_bytes())


def _signing_key(folder: Path) -> SigningKey:
    """The coordinator's key, made once: sites pin it, so a lost one is not replaced."""
    file = folder / "signing.pem"
    if not (folder / FEDERATION_FILE).exists():
        if not file.exists():
            SigningKey.create().save(file)
        return signing_key(folder)
    key = signing_key(folder)
    if key.public != load_federation(folder).key:
        raise KeyFileError("signing.pem is not the key that sites have pinned. Restore it.")
    return key


def _make_kits(
    settings: DeploymentConfig,
    folder: Path,
    key: SigningKey,
    journal: Journal,
    *,
    now: datetime,
    again: Sequence[str],
) -> tuple[str, ...]:
    names = [site.name for site in settings.sites]
    if strangers := sorted(set(again) - set(names)):
        raise ConfigError(f"--again names {', '.join(strangers)}, no member of the federation.")
    made = []
    for name in names:
        if name not in again and load_token(folder, name) is not None:
            continue
        key_id = max(key_ids(folder, name), default=0) + 1
        journal.append("key", {"event": "kit made", "site": name, "key_id": key_id})
        _make_kit(settings, folder, key, site=name, key_id=key_id, now=now)
        made.append(name)
    return tuple(made)


def _make_kit(
    settings: DeploymentConfig,
    folder: Path,
    key: SigningKey,
    *,
    site: str,
    key_id: int,
    now: datetime,
) -> None:
    ca = (folder / "ca.crt").read_bytes()
    kit = Kit(
        protocol=PROTOCOL_VERSION,
        federation=settings.name,
        site=site,
        cohorts=" ".join(settings.cohorts_of(site)),
        key_id=key_id,
        server=f"{settings.server.host}:{settings.server.port}",
        server_key=key.public.text(),
        ca_digest=hashlib.sha256(ca).hexdigest(),
        token=secrets.token_urlsafe(32),
        issued=iso(now),
        expires=iso(now + timedelta(days=KIT_DAYS)),
    ).signed(key)
    for inner in ("kits", "tokens"):
        private_folder(folder / inner, what=f"folder {inner}")
    write_kit(folder / "kits" / f"{site}.zip", kit, ca)
    # The token comes last: without it a repeated command makes the kit anew.
    save_token(folder, Token(site, key_id, kit.token, kit.expires))
