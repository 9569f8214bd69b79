"""Which nodes the SuperLink lets in: keys are registered once, and taken away for good.

The engine never lets an unregistered key in again, so a site that comes back brings a new one.
"""

import json
import logging
import subprocess
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from agssd_core.enrolment import Enrolment
from agssd_core.errors import EngineError
from agssd_core.weights import write_text
from server.superlink import CONNECTION, SuperLink

log = logging.getLogger(__name__)

NODES_FILE = "nodes.json"
_GONE = "unregistered"
_IN_USE = "[code: 23]"  # the engine's "public key already in use"
_COMMAND_TIMEOUT_S = 180.0


def register_nodes(link: SuperLink, enrolments: Iterable[Enrolment]) -> dict[str, int]:
    """Let the nodes of these enrolments in; those that are in already stay.

    A node that belongs to no key of ours is shut out.

    Args:
        link: a running SuperLink with certificates.
        enrolments: valid ones; their signatures were checked.

    Returns:
        ``SITE-KEYID`` -> node id of all keys that were ever registered here.

    Raises:
        EngineError: the engine refused a key, or had it before and no longer knows whose it is.
    """
    known = _known(link)
    for enrolment in enrolments:
        if key_name(enrolment) not in known:
            known[key_name(enrolment)] = _register(link, enrolment, known)
            text = json.dumps(known, indent=1, sort_keys=True) + "\n"
            write_text(_file(link), text, private=True)
    for node in _strangers(link, known):
        _flwr(link, "supernode", "unregister", str(node))
    return known


def unregister_nodes(link: SuperLink, names: Collection[str]) -> list[str]:
    """Shut nodes out, from their next call on; the rest of a running call is not cut off.

    Args:
        link: a running SuperLink with certificates.
        names: ``SITE-KEYID`` of revoked or expired enrolments.

    Returns:
        Those that were let in until now.

    Raises:
        EngineError: the engine did not do it.
    """
    known = _known(link)
    inside = [name for name in names if name in known]
    if not inside:
        return []
    status = node_statuses(link)
    shut_out = [name for name in inside if status.get(known[name], _GONE) != _GONE]
    for name in shut_out:
        _flwr(link, "supernode", "unregister", str(known[name]))
    return shut_out


class NodeKeeper:
    """Lets in the nodes whose keys are valid, and nobody else, while a run goes on.

    Args:
        link: a running SuperLink with certificates.
        valid: gives the enrolments that are valid when it is called.
        say: where a line for the operator goes.
        pause_s: how often to look for changes.

    Raises:
        EngineError: the engine did not take the keys there are now.
    """

    def __init__(
        self,
        link: SuperLink,
        valid: Callable[[], Iterable[Enrolment]],
        *,
        say: Callable[[str], None],
        pause_s: float = 5.0,
    ) -> None:
        self._link = link
        self._valid = valid
        self._say = say
        self._pause_s = pause_s
        self._inside: frozenset[str] | None = None
        self._keep()

    @property
    def count(self) -> int:
        """How many keys are let in."""
        return len(self._inside or ())

    def __call__(self) -> None:
        """Look again if it is time; what the engine did not do is tried again next time."""
        if time.monotonic() < self._next:
            return
        try:
            self._keep()
        except EngineError as error:
            log.warning("the list of nodes could not be kept (%s); trying again", error)

    def _keep(self) -> None:
        self._next = time.monotonic() + self._pause_s
        valid = {key_name(each): each for each in self._valid()}
        if self._inside == valid.keys():
            return
        known = register_nodes(self._link, valid.values())
        for name in unregister_nodes(self._link, known.keys() - valid.keys()):
            self._say(f"node {name} is shut out: its key was revoked or has expired")
        self._inside = frozenset(valid)


def key_name(enrolment: Enrolment) -> str:
    """``SITE-KEYID``."""
    return f"{enrolment.site}-{enrolment.key_id}"


def node_statuses(link: SuperLink) -> dict[int, str]:
    """Node id -> ``registered``, ``online``, ``offline`` or ``unregistered``."""
    rows = _flwr(link, "supernode", "list").get("nodes", [])
    return {int(row["node-id"]): str(row["status"]) for row in rows}


def _register(link: SuperLink, enrolment: Enrolment, known: Mapping[str, int]) -> int:
    file = link.home / f"{key_name(enrolment)}.pub"
    write_text(file, enrolment.node_key)
    try:
        options = ["--name", enrolment.site]
        return int(_flwr(link, "supernode", "register", str(file), *options)["node-id"])
    except EngineError as error:
        # Stopped between the engine's note and ours: then one node is in that we do not know.
        strangers = _strangers(link, known)
        if len(strangers) != 1 or _IN_USE not in str(error):
            raise
        return strangers.pop()


def _strangers(link: SuperLink, known: Mapping[str, int]) -> set[int]:
    """Nodes that may come in though we never registered them, or were stopped while we did."""
    inside = {node for node, status in node_statuses(link).items() if status != _GONE}
    return inside - set(known.values())


def _file(link: SuperLink) -> Path:
    return link.log_folder / NODES_FILE


def _known(link: SuperLink) -> dict[str, int]:
    try:
        return {str(k): int(v) for k, v in json.loads(_file(link).read_text("utf-8")).items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, AttributeError, TypeError):
        raise EngineError(
            f"{NODES_FILE} in the run's engine folder is damaged. Move that folder away; sites "
            "are registered anew when the server starts again."
        ) from None


def _flwr(link: SuperLink, *words: str) -> dict[str, Any]:
    """Answer of a command of the engine.

    Raises:
        EngineError: it failed or answered in another form.
    """
    command = ["flwr", *words, CONNECTION, "--format", "json"]
    what = " ".join(words[:2])
    answer = _json(_output(link, command, what))
    if answer.get("success") is not True:
        reason = str(answer.get("error-message", "no reason given")).strip().splitlines()
        raise EngineError(
            f"`flwr {what}` failed: {reason[-1] if reason else 'no reason given'} Look at "
            "superlink.log in the run's folder."
        )
    return answer


def _output(link: SuperLink, command: Sequence[str], what: str) -> str:
    try:
        done = subprocess.run(  # noqa: S603 - the installed engine's own command
            command,
            env=dict(link.environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_COMMAND_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise EngineError(
            f"`flwr {what}` did not end within {_COMMAND_TIMEOUT_S:g} s. Try again when the "
            "machine is less busy."
        ) from None
    return done.stdout


def _json(text: str) -> dict[str, Any]:
    try:
        answer = json.loads(text)
    except ValueError:
        answer = None
    return answer if isinstance(answer, dict) else {}
