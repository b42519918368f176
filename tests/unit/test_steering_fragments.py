"""Fragments, which tell little of what they belong to: no policy is passed by cutting packets up."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steering.compile import compile_program
from steering.decide import Connection, decide, resolve_machines
from steering.model import (
    Action,
    Deny,
    Direct,
    Family,
    Inspect,
    OnFailure,
    Peer,
    Policy,
    PolicySet,
    PortRange,
    Profile,
    Protocol,
    Service,
)
from tests.support.simulator import Frame, Journey, Simulator
from tests.support.worlds import LANES, build_port, build_record, policy_sets

PORTS = tuple(build_port(number) for number in range(1, 7))
BOTH = (Family.IPV4, Family.IPV6)
TELNET = Service(Protocol.TCP, (PortRange(23, 23),))
PREVENT, DETECT = LANES
WATCH = Inspect(Profile.DETECT, OnFailure.OPEN)


def build_policy(priority: int, action: Action, *services: Service) -> Policy:
    ends = (Peer(vm="vm-1"),), (Peer(vm="vm-2"),)
    return Policy(f"policy-{priority}", priority, *ends, services, BOTH, action)


def send_piece(policies: PolicySet, family: Family, protocol: int, which: str) -> Journey:
    simulator = Simulator(compile_program(policies, resolve_machines(policies, PORTS), LANES))
    ip = 4 if family is Family.IPV4 else 6
    ends = 1, PORTS[0].mac, PORTS[1].mac
    return simulator.send(Frame(*ends, ip=ip, protocol=protocol, ack=True, fragment=which))


def find_fate(journey: Journey) -> str:
    if journey.normal:
        return "direct"
    lanes = {leg.ofport: lane.name for lane in LANES for leg in (lane.leg_a, lane.leg_b)}
    return ", ".join(lanes[port] for port, _ in journey.outputs) or "dropped"


# (policies, what becomes of a first and a later fragment of TCP, and of UDP, in IPv4 and IPv6)
CASES = {
    "a denied port": (
        [(1, Deny(), [TELNET])],
        {
            "ipv4 tcp": "dropped dropped",
            "ipv4 udp": "direct direct",
            "ipv6 tcp": "dropped dropped",
            "ipv6 udp": "direct dropped",
        },
    ),
    "a denied protocol": (
        [(1, Deny(), [Service(Protocol.TCP)])],
        {
            "ipv4 tcp": "dropped dropped",
            "ipv4 udp": "direct direct",
            "ipv6 tcp": "dropped dropped",
            "ipv6 udp": "direct dropped",
        },
    ),
    "a denied port below the inspection of all": (
        [(1, Deny(), [TELNET]), (2, WATCH, [Service()])],
        {
            "ipv4 tcp": "detect detect",
            "ipv4 udp": "detect detect",
            "ipv6 tcp": "detect detect",
            "ipv6 udp": "detect detect",
        },
    ),
    "a denied port above what goes direct": (
        [(2, Deny(), [TELNET]), (1, Direct("no"), [Service()])],
        {
            "ipv4 tcp": "dropped dropped",
            "ipv4 udp": "direct direct",
            "ipv6 tcp": "dropped dropped",
            "ipv6 udp": "direct dropped",
        },
    ),
    "detection of all, and of a port": (
        [(1, WATCH, [Service(), TELNET])],
        {
            "ipv4 tcp": "prevent prevent",
            "ipv4 udp": "prevent prevent",
            "ipv6 tcp": "prevent prevent",
            "ipv6 udp": "prevent prevent",
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_fragments_go(name: str) -> None:
    told, expected = CASES[name]
    policies = PolicySet(
        (build_record(1), build_record(2)),
        (),
        tuple(build_policy(priority, action, *services) for priority, action, services in told),
    )
    found = {
        f"{family} {protocol}": " ".join(
            find_fate(send_piece(policies, family, number, which)) for which in ("first", "later")
        )
        for family in Family
        for protocol, number in (("tcp", 6), ("udp", 17))
    }
    assert found == expected


@settings(max_examples=150, deadline=None)
@given(
    policy_sets(),
    st.sampled_from([(Protocol.TCP, 6), (Protocol.UDP, 17)]),
    st.sampled_from(Family),
    st.integers(0, 1500),
    st.sampled_from(["first", "later"]),
)
def test_no_fragment_of_what_is_denied_goes_direct(
    policies: PolicySet, protocol: tuple[Protocol, int], family: Family, port: int, which: str
) -> None:
    """It is dropped, or inspected where a policy of higher priority inspects what it may be."""
    connection = Connection(family, protocol[0], port, 40_000)
    machines = resolve_machines(policies, PORTS)
    action = decide(policies, machines, "vm-1", "vm-2", connection).action
    if isinstance(action, Deny):
        assert not send_piece(policies, family, protocol[1], which).normal


def test_answers_of_what_is_denied_are_denied_in_pieces_too() -> None:
    policies = PolicySet((), (), (build_policy(1, Deny(), TELNET),))
    policies = replace(policies, machines=(build_record(1), build_record(2)))
    simulator = Simulator(compile_program(policies, resolve_machines(policies, PORTS), LANES))
    opened = Frame(1, PORTS[0].mac, PORTS[1].mac, tp_src=40_000, tp_dst=80, syn=True)
    assert simulator.send(opened).normal
    answer = replace(opened.answer(2), syn=False)
    assert simulator.send(answer).normal
    assert find_fate(simulator.send(replace(answer, fragment="first"))) == "dropped"
