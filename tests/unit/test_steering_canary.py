"""The flows of Hairpin's own port: a canary takes its lane's way and no other, and nothing else passes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steering.canary import SOURCE_MAC, build_destination_mac
from steering.check import Checker, check_program
from steering.compile import compile_program
from steering.compile_canary import find_canary_macs
from steering.counters import Count, build_counters, find_tallies
from steering.decide import resolve_machines
from steering.flows import Flow, FlowKey, Piece, Program
from steering.model import Lane, PolicySet
from steering.pipeline import CookieKind, Table, build_cookie
from steering.reach import FlowIndex, Reached, find_reached, find_reached_in
from tests.support.simulator import Frame, Simulator
from tests.support.worlds import CANARY, LANES, build_port, policy_sets

PORTS = tuple(build_port(number) for number in range(1, 7))
BASE = build_cookie(CookieKind.BASE)
LEGS = frozenset(leg.ofport for lane in LANES for leg in (lane.leg_a, lane.leg_b))


def build(policies: PolicySet, lanes: tuple[Lane, ...] = LANES) -> Program:
    return compile_program(policies, resolve_machines(policies, PORTS), lanes, CANARY)


def build_canary(lane: Lane, *, answer: bool, ip: int = 4) -> Frame:
    mac = build_destination_mac(lane, answer=answer)
    return Frame(CANARY, SOURCE_MAC, mac, ip=ip, protocol=17, tp_src=50_000, tp_dst=4850)


each_way = pytest.mark.parametrize(
    ("lane", "answer", "ip"),
    [(lane, answer, ip) for lane in LANES for answer in (False, True) for ip in (4, 6)],
)


@each_way
def test_a_canary_goes_into_its_lane_and_comes_back_to_its_port(
    lane: Lane, answer: bool, ip: int
) -> None:
    simulator = Simulator(build(PolicySet()))
    frame = build_canary(lane, answer=answer, ip=ip)
    entry, exit_ = (lane.leg_b, lane.leg_a) if answer else (lane.leg_a, lane.leg_b)
    for _ in range(2):  # conntrack does not know it the first time
        there = simulator.send(frame)
        assert (there.outputs, there.normal) == ([(entry.ofport, lane.vlan)], False)
    back = simulator.send(replace(frame, in_port=exit_.ofport, vlan=lane.vlan))
    assert (back.outputs, back.normal) == ([(CANARY, None)], False)


@each_way
def test_a_canary_never_goes_round_a_dead_engine(lane: Lane, answer: bool, ip: int) -> None:
    journey = Simulator(build(PolicySet()), dead=LEGS).send(
        build_canary(lane, answer=answer, ip=ip)
    )
    assert (journey.outputs, journey.normal) == ([], False)
    assert journey.tables[-1] == "STEER", "it met the group, which has no live bucket"


def test_all_else_from_the_port_is_dropped() -> None:
    simulator = Simulator(build(PolicySet()))
    good = build_canary(LANES[0], answer=False)
    for frame in (
        replace(good, dl_src=PORTS[0].mac),
        replace(good, dl_dst=PORTS[0].mac),
        replace(good, dl_dst="ff:ff:ff:ff:ff:ff"),
        replace(good, ip="arp"),
        replace(good, ip=None),
        replace(good, vlan=7),
        replace(good, vlan=LANES[0].vlan),
    ):
        journey = simulator.send(frame)
        assert (journey.outputs, journey.normal, journey.learned) == ([], False, 0), frame


@settings(max_examples=50, deadline=None)
@given(policy_sets(), st.integers(1, 6), st.sampled_from(sorted(find_canary_macs(LANES))))
def test_no_vm_uses_a_canarys_mac(policies: PolicySet, sender: int, mac: str) -> None:
    simulator = Simulator(build(policies))
    journey = simulator.send(Frame(sender, mac, PORTS[sender % 6].mac))
    assert (journey.outputs, journey.normal) == ([], False)
    to = simulator.send(Frame(sender, PORTS[sender - 1].mac, mac))
    assert to.outputs == [], "what a VM sends to it neither enters a lane nor reaches the port"


def test_a_vm_with_a_canarys_mac_is_not_steered() -> None:
    thief = replace(PORTS[0], mac=SOURCE_MAC)
    machines = resolve_machines(PolicySet(), (thief,))
    program = compile_program(PolicySet(), machines, LANES, CANARY)
    assert check_program(program, LANES, CANARY) == ()
    assert [flow for flow in program.flows if "in_port=1" in flow.match.split(",")] == []


def test_without_the_port_none_of_its_flows_stands() -> None:
    program = compile_program(PolicySet(), (), LANES)
    assert [flow for flow in program.flows if flow.cookie >> 40 & 0xFF == CookieKind.CANARY] == []
    assert SOURCE_MAC not in str(program)


def test_the_check_finds_a_way_out_for_the_canarys_port() -> None:
    program = build(PolicySet())
    for flow, where in (
        (Flow(Table.GUARD, 95, f"in_port={CANARY}", "resubmit(,80)", 0), "DIRECT"),
        (Flow(Table.GUARD, 95, "arp", "resubmit(,80)", 0), "DIRECT"),
        (Flow(Table.POLICY, 60_001, "udp", "resubmit(,80)", 0), "DIRECT"),
        (Flow(Table.COMMIT, 200, "", "resubmit(,70)", 0), "DELIVER"),
    ):
        flows = sorted((*program.flows, flow), key=lambda one: (one.key.table, -one.priority))
        reached = find_reached(Program(tuple(flows), program.groups), {"in_port": str(CANARY)})
        assert Table[where] in reached.tables, flow
        told = check_program(Program(tuple(flows), program.groups), LANES, CANARY)
        assert f"the canary's port {CANARY} reaches {where}" in told
    open_way = tuple(
        replace(flow, actions=flow.actions.replace("0x10->reg2", "0x11->reg2"))
        for flow in program.flows
    )
    told = check_program(Program(open_way, program.groups), LANES, CANARY)
    assert any("reaches groups" in sentence for sentence in told)


def test_a_check_that_follows_finds_every_way_out_too(monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[FlowIndex] = []

    def find(index: FlowIndex) -> Reached:
        looked.append(index)
        return find_reached_in(index)

    monkeypatch.setattr("steering.check.find_reached_in", find)
    base = build(PolicySet())
    # Each flow by itself, so that nothing but what came or went is looked at.
    alone = {flow: Piece((flow,)) for flow in base.flows}
    whole = Program(groups=base.groups, pieces=tuple(alone.values()))
    astray = [
        Flow(table, priority, match, actions, BASE)
        for table in Table
        for priority in (0, 50, 95, 201, 60_001)
        for match in ("", "udp", f"in_port={CANARY}", "in_port=1")
        for actions in ("resubmit(,80)", "drop")
    ]
    changed = [
        *(tuple(piece for flow, piece in alone.items() if flow is not gone) for gone in alone),
        *((*whole.pieces, Piece((flow,))) for flow in astray if flow.key not in known(base)),
    ]
    checker, found = Checker(), 0
    for pieces in changed:
        assert checker.check(whole, LANES, CANARY) == ()
        other = Program(groups=base.groups, pieces=pieces)
        told = checker.check(other, LANES, CANARY)
        assert set(told) == set(check_program(other, LANES, CANARY)), pieces[-1]
        found += bool(told)
    assert 50 < found < len(changed), "some lead astray, some do not"
    checker = Checker()
    assert checker.check(whole, LANES, CANARY) == ()
    looked.clear()
    below = Flow(Table.POLICY, 7, "reg4=0x1", "drop", BASE)
    assert (
        checker.check(
            Program(groups=base.groups, pieces=(*whole.pieces, Piece((below,)))), LANES, CANARY
        )
        == ()
    )
    assert looked == [], "what a canary never meets changes nothing for it"


def known(program: Program) -> set[FlowKey]:
    return {flow.key for flow in program.flows}


def test_canaries_are_counted_where_they_enter_and_where_they_are_steered() -> None:
    flows = [
        (flow.key, flow.cookie, place + 1, 100 * (place + 1))
        for place, flow in enumerate(build(PolicySet()).flows)
        if flow.cookie >> 40 & 0xFF == CookieKind.CANARY
        and flow.table in (Table.CLASSIFY, Table.POLICY)
    ]
    foreign = (FlowKey(Table.POLICY.number, 60_000, "x"), build_cookie(CookieKind.CANARY, 9), 7, 7)
    tallies = find_tallies([*flows, foreign], [], PolicySet(), LANES)
    counters = build_counters(tallies, PolicySet(), LANES)
    by_lane = {
        lane.name: sum(
            p for _, c, p, _ in flows if c == build_cookie(CookieKind.CANARY, lane.number)
        )
        for lane in LANES
    }
    assert {name: count.packets for name, count in counters.canary.items()} == by_lane
    assert counters.canary_port == Count(flows[0][2], flows[0][3])
