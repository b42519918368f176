"""Quarantine: a VM that nothing passes from or to, whatever the policies say."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from steering.check import check_program
from steering.compile import compile_program
from steering.compile_quarantine import find_quarantine_flows
from steering.coverage import Status, build_coverage
from steering.decide import QUARANTINED, Connection, decide, resolve_machines
from steering.diff import build_bundle, build_present
from steering.explain import Verdict, explain
from steering.flows import Program
from steering.model import (
    Direct,
    Family,
    Peer,
    Policy,
    PolicySet,
    Protocol,
    Service,
)
from steering.pipeline import Table
from steering.reach import find_reached
from tests.support.worlds import CANARY, LANES, ZONES, build_port, build_record

PORTS = tuple(build_port(number) for number in range(1, 5))
POLICIES = PolicySet(
    machines=tuple(build_record(number) for number in range(1, 5)),
    zones=ZONES,
    policies=(
        Policy("all", 100, (Peer(zone="web"),), (Peer(zone="app"),), (Service(),), tuple(Family), Direct("x")),
    ),
)  # fmt: skip
SHUT = replace(POLICIES, quarantined=frozenset({"vm-1"}))
TCP = Connection(Family.IPV4, Protocol.TCP, 80)


def test_the_flows_are_three_for_each_port() -> None:
    machines = resolve_machines(SHUT, PORTS)
    assert [str(flow) for flow in find_quarantine_flows(machines, SHUT.quarantined)] == [
        "cookie=0x48500d0000000001, table=0, priority=295,in_port=1 actions=drop",
        "cookie=0x48500d0000000001, table=0, priority=280,dl_dst=02:00:00:00:00:01 actions=drop",
        "cookie=0x48500d0000000001, table=70, priority=110,dl_dst=02:00:00:00:00:01 actions=drop",
    ]


@given(quarantined=st.frozensets(st.sampled_from(["vm-1", "vm-2", "vm-3", "vm-9"])))
def test_nothing_else_of_a_program_changes(quarantined: frozenset[str]) -> None:
    machines = resolve_machines(POLICIES, PORTS)
    plain = compile_program(POLICIES, machines, LANES, CANARY)
    shut = compile_program(replace(POLICIES, quarantined=quarantined), machines, LANES, CANARY)
    assert check_program(shut, LANES, CANARY) == ()
    added = set(shut.flows) - set(plain.flows)
    assert added == set(find_quarantine_flows(machines, quarantined))
    assert set(plain.flows) <= set(shut.flows)
    # What is sent ahead is exactly the difference.
    ahead = build_bundle(
        Program(find_quarantine_flows(machines, quarantined), ()), build_present(Program((), ()))
    )
    assert ahead.changes == build_bundle(shut, build_present(plain)).changes


def test_its_packets_reach_nothing() -> None:
    machines = resolve_machines(SHUT, PORTS)
    program = compile_program(SHUT, machines, LANES, CANARY)
    for number in (1, 2):
        reached = find_reached(program, {"in_port": str(number)})
        assert (Table.DIRECT in reached.tables) is (number != 1)


def test_a_port_without_a_mac_of_its_own_is_shut_off_by_its_number() -> None:
    twins = (PORTS[0], replace(PORTS[1], mac=PORTS[0].mac))
    machines = resolve_machines(SHUT, twins)
    flows = [str(flow) for flow in find_quarantine_flows(machines, frozenset({"vm-1", "vm-2"}))]
    assert len([flow for flow in flows if "in_port=" in flow]) == 2
    assert len([flow for flow in flows if "dl_dst=" in flow]) == 2


def test_decision_coverage_and_explanation_say_so() -> None:
    machines = resolve_machines(SHUT, PORTS)
    for pair in (("vm-1", "vm-2"), ("vm-2", "vm-1")):
        decision = decide(SHUT, machines, *pair, TCP)
        assert (decision.policy, decision.action) == (None, QUARANTINED)
        assert decision.reason == "VM host-1 is in quarantine"
    assert decide(SHUT, machines, "vm-4", "vm-2", TCP).policy is not None
    found = {
        (pair.source.vm_id, pair.destination.vm_id): pair.status
        for pair in build_coverage(SHUT, machines).pairs
    }
    assert all((status is Status.DENIED) is ("vm-1" in pair) for pair, status in found.items())
    told = explain(SHUT, machines, LANES, "host-1", "host-2", TCP)
    assert told.verdict is Verdict.DENIED
    assert [str(step) for step in told.forward] == ["CLASSIFY (dropped: quarantine)"]


def test_a_quarantined_vm_whose_port_goes_stays_shut_off_by_its_mac() -> None:
    """Though no policy names it: by another port it would be back before its flows are."""
    gone, rest = PORTS[2], tuple(port for port in PORTS if port != PORTS[2])
    shut = replace(POLICIES, quarantined=frozenset({"vm-3"}))
    for policies, is_shut in ((shut, True), (POLICIES, False)):
        machines = resolve_machines(policies, rest)
        program = compile_program(policies, machines, LANES, ghosts=(replace(gone, ofport=0),))
        back = find_reached(program, {"in_port": "9", "dl_src": gone.mac, "vlan_tci": "0"})
        assert (Table.DIRECT in back.tables) is not is_shut
