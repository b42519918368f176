"""Services as sets of what they cover, so that overlap and remainder are exact.

A space is an int used as a bit set: 65,536 bits of destination ports for each of tcp, udp and sctp,
one bit for ICMP, one for every other IP protocol. It is of one address family.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from steering.model import PortRange, Protocol, Service

PORTED = (Protocol.TCP, Protocol.UDP, Protocol.SCTP)
PORT_COUNT = 65_536

_OFFSETS = {protocol: number * PORT_COUNT for number, protocol in enumerate(PORTED)}
_ICMP_BIT = len(PORTED) * PORT_COUNT
_OTHER_BIT = _ICMP_BIT + 1
EVERYTHING = (1 << (_OTHER_BIT + 1)) - 1


@lru_cache(maxsize=256)
def build_space(service: Service) -> int:
    """What one service covers."""
    if service.protocol is Protocol.ANY:
        return EVERYTHING
    if service.protocol is Protocol.ICMP:
        return 1 << _ICMP_BIT
    ports = 0
    for piece in service.ports or (PortRange(0, PORT_COUNT - 1),):
        ports |= (1 << (piece.last + 1)) - (1 << piece.first)
    return ports << _OFFSETS[service.protocol]


def build_spaces(services: Iterable[Service]) -> int:
    """What any of these services covers."""
    space = 0
    for service in services:
        space |= build_space(service)
    return space


def find_example(space: int) -> Service:
    """The first part of a space that is not empty: its lowest range of ports, or its protocol."""
    if space == EVERYTHING:
        return Service(Protocol.ANY)
    lowest = (space & -space).bit_length() - 1
    if lowest == _ICMP_BIT:
        return Service(Protocol.ICMP)
    if lowest == _OTHER_BIT:
        return Service(Protocol.ANY)
    protocol = PORTED[lowest // PORT_COUNT]
    first = lowest % PORT_COUNT
    ports = (space >> _OFFSETS[protocol]) & ((1 << PORT_COUNT) - 1)
    run = ports >> first
    last = first + (~run & (run + 1)).bit_length() - 2
    if (first, last) == (0, PORT_COUNT - 1):
        return Service(protocol)
    return Service(protocol, (PortRange(first, last),))


def covers(service: Service, protocol: Protocol, port: int | None) -> bool:
    """Is a connection of this protocol to this destination port one of the service's?

    Protocol.ANY stands for a protocol without a name here (GRE, ESP). A port of None is one that is
    not known (a later fragment): only a service for every port covers it.
    """
    if service.protocol is Protocol.ANY:
        return True
    if service.protocol is not protocol:
        return False
    if not service.ports or protocol not in PORTED:
        return True
    if port is None:
        return any(piece.last - piece.first == PORT_COUNT - 1 for piece in service.ports)
    return any(piece.first <= port <= piece.last for piece in service.ports)
