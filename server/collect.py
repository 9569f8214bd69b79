"""Pulling replies one message at a time, so that one that hangs stalls nobody else.

A pull can block for minutes when a site died while uploading (docs/federation.md), so on real
grids every pull runs in its own thread and the round looks only at what has arrived.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from server.pulling import at_most

log = logging.getLogger(__name__)

MAX_PULLS = 2
PATIENCE_S = 30.0


class Exchange(Protocol):
    """What the rounds need of a Flower ``Grid``."""

    def get_node_ids(self) -> Iterable[int]:
        """Nodes that are connected."""

    def push_messages(self, messages: Iterable[Any]) -> Iterable[str]:
        """Send messages; their ids."""

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Any]:
        """Replies to these messages that have arrived."""


class Puller(Protocol):
    """Asks for the reply to one message."""

    def poll(self, message_id: str, max_bytes: int) -> Any | None:
        """The reply, or None while there is none; arrays of more bytes are not fetched."""


@dataclass
class InlinePuller:
    """Pulls in the calling thread; for grids whose pulls return at once."""

    grid: Exchange

    def poll(self, message_id: str, max_bytes: int) -> Any | None:
        """The reply, or None while there is none."""
        return _pulled(self.grid, message_id, max_bytes)


@dataclass
class ThreadedPuller:
    """Pulls each message in its own daemon thread.

    At most ``MAX_PULLS`` pulls that are younger than ``PATIENCE_S`` run at once, so the memory
    of the server stays at a few models however many sites answer together.
    """

    grid: Exchange
    clock: Callable[[], float] = time.monotonic
    _running: dict[str, "_Pull"] = field(default_factory=dict)

    def poll(self, message_id: str, max_bytes: int) -> Any | None:
        """The reply, or None while there is none or its pull still runs."""
        pull = self._running.get(message_id)
        if pull is None:
            if self._young() < MAX_PULLS:
                self._running[message_id] = _Pull(
                    self.grid, message_id, max_bytes, started=self.clock()
                )
            return None
        if pull.thread.is_alive():
            return None
        del self._running[message_id]
        return pull.reply

    def _young(self) -> int:
        now = self.clock()
        return sum(
            pull.thread.is_alive() and now - pull.started < PATIENCE_S
            for pull in self._running.values()
        )


class _Pull:
    """One pull under way."""

    def __init__(self, grid: Exchange, message_id: str, max_bytes: int, *, started: float) -> None:
        self.reply: Any | None = None
        self.started = started
        self._asked = (grid, message_id, max_bytes)
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    def _work(self) -> None:
        self.reply = _pulled(*self._asked)


def _pulled(grid: Exchange, message_id: str, max_bytes: int) -> Any | None:
    try:
        with at_most(max_bytes):
            return next(iter(grid.pull_messages([message_id])), None)
    except Exception as error:  # noqa: BLE001 - a fault of the connection; asked again
        log.warning("a pull failed (%s); it is tried again", type(error).__name__)
        return None


def collect(
    wanted: dict[str, float],
    puller: Puller,
    *,
    max_bytes: int,
    poll_s: float,
    clock: Callable[[], float],
    sleep: Callable[[float], None],
    between: Callable[[], bool] = lambda: False,
) -> Iterator[tuple[str, Any]]:
    """Yield (message id, reply) as replies arrive, until all have or their deadlines are over.

    Every message is looked at once more after its deadline.

    Args:
        wanted: message id -> deadline on ``clock``, seconds. Emptied here; the caller may add a
            message that it sent again while it iterates.
        puller: how replies are asked for.
        max_bytes: of a reply's arrays; more are not fetched.
        poll_s: pause between two looks at all messages, seconds.
        clock: seconds, rising.
        sleep: waits a number of seconds of that clock.
        between: called after each look; whether more messages may be added though none is left.
    """
    more = False
    while wanted or more:
        now = clock()
        for message_id in list(wanted):
            reply = puller.poll(message_id, max_bytes)
            if reply is not None:
                del wanted[message_id]
                yield message_id, reply
            elif now >= wanted[message_id]:
                del wanted[message_id]
        more = between()
        if wanted:
            sleep(min(poll_s, max(min(wanted.values()) - clock(), 0.0)))
        elif more:
            sleep(poll_s)


def push(grid: Exchange, message: Any) -> str | None:
    """Send one message; None when the grid did not take it."""
    try:
        return next(iter(grid.push_messages([message])), None) or None
    except Exception as error:  # noqa: BLE001 - one site's connection must not end the round
        log.warning("a message could not be sent (%s)", type(error).__name__)
        return None


def online_nodes(grid: Exchange) -> set[int] | None:
    """Ids of the nodes that are connected; None when they cannot be listed now."""
    try:
        return set(grid.get_node_ids())
    except Exception as error:  # noqa: BLE001 - a fault of the connection; asked again
        log.warning("nodes could not be listed (%s)", type(error).__name__)
        return None
