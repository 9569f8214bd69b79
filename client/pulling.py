"""What a site's node checks while it takes in a message, before anything of it is opened.

- The bundle's digest is held against the site's list; another one is answered with a refusal.
- The header is fetched before the arrays. A message that declares or brings more than the site's
  policy takes (``work.order_megabytes``) is answered with a refusal.
- Between two messages the node ends when its site has a newer key, and is started again with it.

The names of Flower that are used here are listed in ``client/flower_names.py``.
"""

import contextlib
import hashlib
import logging
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Error, Message
from flwr.common.constant import ErrorCode

from agssd_core.allowance import Form, fetch_header
from agssd_core.application import CODE_DECLINED, SIZE_DECLINED
from agssd_core.config.policy import SitePolicy
from agssd_core.errors import AgssdError, OversizeError
from client.connection import load_connection
from client.policy import read_policy
from client.site_journal import SiteJournal

log = logging.getLogger(__name__)

_OBJECTS = "flwr.supercore.inflatable.inflatable_object"


@dataclass(frozen=True)
class Door:
    """What a node lets in.

    Attributes:
        allowed: digests of bundles that the site answers.
        site: folder with policy, journal and keys; None has none of them.
        key_id: key with which the node was started; 0 never ends it.
    """

    allowed: frozenset[str]
    site: Path | None = None
    key_id: int = 0

    def most_bytes(self) -> int:
        """Bytes that the arrays of a message may have."""
        try:
            policy = None if self.site is None else read_policy(self.site)
        except (AgssdError, OSError):  # a damaged policy refuses everything
            return 0
        return int((policy or SitePolicy()).work.order_megabytes * 1e6)

    def outdated(self) -> bool:
        """Whether the site has another key in use by now."""
        if self.site is None or not self.key_id:
            return False
        try:
            return load_connection(self.site).key_id != self.key_id
        except AgssdError:
            return False  # said at the next start; the key in hand is good

    def note(self, reason: str) -> None:
        """In the site's journal; what cannot be noted stays declined."""
        journal = None if self.site is None else SiteJournal.of(self.site)
        try:
            if journal is not None:
                journal.append("refusal", {"reason": reason})
        except (AgssdError, OSError) as error:
            log.error("a refusal could not be journalled (%s)", type(error).__name__)


def guarded(pull: Callable[..., Any], engine: Any, door: Door) -> Callable[..., Any]:
    """The engine's pull of one message, past the door.

    Between two messages it ends the process, as SIGTERM would, when the site's key was renewed.
    A reply that waits is sent though no message came.
    """

    def pull_one(**given: Any) -> Any:
        intake = _Intake(door, given)
        code = size = False
        run = None
        try:
            run = pull(**(given | intake.wrapped()))
        except _CodeRefusedError:
            code = True
        except OversizeError:
            size = True
        # Flower swallows what is raised while it fetches, hence the second sign.
        if code or size or intake.oversize:
            return intake.refuse(engine, code=code)
        # The engine sends one round of replies for each message. When a message's receipt could not
        # be confirmed and it was answered all the same, that answer takes the next one's place,
        # which then waits in the node for ever, and the coordinator for it.
        return _waiting(given["state"]) if run is None else run

    return pull_one


def _waiting(state: Any) -> int | None:
    """The run of a reply that was not sent yet."""
    with state.lock_msg_store:
        for entry in state.msg_store.values():
            if entry.message.metadata.reply_to_message_id and not entry.is_retrieved:
                return int(entry.message.metadata.run_id)
    return None


class _CodeRefusedError(Exception):
    """The bundle is not on the site's list."""


@dataclass
class _Intake:
    """One message on its way in."""

    door: Door
    given: dict[str, Any]
    message: Message | None = None
    oversize: bool = False
    _header: dict[str, bytes] = field(default_factory=dict)
    _rest: Callable[[str], bytes] | None = None

    def wrapped(self) -> dict[str, Any]:
        """What the engine's pull is given instead."""
        return {"receive": self.receive, "get_fab": self.get_fab, "pull_object": self.pull_object}

    def receive(self) -> Any:
        """The next message, when what it declares may come in."""
        found = self.given["receive"]()
        if found is None:
            if self.door.outdated():
                log.warning("the site has a new key; the node ends and starts again with it")
                signal.raise_signal(signal.SIGTERM)  # Flower's own way out, which signs off
            return None
        self.message, tree = found
        return found if self._declared(tree) else None

    def get_fab(self, digest: str, run: int) -> Any:
        """The bundle, when the site's list has it."""
        if digest not in self.door.allowed:
            raise _CodeRefusedError
        fab = self.given["get_fab"](digest, run)
        if hashlib.sha256(fab.content).hexdigest() != digest:
            raise _CodeRefusedError
        return fab

    def pull_object(self, run: int, name: str) -> bytes:
        """One object: of the header from memory, of the arrays within what was declared."""
        if name in self._header:
            return self._header.pop(name)
        if self._rest is None:
            return bytes(self.given["pull_object"](run, name))
        try:
            return self._rest(name)
        except OversizeError:
            self.oversize = True
            raise

    def refuse(self, engine: Any, *, code: bool) -> int:
        """Answer the message without having opened it; the run that it belongs to."""
        message = self.message
        if message is None:  # pragma: no cover - only a received message is refused
            raise RuntimeError("nothing was received")
        if code:
            log.warning("declined: the application is not one that this site allows")
        else:
            log.warning("declined: the message is larger than work.order_megabytes of policy.yaml")
        self.door.note("policy-code" if code else "size")
        reason = CODE_DECLINED if code else SIZE_DECLINED
        number = ErrorCode.INVALID_FAB if code else ErrorCode.CLIENT_APP_RAISED_EXCEPTION
        run = message.metadata.run_id
        with contextlib.suppress(Exception):  # a courtesy to the server's memory
            self.given["confirm_message_received"](run, message.metadata.message_id)
        refusal = Message(Error(number, reason), reply_to=message)
        engine._insert_message(refusal, self.given["state"], self.given["object_store"])
        return run

    def _declared(self, tree: Any) -> bool:
        """Fetch the header; False when the message was lost meanwhile, as Flower would say it."""
        if tree is None or self.message is None:
            return True
        objects = import_module(_OBJECTS)
        names = [each.object_id for each in objects.iterate_object_tree(tree)]
        run = self.message.metadata.run_id
        pull_objects = import_module("flwr.supernode.start_client_internal").pull_objects

        def fetch(name: str) -> bytes:
            return bytes(self.given["pull_object"](run, name))

        form = Form(objects.get_object_head_values_from_object_content, ConfigRecord.inflate)
        try:
            most = self.door.most_bytes()
            self._header, left = fetch_header(names, fetch, pull_objects, form=form, most=most)
        except OversizeError:
            raise
        except Exception as error:  # noqa: BLE001 - as Flower does with a message that it lost
            log.warning("a message was lost on its way (%s)", type(error).__name__)
            return False
        self._rest = left.counting(fetch)
        return True
