"""A canary's frames as bytes, and what they look like on the way: built and parsed. Pure.

What a canary is made of stands in `steering/canary.py`. Ethernet II, IPv4 or IPv6, UDP, and 802.1Q
where a lane's leg shows it (RFC 791, RFC 8200, RFC 768, IEEE 802.1Q).
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Mapping
from dataclasses import dataclass

from steering.canary import (
    DESTINATION,
    PARTS,
    PORT,
    SOURCE,
    SOURCE_MAC,
    Part,
    build_destination_mac,
    build_payload,
)
from steering.model import Family, Lane

ETHERTYPES = {Family.IPV4: 0x0800, Family.IPV6: 0x86DD}
TAGS = (0x8100, 0x88A8)
UDP = 17
HOPS = 64
SOURCE_PORTS = (20000, 60999)
"""First and last of the ports that a canary may come from: each frame is a connection of its own."""

Filter = tuple[tuple[int, int, int, int], ...]


@dataclass(frozen=True, slots=True)
class Sighting:
    """A canary's frame as a device saw it. `device` is the device's name, `vlan` 0 where there was no tag;

    `leaving`: it went out there.
    """

    device: str
    leaving: bool
    vlan: int
    part: Part


@dataclass(frozen=True, slots=True)
class Trace:
    """How far one packet of a probe came; as `canary_client.PartReport` tells it."""

    entered: bool = False
    vlan: int = 0
    left: bool = False
    returned: bool = False


def build_frame(lane: Lane, part: Part, ruleset: str, probe: str, source_port: int) -> bytes:
    """One packet of a probe, from the Ethernet header to the end of its payload, without a tag."""
    payload = build_payload(part, ruleset, probe)
    source = ipaddress.ip_address(SOURCE[part.family]).packed
    destination = ipaddress.ip_address(DESTINATION[part.family]).packed
    length = 8 + len(payload)
    pseudo = source + destination + struct.pack("!II", length, UDP)
    blank = struct.pack("!HHHH", source_port, PORT, length, 0)
    # In UDP a checksum of 0 says that there is none, so 0 is sent as its other form.
    checksum = build_checksum(pseudo + blank + payload) or 0xFFFF
    datagram = struct.pack("!HHHH", source_port, PORT, length, checksum) + payload
    if part.family is Family.IPV4:
        header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + length, source_port, 0x4000, HOPS, UDP, 0)
        checksum = build_checksum(header + source + destination)
        header = header[:10] + struct.pack("!H", checksum)
    else:
        header = struct.pack("!IHBB", 0x60000000, length, UDP, HOPS)
    ethernet = (
        _pack_mac(build_destination_mac(lane, answer=part.answer))
        + _pack_mac(SOURCE_MAC)
        + struct.pack("!H", ETHERTYPES[part.family])
    )
    return ethernet + header + source + destination + datagram


def build_checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071) of `data`, 0 to 65535."""
    data += b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


def _pack_mac(mac: str) -> bytes:
    return bytes.fromhex(mac.replace(":", ""))


def build_filter() -> Filter:
    """A classic BPF program that takes frames from the canaries' MAC: (code, jt, jf, k) each.

    The sender's address stands before any tag, so one program does for tagged and plain frames, and
    whether the kernel has taken the tag out of the frame or not (kernel, filter.rst).
    """
    source = _pack_mac(SOURCE_MAC)
    return (
        (0x20, 0, 0, 6),  # ld [6]
        (0x15, 0, 3, int.from_bytes(source[:4], "big")),  # jeq, else drop
        (0x28, 0, 0, 10),  # ldh [10]
        (0x15, 0, 1, int.from_bytes(source[4:], "big")),
        (0x06, 0, 0, 0xFFFFFFFF),  # ret all of it
        (0x06, 0, 0, 0),  # ret nothing
    )


def parse_frame(frame: bytes) -> tuple[int, bytes] | None:
    """The VLAN (0 for none) and the UDP payload of a canary's frame; None for any other frame."""
    if len(frame) < 14 or frame[6:12] != _pack_mac(SOURCE_MAC):
        return None
    (kind,) = struct.unpack_from("!H", frame, 12)
    at, vlan = 14, 0
    if kind in TAGS:
        if len(frame) < 18:
            return None
        tag, kind = struct.unpack_from("!HH", frame, 14)
        at, vlan = 18, tag & 0xFFF
    if kind == ETHERTYPES[Family.IPV4]:
        if len(frame) < at + 20 or frame[at + 9] != UDP:
            return None
        at += (frame[at] & 0xF) * 4
    elif kind == ETHERTYPES[Family.IPV6]:
        if len(frame) < at + 40 or frame[at + 6] != UDP:
            return None
        at += 40
    else:
        return None
    if len(frame) < at + 8:
        return None
    (length,) = struct.unpack_from("!H", frame, at + 4)
    return vlan, frame[at + 8 : at + length]


def build_expected(ruleset: str, probe: str) -> Mapping[bytes, Part]:
    """The parts of one probe by their payloads; a payload that is not among them is another probe's."""
    return {build_payload(part, ruleset, probe): part for part in PARTS}


def record_sighting(trace: Trace, sighting: Sighting, lane: Lane, canary: str) -> Trace:
    """What is known of a packet after it was seen once more. `canary` is the canary's own device."""
    first, second = lane.leg_a.device, lane.leg_b.device
    if sighting.part.answer:
        first, second = second, first
    entered, left, returned = trace.entered, trace.left, trace.returned
    vlan = trace.vlan
    if sighting.device == canary:
        returned = returned or not sighting.leaving
    elif sighting.device == first and not sighting.leaving:
        entered, vlan = True, sighting.vlan
    elif sighting.device == second and sighting.leaving:
        left = True
    return Trace(entered=entered, vlan=vlan, left=left, returned=returned)
