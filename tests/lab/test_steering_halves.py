"""What the switch does with packets while it renews its datapath flows after a change: on a real one.

Its threads that renew them are stopped, so what else takes some milliseconds stands still.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from steering.compile import compile_program
from steering.decide import resolve_machines
from steering.diff import build_change
from steering.flows import Program
from steering.model import (
    Family,
    Inspect,
    OnFailure,
    Peer,
    Policy,
    PolicySet,
    Port,
    Profile,
    Service,
)
from steering.switch.openflow import VERSION
from tests.support.dummy_switch import DummySwitch, open_dummy_switch
from tests.support.worlds import LANES, build_port, build_record

pytestmark = pytest.mark.lab

INSPECT = Policy(
    "inspect", 10, (Peer(vm="vm-1"),), (Peer(vm="vm-2"),), (Service(),), tuple(Family),
    Inspect(Profile.PREVENT, OnFailure.CLOSED),
)  # fmt: skip
POLICIES = PolicySet(tuple(build_record(n) for n in (1, 2)), (), (INSPECT,))
PORTS = (build_port(1), build_port(2))
LEG, OTHER = LANES[0].leg_a.ofport, 3


@pytest.fixture
def switch() -> Iterator[DummySwitch]:
    legs = (leg.ofport for lane in LANES for leg in lane.legs)
    with (
        tempfile.TemporaryDirectory(prefix="hp-") as name,
        open_dummy_switch(Path(name), (1, 2, OTHER, 4, *legs)) as switch,
    ):
        yield switch


def build(policies: PolicySet, ports: tuple[Port, ...], *ghosts: Port) -> Program:
    return compile_program(policies, resolve_machines(policies, ports), LANES, 0, ghosts)


def change(switch: DummySwitch, wanted: Program, standing: Program) -> None:
    bundle = build_change(wanted, standing).text
    switch.run("ovs-ofctl", *VERSION, "bundle", switch.target, "-", stdin=bundle)


def build_segment(flags: str) -> Packet:
    ends = IP(src="10.0.0.1", dst="10.0.0.2")
    return Ether(src=PORTS[0].mac, dst=PORTS[1].mac) / ends / TCP(sport=999, dport=80, flags=flags)


def send_over_a_change(switch: DummySwitch, before: Program, after: Program) -> list[int]:
    """A connection that begins before and goes on behind it; frames to the leg, and to a stranger."""
    change(switch, before, Program())
    switch.send(1, build_segment("S"))
    assert len(switch.take(LEG)) == 1
    assert len(switch.take(OTHER)) == 0
    switch.appctl("revalidator/pause")
    change(switch, after, before)
    switch.send(1, build_segment("A"))
    switch.appctl("revalidator/resume")
    return [len(switch.take(LEG)) - 1, len(switch.take(OTHER))]


def test_what_is_on_its_way_to_a_vm_that_goes_is_not_flooded(switch: DummySwitch) -> None:
    after = build(POLICIES, PORTS[:1], replace(PORTS[1], ofport=0))
    assert send_over_a_change(switch, build(POLICIES, PORTS), after) == [0, 0]


def test_what_is_on_its_way_to_a_vm_that_moves_is_inspected(switch: DummySwitch) -> None:
    after = build(POLICIES, (PORTS[0], replace(PORTS[1], ofport=4)))
    assert send_over_a_change(switch, build(POLICIES, PORTS), after) == [1, 0]


def test_what_is_on_its_way_when_all_policies_go_passes(switch: DummySwitch) -> None:
    after = build(PolicySet(POLICIES.machines), PORTS)
    # Flooded: to this switch's legs, too, which are in no VLAN of their own.
    assert send_over_a_change(switch, build(POLICIES, PORTS), after) == [1, 1]
