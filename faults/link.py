"""A bad line in user space: a TCP forwarder with a rate, stalls and cut connections.

It stands in for ``tc netem``, which needs rights that a test machine may not give. Loss on a TCP
line is seen by its ends as a wait for the retransmission, so a lost segment is a stall here; a
connection that loses too much is cut.
"""

import contextlib
import random
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

BLOCK = 16_384
STALL_S = 0.2
"""The least retransmission time-out of Linux."""


@dataclass
class Link:
    """One site's line; everything but the ports may be changed while it is up.

    Attributes:
        target: port on loopback that it leads to.
        source: loopback address that it dials from, by which the proxy knows the site.
        rate: bytes a second in each direction, all connections together; 0 is as fast as it goes.
        loss: chance that a block of 16 KiB is stalled for ``STALL_S``.
        cut: chance that a block is the last of its connection.
        sent: bytes that went up so far.
    """

    target: int
    source: str
    rate: float = 0.0
    loss: float = 0.0
    cut: float = 0.0
    port: int = 0
    sent: int = 0
    received: int = 0
    cuts: int = 0
    chance: random.Random = field(default_factory=lambda: random.Random(17))
    _free: dict[str, float] = field(default_factory=lambda: {"up": 0.0, "down": 0.0})
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def carry(self, block: bytes, way: str) -> None:
        """Wait as long as a block takes.

        Raises:
            ConnectionResetError: the connection is cut.
        """
        with self._lock:
            now = time.monotonic()
            stalled = STALL_S if self.chance.random() < self.loss else 0.0
            taken = len(block) / self.rate if self.rate else 0.0
            self._free[way] = max(self._free[way], now) + taken + stalled
            until = self._free[way]
            cut = self.chance.random() < self.cut
            self.cuts += cut
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))
            if not self.rate:  # made fast meanwhile
                break
        if cut:
            raise ConnectionResetError
        if way == "up":
            self.sent += len(block)
        else:
            self.received += len(block)

    def clear(self) -> None:
        """A good line again."""
        with self._lock:
            self.rate = self.loss = self.cut = 0.0
            self._free = {"up": 0.0, "down": 0.0}


@contextlib.contextmanager
def opened(link: Link) -> Iterator[Link]:
    """Listen on a free port of loopback until the block ends."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    link.port = listener.getsockname()[1]
    threading.Thread(target=_accept, args=(listener, link), daemon=True).start()
    try:
        yield link
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()


def _accept(listener: socket.socket, link: Link) -> None:
    while True:
        try:
            near, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_serve, args=(near, link), daemon=True).start()


def _serve(near: socket.socket, link: Link) -> None:
    try:
        far = socket.create_connection(("127.0.0.1", link.target), 5, (link.source, 0))
    except OSError:
        near.close()
        return
    far.settimeout(None)
    down = threading.Thread(target=_pump, args=(far, near, link, "down"), daemon=True)
    down.start()
    _pump(near, far, link, "up")
    down.join()
    near.close()
    far.close()


def _pump(source: socket.socket, target: socket.socket, link: Link, way: str) -> None:
    size = BLOCK
    with contextlib.suppress(OSError):
        while True:
            if link.rate:  # a block lasts a second at most, so that a slow line is slow evenly
                size = int(min(BLOCK, max(link.rate, 256)))
            block = source.recv(size)
            if not block:
                break
            link.carry(block, way)
            target.sendall(block)
        target.shutdown(socket.SHUT_WR)
        return
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
