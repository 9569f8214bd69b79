"""The coordinator's folder of a federation.

A folder::

    FEDERATION/                 mode 0700
      federation.json           who belongs to it, address, the coordinator's public key
      ca.crt, ca.key            the authority; its key is encrypted and may lie offline
      server.pem, server.key    certificate with chain; key, mode 0600
      signing.pem               the coordinator's signing key, mode 0600
      kits/SITE.zip             to be handed to the site; mode 0600
      tokens/SITE.json          what the kit's receiver must know; empty once used. Mode 0600
      enrolled/SITE-KEYID.json  admitted keys, signed by the coordinator
      answers/SITE-KEYID.json   the same, to be sent to the site
      revoked/SITE-KEYID.json   marks; a marked key is given to nobody
      journal.jsonl             what was done with keys, signed
"""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from agssd_core.config.deployment import DeploymentConfig
from agssd_core.errors import ConfigError, KeyFileError, ProtocolError
from agssd_core.journal import Journal
from agssd_core.protocol import PROTOCOL_VERSION, Record
from agssd_core.signing import SigningKey, VerifyKey
from agssd_core.weights import write_text

FEDERATION_FILE = "federation.json"


@dataclass(frozen=True)
class Federation(Record):
    """The content of federation.json; ``config`` is that of a ``DeploymentConfig``."""

    protocol: int
    server_key: str
    config: dict[str, Any]

    @property
    def settings(self) -> DeploymentConfig:
        """Who belongs to the federation."""
        return DeploymentConfig.model_validate(self.config)

    @property
    def key(self) -> VerifyKey:
        """The coordinator's public key."""
        return VerifyKey.from_text(self.server_key)


@dataclass(frozen=True)
class Token(Record):
    """What admits a site's key ``key_id`` once; ``token`` is empty when used or void."""

    site: str
    key_id: int
    token: str
    expires: str


def save_federation(folder: Path, settings: DeploymentConfig, key: SigningKey) -> None:
    """Write federation.json."""
    record = Federation(PROTOCOL_VERSION, key.public.text(), settings.model_dump(mode="json"))
    write_text(folder / FEDERATION_FILE, record.to_json() + "\n")


def load_federation(folder: Path) -> Federation:
    """Read federation.json.

    Raises:
        ConfigError: the folder is no federation's.
        KeyFileError: the file is damaged.
    """
    try:
        text = (folder / FEDERATION_FILE).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            "the folder holds no federation. Make one with `agssd-server provision "
            "federation.yaml --out DIR`."
        ) from None
    try:
        federation = Federation.from_json(text)
        # Both are looked at now, so that nobody stumbles over them later.
        _ = federation.settings, federation.key
    except (ProtocolError, ValidationError, UnicodeDecodeError):
        raise KeyFileError(
            "federation.json is damaged or of another version. Restore it from the backup."
        ) from None
    return federation


def signing_key(folder: Path) -> SigningKey:
    """The coordinator's private key.

    Raises:
        KeyFileError: it is missing, damaged or readable by others.
    """
    return SigningKey.load(folder / "signing.pem")


def open_journal(folder: Path, key: SigningKey, federation: str) -> Journal:
    """The coordinator's journal."""
    return Journal(folder, key, owner=federation)


def token_file(folder: Path, site: str) -> Path:
    """Where a site's token lies."""
    return folder / "tokens" / f"{site}.json"


def save_token(folder: Path, token: Token) -> None:
    """Write a token, mode 0600."""
    write_text(token_file(folder, token.site), token.to_json() + "\n", private=True)


def load_token(folder: Path, site: str) -> Token | None:
    """Read a site's token; None when no kit was ever made for it.

    Raises:
        KeyFileError: it is damaged.
    """
    try:
        return Token.from_json(token_file(folder, site).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ProtocolError, UnicodeDecodeError):
        raise KeyFileError(
            "a token is damaged. Make a new kit with `agssd-server provision --again SITE`."
        ) from None


def void_token(folder: Path, site: str) -> bool:
    """Let a kit admit nobody from now on; tells whether it would have before."""
    token = load_token(folder, site)
    if token is None or not token.token:
        return False
    save_token(folder, Token(site, token.key_id, "", token.expires))
    return True


def enrolled_file(folder: Path, site: str, key_id: int) -> Path:
    """Where an admitted key's record lies."""
    return folder / "enrolled" / f"{site}-{key_id}.json"


def revoked_file(folder: Path, site: str, key_id: int) -> Path:
    """The mark that takes a key away."""
    return folder / "revoked" / f"{site}-{key_id}.json"


def key_ids(folder: Path, site: str) -> list[int]:
    """Numbers of a site's admitted keys, whatever has become of them."""
    pattern = re.compile(re.escape(site) + r"-([1-9][0-9]{0,8})\.json")
    names = (path.name for path in (folder / "enrolled").glob("*.json"))
    return sorted(int(found[1]) for name in names if (found := pattern.fullmatch(name)))


def iso(moment: datetime) -> str:
    """A moment as records hold it."""
    return moment.astimezone(UTC).isoformat(timespec="seconds")
