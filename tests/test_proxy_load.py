"""The proxy under slow, large and many requests: nothing on disk, nobody shut out."""

import contextlib
import time

import pytest

from tests.support.federation_keys import make_federation
from tests.support.proxy import read_answer, request, running_proxy, upstream

pytestmark = pytest.mark.deploy

MIB = 1 << 20
CALL = "/v1/fleet/push-object"


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    return make_federation(tmp_path_factory.mktemp("load") / "federation")


@pytest.fixture(scope="module")
def proxy(federation, tmp_path_factory):
    folder = tmp_path_factory.mktemp("proxy")
    with upstream(federation) as port, running_proxy(federation, folder, port) as running:
        yield running


def _upload(proxy, size, *, seconds=2.0, headers=()):
    """Send a body slowly; status, and what lay in nginx's temporary folders meanwhile."""
    seen = set()
    with proxy.connect() as connection:
        connection.sendall(request("POST", CALL, f"Content-Length: {size}", *headers))
        part = bytes(size // 64)
        for _ in range(64):
            connection.sendall(part)
            seen.update(proxy.temporary_files())
            time.sleep(seconds / 64)
        status, _ = read_answer(connection)
    seen.update(proxy.temporary_files())
    return status, seen


@pytest.mark.parametrize("size", [5 * MIB, 16 * MIB], ids=["chunk", "largest"])
def test_no_part_of_an_upload_is_ever_on_disk(proxy, size):
    status, seen = _upload(proxy, size)
    assert status == 200
    assert not seen


def test_the_probe_sees_the_file_that_nginx_would_write_otherwise(federation, tmp_path):
    def small_buffer(text):
        return text.replace("client_body_buffer_size 16m", "client_body_buffer_size 64k")

    with (
        upstream(federation) as port,
        running_proxy(federation, tmp_path / "proxy", port, small_buffer) as spoiled,
    ):
        status, seen = _upload(spoiled, 5 * MIB, seconds=0.5)
    assert status == 200
    assert seen


def _download(proxy, size):
    """Read an answer slowly; its length, and what lay in the temporary folders meanwhile."""
    seen, received = set(), 0
    with proxy.connect() as connection:
        connection.sendall(request("POST", "/v1/fleet/pull-object"))
        while part := connection.recv(1 << 18):
            received += len(part)
            if received < 3 * MIB:
                time.sleep(0.01)
                seen.update(proxy.temporary_files())
    return received, seen


@pytest.mark.parametrize("spoiled", [False, True], ids=["as-shipped", "probe"])
def test_no_part_of_a_slow_download_is_ever_on_disk(federation, tmp_path, spoiled):
    size = 32 * MIB
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n\r\n".encode()

    def with_spool(text):
        limit = "proxy_max_temp_file_size 0;"
        return text.replace(limit, "") if spoiled else text

    with (
        upstream(federation, head + bytes(size)) as port,
        running_proxy(federation, tmp_path / "proxy", port, with_spool) as running,
    ):
        received, seen = _download(running, size)
    assert received > size
    assert bool(seen) == spoiled


def test_an_upstream_with_a_foreign_certificate_is_not_spoken_to(federation, tmp_path):
    foreign = make_federation(tmp_path / "foreign")
    with (
        upstream(foreign) as port,
        running_proxy(federation, tmp_path / "proxy", port) as running,
    ):
        assert running.ask(request("GET", "/health"))[0] == 502


def _health_seconds(proxy):
    start = time.monotonic()
    assert proxy.ask(request("GET", "/health"))[0] == 200
    return time.monotonic() - start


def test_two_hundred_half_open_connections_shut_nobody_out(proxy):
    half = request("POST", CALL, "Content-Length: 100")
    stages = {
        "silent": lambda: proxy.dial(source="127.0.0.2"),
        "head": lambda: _begun(proxy, half[:40], source="127.0.0.2"),
        "body": lambda: _begun(proxy, half + b"x", source="127.0.0.3"),
    }
    counts = {"silent": 80, "head": 60, "body": 60}
    with contextlib.ExitStack() as stack:
        opened = [
            stack.enter_context(stages[stage]())
            for stage, count in counts.items()
            for _ in range(count)
        ]
        assert len(opened) == 200
        assert max(_health_seconds(proxy) for _ in range(5)) < 2
        # Who never finished a request's head is shown out after 10 s, and nobody waited for it.
        deadline = time.monotonic() + 25
        waiting = opened[: counts["silent"] + counts["head"]]
        for connection in waiting:
            connection.settimeout(max(0.1, deadline - time.monotonic()))
            with contextlib.suppress(ConnectionResetError):
                assert not connection.recv(1)
        assert time.monotonic() < deadline
        assert _health_seconds(proxy) < 2


def _begun(proxy, request_bytes, *, source):
    connection = proxy.connect(source=source)
    connection.sendall(request_bytes)
    return connection


def test_one_address_holds_no_more_than_32_calls_and_another_is_served(proxy):
    begun = request("POST", CALL, "Content-Length: 100") + b"x"
    with contextlib.ExitStack() as stack:
        held = [stack.enter_context(_begun(proxy, begun, source="127.0.0.4")) for _ in range(40)]
        time.sleep(0.5)
        answers = [answer for connection in held if (answer := _answer_so_far(connection))]
        assert len(answers) == 8
        assert {answer[:13] for answer in answers} == {b"HTTP/1.1 503 "}
        assert proxy.ask(request("GET", "/health"))[0] == 200


def _answer_so_far(connection):
    connection.settimeout(0.02)
    try:
        return connection.recv(1 << 12)
    except TimeoutError:
        return b""


def test_a_flood_is_throttled_with_503_and_nothing_else(proxy):
    ask = request("GET", "/health").replace(b"Connection: close\r\n", b"")
    with proxy.connect(source="127.0.0.5") as connection:
        for _ in range(8):
            connection.sendall(ask * 120)
        connection.settimeout(3)
        received = b""
        with contextlib.suppress(TimeoutError):
            while received.count(b"HTTP/1.1 ") < 960 and (part := connection.recv(1 << 16)):
                received += part
        statuses = [part[:3] for part in received.split(b"HTTP/1.1 ")[1:]]
    assert set(statuses) == {b"200", b"503"}
    assert statuses.count(b"200") >= 400
    assert proxy.ask(request("GET", "/health"))[0] == 200
