"""What stands between a site and its coordinator is named, with a remedy."""

import socket

import pytest

from client.preflight_network import check_clock, check_tls, network_rows
from client.preflight_route import Proxy, Route, route_to
from tests.support.tls_server import DAY, NOW, Authority, coordinator, listening, proxy


@pytest.fixture(scope="module")
def authority():
    return Authority()


@pytest.fixture
def ca(authority, tmp_path):
    file = tmp_path / "ca.crt"
    file.write_bytes(authority.pem())
    return file


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch):
    for name in ("https_proxy", "all_proxy", "no_proxy", "http_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


def rows_of(port, ca, host="localhost", **named):
    return {row.name: row for row in network_rows(Route(host, port, **named), ca)}


def red(rows):
    return [name for name, row in rows.items() if row.level == "fail"]


def test_a_sound_connection_is_green(authority, ca, tmp_path):
    with coordinator(authority.issue(tmp_path)) as port:
        rows = rows_of(port, ca)
    assert [row.level for row in rows.values()] == ["ok"] * 7
    assert list(rows) == [
        "outbound proxy",
        "name",
        "port",
        "tunnel",
        "certificate",
        "coordinator",
        "clock",
    ]
    assert f"until {NOW + 60 * DAY:%Y-%m-%d}" in rows["certificate"].found


@pytest.mark.parametrize(
    ("issued", "found", "remedy"),
    [
        ({"begins": NOW - 9 * DAY, "ends": NOW - DAY}, "ended on", "renew the certificate"),
        ({"begins": NOW + DAY, "ends": NOW + 9 * DAY}, "begins on", "Set this machine's clock"),
        ({"host": "elsewhere.example"}, "not for localhost", "put this name into"),
    ],
    ids=["expired", "not-yet", "wrong-name"],
)
def test_a_certificate_out_of_force_or_of_another_name(
    authority, ca, tmp_path, issued, found, remedy
):
    with coordinator(authority.issue(tmp_path, **issued)) as port:
        rows = rows_of(port, ca)
    assert red(rows) == ["certificate"]
    assert found in rows["certificate"].found
    assert remedy in rows["certificate"].remedy
    assert rows["clock"].level == "ok"
    assert "coordinator" not in rows


def test_a_certificate_that_ends_soon_is_a_warning(authority, ca, tmp_path):
    with coordinator(authority.issue(tmp_path, ends=NOW + 5 * DAY)) as port:
        rows = rows_of(port, ca)
    assert red(rows) == []
    assert rows["certificate"].level == "warn"


def test_another_authority_is_named_as_an_inspecting_proxy(ca, tmp_path):
    inspector = Authority("St. Elsewhere Web Security", "Gateway CA")
    with coordinator(inspector.issue(tmp_path)) as port:
        rows = rows_of(port, ca)
    assert red(rows) == ["certificate"]
    assert "St. Elsewhere Web Security, Gateway CA" in rows["certificate"].found
    assert "exempt this address" in rows["certificate"].remedy
    assert "clock" not in rows


def test_an_authority_of_the_same_name_with_another_key_is_told_apart(ca, tmp_path):
    with coordinator(Authority().issue(tmp_path)) as port:
        rows = rows_of(port, ca)
    assert "another key" in rows["certificate"].found
    assert "enrol again" in rows["certificate"].remedy


@pytest.mark.parametrize(
    ("ahead_s", "level", "found"),
    [
        (-30, "fail", "ahead of"),
        (400, "fail", "behind"),
        (-3.5, "warn", "ahead of"),
        (100, "warn", "behind"),
        (40, "ok", "agrees"),
    ],
)
def test_a_clock_is_held_against_what_the_coordinator_takes(
    authority, ca, tmp_path, ahead_s, level, found
):
    with coordinator(authority.issue(tmp_path), ahead_s=ahead_s) as port:
        row = rows_of(port, ca)["clock"]
    assert (row.level, found in row.found) == (level, True)
    if level != "ok":
        assert int(row.found.split()[0]) == pytest.approx(abs(ahead_s), abs=2)


def test_a_server_without_a_clock(authority, ca, tmp_path):
    with coordinator(authority.issue(tmp_path), date=False) as port:
        assert rows_of(port, ca)["clock"].level == "warn"
    assert check_clock(None).level == "warn"


@pytest.mark.parametrize(("status", "level"), [(404, "fail"), (503, "warn")])
def test_something_else_than_the_coordinator_answers(authority, ca, tmp_path, status, level):
    with coordinator(authority.issue(tmp_path), status=status) as port:
        row = rows_of(port, ca)["coordinator"]
    assert (row.level, str(status) in row.found) == (level, True)


def test_a_closed_port(ca):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        rows = rows_of(taken.getsockname()[1], ca)
    assert red(rows) == ["port"]
    assert "certificate" not in rows


def test_a_name_that_does_not_resolve(ca):
    rows = rows_of(443, ca, host="no-such-host.invalid")
    assert red(rows) == ["name"]
    assert "port" not in rows


def test_a_port_that_speaks_no_tls(ca):
    with listening(lambda stream: stream.sendall(b"220 mail ready\r\n")) as port:
        rows = rows_of(port, ca)
    assert red(rows) == ["certificate"]


def test_a_missing_authority(authority, ca, tmp_path):
    with coordinator(authority.issue(tmp_path)) as port:
        row, _ = check_tls(Route("localhost", port), tmp_path / "none.crt")
    assert row.level == "fail"
    assert "Enrol again" in row.remedy


# --- outbound proxies


def by(port, credentials=""):
    return {"proxy": Proxy("http", "127.0.0.1", port, credentials)}


def test_a_tunnel_leads_to_the_same_green_rows(authority, ca, tmp_path):
    with coordinator(authority.issue(tmp_path)) as port, proxy() as (gate, heads):
        rows = rows_of(port, ca, **by(gate))
    assert red(rows) == []
    assert rows["clock"].level == "ok"
    assert f"127.0.0.1:{gate}" in rows["outbound proxy"].found
    assert heads[0].startswith(f"CONNECT localhost:{port} HTTP/1.1")


def test_a_proxy_that_opens_tls_is_recognised_and_named(authority, ca, tmp_path):
    inspector = Authority("St. Elsewhere Web Security", "Gateway CA")
    false = inspector.issue(tmp_path / "false")
    with (
        coordinator(authority.issue(tmp_path)) as port,
        proxy(opens_tls_with=false) as (gate, _),
    ):
        rows = rows_of(port, ca, **by(gate))
    assert red(rows) == ["certificate"]
    assert "St. Elsewhere Web Security" in rows["certificate"].found
    assert "proxy on the way opens TLS" in rows["certificate"].remedy


@pytest.mark.parametrize(("status", "remedy"), [(403, "allow CONNECT to"), (502, "can reach")])
def test_a_proxy_that_refuses(ca, status, remedy):
    with proxy(status=status) as (gate, _):
        rows = rows_of(443, ca, **by(gate))
    assert red(rows) == ["tunnel"]
    assert str(status) in rows["tunnel"].found
    assert remedy in rows["tunnel"].remedy


def test_user_and_password_open_a_proxy_and_are_never_shown(authority, ca, tmp_path):
    with (
        coordinator(authority.issue(tmp_path)) as port,
        proxy(asks="Basic dXNlcjpwYXNzd29yZA==") as (gate, _),
    ):
        without = rows_of(port, ca, **by(gate))
        rows = rows_of(port, ca, **by(gate, "user:password"))
    assert red(without) == ["tunnel"]
    assert "USER:PASSWORD" in without["tunnel"].remedy
    assert red(rows) == []
    assert "password" not in str(rows)


def test_something_that_is_no_proxy(ca):
    with listening(lambda stream: stream.sendall(b"220 mail ready\r\n\r\n")) as gate:
        rows = rows_of(443, ca, **by(gate))
    assert red(rows) == ["tunnel"]
    assert "no HTTP proxy" in rows["tunnel"].remedy


def test_the_environment_names_the_proxy(monkeypatch):
    monkeypatch.setenv("HTTPS_PROXY", "http://us%40er:se%3Acret@proxy.example:3128")
    route = route_to("coordinator.example", 443)
    assert route.proxy == Proxy("http", "proxy.example", 3128, "us@er:se:cret")
    assert "cret" not in repr(route)
    assert route.first == ("proxy.example", 3128)
    monkeypatch.setenv("NO_PROXY", "other.example,coordinator.example")
    assert route_to("coordinator.example", 443).proxy is None


def test_a_proxy_of_another_kind_is_not_supported(monkeypatch, ca):
    monkeypatch.setenv("HTTPS_PROXY", "socks5://127.0.0.1:9")
    first = next(network_rows(route_to("coordinator.example", 443), ca))
    assert (first.level, "http://NAME:PORT" in first.remedy) == ("fail", True)
