"""Certificates, a TLS server and outbound proxies on loopback, for tests of the preflight."""

import socket
import socketserver
import ssl
import threading
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

NOW = datetime.now(UTC)
DAY = timedelta(days=1)


def subject(organisation, name):
    return x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, organisation),
            x509.NameAttribute(NameOID.COMMON_NAME, name),
        ]
    )


class Authority:
    """A CA that signs whatever it is asked to."""

    def __init__(self, organisation="Federation", name="Federation CA"):
        self.name = subject(organisation, name)
        self.key = ec.generate_private_key(ec.SECP384R1())
        usage = dict.fromkeys(
            [
                "digital_signature",
                "content_commitment",
                "key_encipherment",
                "data_encipherment",
                "key_agreement",
                "encipher_only",
                "decipher_only",
            ],
            False,
        )
        self.certificate = (
            self._builder(self.name, self.key, NOW - DAY, NOW + 900 * DAY)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(x509.KeyUsage(key_cert_sign=True, crl_sign=True, **usage), critical=True)
            .sign(self.key, hashes.SHA384())
        )

    def pem(self):
        return self.certificate.public_bytes(Encoding.PEM)

    def issue(self, folder, *, host="localhost", begins=None, ends=None):
        """A server's certificate and key as two files."""
        key = ec.generate_private_key(ec.SECP384R1())
        leaf = (
            self._builder(subject("Server", host), key, begins or NOW - DAY, ends or NOW + 60 * DAY)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()),
                critical=False,
            )
            .sign(self.key, hashes.SHA384())
        )
        folder.mkdir(parents=True, exist_ok=True)
        files = folder / "server.pem", folder / "server.key"
        files[0].write_bytes(leaf.public_bytes(Encoding.PEM))
        files[1].write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return files

    def _builder(self, name, key, begins, ends):
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self.name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begins)
            .not_valid_after(ends)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
        )


@contextmanager
def listening(handle):
    """Serve connections with ``handle(socket)`` on a port of loopback."""

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            self.request.settimeout(10)
            with suppress(OSError):
                handle(self.request)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads = True
        allow_reuse_address = True

        def handle_error(self, *_):
            """A client that goes away is no error here."""

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def coordinator(files, *, ahead_s=0.0, status=200, date=True):
    """A server with a certificate that answers every request, its clock ``ahead_s`` of ours."""

    def serve(stream):
        with tls(stream, files) as secure:
            read_head(secure)
            moment = datetime.now(UTC) + timedelta(seconds=ahead_s)
            told = f"Date: {format_datetime(moment, usegmt=True)}\r\n" if date else ""
            secure.sendall(f"HTTP/1.1 {status} x\r\n{told}Content-Length: 0\r\n\r\n".encode())

    with listening(serve) as port:
        yield port


@contextmanager
def proxy(*, opens_tls_with=None, status=200, asks=""):
    """An HTTP proxy that tunnels CONNECT; with files it ends TLS itself, as inspection does."""

    def serve(stream):
        head = read_head(stream)
        heads.append(head)
        if status != 200 or (asks and asks not in head):
            stream.sendall(f"HTTP/1.1 {407 if asks else status} no\r\n\r\n".encode())
            return
        host, _, port = head.split()[1].partition(":")
        if opens_tls_with is not None:
            stream.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            with tls(stream, opens_tls_with) as secure:
                read_head(secure)
            return
        with socket.create_connection((host, int(port)), timeout=10) as far:
            stream.sendall(b"HTTP/1.1 200 Connection established\r\nX-By: proxy\r\n\r\n")
            back = threading.Thread(target=pump, args=(far, stream), daemon=True)
            back.start()
            pump(stream, far)
            back.join(5)

    heads = []
    with listening(serve) as port:
        yield port, heads


def tls(stream, files):
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*files)
    return context.wrap_socket(stream, server_side=True)


def read_head(stream):
    found = b""
    while b"\r\n\r\n" not in found:
        part = stream.recv(4096)
        if not part:
            raise OSError("gone")
        found += part
    return found.decode("latin-1")


def pump(source, target):
    with suppress(OSError):
        while part := source.recv(65536):
            target.sendall(part)
        target.shutdown(socket.SHUT_WR)
