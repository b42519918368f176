"""A VM whose port is gone: nothing passes from or to it until its flows are there again."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from steering.check import check_program
from steering.compile import compile_program
from steering.counters import Count, build_counters, find_tallies
from steering.decide import resolve_machines
from steering.diff import build_bundle, build_present
from steering.flows import Program
from steering.ghosts import (
    GHOST_LIMIT,
    GHOST_SECONDS,
    Ghost,
    build_ghosts,
    find_fresh,
    find_guarded_ports,
)
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
from steering.pipeline import CookieKind
from tests.support.simulator import Frame, Simulator
from tests.support.worlds import LANES, build_port, build_record, policy_sets

PORTS = tuple(build_port(number) for number in range(1, 7))


def build(policies: PolicySet, ports: tuple[Port, ...], ghosts: tuple[Port, ...] = ()) -> Program:
    return compile_program(policies, resolve_machines(policies, ports), LANES, 0, ghosts)


def find_scoped(policies: PolicySet) -> frozenset[int]:
    """The numbers of the ports that the policies name, as GUARD has them."""
    return frozenset(
        flow.cookie & 0xFFFF
        for flow in build(policies, PORTS).flows
        if flow.cookie >> 40 & 0xFF == CookieKind.TAGGED
    )


@settings(max_examples=150, deadline=None)
@given(policy_sets(), st.integers(1, 6), st.integers(1, 6), st.sampled_from([4, 6]))
def test_nothing_passes_by_the_mac_of_a_named_vm_whose_port_is_gone(
    policies: PolicySet, gone: int, peer: int, ip: int
) -> None:
    """Not from the port that it comes back by, not to it: there NORMAL would learn it and take it along."""
    scoped = find_scoped(policies)
    if gone not in scoped or peer == gone:
        return
    ghost, other = PORTS[gone - 1], PORTS[peer - 1]
    program = build(policies, tuple(p for p in PORTS if p != ghost), (ghost,))
    assert check_program(program, LANES) == ()
    simulator = Simulator(program)
    for in_port in (99, gone, peer):
        for kind in (ip, "arp", None):
            forged = simulator.send(Frame(in_port, ghost.mac, other.mac, ip=kind))
            assert (forged.outputs, forged.normal) == ([], False)
    to = simulator.send(Frame(peer, other.mac, ghost.mac, ip=ip))
    assert to.outputs == []
    assert to.normal == (peer not in scoped), "who is in no policy is left as it was"


@settings(max_examples=100, deadline=None)
@given(policy_sets(), st.integers(1, 6))
def test_the_bundle_that_brings_a_port_back_takes_its_ghost_away(
    policies: PolicySet, gone: int
) -> None:
    ghost = PORTS[gone - 1]
    without = build(policies, tuple(p for p in PORTS if p != ghost), (ghost,))
    back = replace(ghost, ofport=106)
    moved = tuple(back if p == ghost else p for p in PORTS)
    program = build(policies, moved, (ghost,))
    assert program == build(policies, moved), "a MAC that is there is no ghost"
    bundle = build_bundle(program, build_present(without))
    kinds = {
        change.kind for change in bundle.changes if f"priority=80,dl_src={ghost.mac}" in change.text
    }
    assert kinds <= {"modify"}, "its MAC is shut to others without a break"


def test_two_ports_with_one_mac_are_both_shut_where_a_policy_names_one() -> None:
    policies = PolicySet()
    twin = replace(PORTS[1], mac=PORTS[0].mac)
    assert "9" not in {
        f"{flow.cookie >> 40 & 0xFF}" for flow in build(policies, (PORTS[0], twin)).flows
    }
    named = PolicySet(
        (build_record(1), build_record(2)),
        (),
        (Policy("one", 1, (Peer(vm="vm-1"),), (Peer(vm="vm-3"),), (Service(),), (Family.IPV4,),
                Inspect(Profile.PREVENT, OnFailure.CLOSED)),),
    )  # fmt: skip
    simulator = Simulator(build(named, (PORTS[0], twin, *PORTS[2:])))
    for number in (1, 2):
        journey = simulator.send(Frame(number, PORTS[0].mac, PORTS[2].mac))
        assert (journey.outputs, journey.normal) == ([], False)


def test_a_mac_without_a_name_is_shut_whatever_the_policies_say() -> None:
    """What a reconciler remembers from the flows of the one before it."""
    program = build(PolicySet(), PORTS[:1], (Port("", 0, PORTS[4].mac, "", "", ""),))
    journey = Simulator(program).send(Frame(99, PORTS[4].mac, PORTS[0].mac))
    assert (journey.outputs, journey.normal) == ([], False)


@settings(max_examples=50, deadline=None)
@given(policy_sets())
def test_the_switch_itself_tells_whom_a_reconciler_kept_out(policies: PolicySet) -> None:
    scoped = find_scoped(policies)
    ghost = PORTS[5]
    present = build_present(build(policies, PORTS[:5], (ghost,)))
    found = {port.mac for port in find_guarded_ports(present.flows)}
    assert found == {port.mac for port in PORTS if port.ofport in scoped}


ports_seen = st.lists(st.sets(st.integers(1, 6)), min_size=2, max_size=12)


@given(ports_seen, st.lists(st.integers(0, 1800), min_size=12, max_size=12))
def test_a_ghost_is_who_was_there_and_is_not_for_an_hour(
    seen: list[set[int]], waits: list[int]
) -> None:
    ghosts: tuple[Ghost, ...] = ()
    now, gone_since = 0.0, {}
    before: tuple[Port, ...] = ()
    for numbers, wait in zip(seen, waits, strict=False):
        now += wait
        present = tuple(PORTS[number - 1] for number in sorted(numbers))
        ghosts = build_ghosts(ghosts, before, present, now)
        for port in before:
            if port not in present:
                gone_since[port.mac] = now
        for port in present:
            gone_since.pop(port.mac, None)
        gone_since = {m: at for m, at in gone_since.items() if now - at < GHOST_SECONDS}
        assert {ghost.port.mac: ghost.since for ghost in ghosts} == gone_since
        before = present
    assert find_fresh(ghosts, now + GHOST_SECONDS) == ()


def test_there_are_no_more_ghosts_than_the_limit_and_the_oldest_go() -> None:
    many = [replace(PORTS[0], mac=f"02:00:00:01:{n >> 8:02x}:{n & 255:02x}") for n in range(1200)]
    first = build_ghosts((), many[:600], (), 1.0)
    both = build_ghosts(first, many[600:], (), 2.0)
    assert len(both) == GHOST_LIMIT
    assert [ghost.port for ghost in both] == many[200:]


def test_drops_of_ghosts_are_counted() -> None:
    program = build(PolicySet(), (), (Port("", 0, PORTS[4].mac, "", "", ""),))
    flows = [(flow.key, flow.cookie, 2, 120) for flow in program.flows]
    counters = build_counters(find_tallies(flows, [], PolicySet(), LANES), PolicySet(), LANES)
    assert counters.ghosts == Count(8, 480), "from it, and to it, before conntrack and behind"
