"""The switch's part of the shortcut, on a real Open vSwitch: what it learns, from what, and how it ends."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from scapy.layers.inet import IP, TCP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Packet, Raw

from steering.check import check_program
from steering.compile import compile_program
from steering.decide import resolve_machines
from steering.diff import build_bundle, build_present
from steering.flows import Present, Program
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
    Shortcut,
    Trigger,
)
from steering.shortcut import PRIORITY_CODES, Connection, Return, build_return
from steering.switch.openflow import OpenFlowSwitch
from tests.support.dummy_switch import DummySwitch, open_dummy_switch
from tests.support.worlds import THREE_LEGGED, build_port, build_record

pytestmark = [pytest.mark.lab, pytest.mark.side_by_side]

A, B, OTHER = (build_port(number) for number in (1, 2, 3))
LANE = THREE_LEGGED[0]
LEG_A, LEG_B, LEG_C = (leg.ofport for leg in LANE.legs)
VLAN = LANE.vlan
CODE = PRIORITY_CODES[Trigger.ONE_MEGABYTE]
CUT = Inspect(Profile.PREVENT, OnFailure.OPEN, shortcut=Shortcut(Trigger.ONE_MEGABYTE, max_flows=3))


def build_policies(action: Inspect | Direct = CUT, name: str = "backup") -> PolicySet:
    policy = Policy(
        name, 100, (Peer(vm="vm-1"),), (Peer(vm="vm-2"),), (Service(),), tuple(Family), action
    )
    return PolicySet(tuple(build_record(n) for n in (1, 2, 3)), (), (policy,))


def build_program(policies: PolicySet) -> Program:
    machines = resolve_machines(policies, (A, B, OTHER))
    program = compile_program(policies, machines, THREE_LEGGED)
    assert check_program(program, THREE_LEGGED) == ()
    return program


@pytest.fixture
def switch() -> Iterator[DummySwitch]:
    ports = (1, 2, 3, *(leg.ofport for lane in THREE_LEGGED for leg in lane.legs))
    with (
        tempfile.TemporaryDirectory(prefix="hp-") as directory,
        open_dummy_switch(Path(directory), ports) as dummy,
    ):
        yield dummy


@pytest.fixture
async def door(switch: DummySwitch) -> OpenFlowSwitch:
    door = OpenFlowSwitch(switch.target)
    await door.send_bundle(build_bundle(build_program(build_policies()), Present()))
    return door


def build_frame(flags: str, *, back: bool = False, port: int = 40_000, six: bool = False) -> Packet:
    source, target = (B, A) if back else (A, B)
    ends = {"src": f"10.0.0.{source.ofport}", "dst": f"10.0.0.{target.ofport}"}
    if six:
        ends = {"src": f"fd00::{source.ofport}", "dst": f"fd00::{target.ofport}"}
    ports = {"sport": 873, "dport": port} if back else {"sport": port, "dport": 873}
    head = (IPv6 if six else IP)(**ends)
    return Ether(src=source.mac, dst=target.mac) / head / TCP(flags=flags, **ports) / Raw(b"x" * 64)


def tagged(frame: Packet, code: int = CODE) -> Packet:
    """As it comes back from the lane."""
    rest = frame.payload
    return Ether(src=frame.src, dst=frame.dst) / Dot1Q(vlan=VLAN, prio=code) / rest


def open_connection(switch: DummySwitch, **ends: object) -> None:
    switch.send(1, build_frame("S", **ends))
    switch.send(2, build_frame("SA", back=True, **ends))
    switch.send(1, build_frame("A", **ends))


def count_taken(switch: DummySwitch) -> int:
    """Packets that TAKE delivered uninspected."""
    switch.appctl("revalidator/wait")
    switch.appctl("revalidator/purge")
    text = switch.run("ovs-ofctl", "-O", "OpenFlow15", "dump-flows", switch.target, "table=26")
    lines = [line for line in text.splitlines() if "priority=200" in line]
    return sum(int(line.split("n_packets=")[1].split(",")[0]) for line in lines)


async def test_what_the_third_leg_brings_back_takes_a_shortcut_both_ways(
    switch: DummySwitch, door: OpenFlowSwitch
) -> None:
    for six in (False, True):
        open_connection(switch, six=six)
    assert await door.read_shortcuts() == ()
    assert count_taken(switch) == 0
    for six in (False, True):
        switch.send(LEG_C, tagged(build_frame("A", six=six)))
    taken = await door.read_shortcuts()
    assert sorted(one.match for one in taken) == [
        "tcp,in_port=1,dl_src=02:00:00:00:00:01,dl_dst=02:00:00:00:00:02,nw_src=10.0.0.1,nw_dst=10.0.0.2,tp_src=40000,tp_dst=873",
        "tcp,in_port=2,dl_src=02:00:00:00:00:02,dl_dst=02:00:00:00:00:01,nw_src=10.0.0.2,nw_dst=10.0.0.1,tp_src=873,tp_dst=40000",
        "tcp6,in_port=1,dl_src=02:00:00:00:00:01,dl_dst=02:00:00:00:00:02,ipv6_src=fd00::1,ipv6_dst=fd00::2,tp_src=40000,tp_dst=873",
        "tcp6,in_port=2,dl_src=02:00:00:00:00:02,dl_dst=02:00:00:00:00:01,ipv6_src=fd00::2,ipv6_dst=fd00::1,tp_src=873,tp_dst=40000",
    ]
    before = len(switch.take(2))
    switch.send(1, build_frame("A"))
    switch.send(2, build_frame("A", back=True))
    switch.send(1, build_frame("A", six=True))
    assert count_taken(switch) == 3
    assert len(switch.take(2)) == before + 2
    program = build_program(build_policies())
    assert not build_bundle(program, await door.read_present()), "what is learned is no drift"


async def test_nothing_but_its_own_third_leg_and_trigger_teaches_a_connection(
    switch: DummySwitch, door: OpenFlowSwitch
) -> None:
    open_connection(switch)
    frame = build_frame("A")
    switch.send(LEG_A, tagged(frame))
    switch.send(LEG_B, tagged(frame))
    for code in range(8):
        if code != CODE:
            switch.send(LEG_C, tagged(frame, code))
    switch.send(LEG_C, frame)  # without a tag
    switch.send(1, tagged(frame))  # a VM that forges one
    assert await door.read_shortcuts() == ()


async def test_no_more_connections_than_the_policy_allows(
    switch: DummySwitch, door: OpenFlowSwitch
) -> None:
    for port in range(40_000, 40_010):
        open_connection(switch, port=port)
        switch.send(LEG_C, tagged(build_frame("A", port=port)))
    assert len(await door.read_shortcuts()) == 2 * 3
    steered = len(switch.take(LEG_A))
    switch.send(1, build_frame("A", port=40_009))
    assert len(switch.take(LEG_A)) == steered + 1, "the others are inspected"
    assert count_taken(switch) == 0


async def test_a_connection_that_begins_anew_is_inspected_from_its_first_byte(
    switch: DummySwitch, door: OpenFlowSwitch
) -> None:
    open_connection(switch)
    switch.send(LEG_C, tagged(build_frame("A")))
    assert len(await door.read_shortcuts()) == 2
    for _ in range(3):  # also where the datapath knows such SYNs from before
        steered, delivered = len(switch.take(LEG_A)), len(switch.take(2))
        switch.send(1, build_frame("S"))
        assert len(switch.take(LEG_A)) == steered, "the first one only ends the shortcut"
        await wait_gone(door)
        await asyncio.sleep(0.2)
        switch.send(1, build_frame("S"))
        switch.send(2, build_frame("SA", back=True))
        switch.send(1, build_frame("A"))
        switch.send(2, build_frame("A", back=True))
        assert len(switch.take(LEG_A)) == steered + 2
        assert len(switch.take(2)) == delivered
        assert count_taken(switch) == 0
        switch.send(LEG_C, tagged(build_frame("A")))
        assert len(await door.read_shortcuts()) == 2, "and may take one again"


async def wait_gone(door: OpenFlowSwitch, seconds: float = 8) -> None:
    for _ in range(round(seconds / 0.1)):
        if not await door.read_shortcuts():
            return
        await asyncio.sleep(0.1)
    raise AssertionError(await door.read_shortcuts())


async def test_those_that_ended_count_in_the_bound(
    switch: DummySwitch, door: OpenFlowSwitch
) -> None:
    for port in range(40_000, 40_008):
        open_connection(switch, port=port)
        switch.send(LEG_C, tagged(build_frame("A", port=port)))
        switch.send(1, build_frame("S", port=port))
    shown = switch.run("ovs-ofctl", "-O", "OpenFlow15", "dump-flows", switch.target, "table=25")
    assert shown.count("table=25") == 2 * 3


async def test_an_answers_syn_ends_it_too_and_fin_ends_it_soon(
    switch: DummySwitch, door: OpenFlowSwitch
) -> None:
    open_connection(switch)
    switch.send(LEG_C, tagged(build_frame("A")))
    switch.send(2, build_frame("SA", back=True))
    await wait_gone(door)
    switch.send(LEG_C, tagged(build_frame("A")))
    switch.send(1, build_frame("FA"))
    switch.send(2, build_frame("FA", back=True))
    for _ in range(40):
        if not await door.read_shortcuts():
            break
        await asyncio.sleep(0.2)
    assert await door.read_shortcuts() == ()


async def test_another_vm_with_these_addresses_takes_no_shortcut(
    switch: DummySwitch, door: OpenFlowSwitch
) -> None:
    open_connection(switch)
    switch.send(LEG_C, tagged(build_frame("A")))
    forged = build_frame("A")
    forged.src = OTHER.mac
    switch.send(3, forged)
    assert count_taken(switch) == 0


@pytest.mark.parametrize(
    "wanted",
    [
        Return(),
        Return(policies=frozenset({"backup"})),
        Return(vm_ids=frozenset({"vm-1"})),
        Return(vm_ids=frozenset({"vm-2"})),
        Return(
            connections=frozenset(
                {Connection("backup", Family.IPV4, "10.0.0.2", 873, "10.0.0.1", 40_000)}
            )
        ),
    ],
)
async def test_returned_connections_are_inspected_again(
    switch: DummySwitch, door: OpenFlowSwitch, wanted: Return
) -> None:
    open_connection(switch)
    steered = len(switch.take(LEG_A))
    switch.send(LEG_C, tagged(build_frame("A")))
    switch.send(1, build_frame("A"))
    assert len(switch.take(LEG_A)) == steered
    machines = resolve_machines(build_policies(), (A, B, OTHER))
    other = Return(policies=frozenset({"another"}), vm_ids=frozenset({"vm-3"}))
    await door.send_lines(build_return(other, machines))
    assert len(await door.read_shortcuts()) == 2
    await door.send_lines(build_return(wanted, machines))
    assert await door.read_shortcuts() == ()
    switch.send(1, build_frame("A"))
    into = switch.take(LEG_A)
    assert len(into) == steered + 1
    assert {(frame[Dot1Q].vlan, frame[Dot1Q].prio) for frame in into} == {(VLAN, CODE)}


async def test_one_connection_is_returned_by_its_id(
    switch: DummySwitch, door: OpenFlowSwitch
) -> None:
    for port in (40_000, 40_001):
        open_connection(switch, port=port)
        switch.send(LEG_C, tagged(build_frame("A", port=port)))
    taken = await door.read_shortcuts()
    chosen = frozenset(one.id for one in taken if "40001" in one.match)
    await door.send_lines(build_return(Return(ids=chosen), (), taken))
    assert {one.id for one in await door.read_shortcuts()} == {one.id for one in taken} - chosen


async def test_a_policy_without_the_shortcut_ends_it_in_its_own_bundle(
    switch: DummySwitch, door: OpenFlowSwitch
) -> None:
    open_connection(switch)
    switch.send(LEG_C, tagged(build_frame("A")))
    without = build_program(build_policies(replace(CUT, shortcut=None)))
    present = build_present(build_program(build_policies()))
    await door.send_bundle(build_bundle(without, present), build_return(Return(), ()))
    assert await door.read_shortcuts() == ()
    # A frame that was in the lane as the policy changed.
    switch.send(LEG_C, tagged(build_frame("A")))
    assert await door.read_shortcuts() == ()
    assert len(switch.take(2)) == 2, "it arrived none the less"
