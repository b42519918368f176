"""Shunning: a flow that the engine blocked is dropped in the switch, for a while. Pure.

The engine drops every further packet of such a flow, but each costs the hairpin and a place in its queue. So
two flows drop the 5-tuple, one from each end's own port, before conntrack and policies. They end by their hard
timeout, whether or not the management service runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from steering.flows import KEYWORDS, build_match
from steering.model import Family, Inspect, Machine, PolicySet, Protocol
from steering.pipeline import CookieKind, Table, build_cookie, build_policy_number, parse_cookie

PRIORITY = 110  # above all else in CONNECTION
MAX_FLOWS = 4_000
"""At most so many at a time: whoever makes the engine block many flows must not fill the switch."""


@dataclass(frozen=True, slots=True)
class Blocked:
    """A packet that the engine blocked, with the VMs that its addresses were attributed to."""

    family: Family
    protocol: Protocol
    source_vm_id: str
    source_address: str
    source_port: int
    destination_vm_id: str
    destination_address: str
    destination_port: int
    policy: str


@dataclass(frozen=True, slots=True)
class ShunFlow:
    """A flow to be added. ``seconds``: its hard timeout."""

    match: str
    cookie: int
    seconds: int

    @property
    def command(self) -> str:
        """The line of `ovs-ofctl bundle` that adds it, or renews its time."""
        return (
            f"flow add table={Table.CONNECTION.number},priority={PRIORITY},{self.match},"
            f"hard_timeout={self.seconds},cookie={self.cookie:#x},actions=drop"
        )


@dataclass(frozen=True, slots=True)
class Shunned:
    """A flow as the switch has it. ``left``: seconds until it ends; ``policy_number`` by its cookie."""

    id: str
    match: str
    policy_number: int
    left: float
    packets: int
    bytes: int


def build_shun(
    blocked: Blocked, policies: PolicySet, machines: Sequence[Machine]
) -> tuple[ShunFlow, ...]:
    """Both directions' flows; empty where the policy does not shun, or a VM is not on the switch."""
    seconds = next(
        (
            policy.action.shun_seconds
            for policy in policies.policies
            if policy.name == blocked.policy and isinstance(policy.action, Inspect)
        ),
        None,
    )
    if seconds is None or blocked.protocol not in (Protocol.TCP, Protocol.UDP):
        return ()
    cookie = build_cookie(CookieKind.SHUN, build_policy_number(blocked.policy))
    ends = (
        (blocked.source_vm_id, blocked.source_address, blocked.source_port),
        (blocked.destination_vm_id, blocked.destination_address, blocked.destination_port),
    )
    flows: list[ShunFlow] = []
    for (vm_id, address, port), (_, peer, peer_port) in ((ends[0], ends[1]), (ends[1], ends[0])):
        # Only from the VM's own ports: what another one sends in its name is another matter.
        for ofport in _find_ofports(machines, vm_id):
            match = build_match(
                KEYWORDS[blocked.family][blocked.protocol],
                in_port=ofport,
                **_find_addresses(blocked.family, address, peer),
                tp_src=port,
                tp_dst=peer_port,
            )
            flows.append(ShunFlow(match, cookie, seconds))
    return tuple(flows)


def _find_addresses(family: Family, source: str, destination: str) -> dict[str, str]:
    names = ("nw_src", "nw_dst") if family is Family.IPV4 else ("ipv6_src", "ipv6_dst")
    return dict(zip(names, (source, destination), strict=True))


def _find_ofports(machines: Iterable[Machine], vm_id: str) -> list[int]:
    return [
        port.ofport
        for machine in machines
        if machine.vm_id == vm_id
        for port in machine.ports
        if port.ofport > 0
    ]


def is_shun(cookie: int) -> bool:
    owner = parse_cookie(cookie)
    return owner is not None and owner[0] is CookieKind.SHUN
