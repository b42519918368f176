"""Policies that contradict each other: equal priority, another outcome, and something in common.

Conservative: two zones have a VM in common unless they demand different values of one tag, whether or
not such a VM is declared today. A VM's own zones are what its tags say.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby

from steering.membership import Membership, build_membership, build_zone_index
from steering.model import Action, Direct, Family, Inspect, Peer, Policy, PolicySet
from steering.services import build_spaces, find_example


@dataclass(frozen=True, slots=True)
class Contradiction:
    """``first`` and ``second`` are positions in ``PolicySet.policies``, the first before the second.

    ``overlap`` says in words what both cover.
    """

    first: int
    second: int
    overlap: str


def find_outcome(action: Action) -> str:
    """What becomes of the traffic. Reasons don't count: two that send it direct agree."""
    if isinstance(action, Inspect):
        return str(action)
    return "direct" if isinstance(action, Direct) else "deny"


@dataclass(frozen=True, slots=True)
class _Reach:
    """A policy as bit sets: the peers it names itself, and those that share a VM with them."""

    sources: int
    destinations: int
    reached_sources: int
    reached_destinations: int
    families: frozenset[Family]
    space: int
    outcome: str

    def meets(self, other: _Reach) -> bool:
        return (
            self.outcome != other.outcome
            and bool(self.reached_sources & other.sources)
            and bool(self.reached_destinations & other.destinations)
            and bool(self.space & other.space)
            and bool(self.families & other.families)
        )


class _Peers:
    """Numbers every zone and every VM that a policy names, and knows which of them share a VM."""

    def __init__(self, policies: PolicySet) -> None:
        tags = {record.vm_id: record.tags for record in policies.machines}
        self._vm_ids = {record.name: record.vm_id for record in policies.machines}
        self._vm_ids |= {vm_id: vm_id for vm_id in tags}
        self._demands = {zone.name: zone.match_tags for zone in policies.zones}
        self._zone_bits = {name: 1 << number for number, name in enumerate(self._demands)}
        self._vm_bits: dict[str, int] = {}
        for policy in policies.policies:
            for peer in (*policy.sources, *policy.destinations):
                if peer.vm is not None:
                    fresh = 1 << (len(self._zone_bits) + len(self._vm_bits))
                    self._vm_bits.setdefault(self._vm_ids.get(peer.vm, peer.vm), fresh)
        self._with_key: dict[str, int] = {}
        self._with_tag: dict[tuple[str, str], int] = {}
        for name, demands in self._demands.items():
            for tag in demands.items():
                bit = self._zone_bits[name]
                self._with_key[tag[0]] = self._with_key.get(tag[0], 0) | bit
                self._with_tag[tag] = self._with_tag.get(tag, 0) | bit
        index = build_zone_index(policies.zones)
        self._zones_of_vm: dict[str, int] = {}
        self._vms_of_zone: dict[str, int] = {}
        for vm_id, bit in self._vm_bits.items():
            for name in index.find_zones(tags.get(vm_id, {})):
                self._zones_of_vm[vm_id] = self._zones_of_vm.get(vm_id, 0) | self._zone_bits[name]
                self._vms_of_zone[name] = self._vms_of_zone.get(name, 0) | bit
        self._reached: dict[Peer, int] = {}

    def number(self, peers: Sequence[Peer]) -> int:
        """The bits of these peers; a zone that is not declared has none."""
        bits = 0
        for peer in peers:
            if peer.vm is not None:
                bits |= self._vm_bits[self._vm_ids.get(peer.vm, peer.vm)]
            elif peer.zone is not None:
                bits |= self._zone_bits.get(peer.zone, 0)
        return bits

    def reach(self, peers: Sequence[Peer]) -> int:
        """The bits of all zones and VMs that share a VM with one of these peers."""
        bits = 0
        for peer in peers:
            if peer not in self._reached:
                self._reached[peer] = self._reach(peer)
            bits |= self._reached[peer]
        return bits

    def _reach(self, peer: Peer) -> int:
        if peer.vm is not None:
            vm_id = self._vm_ids.get(peer.vm, peer.vm)
            return self._vm_bits[vm_id] | self._zones_of_vm.get(vm_id, 0)
        demands = self._demands.get(peer.zone or "")
        if demands is None:
            return 0
        bits = (1 << len(self._zone_bits)) - 1
        for tag in demands.items():
            bits &= ~(self._with_key[tag[0]] & ~self._with_tag[tag])
        return bits | self._vms_of_zone.get(peer.zone or "", 0)


def find_contradictions(policies: PolicySet) -> Iterator[Contradiction]:
    """Every pair of policies that contradict, found as it is asked for: there may be many."""
    peers = _Peers(policies)
    describe = _Describer(policies, peers)
    ranked = sorted(range(len(policies.policies)), key=lambda n: (policies.policies[n].priority, n))
    for _, group in groupby(ranked, key=lambda number: policies.policies[number].priority):
        numbers = list(group)
        if len({find_outcome(policies.policies[n].action) for n in numbers}) < 2:
            continue
        reaches = [(n, _build_reach(policies.policies[n], peers)) for n in numbers]
        for (first, one), (second, other) in combinations(reaches, 2):
            if one.meets(other):
                yield Contradiction(first, second, describe(first, second))


def _build_reach(policy: Policy, peers: _Peers) -> _Reach:
    return _Reach(
        sources=peers.number(policy.sources),
        destinations=peers.number(policy.destinations),
        reached_sources=peers.reach(policy.sources),
        reached_destinations=peers.reach(policy.destinations),
        families=frozenset(policy.families),
        space=build_spaces(policy.services),
        outcome=find_outcome(policy.action),
    )


class _Describer:
    """Says in words what two policies have in common; looks at all the VMs only once asked."""

    def __init__(self, policies: PolicySet, peers: _Peers) -> None:
        self._policies = policies
        self._peers = peers
        self._names = {record.vm_id: record.name for record in policies.machines}
        self._membership: Membership | None = None

    def __call__(self, first: int, second: int) -> str:
        one, other = self._policies.policies[first], self._policies.policies[second]
        service = find_example(build_spaces(one.services) & build_spaces(other.services))
        families = [
            str(family) for family in Family if family in {*one.families} & {*other.families}
        ]
        sources = self._describe(one.sources, other.sources)
        destinations = self._describe(one.destinations, other.destinations)
        return f"{sources} to {destinations}, {service}, {' and '.join(families)}"

    def _describe(self, some: Sequence[Peer], others: Sequence[Peer]) -> str:
        shared = sorted(self._find_names(some) & self._find_names(others))
        if shared:
            more = f" and {len(shared) - 3} more VMs" if len(shared) > 3 else ""
            return f"{', '.join(shared[:3])}{more}"
        for one in some:
            for other in others:
                if self._peers.reach([one]) & self._peers.number([other]):
                    return f"any VM that is in {one} and in {other} (their tags allow one)"
        raise ValueError("these peers have nothing in common")

    def _find_names(self, peers: Sequence[Peer]) -> set[str]:
        if self._membership is None:
            self._membership = build_membership(self._policies.zones, self._policies.machines)
        members = self._membership.find_members(peers)
        unknown = {
            peer.vm for peer in peers if peer.vm is not None
        } - self._membership.by_name.keys()
        return {self._names[vm_id] for vm_id in members} | unknown
