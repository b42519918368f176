"""What a VM got from another, and whether all of it had been through a lane: by captures on both ends."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from scapy.layers.inet6 import ICMPv6ND_NA, ICMPv6ND_NS, IPv6
from scapy.utils import RawPcapReader

from appliance.lab import LabState

ETHERNET, TAG = 14, 4


@dataclass
class Witness:
    """After `watching`: the IP packets that the target got, and those that no lane let out."""

    arrived: list[bytes] = field(default_factory=list)
    uninspected: list[bytes] = field(default_factory=list)


def read_packets(path: Path) -> list[bytes]:
    """Each frame from its type on, without VLAN tags."""
    found = []
    for frame, _ in RawPcapReader(str(path)):
        at = ETHERNET - 2
        while frame[at : at + 2] == b"\x81\x00":
            at += TAG
        found.append(frame[at:])
    return found


def is_neighbour_discovery(packet: bytes) -> bool:
    """Those go direct, like ARP (docs/pipeline.md)."""
    if packet[:2] != b"\x86\xdd":
        return False
    parsed = IPv6(packet[2:])
    return ICMPv6ND_NS in parsed or ICMPv6ND_NA in parsed


@contextlib.contextmanager
def watching(lab: LabState, source: str, target: str, directory: Path) -> Iterator[Witness]:
    """Meanwhile, capture what ``target`` gets from ``source`` and what leaves every lane."""
    witness = Witness()
    mac, own = lab.vm(source).mac, lab.vm(target).mac
    # Without a card that strips tags, tcpdump sees them; the filter is for what has none.
    wanted = ["ether", "src", mac, "and", "ether", "dst", own, "and", "(ip", "or", "ip6)"]
    places = [(lab.vm(target).netns, lab.vm(target).device, "in", wanted)]
    places += [
        (lab.service_host, device, "out", []) for lane in lab.lanes for _, device, _ in lane.legs
    ]
    files, captures = [], []
    for netns, device, way, expression in places:
        file = directory / f"{netns}-{device}-{time.monotonic_ns()}.pcap"
        argv = ["ip", "netns", "exec", netns, "tcpdump", "-Z", "root", "-U", "-s0", "-B", "8192"]
        argv += ["-i", device, "-Q", way, "-w", str(file), *expression]
        captures.append(subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE))
        files.append(file)
    for capture in captures:
        assert capture.stderr is not None
        assert any(b"listening" in line for line in capture.stderr), "tcpdump ended"
    try:
        yield witness
        time.sleep(0.5)
    finally:
        for capture in captures:
            capture.send_signal(signal.SIGINT)
            capture.communicate(timeout=10)
    witness.arrived = [one for one in read_packets(files[0]) if not is_neighbour_discovery(one)]
    left = {packet for file in files[1:] for packet in read_packets(file)}
    witness.uninspected = [one for one in witness.arrived if one not in left]
