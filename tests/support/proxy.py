"""A real nginx with our configuration, and requests to it written byte by byte."""

import contextlib
import os
import shutil
import socket
import ssl
import subprocess
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from agssd_core.processes import free_port
from server.proxy import write_federation_proxy


@dataclass(frozen=True)
class Proxy:
    """A running nginx."""

    port: int
    folder: Path
    ca: Path
    process: subprocess.Popen

    def connect(self, *, source="127.0.0.1", timeout_s=10.0):
        """A connection under TLS."""
        context = ssl.create_default_context(cafile=str(self.ca))
        plain = self.dial(source=source, timeout_s=timeout_s)
        return context.wrap_socket(plain, server_hostname="localhost")

    def dial(self, *, source="127.0.0.1", timeout_s=10.0):
        """A connection on which nothing was said yet."""
        return socket.create_connection(
            ("127.0.0.1", self.port), timeout=timeout_s, source_address=(source, 0)
        )

    def ask(self, request, *, source="127.0.0.1"):
        """Status and all else of the answer to one request's bytes."""
        with self.connect(source=source) as connection:
            connection.sendall(request)
            return read_answer(connection)

    def temporary_files(self):
        """What nginx holds of bodies on disk, also if the name is gone already."""
        found = [path for path in (self.folder / "temp").rglob("*") if path.is_file()]
        for member in psutil.Process(self.process.pid).children():
            for link in Path(f"/proc/{member.pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    target = str(link.readlink())
                    if "/temp/" in target:
                        found.append(Path(target))
        return found


@contextlib.contextmanager
def running_proxy(federation, folder, upstream_port, change=lambda text: text):
    """nginx before a port of this machine; ``change`` may spoil its configuration."""
    port = free_port()
    listen = f"127.0.0.1:{port}"
    file = write_federation_proxy(federation, folder, listen=listen, upstream_port=upstream_port)
    file.write_text(change(file.read_text()))
    with started_nginx(folder, port, federation / "ca.crt") as proxy:
        yield proxy


def require_nginx():
    """Skip where there is no nginx; the pipeline installs it."""
    if shutil.which("nginx") is None:
        pytest.skip("nginx is not installed (apt-get install nginx-light)")


@contextlib.contextmanager
def started_nginx(folder, port, ca):
    """nginx with the configuration of a folder, or a skip."""
    require_nginx()
    command = ["nginx", "-e", "stderr", "-p", str(folder), "-c", "nginx.conf"]
    # Workers of a root's nginx would become nobody, who cannot read this folder.
    command += ["-g", "user root;"] if os.geteuid() == 0 else []
    with (folder / "stderr").open("wb") as log:
        process = subprocess.Popen(command, stderr=log)
    proxy = Proxy(port, folder, ca, process)
    try:
        _wait_for(proxy)
        yield proxy
    finally:
        process.terminate()
        process.wait(15)


@contextlib.contextmanager
def upstream(federation, answer=b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"):
    """A server with the federation's certificate and one answer; yields its port."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(federation / "server.pem", federation / "server.key")
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    thread = threading.Thread(target=_serve, args=(listener, context, answer), daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(5)


def request(method, target, *headers, body=b"", host="localhost"):
    """Bytes of a request as a SuperNode would write it."""
    lines = [f"{method} {target} HTTP/1.1", f"Host: {host}", "Connection: close"]
    lines += ["Content-Type: application/protobuf", *headers]
    if method == "POST" and not any(line.lower().startswith(_FRAMING) for line in headers):
        lines.append(f"Content-Length: {len(body)}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def read_answer(connection):
    """Status of an answer, 0 if the connection was just closed, and its bytes."""
    parts = []
    with contextlib.suppress(ConnectionResetError, ssl.SSLError):
        while part := connection.recv(1 << 16):
            parts.append(part)
    answer = b"".join(parts)
    return (int(answer.split(b" ", 2)[1]) if answer.startswith(b"HTTP/1.") else 0), answer


_FRAMING = ("content-length", "transfer-encoding")


def _wait_for(proxy):
    deadline = time.monotonic() + 15
    while time.monotonic() < deadline:
        if proxy.process.poll() is not None:
            break
        with contextlib.suppress(OSError), proxy.dial():
            return
        time.sleep(0.05)
    pytest.fail((proxy.folder / "stderr").read_text())


def _serve(listener, context, answer):
    while True:
        try:
            plain, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=_answer, args=(plain, context, answer), daemon=True).start()


def _answer(plain, context, answer):
    with contextlib.suppress(OSError), context.wrap_socket(plain, server_side=True) as connection:
        received = b""
        while True:
            while b"\r\n\r\n" not in received:
                if not (part := connection.recv(1 << 16)):
                    return
                received += part
            head, received = received.split(b"\r\n\r\n", 1)
            fields = dict(line.split(b": ", 1) for line in head.lower().split(b"\r\n")[1:])
            left = int(fields.get(b"content-length", 0)) - len(received)
            received = b""
            while left > 0 and (part := connection.recv(1 << 16)):
                left -= len(part)
            connection.sendall(answer)
