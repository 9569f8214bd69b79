"""With which key a site signs, and by which it knows its coordinator."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from agssd_core.errors import KeyFileError
from agssd_core.signing import SigningKey, VerifyKey

SERVER_KEY, SIGNING_KEY = "server-key", "signing-key"


@dataclass(frozen=True)
class Identity:
    """A site's own private key and the coordinator's pinned public one."""

    signing_key: SigningKey
    server_key: VerifyKey


@dataclass(frozen=True)
class KeyPlace:
    """Where an identity is, as the node's own configuration names it.

    Attributes:
        server_key: ``ed25519:BASE64``.
        signing_key: path of the private key's file.
    """

    server_key: str
    signing_key: str = field(repr=False)

    def load(self) -> Identity:
        """Read the keys.

        Raises:
            KeyFileError: one is missing, damaged or readable by others.
        """
        return Identity(
            SigningKey.load(Path(self.signing_key)), VerifyKey.from_text(self.server_key)
        )


def key_place(node_config: Mapping[str, object]) -> KeyPlace | None:
    """What a node's configuration says of keys; None on an unsigned connection.

    Raises:
        KeyFileError: only one of the two is named.
    """
    named = {name: str(node_config.get(name) or "") for name in (SERVER_KEY, SIGNING_KEY)}
    if not any(named.values()):
        return None
    if not all(named.values()):
        raise KeyFileError(
            f"the node was started with only one of {SERVER_KEY} and {SIGNING_KEY}. Name both, "
            "or neither for a server on this machine."
        )
    return KeyPlace(named[SERVER_KEY], named[SIGNING_KEY])
