"""A small OpenFlow interpreter: runs one packet through a compiled program, with conntrack as a value.

For property tests: it knows just the matches and actions that Hairpin compiles, and fails on any
other. The lab tests do the same with the real switch and `ofproto/trace`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from ipaddress import ip_address, ip_network
from typing import Any

from steering.flows import Flow, Program
from steering.pipeline import Table

PROTOCOLS = {
    "ip": (4, None), "tcp": (4, 6), "udp": (4, 17), "icmp": (4, 1), "sctp": (4, 132),
    "ipv6": (6, None), "tcp6": (6, 6), "udp6": (6, 17), "icmp6": (6, 58), "sctp6": (6, 132),
    "arp": ("arp", None),
}  # fmt: skip


@dataclass(frozen=True)
class Frame:
    """``ip`` is 4, 6, "arp" or None (another ethertype); ``vlan`` the outer tag, if any."""

    in_port: int
    dl_src: str
    dl_dst: str
    ip: int | str | None = 4
    protocol: int = 6
    tp_src: int = 0
    tp_dst: int = 0
    syn: bool = False
    ack: bool = False
    fragment: str = "no"  # no, first, later
    vlan: int | None = None
    src_ip: str = ""  # empty: the address that belongs to the MAC
    dst_ip: str = ""
    extra: tuple[tuple[str, str], ...] = ()

    def answer(self, in_port: int) -> Frame:
        return replace(
            self, in_port=in_port, dl_src=self.dl_dst, dl_dst=self.dl_src,
            tp_src=self.tp_dst, tp_dst=self.tp_src, ack=True,
        )  # fmt: skip


@dataclass
class Conntrack:
    """Who opened which connection, by addresses and ports as conntrack has it -> the mark."""

    opened: dict[tuple[Any, ...], int] = field(default_factory=dict)

    @staticmethod
    def key(frame: Frame) -> tuple[Any, ...]:
        ends = (frame.src_ip or frame.dl_src, frame.dst_ip or frame.dl_dst)
        return (frame.ip, frame.protocol, *ends, frame.tp_src, frame.tp_dst)

    @staticmethod
    def reverse(frame: Frame) -> tuple[Any, ...]:
        ends = (frame.dst_ip or frame.dl_dst, frame.src_ip or frame.dl_src)
        return (frame.ip, frame.protocol, *ends, frame.tp_dst, frame.tp_src)

    def state(self, frame: Frame) -> tuple[set[str], int]:
        if self.key(frame) in self.opened:
            return {"trk", "est"}, self.opened[self.key(frame)]
        if self.reverse(frame) in self.opened:
            return {"trk", "est", "rpl"}, self.opened[self.reverse(frame)]
        if frame.protocol not in (6, 17, 1, 58) or (
            frame.protocol == 6 and frame.syn and frame.ack
        ):
            return {"trk", "inv"}, 0
        return {"trk", "new"}, 0

    def commit(self, frame: Frame) -> None:
        if self.reverse(frame) not in self.opened:
            self.opened.setdefault(self.key(frame), frame.in_port)


@dataclass
class Journey:
    """Where one packet went. ``outputs`` are (port, vlan or None); ``normal`` if NORMAL took it."""

    tables: list[str] = field(default_factory=list)
    outputs: list[tuple[int, int | None]] = field(default_factory=list)
    groups: list[int] = field(default_factory=list)
    normal: bool = False
    learned: int = 0


def split_actions(text: str) -> list[str]:
    """At the commas that stand in no parentheses."""
    parts, depth, begin = [], 0, 0
    for place, sign in enumerate(f"{text},"):
        depth += (sign == "(") - (sign == ")")
        if sign == "," and not depth:
            parts.append(text[begin:place])
            begin = place + 1
    return parts


class Simulator:
    """``dead`` are ofports whose BFD is down (fast failover skips buckets that watch them).

    ``later``: the program that packets meet behind conntrack, as they do while the switch renews its
    datapath flows one by one after a change: those of before conntrack may stand a while longer.
    """

    def __init__(
        self,
        program: Program,
        conntrack: Conntrack | None = None,
        dead: frozenset[int] = frozenset(),
        later: Program | None = None,
    ):
        self.tables: dict[int, list[Flow]] = {}
        for flow in program.flows:
            self.tables.setdefault(flow.table.number, []).append(flow)
        self.groups = {group.group_id: group for group in program.groups}
        self.conntrack = conntrack or Conntrack()
        self.dead = dead
        self.names = {table.number: table.name for table in Table}
        self.later = None if later is None else Simulator(later, self.conntrack, dead)

    def send(self, frame: Frame) -> Journey:
        journey = Journey()
        self._enter(0, frame, {}, {"-"}, journey)
        return journey

    def _enter(
        self, number: int, frame: Frame, registers: dict[str, int], ct: set[str], journey: Journey
    ) -> None:
        journey.tables.append(self.names[number])
        assert len(journey.tables) < 64, f"a loop: {journey.tables}"
        flow = self._find(number, frame, registers, ct)
        if flow is not None:
            self._do(number, flow.actions, frame, registers, ct, journey)

    def _recirculate(
        self, number: int, frame: Frame, registers: dict[str, int], ct: set[str], journey: Journey
    ) -> None:
        (self.later or self)._enter(number, frame, registers, ct, journey)

    def _find(
        self, number: int, frame: Frame, registers: dict[str, int], ct: set[str]
    ) -> Flow | None:
        by_priority: dict[int, list[Flow]] = {}
        for flow in self.tables.get(number, ()):
            by_priority.setdefault(flow.priority, []).append(flow)
        for priority in sorted(by_priority, reverse=True):
            clauses: dict[int, set[str]] = {}
            for flow in by_priority[priority]:
                if "conj_id=" in flow.match or not self._matches(flow.match, frame, registers, ct):
                    continue
                if not flow.actions.startswith("conjunction"):
                    return flow
                for conjunction, clause in re.findall(r"conjunction\((\d+),(\d/3)\)", flow.actions):
                    clauses.setdefault(int(conjunction), set()).add(clause)
            complete = {c for c, found in clauses.items() if found == {"1/3", "2/3", "3/3"}}
            for flow in by_priority[priority]:
                if flow.match in {f"conj_id={c}" for c in complete}:
                    return flow
        return None

    def _matches(self, match: str, frame: Frame, registers: dict[str, int], ct: set[str]) -> bool:
        extra = dict(frame.extra)
        for part in filter(None, match.split(",")):
            name, _, value = part.partition("=")
            if name in PROTOCOLS:
                ip, protocol = PROTOCOLS[name]
                seen = 44 if frame.ip == 6 and frame.fragment == "later" else frame.protocol
                ok = frame.ip == ip and protocol in (None, seen)
            elif name.startswith("reg"):
                want, mask = self._masked(value, 0xFFFF_FFFF)
                ok = registers.get(name, 0) & mask == want & mask
            elif name == "in_port":
                ok = frame.in_port == int(value)
            elif name == "ct_mark":
                ok = registers.get("ct_mark", 0) == int(value, 0)
            elif name == "dl_dst" and "/" in value:
                assert value == "01:00:00:00:00:00/01:00:00:00:00:00", value
                ok = bool(int(frame.dl_dst[:2], 16) & 1)
            elif name in ("dl_src", "dl_dst"):
                ok = getattr(frame, name) == value
            elif name == "dl_vlan":
                ok = frame.vlan == int(value)
            elif name == "vlan_tci":
                ok = frame.vlan is not None
            elif name in ("tp_src", "tp_dst"):
                want, mask = self._masked(value, 0xFFFF)
                port = 0 if frame.fragment == "later" else getattr(frame, name)
                ok = port & mask == want & mask
            elif name == "nw_frag":
                seen_as = {"no": {"no"}, "first": {"yes"}, "later": {"yes", "later"}}
                assert value in ("no", "yes", "later"), value
                ok = value in seen_as[frame.fragment]
            elif name == "tcp_flags":
                assert value == "+syn-ack", value
                ok = frame.syn and not frame.ack
            elif name == "ct_state":
                ok = all(
                    (flag in ct) == (sign == "+")
                    for sign, flag in re.findall(r"([+-])(\w+)", value)
                )
            elif name in (
                "arp_sha",
                "arp_spa",
                "icmp_type",
                "nd_sll",
                "nd_tll",
                "ipv6_src",
                "nd_target",
                "nw_src",
                "nw_dst",
                "ipv6_dst",
            ):
                ok = extra.get(name) == value or self._is_within(extra.get(name, ""), value)
            else:
                raise AssertionError(f"the simulator does not know {part!r}")
            if not ok:
                return False
        return True

    @staticmethod
    def _is_within(address: str, network: str) -> bool:
        """Of IPv6 prefixes only; the IPv4 masks that are compiled stand for themselves."""
        if "/" not in network or ":" not in network or ":" not in address or "/" in address:
            return False
        return ip_address(address) in ip_network(network)

    @staticmethod
    def _masked(value: str, full: int) -> tuple[int, int]:
        want, _, mask = value.partition("/")
        return int(want, 0), int(mask, 0) if mask else full

    def _do(
        self,
        number: int,
        actions: str,
        frame: Frame,
        registers: dict[str, int],
        ct: set[str],
        journey: Journey,
    ) -> None:
        for action in split_actions(actions):
            if action == "drop":
                return
            if action == "NORMAL":
                journey.normal = True
            elif action == "pop_vlan":
                frame = replace(frame, vlan=None)
            elif action.startswith("push_vlan"):
                frame = replace(frame, vlan=0)
            elif found := re.fullmatch(r"set_field:(\d+)->vlan_vid", action):
                frame = replace(frame, vlan=int(found[1]) & 0xFFF)
            elif found := re.fullmatch(r"set_field:(\w+)->(reg\d)", action):
                registers = {**registers, found[2]: int(found[1], 0)}
            elif found := re.fullmatch(r"resubmit\(,(\d+)\)", action):
                self._enter(int(found[1]), frame, registers, ct, journey)
            elif found := re.fullmatch(r"output:(\d+)", action):
                journey.outputs.append((int(found[1]), frame.vlan))
            elif found := re.fullmatch(r"group:(\d+)", action):
                self._group(int(found[1]), frame, registers, ct, journey)
            elif action.startswith("ct(commit"):
                self.conntrack.commit(frame)
            elif found := re.fullmatch(r"ct\(table=(\d+),zone=\d+\)", action):
                # As the switch does: go on in the table with the connection's state.
                state, mark = self.conntrack.state(frame)
                self._recirculate(
                    int(found[1]), frame, {**registers, "ct_mark": mark}, state, journey
                )
            elif action.startswith("learn("):
                journey.learned += "table=90," in action
            else:
                raise AssertionError(f"the simulator does not know {action!r} in table {number}")

    def _group(
        self, group_id: int, frame: Frame, registers: dict[str, int], ct: set[str], journey: Journey
    ) -> None:
        journey.groups.append(group_id)
        for bucket in self.groups[group_id].buckets:
            watch, _, actions = bucket.partition("actions=")
            found = re.search(r"watch_port:(\d+)", watch)
            if found and int(found[1]) in self.dead:
                continue
            self._do(-1, actions, frame, registers, ct, journey)
            return
