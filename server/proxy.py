"""The nginx configuration of the coordinator's only open port (docs/deploy.md)."""

import ipaddress
import re
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from agssd_core.errors import ConfigError, KeyFileError
from agssd_core.weights import write_text

CONFIG_FILE = "nginx.conf"
SUPERLINK_PORT = 9092
BODY_LIMIT = "16m"  # a chunk of an update has 5 MiB
FLEET_CALLS = (
    "activate-node",
    "deactivate-node",
    "send-node-heartbeat",
    "pull-messages",
    "push-messages",
    "get-run",
    "get-fab",
    "push-object",
    "pull-object",
    "confirm-message-received",
)
# A site has about five calls open; a few may share an address. Bodies: 4 GiB in all at the worst.
_LIMITS = {"requests_per_second": 200, "burst": 400, "calls_per_address": 32, "calls": 256}
_TEMPLATE = "nginx.conf.jinja"
_DNS_NAME = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(\.[A-Za-z0-9-]{1,63})*\Z")
_UNSAFE = re.compile(r'["$\\\x00-\x1f\x7f]')


def write_proxy_config(
    folder: Path,
    *,
    listen: str,
    upstream_port: int,
    names: Sequence[str],
    certificate: Path,
    key: Path,
    ca: Path,
) -> Path:
    """Write nginx.conf for a proxy that lets the calls of a SuperNode through and nothing else.

    ``folder`` becomes the prefix: pid, logs and temporary folders lie in it.

    Args:
        folder: made if new.
        listen: ADDRESS:PORT, or a port of all interfaces.
        upstream_port: where the SuperLink listens on loopback, with the same certificate.
        names: host names and addresses that sites connect to; one of them is a DNS name.
        certificate: the server's with its chain, PEM.
        key: the certificate's, PEM; nginx's user must be able to read it.
        ca: the federation's CA certificate, by which the SuperLink is known.

    Returns:
        The written file.

    Raises:
        ConfigError: an address, name or path cannot be written into the configuration.
    """
    hosts = [_host(name) for name in names]
    upstream_name = _upstream_name(names)
    files = {"certificate": certificate, "key": key, "ca": ca}
    values = {name: _path(path) for name, path in files.items()}
    text = _template().render(
        **values,
        **_LIMITS,
        folder=_path(folder),
        listen=_listen(listen),
        upstream_port=_port(upstream_port),
        names=" ".join(hosts),
        upstream_name=upstream_name,
        fleet_calls="|".join(FLEET_CALLS),
        body_limit=BODY_LIMIT,
    )
    (folder / "temp").mkdir(parents=True, exist_ok=True)
    write_text(folder / CONFIG_FILE, text)
    return folder / CONFIG_FILE


def write_federation_proxy(
    federation: Path, folder: Path, *, listen: str, upstream_port: int
) -> Path:
    """Write nginx.conf for the folder of a federation; the names come from its certificate.

    Raises:
        ConfigError: see ``write_proxy_config``.
        KeyFileError: the federation has no server certificate.
    """
    certificate = federation / "server.pem"
    return write_proxy_config(
        folder,
        listen=listen,
        upstream_port=upstream_port,
        names=certificate_names(certificate),
        certificate=certificate,
        key=federation / "server.key",
        ca=federation / "ca.crt",
    )


def certificate_names(certificate: Path) -> tuple[str, ...]:
    """DNS names and addresses of a certificate, DNS names first.

    Raises:
        KeyFileError: it is missing, damaged or names no host.
    """
    try:
        leaf = x509.load_pem_x509_certificates(certificate.read_bytes())[0]
        hosts = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (OSError, ValueError, x509.ExtensionNotFound):
        raise KeyFileError(
            "the federation has no server certificate that names its hosts. Make one with "
            "`agssd-server provision`."
        ) from None
    addresses = [str(each) for each in hosts.get_values_for_type(x509.IPAddress)]
    return (*hosts.get_values_for_type(x509.DNSName), *addresses)


def _template() -> Template:
    loader = FileSystemLoader(Path(__file__).parent)
    return Environment(  # noqa: S701 - not HTML; values are checked below
        loader=loader, undefined=StrictUndefined, keep_trailing_newline=True
    ).get_template(_TEMPLATE)


def _path(path: Path) -> str:
    text = str(path.resolve())
    if _UNSAFE.search(text):
        raise ConfigError(
            "a path for the proxy holds a quote, dollar sign, backslash or control character. "
            "Choose another folder."
        )
    return text


def _port(number: int) -> int:
    if not 0 < number < 1 << 16:
        raise ConfigError(f"{number} is not a TCP port. Take one from 1 to 65535.")
    return number


def _listen(text: str) -> str:
    host, _, port = text.rpartition(":")
    if host and not _address(host.removeprefix("[").removesuffix("]")):
        raise ConfigError(f"{text!r} is no ADDRESS:PORT to listen on. Give 0.0.0.0:443, say.")
    if not port.isdecimal():
        raise ConfigError(f"{text!r} is no ADDRESS:PORT to listen on. Give 0.0.0.0:443, say.")
    number = _port(int(port))
    return f"{_host(host.strip('[]'))}:{number}" if host else str(number)


def _host(name: str) -> str:
    """A name as nginx compares it with the Host header."""
    address = _address(name)
    if address is not None:
        return f"[{address}]" if address.version == 6 else str(address)
    if not _DNS_NAME.match(name):
        raise ConfigError(f"{name!r} is neither a host name nor an address. Mend the names.")
    return name.lower()


def _upstream_name(names: Sequence[str]) -> str:
    """The name by which nginx checks the SuperLink's certificate; it cannot check addresses."""
    hosts = [_host(name) for name in names if _address(name) is None]
    if not hosts:
        raise ConfigError(
            "the server certificate names no host, only addresses, and nginx checks names. Add "
            "localhost to its names."
        )
    return "localhost" if "localhost" in hosts else hosts[0]


def _address(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None
