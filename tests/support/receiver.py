"""Runs inside a lab VM until it is ended: writes the tokens of the datagrams that arrive to a file.

    python -m tests.support.receiver FILE

One line each: ``socket TOKEN`` when a program would have got it, ``wire TOKEN`` when it came to eth0 at all.
"""

from __future__ import annotations

import re
import selectors
import socket
import sys
from pathlib import Path

PORTS = (9999, 53, 68, 3784, 4789, 3544, 6081, 8472)
TOKEN = re.compile(rb"token=([\w-]+);")
ETH_P_ALL = 3
UDPLITE, EXPERIMENT = 136, 253


def open_sockets() -> list[socket.socket]:
    opened = []
    for port in PORTS:
        one = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        one.bind(("::", port))  # takes IPv4 too
        opened.append(one)
    for family, icmp in ((socket.AF_INET, socket.IPPROTO_ICMP), (socket.AF_INET6, 58)):
        opened.append(socket.socket(family, socket.SOCK_RAW, icmp))
        opened.append(socket.socket(family, socket.SOCK_RAW, EXPERIMENT))
        try:
            lite = socket.socket(family, socket.SOCK_DGRAM, UDPLITE)
        except OSError:
            continue  # a kernel without it
        if family == socket.AF_INET6:
            lite.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        lite.bind(("0.0.0.0" if family == socket.AF_INET else "::", PORTS[0]))
        opened.append(lite)
    return opened


def main() -> None:
    sockets = open_sockets()
    wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    wire.bind(("eth0", 0))
    wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    waiting = selectors.DefaultSelector()
    for one in sockets:
        waiting.register(one, selectors.EVENT_READ, b"socket")
    waiting.register(wire, selectors.EVENT_READ, b"wire")
    with Path(sys.argv[1]).open("ab", buffering=0) as file:
        file.write(b"ready\n")
        while True:
            for key, _ in waiting.select():
                assert isinstance(key.fileobj, socket.socket)
                data, sender = key.fileobj.recvfrom(65536)
                if key.fileobj is wire and sender[2] == socket.PACKET_OUTGOING:
                    continue
                for token in TOKEN.findall(data):
                    file.write(key.data + b" " + token + b"\n")


if __name__ == "__main__":
    main()
