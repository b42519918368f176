"""Classes of VMs: their numbers, what the switch then does, and how few flows a change touches."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from steering.check import Checker
from steering.classes import build_classes, hash_zones, number_classes
from steering.compile import compile_program
from steering.decide import Connection, decide, resolve_machines
from steering.diff import Bundle, build_change
from steering.flows import Program
from steering.membership import build_membership
from steering.model import (
    Deny,
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
from steering.pipeline import CookieKind, Table, parse_cookie
from tests.support import policies as small
from tests.support.crowd import build_crowd, build_crowd_policy, build_crowd_port
from tests.support.simulator import Frame, Simulator
from tests.support.worlds import CANARY, LANES
from tests.unit.test_steering_properties import NUMBERS

OWN = (CookieKind.PORT, CookieKind.SPOOF, CookieKind.TAGGED, CookieKind.UNREAD)


def compile_crowd(policies: PolicySet, vms: int) -> Program:
    ports = tuple(map(build_crowd_port, range(1, vms + 1)))
    return compile_program(policies, resolve_machines(policies, ports), LANES, CANARY)


def find_cookies(bundle: Bundle) -> set[int]:
    return {int(one.text.partition(",")[0].removeprefix("cookie="), 0) for one in bundle.changes}


def find_collision() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Two sets of zones whose numbers meet; among 200,000 there is one (and it is always the same)."""
    seen: dict[int, tuple[str, ...]] = {}
    for number in range(400_000):
        zones = (f"zone-{number}",)
        other = seen.setdefault(hash_zones(zones), zones)
        if other != zones:
            return other, zones
    raise AssertionError("no collision")


def test_the_number_of_a_class_is_its_zones_own() -> None:
    sets = [("a",), ("b",), ("a", "b"), ("ab",)]
    numbers = number_classes(sets)
    assert len({*numbers.values()}) == len(sets)
    assert numbers == {zones: number_classes([zones])[zones] for zones in sets}


def test_no_two_classes_have_one_number() -> None:
    one, other = find_collision()
    assert hash_zones(one) == hash_zones(other)
    numbers = number_classes([one, other, ("a",)])
    assert len({*numbers.values(), 0}) == 4
    assert numbers == number_classes([other, ("a",), one])


def test_a_zone_that_no_policy_names_parts_no_class() -> None:
    crowd = build_crowd(2_000, 1)  # from site s0 to role r1
    machines = resolve_machines(crowd, tuple(map(build_crowd_port, range(1, 2_001))))
    classes = build_classes(
        crowd.policies,
        build_membership(crowd.zones, machines),
        (machine.vm_id for machine in machines),
    )
    assert len({*classes.by_vm.values()}) == 3  # in s0, in r1, in both
    assert {zone: len(found) for zone, found in classes.by_zone.items()} == {"s0": 2, "r1": 2}


protocols = st.sampled_from(list(NUMBERS))
pairs = st.lists(st.integers(1, 6), min_size=2, max_size=2, unique=True)


@settings(max_examples=300, deadline=None)
@given(small.policy_sets(), pairs, protocols, st.sampled_from(Family), st.sampled_from(small.EDGES))
def test_zones_that_overlap_are_decided_as_the_policies_say(
    policies: PolicySet, pair: list[int], protocol: small.Protocol, family: Family, port: int
) -> None:
    """The compiled flows against `decide`: VMs in several zones, named by zone, name and vm-id."""
    machines = small.find_machines(policies)
    simulator = Simulator(compile_program(policies, machines, LANES, CANARY))
    here, there = (small.PORTS[number - 1] for number in pair)
    ported = protocol is not small.Protocol.ICMP
    connection = Connection(family, protocol, port if ported else None)
    action = decide(policies, machines, here.vm_id, there.vm_id, connection).action
    older = family is Family.IPV4
    first = Frame(
        in_port=here.ofport,
        dl_src=here.mac,
        dl_dst=there.mac,
        ip=4 if older else 6,
        protocol=NUMBERS[protocol][0 if older else 1],
        tp_src=40_000 if ported else 0,
        tp_dst=port if ported else 0,
        syn=protocol is small.Protocol.TCP,
    )
    sent = simulator.send(first)
    back = simulator.send(first.answer(there.ofport))
    match action:
        case Inspect(profile=profile):
            lane = next(lane for lane in LANES if lane.profile is profile)
            assert sent.outputs == [(lane.leg_a.ofport, lane.vlan)]
            assert back.outputs == [(lane.leg_b.ofport, lane.vlan)]
        case Deny():
            assert (sent.outputs, sent.normal) == ([], False)
        case Direct():
            assert (sent.outputs, sent.normal) == ([], True)
        case None:
            # Without a SYN it may be the answer to something inspected.
            assert sent.normal or (sent.groups and protocol is not small.Protocol.TCP)


def build_two_zones(*policies: Policy) -> PolicySet:
    return PolicySet(build_crowd(400, 0).machines, build_crowd(1, 0).zones, policies)


def build_wide(name: str, priority: int, action: Inspect | Direct) -> Policy:
    """Between two zones of 200 VMs each, of 400."""
    odd = tuple(Peer(zone=f"r{n}") for n in range(1, 100, 2))
    even = tuple(Peer(zone=f"r{n}") for n in range(0, 100, 2))
    return Policy(name, priority, odd, even, (Service(),), tuple(Family), action)


def test_a_policy_has_flows_for_classes_and_not_for_vms() -> None:
    inspecting = Inspect(Profile.PREVENT, OnFailure.CLOSED)
    one = compile_crowd(build_crowd(400, 1), 400)
    two = compile_crowd(build_crowd(40_00, 1), 4_000)
    in_policy = [
        sum(flow.table is Table.POLICY for flow in program.flows) for program in (one, two)
    ]
    assert in_policy[0] == in_policy[1] < 30
    # Even where a side is 50 zones, it is 50 clauses for 200 VMs.
    before = compile_crowd(build_two_zones(build_wide("a", 1, inspecting)), 400)
    after = compile_crowd(
        build_two_zones(build_wide("a", 1, inspecting), build_wide("b", 2, inspecting)), 400
    )
    assert len(after.flows) - len(before.flows) <= 0.01 * 200 * 200


def test_a_change_of_a_policy_leaves_its_vms_flows_alone() -> None:
    before = build_two_zones(build_wide("a", 1, Inspect(Profile.PREVENT, OnFailure.CLOSED)))
    after = build_two_zones(build_wide("a", 1, Direct("a reason")))
    bundle = build_change(compile_crowd(after, 400), compile_crowd(before, 400))
    assert 0 < len(bundle.changes) <= 10
    owners = {parse_cookie(cookie) for cookie in find_cookies(bundle)}
    assert {owner[0] for owner in owners if owner} == {CookieKind.POLICY}


def test_a_vm_that_arrives_changes_its_own_flows_only() -> None:
    policies = build_crowd(1_200, 300)
    before, after = compile_crowd(policies, 1_100), compile_crowd(policies, 1_101)
    bundle = build_change(after, before)
    newcomer = build_crowd_port(1_101)
    assert {parse_cookie(cookie) for cookie in find_cookies(bundle)} == {
        (kind, newcomer.ofport) for kind in OWN
    }
    assert bundle.count("add") == len(bundle.changes) < 40
    assert not build_change(after, after)
    gone = build_change(before, after)
    assert gone.count("delete") == len(gone.changes) == len(bundle.changes)


def test_two_policies_of_one_number_are_never_sent() -> None:
    """OVS 3.1 takes the way of the higher one's verdict, though only the lower one's clauses are met."""
    policies = build_crowd(20, 2)
    names = "allow-34749", "allow-40390"
    twins = tuple(
        replace(policy, name=name, priority=priority)
        for policy, name, priority in zip(policies.policies, names, (20, 10), strict=True)
    )
    program = compile_crowd(replace(policies, policies=twins), 20)
    checker = Checker()
    for _ in range(2):
        assert any("one conjunction" in one for one in checker.check(program, LANES, CANARY))
    assert checker.check(compile_crowd(policies, 20), LANES, CANARY) == ()
    higher = replace(policies, policies=(replace(twins[0], priority=30), policies.policies[1]))
    assert checker.check(compile_crowd(higher, 20), LANES, CANARY) == (), "at another priority"


def test_the_check_follows_changes() -> None:
    """What is wrong is found in a piece that changed, and still the next time."""
    policies = build_crowd(300, 50)
    checker = Checker()
    sound = compile_crowd(policies, 300)
    assert checker.check(sound, LANES, CANARY) == ()
    flow = next(flow for flow in sound.flows if flow.table is Table.RECEIVER)
    for wrong, said in (
        (replace(flow, priority=101, actions="resubmit(,0)"), "resubmits backwards"),
        (flow, "stands twice"),
        (replace(flow, match="", priority=7, actions="output:5"), "outputs outside DELIVER"),
    ):
        faulty = Program(groups=sound.groups, pieces=(*sound.pieces, *Program((wrong,)).pieces))
        for _ in range(2):
            assert any(said in sentence for sentence in checker.check(faulty, LANES, CANARY)), said
        assert checker.check(sound, LANES, CANARY) == ()
    less = Program(groups=sound.groups, pieces=sound.pieces[1:])
    assert any("is not told apart" in one for one in checker.check(less, LANES, CANARY))
    changed = replace(
        policies, policies=(build_crowd_policy(0, Profile.DETECT), *policies.policies[1:])
    )
    assert checker.check(compile_crowd(changed, 300), LANES, CANARY) == ()
