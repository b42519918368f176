"""Shapes of a packet on the wire, each of which might lead past a policy or an engine. Pure.

A *shape* is a name, with its numbers in it: ``fragments-24``, ``chain-DDD`` (three destination options),
``tags-q7-d3901`` (802.1Q id 7, then 802.1ad id 3901). The same shapes carry TCP segments and datagrams.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from scapy.layers.inet import IP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Dot1AD, Dot1Q, Ether
from scapy.packet import Packet, Raw

FRAGMENT = 44
# IPv6 extension headers by letter: next header's number, and the header for what follows it.
HEADERS: dict[str, tuple[int, Callable[[int], bytes]]] = {
    "H": (0, lambda after: bytes([after, 0, 1, 4, 0, 0, 0, 0])),  # hop by hop
    "D": (60, lambda after: bytes([after, 0, 1, 4, 0, 0, 0, 0])),  # destination options
    "U": (
        60,
        lambda after: bytes([after, 0, 0x1E, 4, 1, 2, 3, 4]),
    ),  # an unknown option, to be skipped
    "R": (43, lambda after: bytes([after, 0, 0, 0, 0, 0, 0, 0])),  # routing, no segment left
    "S": (43, lambda after: bytes([after, 0, 253, 0, 0, 0, 0, 0])),  # of an experimental type
    "F": (FRAGMENT, lambda after: struct.pack("!BBHI", after, 0, 0, 9)),  # a fragment that is all
    "A": (51, lambda after: bytes([after, 4, 0, 0]) + bytes(20)),  # authentication
    "M": (135, lambda after: bytes([after, 0]) + bytes(6)),  # mobility
    "X": (253, lambda after: bytes([after, 0]) + bytes(6)),  # experimental
}
# IPv4 options, padded to whole words.
OPTIONS: dict[str, bytes] = {
    "nop": b"\x01\x01\x01\x01",
    "record-route": b"\x07\x07\x04" + bytes(5),
    "timestamp": b"\x44\x08\x05\x00" + bytes(4),
    "router-alert": b"\x94\x04\x00\x00",
    "loose-route": b"\x83\x07\x08\x0a\x4d\x00\x02\x00",
    "strict-route": b"\x89\x07\x04\x0a\x4d\x00\x02\x00",
    "security": b"\x82\x0b" + bytes(10),
    "unknown": b"\xfe\x04\x00\x00",
    "bad-length": b"\x07\x40\x04\x00",
    "after-end": b"\x00\x07\x07\x04",
}


@dataclass(frozen=True)
class Route:
    """From where to where, as the frame is to say it. ``neighbour`` is another VM's MAC."""

    mac: str
    address: str
    target_mac: str
    target: str
    neighbour: str = ""

    @property
    def v6(self) -> bool:
        return ":" in self.target


def build_route(told: Mapping[str, Any]) -> Route:
    """From ``source`` and ``target`` (MAC, address each) and ``accomplices`` (MACs)."""
    mac, address = told["source"]
    target_mac, target = told["target"]
    return Route(mac, address, target_mac, target, told["accomplices"][0])


def build_l4(route: Route, segment: Packet) -> bytes:
    """The segment with the checksums that this route makes right, unless it has its own."""
    if route.v6:
        return bytes(IPv6(src=route.address, dst=route.target) / segment)[40:]
    return bytes(IP(src=route.address, dst=route.target) / segment)[20:]


def build_chain(letters: str, protocol: int, data: bytes) -> tuple[int, bytes]:
    """IPv6 extension headers before ``data``: the first next header, and all of it."""
    for letter in reversed(letters):
        number, build = HEADERS[letter]
        protocol, data = number, build(protocol) + data
    return protocol, data


def build_frames(shape: str, route: Route, protocol: int, data: bytes) -> list[Packet]:
    """The frames that carry these bytes of IP payload in that shape, in the order to send."""
    kind, _, rest = shape.partition("-")
    match kind:
        case "tags":
            return [_ether(route) / _build_tags(rest.split("-")) / _ip(route, protocol, data)]
        case "chain":
            number, carried = build_chain(rest, protocol, data)
            return [_ether(route) / _ip(route, number, carried)]
        case "cut":
            letters, _, size = rest.partition("-")
            number, carried = build_chain(letters, protocol, data)
            return [_ether(route) / piece for piece in _cut(route, number, carried, int(size))]
        case "fragments":
            return _build_fragments(rest, route, protocol, data)
        case "option":
            packet = _ip(route, protocol, data)
            head = _add_options(bytes(packet)[:20], OPTIONS[rest], len(data))
            return [_ether(route, type=0x0800) / Raw(head + data)]
        case "mac":
            return [_ether(route, **_find_macs(rest, route)) / _ip(route, protocol, data)]
        case "ttl":
            return [_ether(route) / _ip(route, protocol, data, hops=int(rest))]
        case "evil":  # the reserved flag (RFC 3514)
            return [_ether(route) / _ip(route, protocol, data, flags=4)]
        case "trailing":
            return [_ether(route) / _ip(route, protocol, data) / Raw(b"trailing" * 8)]
        case "snap":
            ethertype = struct.pack("!H", 0x86DD if route.v6 else 0x0800)
            llc = b"\xaa\xaa\x03\0\0\0" + ethertype + bytes(_ip(route, protocol, data))
            return [Raw(bytes(_ether(route))[:12] + struct.pack("!H", len(llc)) + llc)]
        case "plain":
            return [_ether(route) / _ip(route, protocol, data)]
    raise ValueError(shape)


def _add_options(plain: bytes, options: bytes, length: int) -> bytes:
    head = bytearray(plain + options + bytes(-len(options) % 4))
    head[0] = 0x40 | len(head) // 4
    head[2:4] = struct.pack("!H", len(head) + length)
    head[10:12] = b"\0\0"
    head[10:12] = struct.pack("!H", compute_checksum(bytes(head)))
    return bytes(head)


def compute_checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071) of a header with its own field zero."""
    total: int = sum(struct.unpack(f"!{len(data) // 2}H", data))
    while total > 0xFFFF:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _ether(route: Route, **other: Any) -> Packet:
    return Ether(**{"src": route.mac, "dst": route.target_mac, **other})


def _find_macs(rest: str, route: Route) -> dict[str, str]:
    group = "33:33:00:00:00:01" if route.v6 else "01:00:5e:00:00:01"
    return {
        "broadcast": {"dst": "ff:ff:ff:ff:ff:ff"},
        "multicast": {"dst": group},
        "group": {"dst": "03:00:00:00:00:01"},
        "neighbour": {"src": route.neighbour},
        "unknown": {"src": "02:de:ad:00:00:01"},
        "target": {"src": route.target_mac},
        "multicast-source": {"src": group},
    }[rest]


def _build_tags(words: list[str]) -> Packet:
    """``q`` is 802.1Q, ``d`` 802.1ad, ``p`` a priority tag; then the id."""
    tags: Packet | None = None
    for word in words:
        vlan = int(word[1:])
        tag = Dot1AD(vlan=vlan) if word[0] == "d" else Dot1Q(vlan=vlan, prio=7 * (word[0] == "p"))
        tags = tag if tags is None else tags / tag
    assert tags is not None
    return tags


def _ip(
    route: Route, protocol: int, data: bytes, *, hops: int = 64, flags: int = 0, **fragment: int
) -> Packet:
    fields: dict[str, Any] = {"src": route.address, "dst": route.target}
    if route.v6:
        return IPv6(**fields, nh=protocol, hlim=hops, plen=len(data)) / Raw(data)
    fields |= {"proto": protocol, "ttl": hops, "flags": flags, **fragment}
    return IP(**fields) / Raw(data)


def _piece(route: Route, protocol: int, number: int, at: int, more: bool, data: bytes) -> Packet:
    if route.v6:
        head = struct.pack("!BBHI", protocol, 0, at | more, number)
        return _ip(route, FRAGMENT, head + data)
    return _ip(route, protocol, data, flags=int(more), id=number & 0xFFFF, frag=at // 8)


def _cut(route: Route, protocol: int, data: bytes, size: int) -> Iterator[Packet]:
    number = random.getrandbits(32)
    for at in range(0, len(data), size):
        yield _piece(route, protocol, number, at, at + size < len(data), data[at : at + size])


def _build_fragments(rest: str, route: Route, protocol: int, data: bytes) -> list[Packet]:
    """``fragments-SIZE`` and what may follow: how their order and content are meddled with."""
    text, _, way = rest.partition("-")
    size, number = int(text), random.getrandbits(32)
    whole = list(_cut(route, protocol, data, size))
    junk = b"J" * size
    last = (len(data) - 1) // size * size

    def piece(at: int, content: bytes, *, more: bool = True) -> Packet:
        return _piece(route, protocol, number, at, more, content)

    parts = [
        piece(at, data[at : at + size], more=at + size < len(data))
        for at in range(0, len(data), size)
    ]
    match way:
        case "":
            pieces = whole
        case "reversed":
            pieces = whole[::-1]
        case "shuffled":
            pieces = random.sample(whole, len(whole))
        case "doubled":
            pieces = [one for one in whole for _ in range(2)]
        case "junk-first":  # the same place with other content, before
            pieces = [parts[0], *(piece(at, junk) for at in range(size, last, size)), *parts[1:]]
        case "junk-last":
            pieces = [*parts[:-1], *(piece(at, junk) for at in range(size, last, size)), parts[-1]]
        case "half-over":  # each reaches half into the next
            pieces = [piece(at, data[at : at + size] + junk[: min(size // 16 * 8, 32)])
                      for at in range(0, last, size)] + [parts[-1]]  # fmt: skip
        case "port":  # the first says another port, a later one mends it
            other = data[:2] + struct.pack("!H", 8080) + data[4:size]
            pieces = [piece(0, other), *parts[:1], *parts[1:]]
        case "teardrop":
            pieces = [parts[0], piece(8, junk[:8]), *parts[1:]]
        case "no-first":  # the first comes when all others are there
            pieces = [*parts[1:], parts[0]]
        case "other-first":  # a set that is never finished, by the same id, and then a whole one
            pieces = [piece(0, junk), *parts]
        case "other-second":
            pieces = [parts[0], piece(0, junk), *parts[1:]]
        case "other-last":
            pieces = [*parts[1:], piece(0, junk), parts[0]]
        case "other-between":
            pieces = [*parts[1:], parts[0], piece(0, junk)]
        case "late-short":  # two last ones
            pieces = [piece(size, junk[:8], more=False), *parts]
        case _:
            raise ValueError(rest)
    return [_ether(route) / one for one in pieces]
