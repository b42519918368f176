"""Classes of VMs: those in the same zones are one number to a policy. Pure.

A class is the set of zones that a VM is in, of the zones that some policy names. So a policy has a clause for
each class in its zones and not for each VM, and a VM that arrives in a class that is there changes nothing
but its own flows. The number is made from the zones' names only: neither other VMs nor policies change it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from steering.membership import Membership
from steering.model import Peer, Policy

NO_CLASS = 0  # what a register holds that nobody wrote


@dataclass(frozen=True, slots=True)
class Classes:
    """``by_vm``: the class of each VM that is in such a zone; ``by_zone``: the classes in each, sorted."""

    by_vm: Mapping[str, int]
    by_zone: Mapping[str, tuple[int, ...]]

    def find_classes(self, peers: Iterable[Peer]) -> tuple[int, ...]:
        """Those of the zones among the peers, sorted."""
        zones = {peer.zone for peer in peers if peer.zone is not None}
        return tuple(sorted({number for zone in zones for number in self.by_zone.get(zone, ())}))


def build_classes(
    policies: Iterable[Policy], membership: Membership, vm_ids: Iterable[str]
) -> Classes:
    """The classes of these VMs."""
    named = {
        peer.zone
        for policy in policies
        for peer in (*policy.sources, *policy.destinations)
        if peer.zone is not None
    }
    wanted = frozenset(vm_ids)
    zones_of: dict[str, list[str]] = {}
    for zone in sorted(named & membership.by_zone.keys()):
        for vm_id in membership.by_zone[zone] & wanted:
            zones_of.setdefault(vm_id, []).append(zone)
    sets = {vm_id: tuple(zones) for vm_id, zones in zones_of.items()}
    numbers = number_classes(sets.values())
    by_zone: dict[str, list[int]] = {}
    for zones, number in numbers.items():
        for zone in zones:
            by_zone.setdefault(zone, []).append(number)
    return Classes(
        {vm_id: numbers[zones] for vm_id, zones in sets.items()},
        {zone: tuple(sorted(found)) for zone, found in by_zone.items()},
    )


def number_classes(sets: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], int]:
    """A number of 32 bits, never 0, for each set of zones (sorted); no two have the same.

    Should two sets' numbers meet, the later one, by the zones' names, takes its next.
    """
    numbers: dict[tuple[str, ...], int] = {}
    taken = {NO_CLASS}
    for zones in sorted(set(sets)):
        number, attempt = hash_zones(zones), 0
        while number in taken:
            attempt += 1
            number = hash_zones(zones, attempt)
        taken.add(number)
        numbers[zones] = number
    return numbers


def hash_zones(zones: tuple[str, ...], attempt: int = 0) -> int:
    # No name of a zone has a slash in it, so different sets are different texts.
    text = "/".join(zones) + "/" * attempt
    return int.from_bytes(hashlib.blake2s(text.encode(), digest_size=4).digest(), "big")
