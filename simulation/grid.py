"""A deterministic in-process ``Grid``: the real ClientApp and real Messages in virtual time.

Messages are deflated to bytes and inflated again on either side, so no array is shared and a
flipped bit has the effect that it would have on a network. A node works its orders off one
after the other, as a SuperNode does, and only when somebody asks for a reply. Threads may share a
grid; one at a time is served.
"""

import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.inflatable.inflatable_object import InflatableObject, get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

RUN_ID = 1
SERVER_NODE = 1
_FIRST_NODE = 101
_APP_RAISED, _LOST = 2, 4

Objects = dict[str, bytes]


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one message.

    Attributes:
        delay_s: the reply is ready that much later, virtual seconds.
        offline: the order never reaches the site, and no reply ever comes.
        lost_reply: the site does its work, and the reply is lost on its way.
        twice: the order is delivered twice; the second reply is the one that is pulled.
        upload_fails: the site's reply is lost and Flower reports it as unavailable.
        corrupt: changes the reply's serialised objects, as a network or a disk might.
        tamper: changes the reply itself, as a hostile site might.
    """

    delay_s: float = 0.0
    offline: bool = False
    lost_reply: bool = False
    twice: bool = False
    upload_fails: bool = False
    corrupt: Callable[[Objects], Objects] | None = None
    tamper: Callable[[Message], Message] | None = None


Faults = Callable[[str, str], Fault]
"""(site name, group id of the message: ``hello`` or the round) -> what goes wrong with it."""


@dataclass
class _Order:
    """A message under way; ``reply`` is None before the node has worked on it."""

    node: int
    objects: Objects
    ready: float
    fault: Fault
    reply: Objects | None = None
    done: bool = False


@dataclass
class VirtualTime:
    """A clock that only ``sleep`` moves."""

    now: float = 0.0

    def clock(self) -> float:
        """Virtual seconds."""
        return self.now

    def sleep(self, seconds: float) -> None:
        """Let virtual time pass."""
        self.now += max(seconds, 1e-3)


@dataclass
class ElapsedTime(VirtualTime):
    """Real time, except that sleeping takes none: only faults make anybody wait here."""

    def clock(self) -> float:
        """Real seconds and those that were slept away."""
        return time.monotonic() + self.now


@dataclass
class _Node:
    """One site: its context lives as long as the grid, as a SuperNode's does for a run."""

    name: str
    context: Context
    queue: list[str] = field(default_factory=list)


class InProcessGrid(Grid):
    """Delivers messages to a ClientApp in this process.

    Args:
        app: the ClientApp; ``client.app.app`` or one with another workbench.
        sites: site name -> site folder; node ids follow the sorted names.
        timer: time of delays, virtual by default.
        faults: what goes wrong; nothing by default.
    """

    def __init__(
        self,
        app: ClientApp,
        sites: Mapping[str, Path],
        *,
        timer: VirtualTime | None = None,
        faults: Faults | None = None,
    ) -> None:
        self.time = timer or VirtualTime()
        self.offline: set[str] = set()
        self.lock = threading.RLock()
        self._app, self._faults = app, faults or (lambda _site, _group: Fault())
        self._nodes = {
            _FIRST_NODE + index: _Node(name, _context(_FIRST_NODE + index, name, sites[name]))
            for index, name in enumerate(sorted(sites))
        }
        self._orders: dict[str, _Order] = {}
        self._run = Run.create_empty(RUN_ID)
        _act_as_server()

    def set_run(self, run: Run) -> None:
        """Set the run."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run."""
        return self._run

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message; ``Message`` itself is what Flower advises now."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Nodes that are connected."""
        return [node for node, entry in self._nodes.items() if entry.name not in self.offline]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Take messages as bytes."""
        with self.lock:
            return [self._push(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies that are ready at this virtual time; each can be pulled once."""
        with self.lock:
            pulled = [self._pull(identifier) for identifier in message_ids]
        return [reply for reply in pulled if reply is not None]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Push, let the time pass, pull once."""
        identifiers = list(self.push_messages(messages))
        self.time.sleep(timeout or 0.0)
        return self.pull_messages(identifiers)

    def _push(self, message: Message) -> str:
        node = message.metadata.dst_node_id
        fault = self._faults(self._nodes[node].name, message.metadata.group_id)
        # Two orders may hold the same bytes; the counter keeps their ids apart.
        identifier = f"{message.object_id}-{len(self._orders)}"
        message.metadata.__dict__["_message_id"] = identifier
        ready = self.time.clock() + fault.delay_s
        self._orders[identifier] = _Order(node, _deflate(message), ready, fault)
        self._nodes[node].queue.append(identifier)
        return identifier

    def _pull(self, identifier: str) -> Message | None:
        order = self._orders.get(identifier)
        if order is None or order.fault.offline or self.time.clock() < order.ready:
            return None
        self._work(order.node, up_to=identifier)
        if order.fault.lost_reply or order.reply is None:
            return None
        reply, order.reply = order.reply, None
        return _inflate(reply)

    def _work(self, node: int, *, up_to: str) -> None:
        """Let a node work its orders off until this one is done."""
        entry = self._nodes[node]
        while entry.queue and not self._orders[up_to].done:
            identifier = entry.queue.pop(0)
            order = self._orders[identifier]
            order.done = True
            if not order.fault.offline:
                order.reply = self._answer(entry, order, identifier)
            order.objects = {}

    def _answer(self, node: _Node, order: _Order, identifier: str) -> Objects:
        for _ in range(2 if order.fault.twice else 1):
            message = _inflate(dict(order.objects))
            message.metadata.__dict__["_message_id"] = identifier
            reply = self._call(message, node)
        if order.fault.upload_fails:
            reply = Message(Error(code=_LOST, reason="unavailable"), reply_to=message)
        if order.fault.tamper is not None:
            reply = order.fault.tamper(reply)
        objects = _deflate(reply)
        return objects if order.fault.corrupt is None else order.fault.corrupt(objects)

    def _call(self, message: Message, node: _Node) -> Message:
        TaskIdentity.node_id = node.context.node_id
        try:
            return self._app(message, node.context)
        except Exception as error:  # noqa: BLE001 - what Flower's own client process does
            text = f"{type(error)}:<'{error}'>"
            return Message(Error(code=_APP_RAISED, reason=text), reply_to=message)
        finally:
            _act_as_server()


def _context(node: int, name: str, folder: Path) -> Context:
    return Context(
        run_id=RUN_ID,
        node_id=node,
        node_config={"site": str(folder), "name": name, "ledger": "run"},
        state=RecordDict(),
        run_config={},
    )


def _act_as_server() -> None:
    """Flower reads who makes a message from this class."""
    TaskIdentity.task_id, TaskIdentity.run_id = 1, RUN_ID
    TaskIdentity.node_id = SERVER_NODE


def _deflate(message: Message) -> Objects:
    """All objects of a message as bytes; the message itself stands first."""
    top = message.object_id
    nested: dict[str, InflatableObject] = get_all_nested_objects(message)
    return {name: nested[name].deflate() for name in [top, *(n for n in nested if n != top)]}


def _inflate(objects: Objects) -> Message:
    top = next(iter(objects))
    message = cast("Message", inflate_object_from_contents(top, objects))
    message.metadata.__dict__["_message_id"] = top
    return message
