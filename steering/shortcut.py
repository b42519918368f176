"""The shortcut: the engine tells the switch to pass the rest of one connection by itself. Pure.

A policy's trigger goes into the lane in the priority bits (PCP) of the lane's tag. What the engine lets go
for just that trigger comes back by the lane's third leg, and the switch learns the connection from it: two
flows of table SHORTCUTS, one for each direction. docs/shortcut.md walks it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from steering.flows import KEYWORDS, build_match
from steering.membership import Membership, build_membership
from steering.model import (
    Deny,
    Family,
    Inspect,
    Lane,
    Machine,
    Policy,
    PolicySet,
    Protocol,
    Trigger,
)
from steering.pipeline import (
    CookieKind,
    Table,
    build_cookie,
    build_policy_number,
    parse_cookie,
)

PRIORITY_CODES = {
    Trigger.RULE: 1,
    Trigger.TLS_HANDSHAKE: 2,
    Trigger.ONE_MEGABYTE: 3,
    Trigger.TEN_MEGABYTES: 4,
    Trigger.HUNDRED_MEGABYTES: 5,
}
"""Trigger -> PCP of the tag (IEEE 802.1Q); 0 is a policy without a shortcut, BFD and canaries."""

IDLE_SECONDS = 60
"""A direction without packets for so long is inspected again. After FIN or RST it is 2 s."""

_OURS = f"cookie={build_cookie(CookieKind.SHORTCUT):#x}/{0xFFFF_FF00_0000_0000:#x}"


@dataclass(frozen=True, slots=True)
class Taken:
    """One direction of a connection that takes a shortcut, as the switch has it now.

    ``idle`` and ``age`` in seconds. ``policy_number``: as `build_policy_number` makes it.
    """

    id: str
    match: str
    policy_number: int
    age: float
    idle: float
    packets: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Connection:
    """A TCP connection's ends, whichever of them opened it, and the policy that names it."""

    policy: str
    family: Family
    source_address: str
    source_port: int
    destination_address: str
    destination_port: int


@dataclass(frozen=True, slots=True)
class Return:
    """Which connections are to be inspected again: all, or those that any of the four names.

    ``of_policies``: of the VMs' connections only those of these policies; none given: of all policies.
    """

    policies: frozenset[str] = frozenset()
    vm_ids: frozenset[str] = frozenset()
    of_policies: frozenset[str] = frozenset()
    connections: frozenset[Connection] = frozenset()
    ids: frozenset[str] = frozenset()

    @property
    def is_all(self) -> bool:
        return not (self.policies or self.vm_ids or self.connections or self.ids)


HOLD_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Hold:
    """Policies whose connections learn no shortcut until then (`time.monotonic`).

    OVS accounts for packets up to half a second later, and learns as it does: so what was just sent back to
    inspection would take its shortcut again, by frames that the engine let go before. ``until``: by policy.
    """

    until: Mapping[str, float] = field(default_factory=lambda: MappingProxyType({}))

    def find_untaught(self, now: float) -> frozenset[str]:
        return frozenset(name for name, until in self.until.items() if until > now)

    def extend(self, policies: Iterable[str], now: float) -> Hold:
        kept = {name: until for name, until in self.until.items() if until > now}
        return Hold(MappingProxyType(kept | dict.fromkeys(policies, now + HOLD_SECONDS)))


def find_held(wanted: Return, policies: PolicySet, machines: Sequence[Machine]) -> frozenset[str]:
    """The policies whose connections must not learn a shortcut at once again after this return."""
    asking = [policy for policy in policies.policies if _asks(policy)]
    if wanted.is_all or wanted.ids:
        return frozenset(policy.name for policy in asking)
    membership = build_membership(policies.zones, machines)
    named = wanted.policies | {one.policy for one in wanted.connections}
    concerned = wanted.of_policies or {policy.name for policy in asking}
    return frozenset(
        policy.name
        for policy in asking
        if policy.name in named
        or (
            policy.name in concerned
            and wanted.vm_ids & membership.find_members((*policy.sources, *policy.destinations))
        )
    )


def find_denied_back(
    asking: Iterable[Policy], policies: Sequence[Policy], membership: Membership
) -> Mapping[str, str]:
    """Those of ``asking`` whose answers a higher deny would take: policy -> deny, by name.

    Conntrack misses what a shortcut passes, and calls what comes after it invalid; a deny takes packets of
    which nobody knows who opened the connection. So a connection that came back would be cut.
    """
    denies = [policy for policy in policies if isinstance(policy.action, Deny)]
    return {
        policy.name: deny.name
        for policy in asking
        for deny in denies
        if deny.priority >= policy.priority
        and set(deny.families) & set(policy.families)
        and any(service.protocol in (Protocol.ANY, Protocol.TCP) for service in deny.services)
        and membership.find_members(deny.sources) & membership.find_members(policy.destinations)
        and membership.find_members(deny.destinations) & membership.find_members(policy.sources)
    }


def build_untaught(policies: Iterable[str]) -> tuple[str, ...]:
    """The lines that end the teaching of these policies' connections."""
    return tuple(
        f"flow delete cookie={build_shortcut_cookie(name):#x}/-1,table={Table.TEACH.number}"
        for name in sorted(policies)
    )


def build_shortcut_cookie(policy: str) -> int:
    return build_cookie(CookieKind.SHORTCUT, build_policy_number(policy))


def build_return(
    wanted: Return, machines: Iterable[Machine], taken: Sequence[Taken] = ()
) -> tuple[str, ...]:
    """The lines of `ovs-ofctl bundle` that delete the learned flows; ``taken`` is needed for ids only."""
    head = f"flow delete {_OURS},table={Table.SHORTCUTS.number}"
    if wanted.is_all:
        return (head,)
    lines = [_build_policy_head(name) for name in sorted(wanted.policies)]
    heads = [_build_policy_head(name) for name in sorted(wanted.of_policies)] or [head]
    ports = (p for machine in machines if machine.vm_id in wanted.vm_ids for p in machine.ports)
    for port in ports:
        if port.ofport > 0:
            lines += [f"{one},in_port={port.ofport}" for one in heads]
        if port.mac:
            lines += [f"{one},dl_dst={port.mac}" for one in heads]
    for one in sorted(wanted.connections, key=repr):
        lines += [f"{head},{match}" for match in _build_connection_matches(one)]
    lines += [f"{head},{one.match}" for one in taken if one.id in wanted.ids]
    return tuple(lines)


def _build_policy_head(policy: str) -> str:
    cookie = build_shortcut_cookie(policy)
    return f"flow delete cookie={cookie:#x}/-1,table={Table.SHORTCUTS.number}"


def build_port_return(ofports: Iterable[int]) -> tuple[str, ...]:
    """The lines that delete what was learned of ports that are gone, or another VM's now."""
    head = f"flow delete {_OURS},table={Table.SHORTCUTS.number}"
    return tuple(f"{head},in_port={ofport}" for ofport in ofports)


def has_shortcuts(*sets: PolicySet) -> bool:
    return any(_asks(policy) for policies in sets for policy in policies.policies)


def _asks(policy: Policy) -> bool:
    return isinstance(policy.action, Inspect) and policy.action.shortcut is not None


def find_shortcut_problems(
    policies: PolicySet, lanes: Sequence[Lane], machines: Sequence[Machine]
) -> tuple[str, ...]:
    """Policies that ask for a shortcut which they can't have."""
    third = {lane.profile for lane in lanes if lane.leg_c is not None}
    asking = [policy for policy in policies.policies if _asks(policy)]
    denied = (
        find_denied_back(asking, policies.policies, build_membership(policies.zones, machines))
        if asking
        else {}
    )
    return tuple(
        f"policy {name} asks for a shortcut, and policy {deny} denies the other way: its connections "
        "stay inspected, since one that came back could be cut; narrow either of them"
        for name, deny in denied.items()
    ) + tuple(
        f"policy {policy.name} asks for a shortcut, and lane {policy.action.profile} has no third leg: "
        "its connections stay inspected; give the lane a `legC` in the settings"
        for policy in policies.policies
        if isinstance(policy.action, Inspect)
        and policy.action.shortcut is not None
        and policy.action.profile not in third
    )


def _build_connection_matches(one: Connection) -> tuple[str, str]:
    keyword = KEYWORDS[one.family][Protocol.TCP]
    source, destination = (
        ("nw_src", "nw_dst") if one.family is Family.IPV4 else ("ipv6_src", "ipv6_dst")
    )

    def match(first: str, first_port: int, second: str, second_port: int) -> str:
        addresses: dict[str, str | int] = {source: first, destination: second}
        return build_match(keyword, **addresses, tp_src=first_port, tp_dst=second_port)

    there = (one.source_address, one.source_port)
    back = (one.destination_address, one.destination_port)
    return match(*there, *back), match(*back, *there)


def is_learned_shortcut(table: int, cookie: int) -> bool:
    owner = parse_cookie(cookie)
    return table == Table.SHORTCUTS.number and owner is not None and owner[0] is CookieKind.SHORTCUT
