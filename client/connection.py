"""How a site reaches its coordinator: what `agssd-site enrol` left in the site's folder."""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from agssd_core.errors import KeyFileError
from agssd_core.signing import SigningKey, VerifyKey
from agssd_core.weights import write_text

KEYS = "keys"
CONNECTION_FILE = "connection.json"


@dataclass(frozen=True)
class Connection:
    """A site's side of its enrolment. Private keys and this record lie in SITE/keys (0700).

    Attributes:
        federation: name of the federation.
        site: enrolled name.
        server: HOST:PORT of the coordinator's proxy.
        server_key: ``ed25519:BASE64``, the coordinator's pinned signing key.
        key_id: which of the site's keys: 1, and one more with every rotation.
        expires: ISO date-time in UTC after which the server takes the key no longer.
    """

    federation: str
    site: str
    server: str
    server_key: str
    key_id: int
    expires: str

    @property
    def host(self) -> str:
        """Name or address of the coordinator."""
        return self.server.rpartition(":")[0]

    @property
    def port(self) -> int:
        """TCP port of the coordinator."""
        return int(self.server.rpartition(":")[2])


def keys_folder(site: Path) -> Path:
    """SITE/keys: ca.crt, node-N (OpenSSH P-384), node-N.pub, signing-N.pem, connection.json."""
    return site / KEYS


def ca_file(site: Path) -> Path:
    """The federation's CA certificate, PEM."""
    return keys_folder(site) / "ca.crt"


def node_key_file(site: Path, key_id: int) -> Path:
    """The private key by which Flower knows the site's node."""
    return keys_folder(site) / f"node-{key_id}"


def signing_key_file(site: Path, key_id: int) -> Path:
    """The private key that signs what leaves the site."""
    return keys_folder(site) / f"signing-{key_id}.pem"


def save_connection(site: Path, connection: Connection) -> None:
    """Write the record, readable by the owner only."""
    text = json.dumps(asdict(connection), indent=1, sort_keys=True) + "\n"
    write_text(keys_folder(site) / CONNECTION_FILE, text, private=True)


def load_connection(site: Path) -> Connection:
    """Read the record.

    Raises:
        KeyFileError: the site is not enrolled, or the record is damaged.
    """
    file = keys_folder(site) / CONNECTION_FILE
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise KeyFileError(
            "the site is not enrolled: it has no keys/connection.json. Use `agssd-site enrol KIT`."
        ) from None
    except (OSError, ValueError):
        content = None
    names = {item.name for item in fields(Connection)}
    if not isinstance(content, dict) or content.keys() != names:
        raise KeyFileError("keys/connection.json is damaged. Restore it, or enrol again.")
    kinds = {name: int if name == "key_id" else str for name in names}
    if any(not isinstance(content[name], kind) for name, kind in kinds.items()):
        raise KeyFileError("keys/connection.json is damaged. Restore it, or enrol again.")
    return Connection(**content)


def signing_key(site: Path, connection: Connection) -> SigningKey:
    """The site's signing key.

    Raises:
        KeyFileError: it is missing, damaged or readable by others.
    """
    return SigningKey.load(signing_key_file(site, connection.key_id))


def server_key(connection: Connection) -> VerifyKey:
    """The coordinator's pinned key."""
    return VerifyKey.from_text(connection.server_key)
