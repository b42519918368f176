"""Transfers between lab VMs with chosen MTUs and offloads: does everything arrive whole?

As a program it runs inside a VM: `python -m tests.support.mtu serve` echoes on TCP and UDP port 9998;
`python -m tests.support.mtu measure JSON` sends to several targets and prints what came back. As a module
it sets MTUs and offloads of a lab's links, and runs both.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import select
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

PORT = 9998
TRANSFER_BYTES = 300_000
TRIES, WAIT_SECONDS = 3, 0.8
ROOT = Path(__file__).resolve().parents[2]
FEATURES = ("rx", "tx", "sg", "tso", "gso", "gro")
# linux/in.h, linux/in6.h: the socket option and what it may say.
DISCOVER = {socket.AF_INET: (socket.IPPROTO_IP, 10), socket.AF_INET6: (socket.IPPROTO_IPV6, 23)}
DISCOVER_NEVER, DISCOVER_ALWAYS = 0, 2
HEADERS = {socket.AF_INET: 28, socket.AF_INET6: 48}


# Inside a VM


class _Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        received = b""
        while len(received) < TRANSFER_BYTES:
            part = self.request.recv(65536)
            if not part:
                return
            received += part
        self.request.sendall(hashlib.sha256(received).digest() + received)


class _Server(socketserver.ThreadingTCPServer):
    address_family = socket.AF_INET6
    allow_reuse_address = True
    daemon_threads = True


def serve() -> None:
    """Echo for ever, IPv4 and IPv6."""
    server = _Server(("::", PORT), _Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as datagrams:
        datagrams.bind(("::", PORT))
        while True:
            data, sender = datagrams.recvfrom(65536)
            # Only what tells it apart, so that the way back proves nothing about the size.
            datagrams.sendto(data[:8], sender)


def transfer(address: str) -> bool:
    """Whether 300 kB came to an address and back, unchanged."""
    data = hashlib.shake_128(address.encode()).digest(TRANSFER_BYTES)
    try:
        with socket.create_connection((address, PORT), 3) as peer:
            peer.settimeout(3)
            sender = threading.Thread(target=_send_quietly, args=(peer, data), daemon=True)
            sender.start()
            answer = b""
            while len(answer) < len(data) + 32:
                part = peer.recv(65536)
                if not part:
                    break
                answer += part
            return answer == hashlib.sha256(data).digest() + data
    except OSError:
        return False


def _send_quietly(peer: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):
        peer.sendall(data)


def send_datagrams(address: str, sizes: Iterable[int], *, whole: bool) -> dict[int, str]:
    """UDP in IP packets of these sizes: "arrived", "refused" (the sender was told), or "lost".

    Lost is what never arrives: a black hole takes every packet of a size, a burst one of them at times.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    found = dict.fromkeys(sizes, "lost")
    with socket.socket(family, socket.SOCK_DGRAM) as peer:
        peer.connect((address, PORT))
        level, option = DISCOVER[family]
        peer.setsockopt(level, option, DISCOVER_ALWAYS if whole else DISCOVER_NEVER)
        for _ in range(TRIES):
            for size in [size for size, what in found.items() if what == "lost"]:
                payload = b"%08d" % size
                try:
                    peer.send(payload.ljust(size - HEADERS[family], b"."))
                except OSError:
                    found[size] = "refused"
            deadline = time.monotonic() + WAIT_SECONDS
            while "lost" in found.values() and (left := deadline - time.monotonic()) > 0:
                if not select.select([peer], [], [], left)[0]:
                    break
                with contextlib.suppress(OSError):
                    found[int(peer.recv(64))] = "arrived"
    return found


def request(address: str, path: str, header: str) -> bool:
    """One HTTP request of several segments, its header last; whether there was an answer."""
    text = f"GET {path} HTTP/1.0\r\nHost: a\r\nX: {'y' * 4000}\r\n{header}\r\n\r\n"
    try:
        with socket.create_connection((address, 80), 2) as peer:
            peer.settimeout(1.5)
            peer.sendall(text.encode())
            return bool(peer.recv(100))
    except OSError:
        return False


def measure(told: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """``targets`` (addresses), ``sizes`` of IP packets, ``benign`` and ``hostile`` headers."""
    sizes = told["sizes"]
    # Silence tells what is broken, so these are waited for at the same time; datagrams by themselves
    # first: nothing sends them again when a burst loses a fragment.
    streams: dict[str, Callable[[str], object]] = {
        "transfer": transfer,
        "benign": partial(request, path="/benign", header=told["benign"]),
        "hostile": partial(request, path="/hostile", header=told["hostile"]),
    }

    def one(address: str) -> dict[str, Any]:
        found: dict[str, Any] = {
            "whole": send_datagrams(address, sizes, whole=True),
            "fragmented": send_datagrams(address, [*sizes, 4000], whole=False),
        }
        with ThreadPoolExecutor(len(streams)) as pool:
            running = {name: pool.submit(probe, address) for name, probe in streams.items()}
        return found | {name: probe.result() for name, probe in running.items()}

    targets: list[str] = told["targets"]
    with ThreadPoolExecutor(len(targets)) as pool:
        return dict(zip(targets, pool.map(one, targets), strict=True))


# Outside: the lab's links


@dataclass(frozen=True)
class Cell:
    """One row of the matrix. ``mtus`` are the sender's and the targets'; ``on`` the offloads that are on,

    at the VMs' eth0 (``where`` "vm"), at all links ("all": also the ports, the legs and their devices).
    """

    name: str
    mtus: tuple[int, int] = (1500, 1500)
    on: tuple[str, ...] = ()
    where: str = "vm"
    legs: int = 1600

    @property
    def sizes(self) -> list[int]:
        smallest = min(self.mtus)
        return [smallest + more for more in range(-4, 5)]


@dataclass(frozen=True)
class Result:
    """What one pair made of a cell, in one family. Sizes are of IP packets."""

    transfer: bool
    whole: Mapping[str, str]
    fragmented: Mapping[str, str]
    benign: bool
    hostile: bool

    @property
    def lost(self) -> tuple[str, ...]:
        """What went into a black hole: neither arrived nor refused."""
        return (
            *(f"whole {size}" for size, what in self.whole.items() if what == "lost"),
            *(f"cut {size}" for size, what in self.fragmented.items() if what == "lost"),
        )

    def find_worse(self, direct: Result) -> list[str]:
        """What is worse here than on the direct pair of the same cell."""
        worse = [f"lost {one}" for one in self.lost if one not in direct.lost]
        worse += ["transfer"] if direct.transfer and not self.transfer else []
        return worse + (["benign request"] if direct.benign and not self.benign else [])


def main() -> None:
    if sys.argv[1] == "serve":
        serve()
    else:
        print(json.dumps(measure(json.loads(sys.argv[2]))))


if __name__ == "__main__":
    main()
