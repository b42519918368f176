"""Runs inside a lab VM: one HTTP request a mode, sent by hand in frames that try to slip past.

    python -m tests.support.attacker '{"source": [mac, ip], "target": [mac, ip],
        "accomplices": [mac, ...], "modes": [...], "header": "..."}'

A mode is a shape of `attacker_frames` for the segment with the request, with ``whole-`` before it for all
segments, or a trick below. Prints one JSON line: mode -> "sent" or "refused" (no handshake), and the path
asked for, by which the server's log tells whether it arrived. The VM's own kernel must not reset these
connections; the caller sees to it.
"""

from __future__ import annotations

import itertools
import json
import random
import select
import sys
import time
from typing import Any

from scapy.all import conf
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from tests.support.attacker_frames import build_frames, build_l4, build_route

WAIT_SECONDS = 1.0
TCP_NUMBER = 6
# A port that a killed connection had is no fair start for the next one.
PORTS = itertools.count(20_000 + time.time_ns() // 2_000_000 % 40_000)


class Client:
    """One connection to port 80 of the target, and the frames that a mode makes of its request."""

    def __init__(self, told: dict[str, Any], mode: str) -> None:
        self.route = build_route(told)
        self.accomplices = told["accomplices"]
        self.whole = mode.startswith("whole-")
        self.mode = mode.removeprefix("whole-")
        self.port = next(PORTS)
        self.path = f"/{mode}-{self.port}"
        self.sequence, self.ack = random.randint(1, 2**31), 0
        # Long enough for fragments of 1,400 bytes to be several.
        pad = "y" * (2500 if "-1400" in mode else 60)
        head = f"GET {self.path} HTTP/1.0\r\nHost: a\r\n{told['header']}\r\nX: {pad}\r\n\r\n"
        self.request = head.encode()
        self.socket = conf.L2socket(iface="eth0")

    def tcp(self, flags: str, data: bytes = b"", *, ahead: int = 0, **fields: Any) -> Packet:
        fields = {"ack": self.ack, **fields}
        segment = TCP(sport=self.port, dport=80, flags=flags, seq=self.sequence + ahead, **fields)
        return segment / data if data else segment

    def send(self, *segments: Packet, shape: str = "plain") -> None:
        for segment in segments:
            data = build_l4(self.route, segment)
            for frame in build_frames(shape, self.route, TCP_NUMBER, data):
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

    def run(self) -> str:
        self.prepare()
        shape = self.mode if self.whole else "plain"
        options: list[Any] = [("MSS", 1400)]
        if self.mode == "junk-old-stamp":
            options.append(("Timestamp", (5_000_000, 0)))
        data = self.request if self.mode == "syn-data" else b""
        self.send(self.tcp("S", data, options=options), shape=shape)
        answer = self.receive(lambda packet: packet[TCP].flags.S and packet[TCP].flags.A)
        if answer is None:
            return "refused"
        self.sequence, self.ack = self.sequence + 1, answer[TCP].seq + 1
        self.stamp = dict(answer[TCP].options).get("Timestamp", (0, 0))[0]
        if self.mode == "syn-data":
            self.sequence = answer[TCP].ack
            self.send(self.tcp("A"))
            return "sent"
        self.send(self.tcp("A", options=self.stamped(5_000_001)), shape=shape)
        self.send_request()
        return "sent"

    def stamped(self, value: int) -> list[Any]:
        return [("Timestamp", (value, self.stamp))] if self.mode == "junk-old-stamp" else []

    def prepare(self) -> None:
        """What comes before the connection."""
        match self.mode:
            case "forged-opener-0" | "forged-opener-1" | "forged-opener-2":
                self.forge(int(self.mode[-1]))
            case "decoy-syn-bad-checksum":
                self.send(self.tcp("S", ahead=900_000, chksum=0x1234))
            case "decoy-syn-signed":
                self.send(self.tcp("S", ahead=900_000, options=[(19, b"\0" * 16)]))
            case "decoy-syn-reset":
                self.send(self.tcp("S", ahead=900_000), self.tcp("R", ahead=900_001))
                time.sleep(0.05)
            case "decoy-request":  # midstream, before the connection that it is not of
                self.send(self.tcp("PA", b"GET /decoy HTTP/1.0\r\n\r\n", ahead=1))
                time.sleep(0.05)

    def forge(self, accomplice: int) -> None:
        """Open a connection in the target's name, so that the attack could pass for its answer."""
        route = self.route
        address = IPv6 if route.v6 else IP
        packet = address(src=route.target, dst=route.address)
        syn = TCP(sport=80, dport=self.port, flags="S", seq=7)
        self.socket.send(Ether(src=route.mac, dst=self.accomplices[accomplice]) / packet / syn)
        time.sleep(0.2)

    def send_request(self) -> None:
        whole, half = self.tcp("PA", self.request), len(self.request) // 2
        first, second = self.request[:half], self.request[half:]
        junk = b"GET /x HTTP/1.0\r\n".ljust(len(self.request), b"A")
        match self.mode:
            case "bytewise":
                self.send(*(self.tcp("PA", bytes([byte]), ahead=ahead)
                            for ahead, byte in enumerate(self.request)))  # fmt: skip
            case "bytewise-reversed":
                pieces = range(0, len(self.request), 7)
                self.send(*(self.tcp("PA", self.request[at : at + 7], ahead=at)
                            for at in reversed(pieces)))  # fmt: skip
            case "syn-data":
                pass
            case "overlap":
                self.send(
                    self.tcp("PA", second, ahead=half),
                    self.tcp("PA", b"Z" * len(second), ahead=half),
                    self.tcp("PA", first),
                )
            case "overlap-junk-first":
                self.send(
                    self.tcp("PA", b"Z" * len(second), ahead=half),
                    self.tcp("PA", second, ahead=half),
                    self.tcp("PA", first),
                )
            case "left-overlap":  # begins before what is expected: the target trims it
                self.send(self.tcp("PA", b"q" + self.request, ahead=-1))
            case "junk-bad-checksum":
                self.send(self.tcp("PA", junk, chksum=0x1234), whole)
            case "junk-bad-ip-checksum":
                data = build_l4(self.route, self.tcp("PA", junk))
                (frame,) = build_frames("plain", self.route, TCP_NUMBER, data)
                frame[IP].chksum = 0x1234
                self.socket.send(frame)
                self.send(whole)
            case "junk-hop-limit":
                self.send(self.tcp("PA", junk), shape="ttl-1")
                self.send(whole)
            case "junk-no-ack":
                self.send(self.tcp("P", junk), whole)
            case "junk-no-flags":
                self.send(self.tcp("", junk), whole)
            case "junk-bad-ack":
                self.send(self.tcp("PA", junk, ack=self.ack + 500_000), whole)
            case "junk-signed":
                self.send(self.tcp("PA", junk, options=[(19, b"\0" * 16)]), whole)
            case "junk-syn":
                self.send(self.tcp("S", junk), whole)
            case "junk-old-stamp":
                self.send(self.tcp("PA", junk, options=self.stamped(1)))
                self.send(self.tcp("PA", self.request, options=self.stamped(5_000_002)))
            case "urgent":
                self.send(self.tcp("PAU", self.request, urgptr=len(self.request) - 2))
                self.send(self.tcp("PA", b"\r\n\r\n", ahead=len(self.request)))
            case "urgent-inside":  # a byte that is out of band, and no part of what is read
                at = self.request.index(b"User-Agent: ") + 14
                split = self.request[:at] + b"!" + self.request[at:]
                self.send(self.tcp("PAU", split, urgptr=at + 1))
                self.send(self.tcp("PA", b"\r\n", ahead=len(split)))
            case "finish-with-data":
                self.send(self.tcp("FPA", self.request))
            case "no-push" | "congestion":
                self.send(self.tcp("A" if self.mode == "no-push" else "EC" + "PA", self.request))
            case "reset-out-of-window":
                self.send(self.tcp("R", ahead=70_000_000), whole)
            case "reset-in-window":
                self.send(self.tcp("RA", ahead=9), whole)
            case "reset-bad-checksum":
                self.send(self.tcp("RA", chksum=0x1234), whole)
            case "reset-bad-ack":
                self.send(self.tcp("RA", ahead=1, ack=self.ack + 900_000), whole)
            case "reset-signed":
                self.send(self.tcp("RA", options=[(19, b"\0" * 16)]), whole)
            case "finish-bad-checksum":
                self.send(self.tcp("FA", chksum=0x1234), whole)
            case "finish-out-of-window":
                self.send(self.tcp("FA", ahead=70_000_000), whole)
            case "syn-again":
                self.send(self.tcp("S", ahead=40), whole)
            case "bad-options":
                self.send(self.tcp("PA", self.request, options=[(254, b"\0" * 6), ("NOP", None)]))
            case "split-by-time":
                self.send(self.tcp("PA", first))
                time.sleep(0.5)
                self.send(self.tcp("PA", second, ahead=half))
            case _ if self.mode.startswith(("forged-opener", "decoy-")):
                self.send(whole)
            case _:
                self.send(whole, shape=self.mode)


def main() -> None:
    told = json.loads(sys.argv[1])
    found = {}
    for mode in told["modes"]:
        client = Client(told, mode)
        found[mode] = (client.run(), client.path)
        client.socket.close()
    time.sleep(WAIT_SECONDS)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
