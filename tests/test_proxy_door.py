"""The coordinator's open port: a real nginx before a real SuperLink lets ten calls through."""

import json
import os
import ssl
import subprocess
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import tomli_w

from agssd_core.config import parse_config
from agssd_core.processes import engine_environment
from server.nodes import node_statuses
from server.proxy import FLEET_CALLS
from server.superlink import Certificates, SuperLink, superlink
from tests.support.federation_keys import make_federation, make_node_key
from tests.support.proxy import Proxy, read_answer, request, running_proxy

pytestmark = pytest.mark.deploy

THROUGH = {("POST", f"/v1/fleet/{call}") for call in FLEET_CALLS} | {("GET", "/health")}
ROUTES = """
import json
from flwr.superlink.main import create_app, iter_route_contexts
routes = [context.route for context in iter_route_contexts(create_app().routes)]
print(json.dumps([(method, route.path) for route in routes for method in route.methods]))
"""


@dataclass(frozen=True)
class Door:
    """SuperLink and proxy."""

    link: SuperLink
    proxy: Proxy
    federation: Path


@pytest.fixture(scope="module")
def door(tmp_path_factory):
    folder = tmp_path_factory.mktemp("door")
    federation = make_federation(folder / "federation")
    config = parse_config({"preset": "tiny"}, ())
    certificates = Certificates.of(federation)
    with (
        superlink(config, folder / "engine", certificates=certificates) as link,
        running_proxy(federation, folder / "proxy", link.port) as proxy,
    ):
        yield Door(link, proxy, federation)


def _routes(folder):
    environment = engine_environment(folder, threads=1)
    found = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ROUTES],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return {tuple(each) for each in json.loads(found.stdout.splitlines()[-1])}


def test_of_all_routes_exactly_ten_calls_and_health_get_through(door, tmp_path):
    routes = _routes(tmp_path)
    assert len({path for _, path in routes}) >= 77
    assert routes > THROUGH
    inside = Proxy(door.link.port, tmp_path, door.proxy.ca, door.proxy.process)
    # Control: whoever reaches the SuperLink itself finds all of them.
    unknown = b'{"detail":"Not Found"}'
    assert unknown in inside.ask(request("POST", "/v1/no-such-route"))[1]
    assert not [route for route in _sample(routes) if unknown in inside.ask(request(*route))[1]]

    others = {(method, path) for _, path in routes for method in ("GET", "POST", "HEAD", "PUT")}
    answers = {route: door.proxy.ask(request(*route))[0] for route in routes | others}
    assert {route for route, status in answers.items() if status != 404} == THROUGH
    assert answers["GET", "/health"] == 200
    # They arrive at the SuperLink, which asks who calls.
    assert {answers["POST", f"/v1/fleet/{call}"] for call in FLEET_CALLS} == {401}


def _sample(routes):
    """All that give one answer and end; a log's stream would not."""
    return [route for route in routes if "stream" not in route[1]]


@pytest.mark.parametrize(
    "target",
    [
        "/v1/fleet/pull-messages%0a",
        "/v1/fleet/pull-messages%0A",
        "/v1/fleet/pull-messages%00",
        "/v1/fleet/pull-messages%20",
        "/v1/fleet/pull-messages/",
        "/v1/fleet/pull-messages//",
        "/v1/fleet/pull-messages?run=1",
        "/v1/fleet/pull-messages?",
        "/v1/fleet/pull-messages#x",
        "/v1/fleet/pull-messages;x",
        "/v1/fleet/pull%2Dmessages",
        "/v1/fleet/%70ull-messages",
        "/v1/fleet%2Fpull-messages",
        "/v1%2ffleet%2fpull-messages",
        "//v1/fleet/pull-messages",
        "/v1//fleet/pull-messages",
        "/v1/fleet/./pull-messages",
        "/v1/fleet/../fleet/pull-messages",
        "/v1/control/../fleet/pull-messages",
        "/v1/fleet/../control/list-runs",
        "/v1/fleet/%2e%2e/control/list-runs",
        "/v1/fleet/pull-messages/../../control/list-runs",
        "/v1/fleet/pull-messages%2f..%2f..%2fcontrol%2flist-runs",
        "/v1/fleet/pull-messages/%2e%2e/%2e%2e/control/list-runs",
        "/v1/control/list-runs%2f..%2f..%2ffleet%2fpull-messages",
        "/V1/fleet/pull-messages",
        "/v1/fleet/PULL-MESSAGES",
        "/v1/fleet/pull-messages\\..\\..\\control\\list-runs",
        "/v1/fleet/xpull-messages",
        "/x/v1/fleet/pull-messages",
        "/health/../v1/control/list-runs",
        "v1/fleet/pull-messages",
        "https://localhost/v1/control/list-runs",
        "https://localhost//v1/fleet/pull-messages",
        "*",
    ],
)
def test_a_path_that_is_not_written_as_meant_stops_at_nginx(door, target):
    status, answer = door.proxy.ask(request("POST", target))
    assert status in (400, 404, 405)
    assert b"nginx" in answer.rsplit(b"\r\n\r\n", 1)[-1]


def test_an_absolute_target_is_held_to_the_same_list(door):
    ask = door.proxy.ask
    assert ask(request("POST", "https://localhost/v1/fleet/pull-messages"))[0] == 401
    assert ask(request("POST", "https://other.example/v1/fleet/pull-messages"))[0] == 404
    assert ask(request("POST", "/v1/fleet/pull-messages", host="other.example"))[0] == 404


CALL = "/v1/fleet/pull-messages"


@pytest.mark.parametrize(
    ("status", "headers", "body"),
    [
        (400, ("Content-Length: 4", "Transfer-Encoding: chunked"), b"0\r\n\r\n"),
        (400, ("Content-Length: 4", "Content-Length: 5"), b"abcd"),
        (400, ("Content-Length: 4", "Content-Length: 4"), b"abcd"),
        (400, ("Content-Length: -1",), b""),
        (400, ("Content-Length: 1e1",), b""),
        (411, ("Transfer-Encoding: chunked",), b"4\r\nabcd\r\n0\r\n\r\n"),
        (501, ("Transfer-Encoding: gzip, chunked",), b"0\r\n\r\n"),
        (400, ("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"), b"0\r\n\r\n"),
        (413, (f"Content-Length: {(16 << 20) + 1}",), b""),
        (413, (f"Content-Length: {10 << 30}",), b""),
        (400, ("X: " + "a" * 40_000,), b""),
    ],
)
def test_a_body_of_doubtful_length_is_refused(door, status, headers, body):
    assert door.proxy.ask(request("POST", CALL, *headers, body=body))[0] == status


def test_nobody_is_upgraded_to_http2(door):
    upgrade = ("Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQCAAAAAAIAAAAA", "Connection: Upgrade")
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"
    status, answer = door.proxy.ask(request("POST", CALL, *upgrade))
    assert status == 401
    assert b"pgrade" not in answer
    assert door.proxy.ask(preface)[0] in (0, 400, 405)
    context = ssl.create_default_context(cafile=str(door.proxy.ca))
    context.set_alpn_protocols(["h2", "http/1.1"])
    with context.wrap_socket(door.proxy.dial(), server_hostname="localhost") as connection:
        assert connection.selected_alpn_protocol() in (None, "http/1.1")


def test_tls_below_1_2_and_clear_text_are_refused(door):
    with door.proxy.dial() as plain:
        plain.sendall(request("POST", CALL))
        assert read_answer(plain)[0] == 400
    context = ssl.create_default_context(cafile=str(door.proxy.ca))
    context.set_ciphers("ALL:@SECLEVEL=0")
    with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
        context.minimum_version = ssl.TLSVersion.TLSv1
        context.maximum_version = ssl.TLSVersion.TLSv1_1
    with door.proxy.dial() as plain, pytest.raises(ssl.SSLError, match="alert protocol version"):
        context.wrap_socket(plain, server_hostname="localhost")
    for version in (ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3):
        context = ssl.create_default_context(cafile=str(door.proxy.ca))
        context.minimum_version = context.maximum_version = version
        with context.wrap_socket(door.proxy.dial(), server_hostname="localhost") as connection:
            connection.sendall(request("GET", "/health"))
            assert read_answer(connection)[0] == 200


def test_answers_and_logs_tell_little(door):
    _, answer = door.proxy.ask(request("GET", "/health?nobody-should-log-this"))
    assert b"nginx/" not in answer
    log = (door.proxy.folder / "access.log").read_text()
    assert "GET /health 404" in log
    assert "nobody-should-log-this" not in log


def _flwr(environment, *words):
    """Exit code and output of a command of Flower."""
    done = subprocess.run(
        [Path(sys.executable).parent / "flwr", *words],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=180,
    )
    return done.returncode, done.stdout


def test_with_the_ca_certificate_alone_nobody_runs_lists_stops_or_registers(door, tmp_path):
    key = tmp_path / "node.pub"
    key.write_text(make_node_key(tmp_path / "node"))
    app = {
        "project": {"name": "x", "version": "1.0.0", "license": "Apache-2.0", "description": "x"},
        "tool": {"flwr": {"app": {"publisher": "x", "components": {}, "config": {}}}},
    }
    app["tool"]["flwr"]["app"]["components"] = {"serverapp": "x:a", "clientapp": "x:a"}
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "pyproject.toml").write_text(tomli_w.dumps(app))
    (tmp_path / "app" / "x.py").write_text("a = None\n")
    links = {
        name: {"address": f"localhost:{port}", "root-certificates": str(door.proxy.ca)}
        for name, port in {"outside": door.proxy.port, "inside": door.link.port}.items()
    }
    home = tmp_path / "home"
    home.mkdir()
    (home / "config.toml").write_text(tomli_w.dumps({"superlink": links}))
    environment = engine_environment(home, threads=1) | {"PATH": os.environ["PATH"]}
    before = node_statuses(door.link)
    commands = {
        "list": ("list", "outside"),
        "stop": ("stop", "1", "outside"),
        "run": ("run", str(tmp_path / "app"), "outside"),
        "register": ("supernode", "register", str(key), "outside"),
        "nodes": ("supernode", "list", "outside"),
        "control": ("list", "inside"),
    }
    told = {name: _flwr(environment, *words) for name, words in commands.items()}
    codes = {name: code for name, (code, _) in told.items()}
    said = {name: text for name, (_, text) in told.items()}
    assert codes.pop("control") == 0, said["control"]
    assert all(codes.values()), codes
    assert all("404" in said[name] for name in codes), said
    assert node_statuses(door.link) == before
