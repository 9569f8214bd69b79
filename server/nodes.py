"""Which nodes the SuperLink lets in: keys are registered once, and taken away for good.

The engine never lets an unregistered key in again, so a site that comes back brings a new one.
"""

import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from agssd_core.enrolment import Enrolment
from agssd_core.errors import EngineError
from agssd_core.weights import write_text
from server.superlink import CONNECTION, SuperLink

NODES_FILE = "nodes.json"
_GONE = "unregistered"
_IN_USE = "[code: 23]"  # the engine's "public key already in use"
_COMMAND_TIMEOUT_S = 60.0


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
        if _name(enrolment) not in known:
            known[_name(enrolment)] = _register(link, enrolment, known)
            text = json.dumps(known, indent=1, sort_keys=True) + "\n"
            write_text(_file(link), text, private=True)
    for node in _strangers(link, known):
        _flwr(link, "supernode", "unregister", str(node))
    return known


def unregister_nodes(link: SuperLink, enrolments: Iterable[Enrolment]) -> list[str]:
    """Shut the nodes of revoked or expired enrolments out, from their next call on.

    Returns:
        ``SITE-KEYID`` of those that were let in until now.

    Raises:
        EngineError: the engine did not do it.
    """
    known = _known(link)
    inside = {name: known[name] for each in enrolments if (name := _name(each)) in known}
    if not inside:
        return []
    status = node_statuses(link)
    shut_out = [name for name, node in inside.items() if status.get(node, _GONE) != _GONE]
    for name in shut_out:
        _flwr(link, "supernode", "unregister", str(inside[name]))
    return shut_out


def node_statuses(link: SuperLink) -> dict[int, str]:
    """Node id -> ``registered``, ``online``, ``offline`` or ``unregistered``."""
    rows = _flwr(link, "supernode", "list").get("nodes", [])
    return {int(row["node-id"]): str(row["status"]) for row in rows}


def _register(link: SuperLink, enrolment: Enrolment, known: Mapping[str, int]) -> int:
    file = link.home / f"{_name(enrolment)}.pub"
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


def _name(enrolment: Enrolment) -> str:
    return f"{enrolment.site}-{enrolment.key_id}"


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
