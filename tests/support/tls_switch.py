"""A dummy switch that listens by TLS on loopback, and files for whoever speaks to it."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from appliance.hosting.pki import Issued, Pki, issue
from steering.tls import TlsFiles
from tests.support.dummy_switch import BRIDGE, DummySwitch, open_dummy_switch

ADDRESS = "127.0.0.1"
NAME = "hv-1"


def find_free_ports(count: int) -> list[int]:
    """Ports that nobody listens at now."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind((ADDRESS, 0))
        return [one.getsockname()[1] for one in sockets]


def write_files(directory: Path, ca: Issued, own: Issued, name: str | None = None) -> TlsFiles:
    directory.mkdir(parents=True, exist_ok=True)
    files = TlsFiles(directory / "ca.pem", directory / "own.pem", directory / "own.key", name)
    files.ca.write_text(ca.certificate)
    files.certificate.write_text(own.certificate)
    files.key.write_text(own.key)
    files.key.chmod(0o600)
    return files


@dataclass(frozen=True)
class TlsSwitch:
    switch: DummySwitch
    pki: Pki
    ours: TlsFiles
    ovsdb_port: int
    openflow_port: int

    @property
    def ovsdb(self) -> str:
        return f"ssl:{ADDRESS}:{self.ovsdb_port}"

    @property
    def openflow(self) -> str:
        return f"ssl:{ADDRESS}:{self.openflow_port}"

    def vsctl(self, *argv: str) -> str:
        return self.switch.vsctl(*argv)

    def show(self, shown: Issued, trusted: Issued) -> None:
        """Give the switch another certificate, or another CA to check its clients by."""
        files = write_files(self.switch.directory / "host", trusted, shown)
        self.vsctl("set-ssl", str(files.key), str(files.certificate), str(files.ca))

    def listen(self, method: str) -> None:
        """As `pssl` or, as nobody should, `ptcp`."""
        # vswitchd would open the new one before it closes the old one, at the same port, and give up.
        self.vsctl("del-manager", "--", "del-controller", BRIDGE)
        openflow = f"{method}:{self.openflow_port}:{ADDRESS}"
        self.vsctl(
            "set-manager", f"{method}:{self.ovsdb_port}:{ADDRESS}", "--", "set-controller", BRIDGE, openflow
        )  # fmt: skip
        _wait_listening(self.ovsdb_port, self.openflow_port)


def _wait_listening(*ports: int) -> None:
    for port in ports:
        for _ in range(100):
            with contextlib.suppress(OSError), socket.create_connection((ADDRESS, port), 0.1):
                break


@contextlib.contextmanager
def open_tls_switch(directory: Path, ofports: Sequence[int], now: float) -> Iterator[TlsSwitch]:
    """``directory``: short. ``now``: when the certificates were issued, in epoch seconds."""
    pki = issue(NAME, [], ADDRESS, now)
    ovsdb_port, openflow_port = find_free_ports(2)
    ours = write_files(directory / "appliance", pki.ca, pki.appliance)
    with open_dummy_switch(directory, ofports) as switch:
        one = TlsSwitch(switch, pki, ours, ovsdb_port, openflow_port)
        one.show(pki.host, pki.ca)
        one.listen("pssl")
        yield one


def speak_plainly(port: int, said: bytes) -> bytes:
    """What a listener answers to who does not speak TLS; b"" when it just hangs up."""
    with socket.create_connection((ADDRESS, port), 3) as plain:
        plain.sendall(said)
        plain.settimeout(3)
        try:
            return plain.recv(100)
        except ConnectionResetError:
            return b""


def speak_old(port: int, files: TlsFiles, version: ssl.TLSVersion) -> str:
    """The version that is agreed on with a client that knows none newer. Raises ssl.SSLError, OSError."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_ciphers("ALL:@SECLEVEL=0")
    context.minimum_version = ssl.TLSVersion.MINIMUM_SUPPORTED
    context.maximum_version = version
    context.load_verify_locations(files.ca)
    context.load_cert_chain(files.certificate, files.key)
    with (
        socket.create_connection((ADDRESS, port), 3) as plain,
        context.wrap_socket(plain, server_hostname=ADDRESS) as stream,
    ):
        return stream.version() or ""
