"""Whether the coordinator can be reached, is the one that was enrolled with, and keeps our time."""

import http.client
import socket
import ssl
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from pathlib import Path

from cryptography import x509
from cryptography.x509.oid import NameOID

from client.preflight_route import Answer, Route, TunnelError, ask_health, connect, handshake
from client.preflight_row import Row, fail, ok, warn

# Flower takes no signed clock that is this far ahead or behind, seconds.
AHEAD_S, BEHIND_S = 5.0, 300.0
_AHEAD_WARN_S, _BEHIND_WARN_S = 2.0, 60.0
SOON = timedelta(days=14)
_EXPIRED, _NOT_YET, _WRONG_NAME = 10, 9, 62  # of X509_V_ERR_
_SUPPORTED = ("http",)


def network_rows(route: Route, ca: Path) -> Iterator[Row]:
    """All checks of the way to the coordinator; one that rests on a failed one is left out."""
    yield check_proxy(route)
    for check in (check_name, check_port, check_tunnel):
        row = check(route)
        yield row
        if row.level == "fail":
            return
    tls, certificate = check_tls(route, ca)
    yield tls
    if tls.level != "fail":
        answer = health(route, ca)
        yield check_health(answer)
        yield check_clock(answer)
    elif certificate is not None and certificate.issuer == _subject_of(ca):
        # Out of force or under another name; a wrong clock of ours may be the cause.
        yield check_clock(health(route, None))


def check_proxy(route: Route) -> Row:
    """Whether the environment names an outbound proxy that can be used."""
    name, proxy = "outbound proxy", route.proxy
    if proxy is None:
        return ok(name, "none for this address")
    shown = f"{proxy.host}:{proxy.port}"
    if proxy.scheme not in _SUPPORTED or not proxy.host:
        return fail(
            name,
            f"{shown} by {proxy.scheme}",
            "Name an HTTP proxy in HTTPS_PROXY (http://NAME:PORT), or list the coordinator in "
            "NO_PROXY.",
        )
    return ok(name, f"{shown}, from the environment{', with a user' * bool(proxy.credentials)}")


def check_name(route: Route) -> Row:
    """Whether the name of whom we connect to resolves."""
    host, port = route.first
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        return fail(
            "name",
            f"{host} does not resolve ({type(error).__name__})",
            "Ask the network's staff for a DNS entry, or correct the name: "
            + ("in HTTPS_PROXY." if route.proxy else "enrol with a kit that holds the right one."),
        )
    addresses = sorted({str(entry[4][0]) for entry in found})
    return ok("name", f"{host} is {', '.join(addresses[:3])}")


def check_port(route: Route) -> Row:
    """Whether somebody listens there."""
    host, port = route.first
    try:
        connect(Route(host, port)).close()
    except OSError as error:
        said = error.strerror or type(error).__name__
        return fail(
            "port",
            f"{host}:{port} takes no connection ({said})",
            "Ask the network's staff to let this machine out to that address and port, or to name "
            "a proxy for HTTPS_PROXY. If others are cut off too, ask the coordinator.",
        )
    return ok("port", f"{host}:{port} takes connections")


def check_tunnel(route: Route) -> Row:
    """Whether the proxy, where there is one, lets us through."""
    if route.proxy is None:
        return ok("tunnel", "not needed")
    target = f"{route.host}:{route.port}"
    try:
        connect(route).close()
    except TunnelError as error:
        remedies = {
            407: "Put user and password into HTTPS_PROXY (http://USER:PASSWORD@NAME:PORT).",
            403: f"Ask the network's staff to allow CONNECT to {target}.",
            0: "What HTTPS_PROXY names is no HTTP proxy. Correct it.",
        }
        said = f"answers {error.status}" if error.status else "does not answer as a proxy"
        other = f"Ask the proxy's staff whether it can reach {target}."
        return fail("tunnel", f"the proxy {said} to CONNECT", remedies.get(error.status, other))
    except OSError as error:
        return fail(
            "tunnel",
            f"the proxy broke off ({type(error).__name__})",
            f"Ask the proxy's staff whether it can reach {target}.",
        )
    return ok("tunnel", "the proxy lets us through")


def check_tls(
    route: Route, ca: Path, *, now: datetime | None = None
) -> tuple[Row, x509.Certificate | None]:
    """Whether the certificate is the federation's, for this name and in force."""
    name, now = "certificate", now or datetime.now(UTC)
    try:
        with handshake(route, ca) as stream:
            certificate = _certificate_of(stream)
    except ssl.SSLCertVerificationError as error:
        certificate = _look_at(route)
        return _refused(error, certificate, ca, host=route.host), certificate
    except ssl.SSLError as error:
        return fail(
            name, f"no TLS ({error.reason})", "Compare address and port with the coordinator's."
        ), None
    except OSError as error:
        said = "cannot be read" if isinstance(error, FileNotFoundError) else "broke off"
        return fail(
            name,
            f"{'keys/ca.crt' if said == 'cannot be read' else 'the connection'} {said}",
            "Enrol again with the coordinator's kit."
            if said == "cannot be read"
            else "Try again; ask the coordinator if it stays so.",
        ), None
    if certificate is None:
        return fail(name, "none was shown", "Ask the coordinator."), None
    until = certificate.not_valid_after_utc
    if until - now < SOON:
        row = warn(name, f"ends on {until:%Y-%m-%d}", "Tell the coordinator to renew it.")
        return row, certificate
    return ok(name, f"the federation's, until {until:%Y-%m-%d}"), certificate


def health(route: Route, ca: Path | None) -> Answer | None:
    """The coordinator's answer, None without one; ``ca`` None is for its clock alone."""
    with suppress(OSError, http.client.HTTPException), handshake(route, ca) as stream:
        return ask_health(stream, route.host)
    return None


def check_health(answer: Answer | None) -> Row:
    """Whether the coordinator serves."""
    if answer is not None and answer.status == 200:
        return ok("coordinator", "answers")
    said = "gives no answer" if answer is None else f"answers {answer.status}"
    level = warn if answer is not None and answer.status in (502, 503, 504) else fail
    return level(
        "coordinator",
        f"{said} on /health",
        "Ask the coordinator whether its server runs; the site keeps trying.",
    )


def check_clock(answer: Answer | None) -> Row:
    """Whether our clock is within what the coordinator takes; resolution about a second."""
    try:
        theirs = parsedate_to_datetime(answer.date).timestamp() if answer is not None else None
    except (ValueError, TypeError):
        theirs = None
    if answer is None or theirs is None:
        return warn(
            "clock",
            "not compared, the coordinator tells no time",
            "Set this machine's clock by NTP.",
        )
    # The header counts whole seconds that have passed: on average half a second more.
    skew = (answer.before + answer.after) / 2 - (theirs + 0.5)
    said = f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the coordinator's"
    remedy = "Set this machine's clock by NTP, and start the site again."
    if skew > AHEAD_S or skew < -BEHIND_S:
        return fail("clock", f"{said}; 5 s ahead or 300 s behind are refused", remedy)
    if skew > _AHEAD_WARN_S or skew < -_BEHIND_WARN_S:
        return warn("clock", said, remedy)
    return ok("clock", "agrees with the coordinator's to about a second")


def _certificate_of(stream: ssl.SSLSocket) -> x509.Certificate | None:
    content = stream.getpeercert(binary_form=True)
    try:
        return None if content is None else x509.load_der_x509_certificate(content)
    except ValueError:
        return None


def _look_at(route: Route) -> x509.Certificate | None:
    """The certificate that is shown to us, believed or not."""
    with suppress(OSError), handshake(route, None) as stream:
        return _certificate_of(stream)
    return None


def _refused(
    error: ssl.SSLCertVerificationError, shown: x509.Certificate | None, ca: Path, *, host: str
) -> Row:
    name = "certificate"
    if error.verify_code == _EXPIRED:
        return fail(
            name,
            f"ended on {shown.not_valid_after_utc:%Y-%m-%d}" if shown else "has ended",
            "Compare this machine's clock (below); if it is right, tell the coordinator to renew "
            "the certificate.",
        )
    if error.verify_code == _NOT_YET:
        return fail(
            name,
            f"begins on {shown.not_valid_before_utc:%Y-%m-%d}" if shown else "has not begun",
            "Set this machine's clock, which is probably behind.",
        )
    if error.verify_code == _WRONG_NAME:
        return fail(
            name,
            f"is the federation's, but not for {host}",
            "Tell the coordinator to put this name into its certificate, or enrol with a kit that "
            "holds the right one.",
        )
    return _foreign(error, shown, ca)


def _foreign(error: ssl.SSLCertVerificationError, shown: x509.Certificate | None, ca: Path) -> Row:
    """A chain that does not end at the federation's authority: an inspecting proxy, most often."""
    name = "certificate"
    if shown is None:
        return fail(name, f"is not believed ({error.verify_message})", "Ask the coordinator.")
    issuer, own = shown.issuer, _subject_of(ca)
    if own is not None and issuer == own:
        return fail(
            name,
            "is signed by an authority of the federation's name with another key",
            "The coordinator has made its authority anew: enrol again with its new kit.",
        )
    return fail(
        name,
        f"is signed by {_signer(issuer)}, not by the federation's authority",
        "A proxy on the way opens TLS, most likely. Ask the network's staff to exempt this address "
        "from inspection. Do not add that authority to keys/ca.crt: whoever holds it could read "
        "and change what is sent.",
    )


def _subject_of(ca: Path) -> x509.Name | None:
    try:
        return x509.load_pem_x509_certificate(ca.read_bytes()).subject
    except (OSError, ValueError):
        return None


def _signer(issuer: x509.Name) -> str:
    """Organisation and name of an authority, printable and short."""
    wanted = (NameOID.ORGANIZATION_NAME, NameOID.COMMON_NAME)
    parts = [str(each.value) for oid in wanted for each in issuer.get_attributes_for_oid(oid)]
    text = ", ".join(dict.fromkeys(parts)) or "an authority without a name"
    return "".join(sign for sign in text if sign.isprintable())[:80]
