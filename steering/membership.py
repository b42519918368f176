"""Which VM is in which zone, and which VMs a policy's peers name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from steering.model import Machine, MachineRecord, Peer, Zone


def is_in_zone(zone: Zone, tags: Mapping[str, str]) -> bool:
    return bool(zone.match_tags) and all(
        tags.get(key) == value for key, value in zone.match_tags.items()
    )


def find_zones(zones: Iterable[Zone], tags: Mapping[str, str]) -> tuple[str, ...]:
    """The names of the zones that a VM with these tags is in, sorted."""
    return tuple(sorted(zone.name for zone in zones if is_in_zone(zone, tags)))


@dataclass(frozen=True, slots=True)
class ZoneIndex:
    """Zones by the tags that they demand: finds a VM's zones without a walk over all of them."""

    demands: Mapping[str, int]
    by_tag: Mapping[tuple[str, str], tuple[str, ...]]

    def find_zones(self, tags: Mapping[str, str]) -> tuple[str, ...]:
        """As the function of that name."""
        met = Counter(name for tag in tags.items() for name in self.by_tag.get(tag, ()))
        return tuple(sorted(name for name, count in met.items() if count == self.demands[name]))


def build_zone_index(zones: Iterable[Zone]) -> ZoneIndex:
    demands: dict[str, int] = {}
    by_tag: dict[tuple[str, str], list[str]] = {}
    for zone in zones:
        demands[zone.name] = len(zone.match_tags)
        for tag in zone.match_tags.items():
            by_tag.setdefault(tag, []).append(zone.name)
    return ZoneIndex(demands, {tag: tuple(names) for tag, names in by_tag.items()})


@dataclass(frozen=True, slots=True)
class Membership:
    """The members of every zone and the vm-ids of every name, among the VMs it was built from.

    A name means more than one only where a port carries as its vm-id what is another VM's name; then, as in
    `decide`, it means both: the named VM must not lose its policies to whoever comes by such an id.
    """

    by_zone: Mapping[str, frozenset[str]]
    by_name: Mapping[str, frozenset[str]]

    def find_members(self, peers: Iterable[Peer]) -> frozenset[str]:
        """The vm-ids that these peers name."""
        members: set[str] = set()
        for peer in peers:
            if peer.zone is not None:
                members |= self.by_zone.get(peer.zone, frozenset())
            elif peer.vm is not None:
                members |= self.by_name.get(peer.vm, frozenset())
        return frozenset(members)


def build_membership(
    zones: Iterable[Zone], machines: Sequence[Machine] | Sequence[MachineRecord]
) -> Membership:
    index = build_zone_index(zones)
    by_zone: dict[str, set[str]] = {}
    for machine in machines:
        for name in index.find_zones(machine.tags):
            by_zone.setdefault(name, set()).add(machine.vm_id)
    names = {machine.vm_id: frozenset({machine.vm_id}) for machine in machines}
    for machine in machines:
        names[machine.name] = names.get(machine.name, frozenset()) | {machine.vm_id}
    return Membership({zone: frozenset(members) for zone, members in by_zone.items()}, names)
