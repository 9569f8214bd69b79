"""What `agssd-server proxy-config` writes and refuses; no nginx needed."""

import ipaddress
from pathlib import Path

import pytest
from cryptography import x509
from typer.testing import CliRunner

from agssd_core.errors import ConfigError, KeyFileError
from server.cli import app
from server.proxy import write_federation_proxy, write_proxy_config
from server.superlink import Certificates
from tests.support.federation_keys import make_federation

EXAMPLE = Path(__file__).parents[1] / "deploy" / "nginx" / "nginx.conf"


def _written(folder, **changes):
    values = {
        "listen": "443",
        "upstream_port": 9092,
        "names": ["coordinator.example.org", "localhost", "127.0.0.1"],
        "certificate": Path("/srv/federation/server.pem"),
        "key": Path("/srv/federation/server.key"),
        "ca": Path("/srv/federation/ca.crt"),
    }
    return write_proxy_config(folder, **(values | changes)).read_text()


def test_the_example_in_the_repository_is_what_the_command_writes(tmp_path):
    assert _written(tmp_path).replace(str(tmp_path), "/srv/proxy") == EXAMPLE.read_text()


def test_names_come_from_the_certificate(tmp_path):
    names = [
        x509.DNSName("hub.example.org"),
        x509.DNSName("localhost"),
        x509.IPAddress(ipaddress.ip_address("10.0.0.7")),
        x509.IPAddress(ipaddress.ip_address("fd00::7")),
    ]
    federation = make_federation(tmp_path / "federation", names)
    command = ["proxy-config", federation, "--out", tmp_path / "proxy", "--listen", "[::]:8443"]
    result = CliRunner().invoke(app, [str(part) for part in command])
    assert result.exit_code == 0, result.output
    text = (tmp_path / "proxy" / "nginx.conf").read_text()
    assert "server_name hub.example.org localhost 10.0.0.7 [fd00::7];" in text
    assert "listen [::]:8443 ssl;" in text
    assert "proxy_ssl_name localhost;" in text
    assert str(federation / "server.key") in text


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"listen": "443; include /etc/passwd"}, "no ADDRESS:PORT"),
        ({"listen": "hub.example.org:443"}, "no ADDRESS:PORT"),
        ({"listen": "0.0.0.0:70000"}, "not a TCP port"),
        ({"upstream_port": 0}, "not a TCP port"),
        ({"names": ["hub.example.org; return 200"]}, "neither a host name nor an address"),
        ({"names": ["10.0.0.7"]}, "Add localhost"),
        ({"names": []}, "Add localhost"),
        ({"key": Path('/srv/x";y')}, "Choose another folder"),
        ({"ca": Path("/srv/$host")}, "Choose another folder"),
    ],
)
def test_what_nginx_would_read_otherwise_is_refused(tmp_path, change, words):
    with pytest.raises(ConfigError, match=words):
        _written(tmp_path, **change)
    assert not list(tmp_path.iterdir())


def test_a_folder_without_certificates_is_told(tmp_path):
    with pytest.raises(KeyFileError, match="agssd-server provision"):
        write_federation_proxy(tmp_path, tmp_path / "out", listen="443", upstream_port=9092)
    with pytest.raises(KeyFileError, match=r"lacks ca\.crt, server\.pem, server\.key"):
        Certificates.of(tmp_path)
    federation = make_federation(tmp_path / "federation")
    (federation / "server.key").chmod(0o644)
    with pytest.raises(KeyFileError, match="Set its mode to 600"):
        Certificates.of(federation)
