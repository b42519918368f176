"""What the switch dropped or let through beside the policies is told, with whose it was and a mend."""

from __future__ import annotations

from appliance.management.render import build_counter_gaps
from steering.counters import Count, Counters, LaneCount
from steering.decide import resolve_machines
from steering.model import PolicySet
from tests.support.worlds import build_port, build_record

MACHINES = resolve_machines(
    PolicySet((build_record(1), build_record(2))), [build_port(1), build_port(2)]
)


def find_reasons(counters: Counters) -> list[tuple[str, list[str]]]:
    gaps = build_counter_gaps(counters, MACHINES)
    assert all(gap.mend for gap in gaps)
    return [(gap.reason, [vm.name for vm in gap.vms]) for gap in gaps]


def test_what_was_not_counted_is_no_gap() -> None:
    none = Count()
    quiet = Counters({}, {"prevent": LaneCount()}, {1: none}, {1: none}, claims={0: none})
    assert find_reasons(quiet) == []


def test_broadcast_and_multicast_are_counted_but_no_gap() -> None:
    """DHCP and mDNS are everywhere."""
    assert find_reasons(Counters({}, {}, {}, {}, many=Count(500, 60_000))) == []


def test_drops_are_told_with_the_vm_that_they_concern() -> None:
    counted = Counters(
        policies={},
        lanes={"prevent": LaneCount(bypassed=Count(7, 700))},
        spoofed={1: Count(1, 60)},
        tagged={2: Count(2, 120)},
        strays=Count(6, 360),
        ghosts=Count(5, 300),
        claims={0: Count(8, 480), 1: Count(4, 240)},
        unread={2: Count(3, 180), 9: Count(3, 180)},
    )
    assert find_reasons(counted) == [
        (
            "7 packets (700 bytes) passed uninspected by open policies while lane prevent was down",
            [],
        ),
        (
            "1 frames of host-1 or in its name were dropped that lied about their sender (MAC, ARP or ND)",
            ["host-1"],
        ),
        (
            "2 frames of host-2 or in its name were dropped that carried a VLAN tag of the VM's own",
            ["host-2"],
        ),
        (
            "3 frames of host-2 to VMs that policies name were dropped: they are neither IP nor ARP "
            "(MPLS, PPPoE, LLC), and nothing could inspect them",
            ["host-2"],
        ),
        (
            "8 claims (ARP, ND) of an address that the documents give to a VM that is gone were dropped",
            [],
        ),
        (
            "4 claims (ARP, ND) of an address that the documents give to host-1 were dropped",
            ["host-1"],
        ),
        (
            "6 unicast IP packets in broadcast or multicast frames, sent by VMs that policies name, "
            "were dropped: they would have passed uninspected",
            [],
        ),
        (
            "5 frames were dropped, from or to VMs that policies name and whose ports are gone or "
            "share a MAC",
            [],
        ),
    ]
