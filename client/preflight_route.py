"""The way from a site to its coordinator: straight, or through the hospital's outbound proxy."""

import base64
import http.client
import socket
import ssl
import time
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import getproxies, proxy_bypass

TIMEOUT_S = 10.0
_MAX_ANSWER = 1 << 16


class TunnelError(OSError):
    """A proxy does not let us through; ``status`` is its answer, 0 for none that is HTTP."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


@dataclass(frozen=True)
class Proxy:
    """An outbound proxy; its user and password never appear in a text."""

    scheme: str
    host: str
    port: int
    credentials: str = field(default="", repr=False)


@dataclass(frozen=True)
class Route:
    """Where the coordinator is, and through whom."""

    host: str
    port: int
    proxy: Proxy | None = None

    @property
    def first(self) -> tuple[str, int]:
        """Whom we connect to: the proxy, where there is one."""
        return (self.proxy.host, self.proxy.port) if self.proxy else (self.host, self.port)


@dataclass(frozen=True)
class Answer:
    """The coordinator's answer to ``GET /health``.

    Attributes:
        date: its ``Date`` header, empty without one.
        before, after: our clock around the question, seconds since 1970.
    """

    status: int
    date: str
    before: float
    after: float


def route_to(host: str, port: int) -> Route:
    """The way that the environment prescribes (HTTPS_PROXY, ALL_PROXY, NO_PROXY)."""
    named = getproxies()
    text = named.get("https") or named.get("all") or ""
    if not text or proxy_bypass(f"{host}:{port}"):
        return Route(host, port)
    parts = urlsplit(text if "://" in text else f"http://{text}")
    scheme = parts.scheme.lower()
    user = f"{unquote(parts.username)}:{unquote(parts.password or '')}" if parts.username else ""
    number = parts.port or (443 if scheme == "https" else 80)
    return Route(host, port, Proxy(scheme, parts.hostname or "", number, user))


def connect(route: Route) -> socket.socket:
    """A connection to the coordinator, by a tunnel where a proxy stands between.

    Raises:
        OSError: nobody listens, or not in time.
        TunnelError: the proxy refuses.
    """
    stream = socket.create_connection(route.first, timeout=TIMEOUT_S)
    if route.proxy is None:
        return stream
    try:
        _ask_tunnel(stream, route, route.proxy)
    except BaseException:
        stream.close()
        raise
    return stream


def handshake(route: Route, ca: Path | None) -> ssl.SSLSocket:
    """TLS with the coordinator.

    Args:
        route: the way to it.
        ca: the federation's authority; None believes anybody, for looking at a certificate only.

    Raises:
        OSError: no connection, or the certificate is not believed (``ssl.SSLError``).
    """
    if ca is None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        context = ssl.create_default_context(cafile=str(ca))
    stream = connect(route)
    try:
        return context.wrap_socket(stream, server_hostname=route.host)
    except BaseException:
        stream.close()
        raise


def ask_health(stream: ssl.SSLSocket, host: str) -> Answer:
    """``GET /health`` on an open connection.

    Raises:
        OSError, http.client.HTTPException: no answer that is HTTP.
    """
    before = time.time()
    request = f"GET /health HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    stream.sendall(request.encode("ascii"))
    response = http.client.HTTPResponse(stream)
    response.begin()
    return Answer(response.status, response.getheader("Date") or "", before, time.time())


def _ask_tunnel(stream: socket.socket, route: Route, proxy: Proxy) -> None:
    target = f"{route.host}:{route.port}"
    lines = [f"CONNECT {target} HTTP/1.1", f"Host: {target}"]
    if proxy.credentials:
        coded = base64.b64encode(proxy.credentials.encode("utf-8")).decode("ascii")
        lines.append(f"Proxy-Authorization: Basic {coded}")
    stream.sendall("\r\n".join([*lines, "", ""]).encode("ascii"))
    answer = b""
    while b"\r\n\r\n" not in answer:
        part = stream.recv(1)  # not a byte of what the coordinator says may be taken
        if not part or len(answer) > _MAX_ANSWER:
            raise TunnelError(0)
        answer += part
    words = answer.split(b"\r\n", 1)[0].split(b" ", 2)
    status = int(words[1]) if len(words) > 1 and words[1].isdigit() else 0
    if not words[0].startswith(b"HTTP/") or status != 200:
        raise TunnelError(status)
