"""Which packets stand for which class of traffic, and which of them a run of the ledger traces. Pure.

A *case* is what can be said of a packet without saying whose it is: family, service, fragment, from
the opener or its answer, and what conntrack knows. A *witness* is a case between two ports. Which cases
there are follows from the policies that may name the pair, so that every edge of every port range has
a witness, and what lies outside of all of them has one, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from steering.model import Family, Lane, Leg, Machine, Policy, Port, Protocol
from steering.services import PORTED

EPHEMERAL = 40_000  # the opener's own port; no policy looks at it, but an answer's reader may
NUMBERS = {  # IP protocol numbers (IANA); ANY stands for one that no policy can name: GRE
    Protocol.ANY: (47, 47),
    Protocol.TCP: (6, 6),
    Protocol.UDP: (17, 17),
    Protocol.SCTP: (132, 132),
    Protocol.ICMP: (1, 58),
}
LATER_IPV6 = 44  # what Open vSwitch gives for the protocol of a later fragment in IPv6


class Way(StrEnum):
    """Which side of the connection sent the packet."""

    OPENER = "opener"
    ANSWER = "answer"


class State(StrEnum):
    """What conntrack knows: of a first packet, of a known connection, of one that it has forgotten."""

    NEW = "new"
    ESTABLISHED = "established"
    MIDSTREAM = "midstream"


class Fragment(StrEnum):
    WHOLE = "whole"
    FIRST = "first fragment"
    LATER = "later fragment"


@dataclass(frozen=True, slots=True)
class Case:
    """``port`` is the service's (the opener's packets go to it), None where there is none."""

    family: Family
    protocol: Protocol
    port: int | None
    fragment: Fragment
    way: Way
    state: State

    @property
    def service(self) -> str:
        name = "another protocol" if self.protocol is Protocol.ANY else str(self.protocol)
        port = "" if self.port is None else f"/{self.port}"
        return f"{name}{port}" + ("" if self.fragment is Fragment.WHOLE else f" {self.fragment}")


@dataclass(frozen=True, slots=True)
class End:
    """A port of a VM, with addresses for its witnesses. ``network`` is (bridge, access VLAN or None).

    ``barred``: families in which it may use no address, by its document.
    """

    vm_id: str
    name: str
    interface: str
    ofport: int
    mac: str
    network: tuple[str, int | None]
    ipv4: str
    ipv6: str
    barred: tuple[Family, ...] = ()

    def find_address(self, family: Family) -> str:
        return self.ipv4 if family is Family.IPV4 else self.ipv6


@dataclass(frozen=True, slots=True)
class Witness:
    """A packet of a connection that ``source`` opens to ``destination``."""

    source: End
    destination: End
    case: Case

    @property
    def sender(self) -> End:
        return self.source if self.case.way is Way.OPENER else self.destination

    @property
    def receiver(self) -> End:
        return self.destination if self.case.way is Way.OPENER else self.source


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """What `ofproto/trace` is asked: a flow, and the connection's state after the first `ct()`."""

    bridge: str
    flow: str
    ct_next: str = ""

    def __str__(self) -> str:
        """Ready for a shell, after `ovs-appctl ofproto/trace`."""
        after = f" --ct-next '{self.ct_next}'" if self.ct_next else ""
        return f"{self.bridge} '{self.flow}'{after}"

    @property
    def arguments(self) -> list[str]:
        return [self.bridge, self.flow, *(("--ct-next", self.ct_next) if self.ct_next else ())]


# Who can be traced


def find_ends(
    machines: Sequence[Machine],
    addresses: Mapping[str, Sequence[str]],
    declared: Mapping[str, Sequence[str]],
) -> tuple[tuple[End, ...], tuple[tuple[str, str], ...]]:
    """Ports that can be told from each other, and (VM's name, why not) for those that can't.

    ``addresses`` are known ones by vm-id; a VM without gets one that nobody has. ``declared`` are those
    that documents give to VMs, which may then use no others.
    """
    ports = [(machine, port) for machine in machines for port in machine.ports]
    macs: dict[str, int] = {}
    for _, port in ports:
        macs[port.mac] = macs.get(port.mac, 0) + 1
    ends: list[End] = []
    without: list[tuple[str, str]] = []
    for machine, port in ports:
        if port.ofport <= 0:
            without.append((machine.name, f"port {port.interface} has no number in the switch"))
        elif not port.mac:
            without.append((machine.name, f"port {port.interface} has no attached-mac"))
        elif macs[port.mac] > 1:
            without.append((machine.name, f"{macs[port.mac]} ports have its MAC {port.mac}"))
        else:
            own = declared.get(machine.vm_id, ())
            ends.append(
                _build_end(machine, port, own or addresses.get(machine.vm_id, ()), bool(own))
            )
    return tuple(sorted(ends, key=lambda end: end.ofport)), tuple(without)


def _build_end(machine: Machine, port: Port, known: Sequence[str], only: bool) -> End:
    ipv4 = next((address for address in known if "." in address), None)
    ipv6 = next((address for address in known if ":" in address), None)
    number = f"{port.ofport:x}"
    return End(
        vm_id=machine.vm_id,
        name=machine.name,
        interface=port.interface,
        ofport=port.ofport,
        mac=port.mac,
        network=(port.bridge, port.tag),
        ipv4=ipv4 or f"198.19.{port.ofport >> 8 & 0xFF}.{port.ofport & 0xFF}",
        # A link-local address every VM may use.
        ipv6=ipv6 or (f"fe80::4850:{number}" if only else f"fd48:5049:5250:1::{number}"),
        barred=(Family.IPV4,) if only and ipv4 is None else (),
    )


# Which cases a pair has


def build_cases(policies: Iterable[Policy]) -> tuple[Case, ...]:
    """All cases of a pair for which these policies may have a word, sorted."""
    ranges: dict[Protocol, list[tuple[int, int]]] = {Protocol.TCP: [], Protocol.UDP: []}
    for policy in policies:
        for service in policy.services:
            if service.protocol in PORTED:
                own = ranges.setdefault(service.protocol, [])
                own += [(piece.first, piece.last) for piece in service.ports]
    cases: set[Case] = set()
    for family in Family:
        for protocol, found in ranges.items():
            for port in find_witness_ports(found):
                cases.update(_build_states(family, protocol, port, Fragment.WHOLE))
            edge = found[0][0] if found else 1
            cases.update(_build_states(family, protocol, edge, Fragment.FIRST))
            if family is Family.IPV4:
                cases.update(_build_states(family, protocol, None, Fragment.LATER))
        for protocol in (Protocol.ICMP, Protocol.ANY):
            cases.update(_build_states(family, protocol, None, Fragment.WHOLE))
    # In IPv6 a later fragment does not tell its protocol, so there is one for all.
    cases.update(_build_states(Family.IPV6, Protocol.ANY, None, Fragment.LATER))
    return tuple(sorted(cases, key=_rank))


def _rank(case: Case) -> tuple[str, str, int, str, str, str]:
    port = -1 if case.port is None else case.port
    return case.family, case.protocol, port, case.fragment, case.way, case.state


def find_witness_ports(ranges: Iterable[tuple[int, int]]) -> tuple[int, ...]:
    """Both ends of each range, and just beyond each what is in none; with no range a port at all."""
    found = sorted(set(ranges))
    inside = {port for piece in found for port in piece}
    beyond = {port for first, last in found for port in (first - 1, last + 1)}
    outside = {
        port
        for port in beyond
        if 0 < port <= 0xFFFF and not any(first <= port <= last for first, last in found)
    }
    # Two of them do for "everything else": the lowest and the highest.
    return tuple(sorted(inside | {*sorted(outside)[:1], *sorted(outside)[-1:]})) or (
        EPHEMERAL // 4,
    )


def _build_states(
    family: Family, protocol: Protocol, port: int | None, fragment: Fragment
) -> Iterator[Case]:
    """A first packet that tells that it opens (SYN) is new; one that does not may be anybody's."""
    if protocol is Protocol.ANY and fragment is Fragment.WHOLE:
        # Conntrack calls it new (kernel) or invalid (userspace): here nothing is ever established.
        states: tuple[tuple[Way, State], ...] = (
            (Way.OPENER, State.NEW),
            (Way.OPENER, State.MIDSTREAM),
        )
    else:
        tells = protocol is Protocol.TCP and fragment is Fragment.WHOLE
        states = (
            (Way.OPENER, State.NEW),
            (Way.OPENER, State.ESTABLISHED),
            *(((Way.OPENER, State.MIDSTREAM),) if tells else ()),
            (Way.ANSWER, State.ESTABLISHED),
            (Way.ANSWER, State.MIDSTREAM),
        )
    for way, state in states:
        yield Case(family, protocol, port, fragment, way, state)


# How a witness is written


def render_entry(witness: Witness) -> TraceRequest:
    """The packet as its sender sends it: untracked, and what conntrack then says of it."""
    case, sender = witness.case, witness.sender
    parts = [f"in_port={sender.ofport}", *_render_packet(witness)]
    if case.state is State.ESTABLISHED:
        parts.append(f"ct_mark={witness.source.ofport}")
    return TraceRequest(sender.network[0], ",".join(parts), _find_ct_state(case))


def render_return(witness: Witness, lane: Lane, leg: Leg) -> TraceRequest:
    """The same packet as it comes out of the lane by ``leg``."""
    parts = [f"in_port={leg.ofport}", f"dl_vlan={lane.vlan}", *_render_packet(witness)]
    return TraceRequest(witness.sender.network[0], ",".join(parts))


def _find_ct_state(case: Case) -> str:
    if case.state is State.ESTABLISHED:
        return "trk,est,rpl" if case.way is Way.ANSWER else "trk,est"
    foreign = case.protocol is Protocol.ANY and case.fragment is Fragment.WHOLE
    return "trk,inv" if foreign and case.state is State.MIDSTREAM else "trk,new"


def _render_packet(witness: Witness) -> Iterator[str]:
    case, sender, receiver = witness.case, witness.sender, witness.receiver
    yield f"dl_src={sender.mac}"
    yield f"dl_dst={receiver.mac}"
    older = case.family is Family.IPV4
    number = NUMBERS[case.protocol][0 if older else 1]
    if not older and case.fragment is Fragment.LATER:
        number = LATER_IPV6
    yield "ip" if older else "ipv6"
    yield f"nw_proto={number}"
    source, destination = (one.find_address(case.family) for one in (sender, receiver))
    yield f"{'nw' if older else 'ipv6'}_src={source}"
    yield f"{'nw' if older else 'ipv6'}_dst={destination}"
    yield "nw_ttl=64"
    if case.fragment is not Fragment.WHOLE:
        yield "nw_frag=first" if case.fragment is Fragment.FIRST else "nw_frag=later"
    if case.fragment is Fragment.LATER:
        return
    if case.protocol is Protocol.ICMP:
        kinds = (8, 0) if older else (128, 129)
        name = "icmp" if older else "icmpv6"
        yield f"{name}_type={kinds[0 if case.way is Way.OPENER else 1]}"
    elif case.port is not None:
        ports = (EPHEMERAL, case.port)
        source_port, destination_port = ports if case.way is Way.OPENER else ports[::-1]
        yield f"{case.protocol}_src={source_port}"
        yield f"{case.protocol}_dst={destination_port}"
        if case.protocol is Protocol.TCP:
            yield f"tcp_flags={'syn' if case.state is State.NEW else 'ack'}"
