"""Connections that somebody opens at the coordinator's door and never finishes."""

import contextlib
import resource
import socket
import ssl
import threading
from collections.abc import Iterator
from pathlib import Path

LORIS = 60
HALF_OPEN = 1000
HEAD = b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: localhost\r\n"


@contextlib.contextmanager
def slow_loris(port: int, ca: Path) -> Iterator[int]:
    """Heads of requests that grow by a byte a second; who is shut out comes again."""
    over = threading.Event()
    context = ssl.create_default_context(cafile=str(ca))

    def crawl(source: str) -> None:
        while not over.is_set():
            with (
                contextlib.suppress(OSError),
                _dial(port, source) as plain,
                context.wrap_socket(plain, server_hostname="localhost") as secure,
            ):
                for byte in HEAD + b"X-A: " + b"a" * 4000:
                    if over.wait(1.0):
                        return
                    secure.sendall(bytes([byte]))
            over.wait(0.5)

    crawlers = [
        threading.Thread(target=crawl, args=(f"127.0.0.{60 + number % 8}",), daemon=True)
        for number in range(LORIS)
    ]
    for crawler in crawlers:
        crawler.start()
    try:
        yield LORIS
    finally:
        over.set()
        for crawler in crawlers:
            crawler.join(15)


@contextlib.contextmanager
def half_open(port: int, ca: Path) -> Iterator[int]:
    """A third silent, a third after TLS's first bytes, a third with half a head under TLS."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, 4096)), hard))
    context = ssl.create_default_context(cafile=str(ca))
    with contextlib.ExitStack() as stack:
        for number in range(HALF_OPEN):
            plain = stack.enter_context(_dial(port, f"127.0.0.{80 + number % 8}"))
            if number % 3 == 1:
                plain.sendall(b"\x16\x03\x01\x02\x00\x01")
            elif number % 3 == 2:
                secure = context.wrap_socket(plain, server_hostname="localhost")
                stack.enter_context(secure).sendall(HEAD)
        yield HALF_OPEN


def _dial(port: int, source: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", port), 10, (source, 0))
