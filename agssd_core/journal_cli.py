"""The verbs ``journal verify`` and ``journal show``, the same at a site and at the coordinator."""

import json
import re
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from agssd_core.console import say
from agssd_core.errors import ConfigError, JournalError
from agssd_core.journal import Entry, Head, entries_of, verify_journal
from agssd_core.signing import VerifyKey

FolderArgument = Annotated[Path, typer.Argument(help="Folder of the journal.", show_default=False)]


def journal_app(key_of: Callable[[Path], VerifyKey]) -> typer.Typer:
    """The group ``journal``.

    Args:
        key_of: finds the owner's public key in the folder.
    """
    app = typer.Typer(help="Look at the signed journal.", no_args_is_help=True)

    @app.command()
    def verify(
        folder: FolderArgument,
        key: Annotated[
            str, typer.Option(help="Owner's public key, ed25519:...; the folder's if left out.")
        ] = "",
        head: Annotated[
            str, typer.Option(help="NUMBER:DIGEST of an entry seen before; shows if it was cut.")
        ] = "",
    ) -> None:
        """Check every entry; exit code 2 says what is wrong and where.

        Example: agssd-site journal verify /srv/site --head 41:9f3c...
        """
        public = VerifyKey.from_text(key) if key else key_of(folder)
        found = verify_journal(folder, public, _head(head))
        if not found.head[0]:
            raise JournalError("the journal has no entry. Restore it from the backup.")
        say(f"the journal holds: {found.head[0]} entries, head {found.head[0]}:{found.head[1]}")
        if found.torn_bytes:
            say(
                f"after them lie {found.torn_bytes} bytes of an unfinished line, left by a killed "
                "process; the next command that writes sets them aside."
            )

    @app.command()
    def show(
        folder: FolderArgument,
        as_json: Annotated[bool, typer.Option("--json", help="A JSON object a line.")] = False,
    ) -> None:
        """List the entries, up to the first that does not follow; `verify` checks signatures.

        Example: agssd-site journal show /srv/site --json
        """
        for entry in entries_of(folder):
            say(json.dumps(asdict(entry), sort_keys=True) if as_json else _line(entry))

    return app


def _line(entry: Entry) -> str:
    facts = " ".join(f"{name}={json.dumps(value)}" for name, value in sorted(entry.facts.items()))
    return f"{entry.sequence}  {json.dumps(entry.time)[1:-1]}  {entry.kind}  {facts}".rstrip()


def _head(text: str) -> Head | None:
    """``NUMBER:DIGEST``; None for nothing."""
    if not text:
        return None
    named = re.fullmatch(r"([0-9]{1,12}):([0-9a-f]{64})", text)
    if named is None:
        raise ConfigError("--head is not NUMBER:DIGEST as `journal verify` prints it.")
    return int(named[1]), named[2]
