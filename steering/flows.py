"""Flows and groups as values, and the way OVS writes them.

A `Match` prints its fields in OVS's own order, so that a compiled flow equals the line that
`ovs-ofctl dump-flows` gives back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from steering.model import Family, Protocol
from steering.pipeline import Table

# The order in which OVS prints match fields (lib/match.c of OVS 3.1 to 3.5 behaves the same).
FIELD_ORDER = (
    "conj_id",
    "ct_state",
    "ct_mark",
    "(protocol)",
    "reg0",
    "reg1",
    "reg2",
    "reg4",
    "reg5",
    "reg6",
    "reg7",
    "reg8",
    "reg9",
    "in_port",
    "dl_vlan",
    "vlan_tci",
    "dl_src",
    "dl_dst",
    "nw_src",
    "nw_dst",
    "ipv6_src",
    "ipv6_dst",
    "arp_spa",
    "arp_sha",
    "nw_frag",
    "icmp_type",
    "nd_target",
    "nd_sll",
    "nd_tll",
    "tp_src",
    "tp_dst",
    "tcp_flags",
)
_RANK = {name: rank for rank, name in enumerate(FIELD_ORDER)}

# (family keyword, its TCP, UDP, SCTP and ICMP keywords), as OVS writes them.
KEYWORDS = {
    Family.IPV4: {
        Protocol.ANY: "ip",
        Protocol.TCP: "tcp",
        Protocol.UDP: "udp",
        Protocol.SCTP: "sctp",
        Protocol.ICMP: "icmp",
    },
    Family.IPV6: {
        Protocol.ANY: "ipv6",
        Protocol.TCP: "tcp6",
        Protocol.UDP: "udp6",
        Protocol.SCTP: "sctp6",
        Protocol.ICMP: "icmp6",
    },
}
IP_KEYWORDS = tuple(KEYWORDS[family][Protocol.ANY] for family in Family)
TCP_KEYWORDS = tuple(KEYWORDS[family][Protocol.TCP] for family in Family)


def render_number(value: int) -> str:
    """A register's value as OVS prints it: hexadecimal, but a bare 0."""
    return f"{value:#x}" if value else "0"


def go_to(*tables: Table) -> str:
    """On to these tables, one after the other."""
    return ",".join(f"resubmit(,{table.number})" for table in tables)


def set_register(register: str, value: int) -> str:
    return f"set_field:{render_number(value)}->{register}"


def build_match(protocol: str = "", **fields: str | int) -> str:
    """A match as OVS prints it, e.g. ``build_match("tcp", tp_dst=80, in_port=3)`` -> ``tcp,in_port=3,tp_dst=80``."""
    parts = [(_RANK[name], f"{name}={value}") for name, value in fields.items()]
    if protocol:
        parts.append((_RANK["(protocol)"], protocol))
    return ",".join(text for _, text in sorted(parts))


def build_match_id(match: str) -> str:
    """Eight hexadecimal digits that name a flow which the switch was taught, as long as it is there."""
    return hashlib.blake2s(match.encode(), digest_size=4).hexdigest()


class FlowKey(NamedTuple):
    """What makes a flow that flow; two flows with one key can't both be in the switch.

    A tuple, since thousands are looked up at a time.
    """

    table: int
    priority: int
    match: str


@dataclass(frozen=True, slots=True)
class Flow:
    """One OpenFlow flow, its match and actions in OVS's own spelling."""

    table: Table
    priority: int
    match: str
    actions: str
    cookie: int
    # Made once: it is asked for several times for each of thousands of flows.
    key: FlowKey = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", FlowKey(self.table.number, self.priority, self.match))

    def __str__(self) -> str:
        match = f",{self.match}" if self.match else ""
        return (
            f"cookie={self.cookie:#x}, table={self.table.number}, "
            f"priority={self.priority}{match} actions={self.actions}"
        )


@dataclass(frozen=True, slots=True)
class Group:
    """One OpenFlow group; ``buckets`` in OVS's own spelling, without bucket ids."""

    group_id: int
    kind: str
    buckets: tuple[str, ...]

    def __str__(self) -> str:
        buckets = "".join(f",bucket={bucket}" for bucket in self.buckets)
        return f"group_id={self.group_id},type={self.kind}{buckets}"


@dataclass(frozen=True, slots=True)
class PresentFlow:
    """A flow of ours as the switch gave it back; ``table`` is a number since it may be an old one."""

    key: FlowKey
    actions: str
    cookie: int

    def __str__(self) -> str:
        match = f",{self.key.match}" if self.key.match else ""
        return (
            f"cookie={self.cookie:#x}, table={self.key.table}, "
            f"priority={self.key.priority}{match} actions={self.actions}"
        )


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Flows that were compiled together, sorted. The same object stands for the same flows.

    So whether a piece is another one than before is known without looking into it; two objects may
    have the same flows, too.
    """

    flows: tuple[Flow, ...]


@dataclass(frozen=True, eq=False, init=False)
class Program:
    """All flows and groups that Hairpin wants in the switch, or has in it; no flow stands in two pieces."""

    pieces: tuple[Piece, ...]
    groups: tuple[Group, ...]

    def __init__(
        self,
        flows: Iterable[Flow] = (),
        groups: tuple[Group, ...] = (),
        *,
        pieces: tuple[Piece, ...] | None = None,
    ) -> None:
        """Of ``pieces``, or of ``flows`` as one piece."""
        one = tuple(flows)
        made = ((Piece(one),) if one else ()) if pieces is None else pieces
        object.__setattr__(self, "pieces", made)
        object.__setattr__(self, "groups", groups)

    @cached_property
    def flows(self) -> tuple[Flow, ...]:
        """By table, falling priority and match."""
        return tuple(sort_flows(flow for piece in self.pieces for flow in piece.flows))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Program):
            return NotImplemented
        if self.groups != other.groups:
            return False
        return set(self.pieces) == set(other.pieces) or self.flows == other.flows

    def __hash__(self) -> int:
        return hash((self.groups, len(self.flows)))


def sort_flows(flows: Iterable[Flow]) -> list[Flow]:
    return sorted(flows, key=lambda flow: (flow.key.table, -flow.priority, flow.match))


@dataclass(frozen=True, slots=True)
class Present:
    """All flows and groups with our cookies and ids that the switch has."""

    flows: tuple[PresentFlow, ...] = ()
    groups: tuple[Group, ...] = ()


def build_port_matches(first: int, last: int) -> tuple[str, ...]:
    """A port range as the fewest value/mask pairs (`tp_dst` has no ranges in OpenFlow).

    ``(80, 80)`` -> ``("80",)``; ``(8000, 8007)`` -> ``("0x1f40/0xfff8",)``.
    """
    pieces: list[str] = []
    while first <= last:
        # The largest aligned block that starts here and does not pass the end.
        size = first & -first or 0x10000
        while first + size - 1 > last:
            size >>= 1
        mask = 0xFFFF & ~(size - 1)
        pieces.append(str(first) if size == 1 else f"{first:#x}/{mask:#x}")
        first += size
    return tuple(pieces)


@dataclass(slots=True)
class FlowBook:
    """Collects flows; conjunction clauses with one key are merged, any other clash is a bug and raises."""

    _flows: dict[FlowKey, Flow] = field(default_factory=dict)
    _clauses: dict[FlowKey, list[str]] = field(default_factory=dict)

    def add(self, table: Table, priority: int, match: str, actions: str, cookie: int) -> None:
        flow = Flow(table, priority, match, actions, cookie)
        if flow.key in self._flows and self._flows[flow.key] != flow:
            raise AssertionError(f"two flows with one key: {self._flows[flow.key]} and {flow}")
        self._flows[flow.key] = flow

    def extend(self, flows: Iterable[Flow]) -> None:
        """Add flows that were collected elsewhere; none of them a clause."""
        for flow in flows:
            key = flow.key
            if self._flows.setdefault(key, flow) != flow:
                raise AssertionError(f"two flows with one key: {self._flows[key]} and {flow}")

    def add_clause(self, table: Table, priority: int, match: str, clause: str, cookie: int) -> None:
        key = FlowKey(table.number, priority, match)
        clauses = self._clauses.setdefault(key, [])
        if clause not in clauses:
            clauses.append(clause)
            clauses.sort(key=_clause_rank)
        first = self._flows.get(key)
        shared = cookie if first is None or first.cookie == cookie else min(first.cookie, cookie)
        self._flows[key] = Flow(table, priority, match, ",".join(clauses), shared)

    def flows(self) -> list[Flow]:
        return sort_flows(self._flows.values())


def _clause_rank(clause: str) -> tuple[int, int]:
    """OVS sorts nothing inside actions; a fixed order makes compiling the same thing twice the same."""
    number, position = clause.removeprefix("conjunction(").removesuffix(")").split(",")
    return int(number), int(position.split("/")[0])
