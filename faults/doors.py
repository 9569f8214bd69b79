"""Row 9: certificates that are not right, keys that are not let in, clocks that are wrong.

Every attempt is that of Flower's own client of a SuperNode. With a bad certificate nothing of a
request may reach the server; with a bad key or clock the proxy's log must hold the refused call.
"""

import ssl
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.proto.fleet_pb2 import ActivateNodeRequest, DeactivateNodeRequest
from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supernode import node_auth_http_interceptor as node_auth
from flwr.supernode.fleet_http_client import FleetHttpClient

from client.connection import node_key_file
from faults.deployed import START_S, Deployment, deployment, wait_for
from faults.suite import Fault, Try
from server.cli import app as server_app
from tests.support.deployed import do
from tests.support.tls_server import DAY, NOW, Authority, listening, read_head, tls

REVOKED, SKEWED = "west", "east"
KINDS = ("unregistered", "revoked", "skewed")
PLAN = {"expected_sites": 1, "discovery_timeout_s": START_S}
SKEW = timedelta(minutes=10)
HEARTBEAT_S = 30.0


def session(port: int, ca: Path, key: Any) -> None:
    """Sign on as a SuperNode, and off again.

    Raises:
        httpx.HTTPError: no connection, or it was refused.
    """
    interceptors = [
        RuntimeVersionHttpInterceptor(component_name="SuperNode"),
        node_auth.NodeAuthHttpInterceptor(key, key.public_key()),
    ]
    with FleetHttpClient.from_server_address(
        f"localhost:{port}", insecure=False, root_certificates=str(ca), interceptors=interceptors
    ) as client:
        public = public_key_to_bytes(key.public_key())
        asked = ActivateNodeRequest(public_key=public, heartbeat_interval=HEARTBEAT_S)
        node = client.ActivateNode(asked)
        client.DeactivateNode(DeactivateNodeRequest(node_id=node.node_id))


def _certificates() -> dict[str, tuple[dict[str, Any], str]]:
    """Name -> (how it is issued, what the client says of it)."""
    return {
        "expired": ({"begins": NOW - 9 * DAY, "ends": NOW - DAY}, "expired"),
        "not yet valid": ({"begins": NOW + DAY, "ends": NOW + 9 * DAY}, "not yet valid"),
        "another authority's": ({}, "certificate verify failed"),
        "another name's": ({"host": "elsewhere.example"}, "mismatch"),
    }


def bad_certificates(folder: Path, tries: int) -> Iterator[Try]:
    """Each kind in turn; a sound certificate lets the same request through."""
    authority, other = Authority(), Authority()
    ca = folder / "ca.crt"
    ca.write_bytes(authority.pem())
    key = ec.generate_private_key(ec.SECP384R1())
    heads: list[str] = []

    def attempt(files: tuple[Path, Path]) -> str:
        def serve(stream: Any) -> None:
            with tls(stream, files) as secure:
                heads.append(read_head(secure))
                secure.sendall(b"HTTP/1.1 503 x\r\nContent-Length: 0\r\n\r\n")

        with listening(serve) as port:
            try:
                session(port, ca, key)
            except (httpx.HTTPError, ssl.SSLError) as error:
                return f"{type(error).__name__}: {error}"
        return "a session"

    attempt(authority.issue(folder / "sound"))
    if not any("activate-node" in head for head in heads):
        raise AssertionError("a sound certificate let nothing through, so nothing is shown")
    kinds = _certificates()
    for number in range(tries):
        name = list(kinds)[number % len(kinds)]
        issued, words = kinds[name]
        heads.clear()
        issuer = other if name == "another authority's" else authority
        said = attempt(issuer.issue(folder / str(number), **issued))
        yield Try(words in said and not heads, f"{name}: {said}; requests seen: {len(heads)}")


def bad_keys(folder: Path, tries: int) -> Iterator[Try]:
    """Each kind in turn, at a real SuperLink behind nginx: no session, and a line in its log."""
    with deployment(
        folder, sites={"north": "CT"}, extra=(REVOKED, SKEWED), federation=PLAN
    ) as found:
        found.begin_run("keys")
        found.serve()
        for site in (REVOKED, SKEWED):  # they are let in until now
            session(found.port, found.federation / "ca.crt", _key(found, site))
        _revoke(found)
        for number in range(tries):
            kind = KINDS[number % len(KINDS)]
            before = _refused_calls(found)
            said = _attempt(found, kind, early=number % 2 == 0)
            noted = _noted(found, before)
            refused = said in ("status 401", "status 403", "status 412")
            yield Try(refused and noted, f"{kind}: {said}; noted: {noted}")


def _attempt(found: Deployment, kind: str, *, early: bool) -> str:
    site = REVOKED if kind == "revoked" else SKEWED
    stranger = kind == "unregistered"
    key = ec.generate_private_key(ec.SECP384R1()) if stranger else _key(found, site)
    off = (-SKEW if early else SKEW) if kind == "skewed" else timedelta(0)
    with patch.object(node_auth, "now", lambda: datetime.now(UTC) + off):
        try:
            session(found.port, found.federation / "ca.crt", key)
        except httpx.HTTPStatusError as error:
            return f"status {error.response.status_code}"
    return "a session"


def _key(found: Deployment, site: str) -> Any:
    return load_ssh_private_key(node_key_file(found.sites[site], 1).read_bytes(), None)


def _noted(found: Deployment, before: int) -> bool:
    ends = time.monotonic() + 5
    while _refused_calls(found) == before and time.monotonic() < ends:
        time.sleep(0.05)
    return _refused_calls(found) > before


def _revoke(found: Deployment) -> None:
    do(server_app, "revoke", REVOKED, "--federation", found.federation)
    log = sorted(found.folder.glob("server-*.log"))[-1]
    wait_for(lambda: f"{REVOKED}-1 is shut out" in log.read_text("utf-8"), 300, "the revocation")


def _refused_calls(found: Deployment) -> int:
    lines = (found.run / "proxy" / "access.log").read_text("utf-8").splitlines()
    return sum(any(f" {code} in=" in line for code in (401, 403, 412)) for line in lines)


FAULTS = [
    Fault(9, "expired, early, other CA's, other name's certificate", bad_certificates, 8, short=4),
    Fault(9, "unregistered key, revoked key, clock 10 min off", bad_keys, 24, short=4, deploy=True),
]
