"""A page on loopback that shows a run as it goes; it holds no pixel and takes no order."""

import json
import secrets
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from agssd_core.processes import LOOPBACK
from server.cohorts import run_folders
from server.live import read_live
from server.report import REPORT_FILE, TEMPLATES

_HOSTS = (LOOPBACK, "localhost")
_NOTHING_YET = (
    b"<!doctype html><title>no round yet</title><p>The first round is not closed yet.</p>"
)


@contextmanager
def live_page(run: Path, *, port: int = 0) -> Iterator[str]:
    """Serve a run's page until the block ends.

    Args:
        run: the run's folder.
        port: on 127.0.0.1; 0 takes a free one.

    Yields:
        The page's address.
    """
    handler = type("Handler", (_Handler,), {"run": run})
    with ThreadingHTTPServer((LOOPBACK, port), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://{LOOPBACK}:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


def live_cohorts(run: Path) -> list[dict[str, Any]]:
    """What the cohorts of a run say of themselves now."""
    found = [read_live(folder) for folder in run_folders(run).values()]
    return [each for each in found if each is not None]


class _Handler(BaseHTTPRequestHandler):
    """Three pages, by GET, for browsers of this machine."""

    run: Path
    server_version, sys_version = "agssd", ""
    timeout = 10

    def do_GET(self) -> None:
        """Answer one request."""
        host = self.headers.get("Host", "").rpartition(":")[0]
        if host not in _HOSTS:  # a name of another's that leads here reads nothing
            self._answer(HTTPStatus.FORBIDDEN, "text/plain", b"this page is for 127.0.0.1 only")
        elif self.path == "/":
            self._answer(HTTPStatus.OK, "text/html; charset=utf-8", _page(self.run))
        elif self.path == "/live.json":
            text = json.dumps(live_cohorts(self.run)).encode()
            self._answer(HTTPStatus.OK, "application/json", text)
        elif self.path == f"/{REPORT_FILE}":
            file = self.run / REPORT_FILE
            body = file.read_bytes() if file.is_file() else _NOTHING_YET
            self._answer(HTTPStatus.OK, "text/html; charset=utf-8", body)
        else:
            self._answer(HTTPStatus.NOT_FOUND, "text/plain", b"no such page")

    def log_message(self, *_args: Any) -> None:
        """Looking on leaves no trace."""

    def _answer(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(body))),
            ("Cache-Control", "no-store"),
            ("X-Content-Type-Options", "nosniff"),
            ("X-Frame-Options", "SAMEORIGIN"),
        ):
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def _page(run: Path) -> bytes:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined
    )
    nonce = secrets.token_urlsafe(16)
    return environment.get_template("live.html").render(name=run.name, nonce=nonce).encode()
