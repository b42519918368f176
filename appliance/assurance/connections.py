"""Connections that take a shortcut: the switch's flows, two for each, paired and given names. Pure."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from steering.errors import HairpinError
from steering.membership import build_membership
from steering.model import Family, Inspect, Machine, PolicySet, Protocol, Service, Trigger
from steering.pipeline import build_policy_number
from steering.services import covers
from steering.shortcut import Connection, Return, Taken


@dataclass(frozen=True, slots=True)
class End:
    """One end. ``packets`` and ``bytes`` were sent by it since the switch passes the connection by itself.

    ``vm_id`` and ``vm`` None: no VM on the switch has that port.
    """

    vm_id: str | None
    vm: str | None
    address: str
    port: int
    packets: int = 0
    bytes: int = 0


@dataclass(frozen=True, slots=True)
class TakenConnection:
    """A connection that the switch passes by itself, both directions in one.

    ``id``: the same as long as it takes its shortcut. ``policy`` and ``trigger`` None: of a policy that is no
    longer in force. ``source`` opened it, as far as the policy tells. ``age`` and ``idle`` in seconds, of the
    older and of the busier direction. ``parts`` are the ids of its flows.
    """

    id: str
    policy: str | None
    trigger: Trigger | None
    family: Family
    source: End
    destination: End
    age: float
    idle: float
    parts: frozenset[str]

    @property
    def packets(self) -> int:
        return self.source.packets + self.destination.packets

    @property
    def bytes(self) -> int:
        return self.source.bytes + self.destination.bytes

    @property
    def vm_ids(self) -> frozenset[str]:
        return frozenset(end.vm_id for end in (self.source, self.destination) if end.vm_id)

    @property
    def wanted(self) -> Connection:
        """As steering names it."""
        return Connection(
            self.policy or "",
            self.family,
            self.source.address,
            self.source.port,
            self.destination.address,
            self.destination.port,
        )


@dataclass(frozen=True, slots=True)
class Roles:
    """What a policy with a shortcut says of its connections' ends; VMs by vm-id."""

    name: str
    trigger: Trigger
    sources: frozenset[str]
    destinations: frozenset[str]
    services: tuple[Service, ...]

    def is_opened_by(self, source: End, destination: End) -> bool:
        return (
            source.vm_id in self.sources
            and destination.vm_id in self.destinations
            and any(covers(one, Protocol.TCP, destination.port) for one in self.services)
        )


@dataclass(frozen=True, slots=True)
class _Place:
    """A VM's port as a flow names it: by its MAC, or (a port that is gone) by its ofport."""

    name: str
    vm_id: str | None = None
    vm: str | None = None


@dataclass(slots=True)
class _Pair:
    """Of one connection the flows that were found so far, by who sends."""

    policy_number: int
    family: Family
    ends: list[tuple[_Place, str, int]]
    flows: dict[tuple[_Place, str, int], Taken] = field(default_factory=dict)


def build_roles(policies: PolicySet, machines: Sequence[Machine]) -> dict[int, Roles]:
    """By policy number: the policies that allow a shortcut."""
    membership = build_membership(policies.zones, machines)
    return {
        build_policy_number(policy.name): Roles(
            policy.name,
            policy.action.shortcut.after,
            membership.find_members(policy.sources),
            membership.find_members(policy.destinations),
            policy.services,
        )
        for policy in policies.policies
        if isinstance(policy.action, Inspect) and policy.action.shortcut is not None
    }


def pair_taken(
    taken: Iterable[Taken], policies: PolicySet, machines: Sequence[Machine]
) -> tuple[TakenConnection, ...]:
    """The connections of these flows, the oldest first. Raises HairpinError for what is no such flow.

    A direction whose other one is gone (it was idle) is a connection too.
    """
    by_ofport, by_mac = _find_places(machines)
    pairs: dict[tuple[int, Family, frozenset[tuple[_Place, str, int]]], _Pair] = {}
    for one in taken:
        family, fields = _read_match(one.match)
        names = ("nw_src", "nw_dst") if family is Family.IPV4 else ("ipv6_src", "ipv6_dst")
        try:
            ofport, mac = int(fields["in_port"]), fields["dl_dst"]
            sender = (
                by_ofport.get(ofport, _Place(f"ofport {ofport}")),
                fields[names[0]],
                int(fields["tp_src"]),
            )
            receiver = (by_mac.get(mac, _Place(mac)), fields[names[1]], int(fields["tp_dst"]))
        except (KeyError, ValueError) as fault:
            raise _unreadable(one.match) from fault
        key = one.policy_number, family, frozenset((sender, receiver))
        pair = pairs.setdefault(key, _Pair(one.policy_number, family, [sender, receiver]))
        pair.flows[sender] = one
    roles = build_roles(policies, machines)
    found = [_build_connection(pair, roles.get(pair.policy_number)) for pair in pairs.values()]
    return tuple(sorted(found, key=lambda one: (-one.age, one.id)))


def _find_places(machines: Sequence[Machine]) -> tuple[dict[int, _Place], dict[str, _Place]]:
    by_ofport: dict[int, _Place] = {}
    by_mac: dict[str, _Place] = {}
    for machine in machines:
        for port in machine.ports:
            place = _Place(port.mac, machine.vm_id, machine.name)
            by_mac[port.mac] = place
            if port.ofport > 0:
                by_ofport[port.ofport] = place
    return by_ofport, by_mac


def _read_match(match: str) -> tuple[Family, Mapping[str, str]]:
    keyword, _, rest = match.partition(",")
    families = {"tcp": Family.IPV4, "tcp6": Family.IPV6}
    if keyword not in families:
        raise _unreadable(match)
    return families[keyword], dict(part.partition("=")[::2] for part in rest.split(","))


def _unreadable(match: str) -> HairpinError:
    return HairpinError(
        f"a flow with Hairpin's cookie in the table of shortcuts is none that it learns: {match!r}",
        "look for another controller; `ovs-ofctl del-flows` removes it",
    )


def _build_connection(pair: _Pair, roles: Roles | None) -> TakenConnection:
    first, second = (_build_end(one, pair.flows.get(one)) for one in pair.ends)
    forth = roles is not None and roles.is_opened_by(first, second)
    back = roles is not None and roles.is_opened_by(second, first)
    # Where the policy would have it either way: the lower port is the one that is served.
    if back if forth != back else first.port < second.port:
        first, second = second, first
    flows = pair.flows.values()
    return TakenConnection(
        id=_find_id(pair),
        policy=None if roles is None else roles.name,
        trigger=None if roles is None else roles.trigger,
        family=pair.family,
        source=first,
        destination=second,
        age=max(one.age for one in flows),
        idle=min(one.idle for one in flows),
        parts=frozenset(one.id for one in flows),
    )


def _build_end(end: tuple[_Place, str, int], sent: Taken | None) -> End:
    place, address, port = end
    packets, size = (sent.packets, sent.bytes) if sent is not None else (0, 0)
    return End(place.vm_id, place.vm, address, port, packets, size)


def _find_id(pair: _Pair) -> str:
    ends = sorted(f"{place.name} {address} {port}" for place, address, port in pair.ends)
    text = f"{pair.policy_number} {pair.family} {ends}"
    return hashlib.blake2s(text.encode(), digest_size=4).hexdigest()


def find_named(
    wanted: Return, connections: Iterable[TakenConnection]
) -> tuple[TakenConnection, ...]:
    """Those that a `Return` sends back, as `steering.shortcut.build_return` does."""
    return tuple(one for one in connections if _is_named(wanted, one))


def _is_named(wanted: Return, one: TakenConnection) -> bool:
    if wanted.is_all or one.policy in wanted.policies or one.parts & wanted.ids:
        return True
    if one.vm_ids & wanted.vm_ids and (not wanted.of_policies or one.policy in wanted.of_policies):
        return True
    ends = {(end.address, end.port) for end in (one.source, one.destination)}
    return any(
        ends
        == {
            (asked.source_address, asked.source_port),
            (asked.destination_address, asked.destination_port),
        }
        for asked in wanted.connections
    )
