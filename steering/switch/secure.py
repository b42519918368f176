"""The door to TLS: the `ovs` package's stream with the peer's name checked, and what is wrong when it fails.

OVS's own programs and the package check that the peer's certificate is signed by the CA, and for what purpose;
neither looks at whose it is, and neither says more of a failure than an errno. Here a connection is made by
Python's `ssl` to see both. ovs-ofctl can't be told a name, so for OpenFlow it is looked at before, not in, its
connections: a CA that signs for one host only (as Hairpin issues it) leaves no gap.
"""

from __future__ import annotations

import contextlib
import json
import socket
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ovs.socket_util
import ovs.stream
import structlog
from cryptography import x509

from steering.errors import SwitchError
from steering.tls import TlsFiles, split_target

log = structlog.get_logger("tls")

SECONDS = 5.0
# Answered by each: OpenFlow greets by itself, OVSDB answers this (RFC 7047, 4.1.11).
_ECHO = json.dumps({"id": "hairpin", "method": "echo", "params": []}).encode()
RENEW = "issue new certificates with `hairpin host prepare --renew` (docs/deploy.md)"

_known: dict[str, TlsFiles] = {}  # by ADDRESS:PORT as in the connection string


def build_context(tls: TlsFiles) -> ssl.SSLContext:
    """A client's: TLS 1.2 at least, peer and its name checked. Raises SwitchError for unusable files."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks certificate and name
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    with _naming(tls.ca, "switch.tls.caFile"):
        context.load_verify_locations(tls.ca)
    with _naming(tls.key, "switch.tls.keyFile"), tls.key.open("rb"):
        pass
    with _naming(tls.certificate, "switch.tls.certFile, with keyFile"):
        context.load_cert_chain(tls.certificate, tls.key)
    return context


@contextlib.contextmanager
def _naming(path: Path, setting: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as fault:  # ssl.SSLError is an OSError
        said = getattr(fault, "strerror", None) or getattr(fault, "reason", None)
        reason = str(said or fault)
        raise SwitchError(
            f"{path} is of no use for TLS: {reason}",
            f"correct {setting}; the files must be PEM, and readable by the service's user only",
        ) from fault


class VerifiedStream(ovs.stream.SSLStream):  # type: ignore[misc]
    """The package's ssl stream with files of its own for each target, and the peer's name checked."""

    @staticmethod
    def _open(suffix: str, dscp: int) -> tuple[int, ssl.SSLSocket | None]:
        tls = _known[suffix]
        address = ovs.socket_util.inet_parse_active(suffix, 0, raises=False)
        family, plain = ovs.socket_util.inet_create_socket_active(socket.SOCK_STREAM, address)
        if plain is None:
            return family, None
        stream = build_context(tls).wrap_socket(
            plain, do_handshake_on_connect=False, server_hostname=tls.name or address[0]
        )
        error = ovs.socket_util.inet_connect_active(stream, address, family, dscp)
        return error, stream


def register(target: str, tls: TlsFiles | None) -> None:
    """Have the package open ``target``, where it is an ssl one, with these files. Raises SwitchError."""
    if not target.startswith("ssl:"):
        return
    if tls is None:
        raise SwitchError(f"{target} is spoken to by TLS", "give switch.tls in the settings")
    build_context(tls)
    _known[target.removeprefix("ssl:")] = tls
    ovs.stream.Stream.register_method("ssl", VerifiedStream)


@dataclass(frozen=True, slots=True)
class Seen:
    """When both ends' certificates end, in epoch seconds."""

    ours: float
    theirs: float


def read_end(path: Path) -> float:
    """When the first certificate of a PEM file ends. Raises OSError, ValueError."""
    return x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc.timestamp()


def check_ovsdb(target: str, tls: TlsFiles) -> Seen:
    """As `check_openflow`, of an OVSDB server."""
    return _check(target, tls, _ECHO)


def check_openflow(target: str, tls: TlsFiles) -> Seen:
    """Make a TLS connection, have the other end say something, and end it. Blocks up to some seconds.

    Raises SwitchError that says which end's certificate is wrong, how, and what to do.
    """
    return _check(target, tls, b"")


def _check(target: str, tls: TlsFiles, ask: bytes) -> Seen:
    address, port = split_target(target)
    context = build_context(tls)
    log.debug("check peer", target=target, name=tls.name or address)
    trusted = False
    try:
        with (
            socket.create_connection((address, port), timeout=SECONDS) as plain,
            context.wrap_socket(plain, server_hostname=tls.name or address) as stream,
        ):
            trusted = True
            # In TLS 1.3 our own certificate is judged after the handshake: only an answer shows it.
            stream.sendall(ask)
            if not stream.recv(1):
                raise ConnectionResetError("it closed the connection without a word")
            ends = stream.getpeercert()
    except (ssl.SSLError, OSError) as fault:
        raise SwitchError(*_explain(target, tls, fault, trusted=trusted)) from fault
    not_after = str((ends or {}).get("notAfter", ""))
    return Seen(read_end(tls.certificate), float(ssl.cert_time_to_seconds(not_after)))


# By X509_V_ERR_* (openssl-verification-options(1)): what is wrong with the switch's certificate.
_THEIRS = {
    9: "is not valid yet: one of both clocks is wrong",
    10: "has expired",
    26: "is not one for a server",
    62: "is for another name than {name}",
    64: "is for another address than {name}",
}
# By the alert that the switch ended the connection with: what it holds against ours.
_OURS = {
    "CERTIFICATE_EXPIRED": "has expired",
    "UNKNOWN_CA": "is not signed by the CA that the host trusts",
    "UNSUPPORTED_CERTIFICATE": "is not one for a client",
    "BAD_CERTIFICATE": "is refused",
    "CERTIFICATE_UNKNOWN": "is refused",
    "CERTIFICATE_REQUIRED": "was not shown",
    "ACCESS_DENIED": "is refused",
}


def _explain(target: str, tls: TlsFiles, fault: OSError, *, trusted: bool) -> tuple[str, str]:
    """(reason, mend) of a TLS connection that came to nothing.

    ``trusted``: the switch's certificate was taken. What then goes wrong is its judgement of ours; it
    may end the connection before its alert is out.
    """
    if isinstance(fault, ssl.SSLCertVerificationError):
        name = tls.name or split_target(target)[0]
        wrong = _THEIRS.get(fault.verify_code, f"is not trusted ({fault.verify_message})")
        reason = f"the certificate of {target} {wrong.format(name=name)}"
        if fault.verify_code in (62, 64):
            return reason, "correct switch.tls.serverName, or the address in the connection"
        if fault.verify_code in _THEIRS:
            return reason, RENEW
        return reason, f"check that {tls.ca} is the CA that signed the host's certificate"
    said = str(getattr(fault, "reason", None) or "")
    for alert, wrong in _OURS.items():
        if said.endswith(f"ALERT_{alert}"):
            return f"{target} refused us: our certificate {tls.certificate} {wrong}", RENEW
    if said.endswith("ALERT_INTERNAL_ERROR"):
        return (
            f"{target} speaks TLS, but has no certificate to show",
            "run what `hairpin host prepare` prints on the host",
        )
    if said in ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "UNSUPPORTED_PROTOCOL"):
        return (
            f"{target} does not speak TLS 1.2 or newer",
            "the host must listen with pssl:, not ptcp: (`hairpin host prepare`)",
        )
    if isinstance(fault, TimeoutError):
        return f"{target} does not answer", "check the address, and the firewalls between"
    if isinstance(fault, ConnectionRefusedError):
        return (
            f"nobody listens at {target}",
            "run what `hairpin host prepare` prints on the host; check that Open vSwitch runs",
        )
    if isinstance(
        fault, (ssl.SSLEOFError, ssl.SSLZeroReturnError, ConnectionResetError, BrokenPipeError)
    ):
        if trusted:
            return f"{target} refused us: our certificate {tls.certificate} is refused", RENEW
        return (
            f"{target} ended the connection before it showed a certificate",
            "the host must listen with pssl:, not ptcp: (`hairpin host prepare`)",
        )
    return f"{target} can't be spoken to by TLS: {fault}", "check the address and the certificates"
