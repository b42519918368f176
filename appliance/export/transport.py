"""The door to a syslog receiver: TCP or TLS, and how much of what was sent its host has taken.

Syslog has no acknowledgement of its own. What can be known is that the receiver's kernel has
acknowledged every byte: nothing is left in this process's buffers, and the socket's send queue is
empty (SIOCOUTQ, tcp(7): bytes sent and not acknowledged, or not yet sent).
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import socket
import ssl
import struct
import termios
from dataclasses import dataclass
from pathlib import Path

from steering.errors import HairpinError

CONNECT_SECONDS = 10.0
_USER_TIMEOUT_MS = 30_000


class TransportError(HairpinError):
    """The receiver could not be reached, did not prove who it is, or the connection broke."""


@dataclass(frozen=True, slots=True)
class Receiver:
    """Where to send. ``ca_file`` None trusts the system's authorities; the client certificate
    needs both of its files."""

    host: str
    port: int
    tls: bool = True
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'tls' if self.tls else 'tcp'}:{host}:{self.port}"


def build_tls(receiver: Receiver) -> ssl.SSLContext:
    """TLS 1.2 or later, the receiver's certificate and name verified (RFC 5425 section 5).

    Raises TransportError when a certificate or key file can't be used.
    """
    try:
        context = ssl.create_default_context(
            cafile=None if receiver.ca_file is None else str(receiver.ca_file)
        )
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if receiver.cert_file is not None:
            context.load_cert_chain(receiver.cert_file, receiver.key_file)
    except (OSError, ssl.SSLError) as fault:
        raise TransportError(
            f"{receiver}: its certificate files can't be used: {fault}",
            "check caFile, certFile and keyFile of this exporter",
        ) from fault
    return context


class Connection:
    """One open connection; made by `open_connection`. Not to be used by two tasks at once."""

    def __init__(
        self, receiver: Receiver, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._receiver = receiver
        self._reader = reader
        self._writer = writer
        # Under TLS there are two transports with a buffer each; this is the one on the socket.
        self._socket_transport = writer.transport
        self._watch: asyncio.Task[str] | None = None

    async def start(self) -> None:
        if self._receiver.tls:
            await self._writer.start_tls(
                build_tls(self._receiver),
                server_hostname=self._receiver.host,
                ssl_handshake_timeout=CONNECT_SECONDS,
            )
        self._watch = asyncio.create_task(_find_end(self._reader), name="syslog peer")

    async def send(self, data: bytes, limit_seconds: float) -> None:
        """Send ``data`` and wait until the receiver's kernel has acknowledged all of it.

        Raises TransportError when the connection breaks, when the receiver closes it, and when
        ``limit_seconds`` pass without that.
        """
        try:
            async with asyncio.timeout(limit_seconds):
                self.check_open()
                self._writer.write(data)
                await self._writer.drain()
                pause = 0.0005
                while self.count_unacknowledged():
                    await asyncio.sleep(pause)
                    self.check_open()
                    pause = min(pause * 2, 0.02)
                self.check_open()
        except TimeoutError as fault:
            raise TransportError(
                f"{self._receiver} did not take what was sent within {limit_seconds:g} s",
                "see whether the receiver is stuck or its disk is full",
            ) from fault
        except OSError as fault:
            raise TransportError(f"{self._receiver}: {fault}") from fault

    def check_open(self) -> None:
        """Raise TransportError when the receiver has closed or reset the connection.

        A receiver that closes only its own direction counts as gone, too: it says nothing to us
        otherwise, so the end of its stream is the one sign of a shutdown that it gives.
        """
        if self._watch is not None and self._watch.done():
            raise TransportError(f"{self._receiver} {self._watch.result()}")

    def count_unacknowledged(self) -> int:
        """Bytes not yet acknowledged by the receiver's kernel, this process's buffers included.

        Raises OSError when the socket is gone.
        """
        waiting = self._socket_transport.get_write_buffer_size()
        if self._writer.transport is not self._socket_transport:
            waiting += self._writer.transport.get_write_buffer_size()
        peer: socket.socket | None = self._socket_transport.get_extra_info("socket")
        if peer is None or peer.fileno() < 0:
            raise ConnectionResetError("the connection is closed")
        queue = fcntl.ioctl(peer.fileno(), termios.TIOCOUTQ, struct.pack("i", 0))
        return waiting + int(struct.unpack("i", queue)[0])

    async def close(self) -> None:
        if self._watch is not None:
            self._watch.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._watch
        with contextlib.suppress(OSError):
            # What the receiver has not taken is sent again later; closing must not wait for it.
            if self.count_unacknowledged():
                self._socket_transport.abort()
        self._writer.close()
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(2):
                await self._writer.wait_closed()


async def open_connection(receiver: Receiver) -> Connection:
    """Connect, and under TLS prove the receiver. Raises TransportError."""
    try:
        async with asyncio.timeout(CONNECT_SECONDS):
            reader, writer = await asyncio.open_connection(receiver.host, receiver.port)
    except (OSError, TimeoutError) as fault:
        raise TransportError(f"{receiver} can't be reached: {fault or 'timed out'}") from fault
    connection = Connection(receiver, reader, writer)
    try:
        _watch_liveness(writer.get_extra_info("socket"))
        await connection.start()
    except BaseException as fault:
        await connection.close()
        if isinstance(fault, OSError):
            raise TransportError(
                f"{receiver}: no TLS connection: {fault}",
                "check the certificates and the host name of this exporter",
            ) from fault
        raise
    return connection


def _watch_liveness(peer: socket.socket) -> None:
    # A host that vanished without a word is noticed within half a minute, idle or sending.
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _USER_TIMEOUT_MS)


async def _find_end(reader: asyncio.StreamReader) -> str:
    """Read until the receiver ends its stream (a receiver has nothing to say): how it ended."""
    try:
        while await reader.read(4096):
            pass
    except OSError as fault:
        return f"broke the connection: {fault}"
    return "closed the connection"
