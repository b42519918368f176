"""Legs that carry less than VMs send, or more than the switch's super-packets allow, are told."""

from __future__ import annotations

from dataclasses import replace

from steering.decide import resolve_machines
from steering.model import (
    Direct,
    Family,
    Inspect,
    OnFailure,
    Peer,
    Policy,
    PolicySet,
    Profile,
    Service,
)
from steering.widths import find_width_problems
from tests.support.worlds import LANES, build_port, build_record

INSPECTED = Policy(
    "one",
    1,
    (Peer(vm="vm-1"),),
    (Peer(vm="vm-2"),),
    (Service(),),
    (Family.IPV4,),
    Inspect(Profile.PREVENT, OnFailure.CLOSED),
)
VMS = {"vnet1": 1500, "vnet2": 9000, "vnet3": 65_000}


def find(legs: int, *, policy: Policy = INSPECTED, super_packets: bool = False) -> tuple[str, ...]:
    policies = PolicySet(tuple(build_record(n) for n in (1, 2, 3)), (), (policy,))
    machines = resolve_machines(policies, [build_port(n) for n in (1, 2, 3)])
    mtus = {**VMS, "p-a": legs, "p-b": 9004}
    return find_width_problems(policies, machines, LANES[:1], mtus, super_packets=super_packets)


def test_a_leg_that_carries_less_than_an_inspected_vm_sends_is_told() -> None:
    assert find(1600) == (
        "leg p-a carries 1600 bytes, VM port vnet2 sends up to 9000: larger frames of inspected "
        "pairs are lost; `ip link set dev p-a mtu 9004`, and the same for its device in the service "
        "host",
    )
    assert find(9000) == find(65_000) == (), "VM 3 is in no policy"


def test_what_no_policy_inspects_needs_no_leg() -> None:
    assert find(100, policy=replace(INSPECTED, action=Direct("no"))) == ()


def test_with_super_packets_a_leg_may_carry_too_much() -> None:
    assert find(9004, super_packets=True) == tuple(
        f"leg {leg} carries 9004 bytes, VM port vnet1 takes 1500: with userspace-tso-enable "
        "super-packets of inspected pairs are cut too long for it and lost; "
        f"`ip link set dev {leg} mtu 1504`, and the same for its device in the service host"
        for leg in ("p-a", "p-b")
    )
    alike = replace(INSPECTED, destinations=(Peer(vm="vm-1"),))
    assert [said.split()[1] for said in find(1504, policy=alike, super_packets=True)] == ["p-b"]
