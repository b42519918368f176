"""A packet that is judged before conntrack by the tables of before a change, and behind it by those of after.

OVS renews its datapath flows one by one; those before conntrack and those behind it are not the same ones.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steering.compile import compile_program
from steering.decide import resolve_machines
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
from tests.support.simulator import Frame, Journey, Simulator
from tests.support.worlds import LANES, build_port, build_record, policy_sets

PORTS = tuple(build_port(number) for number in range(1, 7))
pairs = st.lists(st.integers(1, 6), min_size=2, max_size=2, unique=True)


def build(policies: PolicySet, ports: tuple[Port, ...], ghosts: tuple[Port, ...] = ()) -> Program:
    return compile_program(policies, resolve_machines(policies, ports), LANES, 0, ghosts)


def build_syn(pair: list[int], port: int) -> Frame:
    source, destination = PORTS[pair[0] - 1], PORTS[pair[1] - 1]
    return Frame(source.ofport, source.mac, destination.mac, tp_src=40_000, tp_dst=port, syn=True)


def tell(journey: Journey) -> object:
    return "direct" if journey.normal else tuple(journey.outputs)


def meet(before: Program, after: Program, frame: Frame) -> tuple[object, object, object]:
    """What becomes of it by the one, by the other, and by the one before and the other behind conntrack."""
    ways = (Simulator(before), Simulator(after), Simulator(before, later=after))
    old, new, half = (tell(simulator.send(frame)) for simulator in ways)
    return old, new, half


@settings(max_examples=150, deadline=None)
@given(policy_sets(), policy_sets(), pairs, st.integers(0, 1500))
def test_a_change_of_policies_leads_a_packet_the_old_way_or_the_new(
    former: PolicySet, policies: PolicySet, pair: list[int], port: int
) -> None:
    old, new, half = meet(build(former, PORTS), build(policies, PORTS), build_syn(pair, port))
    assert half in (old, new)


@settings(max_examples=150, deadline=None)
@given(policy_sets(), pairs, st.integers(0, 1500), st.sampled_from(["receiver", "sender"]))
def test_a_vm_whose_port_goes_is_not_passed_by_in_between(
    policies: PolicySet, pair: list[int], port: int, who: str
) -> None:
    gone = PORTS[pair[who == "receiver"] - 1]
    after = build(policies, tuple(p for p in PORTS if p != gone), (replace(gone, ofport=0),))
    old, new, half = meet(build(policies, PORTS), after, build_syn(pair, port))
    assert half in (old, new)


@settings(max_examples=150, deadline=None)
@given(policy_sets(), pairs, st.integers(0, 1500))
def test_a_vm_that_is_on_another_port_now_is_inspected_in_between(
    policies: PolicySet, pair: list[int], port: int
) -> None:
    moved = replace(PORTS[pair[1] - 1], ofport=60)
    after = build(policies, tuple(moved if p.mac == moved.mac else p for p in PORTS))
    old, new, half = meet(build(policies, PORTS), after, build_syn(pair, port))
    if "direct" in (old, new):
        return
    assert half in (old, new)


def test_the_half_way_is_looked_at() -> None:
    """Else the three above could not fail."""
    inspect = Policy(
        "inspect", 10, (Peer(vm="vm-1"),), (Peer(vm="vm-2"),), (Service(),), tuple(Family),
        Inspect(Profile.PREVENT, OnFailure.CLOSED),
    )  # fmt: skip
    policies = PolicySet(tuple(build_record(n) for n in (1, 2)), (), (inspect,))
    before, empty = build(policies, PORTS), build(PolicySet(policies.machines), PORTS)
    old, new, half = meet(before, empty, build_syn([1, 2], 80))
    assert old == ((LANES[0].leg_a.ofport, LANES[0].vlan),)
    assert new == "direct"
    with pytest.raises(AssertionError):
        assert half == old
