"""Runs inside a lab VM: one HTTP request a mode, sent by hand in frames that try to slip past.

    python attacker.py '{"source": [mac, ip], "target": [mac, ip], "accomplices": [mac, ...],
                         "modes": [...], "header": "..."}'

Prints one JSON line: mode -> what came back ("answered", "silent" or "refused": no handshake) and the
path that it asked for. The VM's own kernel must not reset these connections; the caller sees to it.
"""

from __future__ import annotations

import json
import random
import select
import sys
import time
from typing import Any

from scapy.all import conf
from scapy.layers.inet import IP, TCP, fragment
from scapy.layers.inet6 import (
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    PadN,
    fragment6,
)
from scapy.layers.l2 import Dot1Q, Ether

WAIT_SECONDS = 1.0


class Client:
    """One connection to port 80 of the target, and the frames that a mode makes of its request."""

    def __init__(self, told: dict[str, Any], mode: str) -> None:
        self.mac, self.address = told["source"]
        self.target_mac, self.target = told["target"]
        self.accomplices = told["accomplices"]
        self.mode = mode
        self.v6 = ":" in self.address
        self.port = random.randint(20_000, 60_000)
        self.path = f"/{mode}-{self.port}"
        pad = "y" * (2500 if mode.endswith("-1400") else 60)
        self.request = (
            f"GET {self.path} HTTP/1.0\r\nHost: a\r\n{told['header']}\r\nX: {pad}\r\n\r\n"
        ).encode()
        self.sequence = random.randint(1, 2**31)
        self.socket = conf.L2socket(iface="eth0")

    def ip(self, **fields: int) -> Any:
        if self.v6:
            packet = IPv6(src=self.address, dst=self.target)
            if "ttl" in fields:
                packet.hlim = fields["ttl"]
            return packet
        return IP(src=self.address, dst=self.target, **fields)

    def frame(self, packet: Any, **ether: str) -> Any:
        return Ether(**{"src": self.mac, "dst": self.target_mac, **ether}) / packet

    def tcp(self, flags: str, data: bytes = b"", *, ahead: int = 0, **fields: Any) -> Any:
        segment = TCP(
            sport=self.port,
            dport=80,
            flags=flags,
            seq=self.sequence + ahead,
            ack=self.ack,
            **fields,
        )
        return segment / data if data else segment

    def send(self, *frames: Any) -> None:
        for frame in frames:
            self.socket.send(frame)

    def receive(self, wanted: Any) -> Any:
        deadline = time.monotonic() + WAIT_SECONDS
        while select.select([self.socket], [], [], max(0.0, deadline - time.monotonic()))[0]:
            packet = self.socket.recv()
            if (
                packet is not None
                and TCP in packet
                and packet[TCP].dport == self.port
                and wanted(packet)
            ):
                return packet
        return None

    def wrap(self, segment: Any) -> Any:
        pad = PadN(optdata=b"\0\0\0\0")
        extra = {
            "hop-by-hop": IPv6ExtHdrHopByHop(options=[pad]),
            "destination-options": IPv6ExtHdrDestOpt(options=[pad]),
        }.get(self.mode)
        return self.frame(self.ip() / extra / segment if extra is not None else self.ip() / segment)

    def run(self) -> str:
        self.ack = 0
        if self.mode.startswith("forged-opener"):
            self.forge(int(self.mode[-1]))
        self.send(self.wrap(self.tcp("S", options=[("MSS", 1400)])))
        answer = self.receive(lambda packet: packet[TCP].flags.S and packet[TCP].flags.A)
        if answer is None:
            return "refused"
        self.sequence, self.ack = self.sequence + 1, answer[TCP].seq + 1
        self.send(self.wrap(self.tcp("A")))
        self.send_request()
        answer = self.receive(lambda packet: b"HTTP/" in bytes(packet[TCP].payload))
        return "silent" if answer is None else "answered"

    def forge(self, accomplice: int) -> None:
        """Open a connection in the target's name, so that the attack could pass for its answer."""
        packet = self.ip()
        packet.src, packet.dst = packet.dst, packet.src
        self.send(
            self.frame(
                packet / TCP(sport=80, dport=self.port, flags="S", seq=7),
                dst=self.accomplices[accomplice],
            )
        )
        time.sleep(0.2)

    def send_request(self) -> None:
        data, half = self.tcp("PA", self.request), len(self.request) // 2
        junk = b"GET /x HTTP/1.0\r\n".ljust(len(self.request), b"A")
        match self.mode.rstrip("0123456789").rstrip("-"):
            case "fragments" | "reversed-fragments":
                frames = list(self.cut(data, int(self.mode.rpartition("-")[2])))
                self.send(*(reversed(frames) if self.mode.startswith("reversed") else frames))
            case "atomic-fragment":
                self.send(self.frame(self.ip() / IPv6ExtHdrFragment(id=9, offset=0, m=0) / data))
            case "bytewise":
                for ahead, byte in enumerate(self.request):
                    self.send(self.wrap(self.tcp("PA", bytes([byte]), ahead=ahead)))
            case "bad-checksum":
                self.send(self.wrap(self.tcp("PA", junk, chksum=0x1234)), self.wrap(data))
            case "short-ttl":
                self.send(self.frame(self.ip(ttl=1) / self.tcp("PA", junk)), self.wrap(data))
            case "overlap":
                second = self.tcp("PA", self.request[half:], ahead=half)
                other = self.tcp("PA", b"Z" * (len(self.request) - half), ahead=half)
                self.send(
                    self.wrap(second),
                    self.wrap(other),
                    self.wrap(self.tcp("PA", self.request[:half])),
                )
            case "urgent":
                self.send(self.wrap(self.tcp("PAU", self.request, urgptr=5)))
            case "reset-first":
                self.send(self.wrap(self.tcp("R", ahead=70_000)), self.wrap(data))
            case "vlan":
                tag = Dot1Q(vlan=int(self.mode.rpartition("-")[2]))
                self.send(self.frame(tag / self.ip() / data))
            case "broadcast":
                self.send(self.frame(self.ip() / data, dst="ff:ff:ff:ff:ff:ff"))
            case _:
                self.send(self.wrap(data))

    def cut(self, data: Any, size: int) -> Any:
        if self.v6:
            whole = self.ip() / IPv6ExtHdrFragment(id=random.getrandbits(32)) / data
            pieces = fragment6(whole, size)
        else:
            pieces = fragment(self.ip(id=random.randint(1, 65_000)) / data, fragsize=size)
        return (self.frame(piece) for piece in pieces)


def main() -> None:
    told = json.loads(sys.argv[1])
    found = {}
    for mode in told["modes"]:
        client = Client(told, mode)
        found[mode] = (client.run(), client.path)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
