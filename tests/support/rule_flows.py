"""Whole TCP connections as packets, so that a rule can be tried on real Suricata from a capture file.

Each connection has its own client port, and so is found again in the alerts.
"""

from __future__ import annotations

import json
import random
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet
from scapy.utils import wrpcap

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
FIRST_PORT = 20000
SURICATA = Path("/usr/bin/suricata")


@dataclass(frozen=True)
class Connection:
    """``requests`` are segments: one item a segment; ``answer`` follows the last of them.

    ``opening`` is an exchange of (request, answer) pairs before it.
    """

    name: str
    requests: tuple[bytes, ...]
    answer: bytes = OK
    server_port: int = 8080
    ipv6: bool = False
    opening: tuple[tuple[bytes, bytes], ...] = ()


def split(data: bytes, size: int) -> tuple[bytes, ...]:
    return tuple(data[at : at + size] for at in range(0, len(data), size))


def build_packets(connection: Connection, client_port: int) -> list[Packet]:
    """Handshake, requests, answer and close of one connection, with both sides' acknowledgements."""
    client, server = ("fd77::1", "fd77::2") if connection.ipv6 else ("10.77.0.1", "10.77.0.2")
    network = IPv6 if connection.ipv6 else IP
    sequence = {True: 1000, False: 9000}
    packets: list[Packet] = []

    def send(from_client: bool, flags: str, payload: bytes = b"") -> None:
        ports = (client_port, connection.server_port)
        packet = (
            Ether(src="02:00:00:00:00:01", dst="02:00:00:00:00:02", type=0)
            / (network(src=client, dst=server) if from_client else network(src=server, dst=client))
            / TCP(
                sport=ports[0] if from_client else ports[1],
                dport=ports[1] if from_client else ports[0],
                flags=flags,
                seq=sequence[from_client],
                ack=0 if flags == "S" else sequence[not from_client],
                window=65535,
            )
            / payload
        )
        packet[Ether].type = 0x86DD if connection.ipv6 else 0x0800
        packets.append(packet)
        sequence[from_client] += len(payload) + (1 if set(flags) & set("SF") else 0)

    def exchange(segments: Iterable[bytes], answer: bytes) -> None:
        for segment in segments:
            send(True, "PA", segment)
            send(False, "A")
        if answer:
            send(False, "PA", answer)
            send(True, "A")

    send(True, "S")
    send(False, "SA")
    send(True, "A")
    for request, answer in connection.opening:
        exchange([request], answer)
    exchange(connection.requests, connection.answer)
    send(True, "FA")
    send(False, "FA")
    send(True, "A")
    return packets


def find_alerts(
    connections: Sequence[Connection], rules: Path, config: Path, directory: Path
) -> dict[str, set[tuple[int, str]]]:
    """Connection name -> {(sid, "blocked" or "allowed")} that Suricata says, in IPS mode, in one run."""
    packets: list[Packet] = []
    for number, connection in enumerate(connections):
        packets += build_packets(connection, FIRST_PORT + number)
    start = 1_790_000_000.0
    for number, packet in enumerate(packets):
        packet.time = start + number / 1000
    capture = directory / "flows.pcap"
    wrpcap(str(capture), packets)
    command = [SURICATA, "-c", config, "-S", rules, "-r", capture, "-l", directory]
    command += [
        "--runmode=single",
        "--simulate-ips",
        "-k",
        "all",
        f"--pidfile={directory}/{random.random()}.pid",
    ]
    subprocess.run([str(part) for part in command], check=True, capture_output=True, timeout=120)
    found: dict[str, set[tuple[int, str]]] = {connection.name: set() for connection in connections}
    for line in (directory / "eve.json").read_text().splitlines():
        event = json.loads(line)
        if event["event_type"] != "alert":
            continue
        port = event["src_port"] if event["src_port"] >= FIRST_PORT else event["dest_port"]
        alert = event["alert"]
        found[connections[port - FIRST_PORT].name].add((alert["signature_id"], alert["action"]))
    return found
