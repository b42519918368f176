"""What must hold of every compiled program, over random policies, by running packets through it."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from steering.check import check_program
from steering.compile import compile_program
from steering.decide import Connection, decide, resolve_machines
from steering.diff import build_bundle, build_present
from steering.explain import explain
from steering.flows import Present, Program
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
    Protocol,
    Service,
)
from steering.pipeline import CookieKind, build_group_id, build_steer_key
from tests.support.simulator import Conntrack, Frame, Simulator
from tests.support.worlds import CANARY, LANES, build_port, build_record, policy_sets

PORTS = tuple(build_port(number) for number in range(1, 7))
LEGS = {leg.ofport for lane in LANES for leg in (lane.leg_a, lane.leg_b)}
NUMBERS = {Protocol.TCP: (6, 6), Protocol.UDP: (17, 17), Protocol.ICMP: (1, 58)}

pairs = st.lists(st.integers(1, 6), min_size=2, max_size=2, unique=True)
protocols = st.sampled_from(list(NUMBERS))
many = settings(max_examples=150, deadline=None)


def compile_for(policies: PolicySet) -> Program:
    return compile_program(policies, resolve_machines(policies, PORTS), LANES, CANARY)


def build_first(
    pair: list[int], protocol: Protocol, family: Family, port: int, source: int = 40_000
) -> Frame:
    ip = 4 if family is Family.IPV4 else 6
    ported = protocol is not Protocol.ICMP
    return Frame(
        in_port=pair[0],
        dl_src=PORTS[pair[0] - 1].mac,
        dl_dst=PORTS[pair[1] - 1].mac,
        ip=ip,
        protocol=NUMBERS[protocol][0 if ip == 4 else 1],
        tp_src=source if ported else 0,
        tp_dst=port if ported else 0,
        syn=protocol is Protocol.TCP,
    )


def decide_first(
    policies: PolicySet, pair: list[int], protocol: Protocol, family: Family, port: int
) -> object:
    machines = resolve_machines(policies, PORTS)
    number = None if protocol is Protocol.ICMP else port
    connection = Connection(family, protocol, number, None if number is None else 40_000)
    return decide(policies, machines, f"vm-{pair[0]}", f"vm-{pair[1]}", connection).action


@many
@given(policy_sets())
def test_every_program_keeps_the_invariants(policies: PolicySet) -> None:
    assert check_program(compile_for(policies), LANES, CANARY) == ()


@many
@given(policy_sets(), pairs, protocols, st.sampled_from(Family), st.integers(0, 1500))
def test_the_switch_does_what_the_policies_say(
    policies: PolicySet, pair: list[int], protocol: Protocol, family: Family, port: int
) -> None:
    """First packets and answers, against the independent reading of the policies in `decide`."""
    simulator = Simulator(compile_for(policies))
    first = build_first(pair, protocol, family, port)
    action = decide_first(policies, pair, protocol, family, port)
    there = simulator.send(first)
    back = simulator.send(first.answer(pair[1]))
    match action:
        case Inspect(profile=profile):
            lane = next(lane for lane in LANES if lane.profile is profile)
            assert there.outputs == [(lane.leg_a.ofport, lane.vlan)]
            assert back.outputs == [(lane.leg_b.ofport, lane.vlan)], "one lane, legs swapped"
            assert not there.normal
            assert not back.normal
        case Deny():
            assert (there.outputs, there.normal) == ([], False)
        case None if protocol is not Protocol.TCP:
            # Without a SYN it may be the answer to something inspected; never dropped, though.
            assert there.normal or there.groups
        case _:
            assert there.normal
            assert back.normal
            assert there.outputs == back.outputs == []


def test_a_vm_keeps_its_policies_though_its_name_comes_as_anothers_vm_id() -> None:
    """What ports carry as vm-id is nobody's document, and may be any text."""
    inspect = Policy(
        "inspect", 10, (Peer(vm="host-1"),), (Peer(vm="vm-2"),), (Service(),), tuple(Family),
        Inspect(Profile.PREVENT, OnFailure.CLOSED),
    )  # fmt: skip
    policies = PolicySet(tuple(build_record(n) for n in (1, 2)), (), (inspect,))
    ports = (*PORTS[:2], replace(PORTS[2], vm_id="host-1"))
    machines = resolve_machines(policies, ports)
    simulator = Simulator(compile_program(policies, machines, LANES))
    for vm_id, number in (("vm-1", 1), ("host-1", 3)):
        asked = Connection(Family.IPV4, Protocol.TCP, 80, 40_000)
        assert decide(policies, machines, vm_id, "vm-2", asked).policy == inspect
        there = simulator.send(build_first([number, 2], Protocol.TCP, Family.IPV4, 80))
        assert there.outputs == [(LANES[0].leg_a.ofport, LANES[0].vlan)]


@many
@given(policy_sets(), pairs, protocols, st.sampled_from(Family), st.integers(0, 1500))
def test_no_frame_is_steered_twice(
    policies: PolicySet, pair: list[int], protocol: Protocol, family: Family, port: int
) -> None:
    """What comes back from a leg is delivered to its VM, once; it meets no group and no NORMAL."""
    simulator = Simulator(compile_for(policies))
    there = simulator.send(build_first(pair, protocol, family, port))
    assert len(there.groups) <= 1
    for leg, vlan in there.outputs:
        lane = next(lane for lane in LANES if leg in (lane.leg_a.ofport, lane.leg_b.ofport))
        other = lane.leg_b if leg == lane.leg_a.ofport else lane.leg_a
        first = build_first(pair, protocol, family, port)
        frame = Frame(**{**{n: getattr(first, n) for n in first.__dataclass_fields__}, "in_port": other.ofport,
                         "vlan": vlan})  # fmt: skip
        back = simulator.send(frame)
        assert back.outputs == [(pair[1], None)]
        assert back.groups == []
        assert not back.normal


@many
@given(policy_sets(), pairs, protocols, st.sampled_from(Family), st.integers(0, 1500))
def test_a_dead_lane_fails_as_its_policy_says(
    policies: PolicySet, pair: list[int], protocol: Protocol, family: Family, port: int
) -> None:
    simulator = Simulator(compile_for(policies), dead=frozenset(LEGS))
    action = decide_first(policies, pair, protocol, family, port)
    if not isinstance(action, Inspect):
        return
    there = simulator.send(build_first(pair, protocol, family, port))
    expected = [(pair[1], None)] if action.on_failure is OnFailure.OPEN else []
    assert there.outputs == expected
    assert not there.normal


@many
@given(policy_sets(), pairs, st.sampled_from(Family), st.integers(0, 1500), st.booleans())
def test_midstream_doubt_means_inspection(
    policies: PolicySet, pair: list[int], family: Family, port: int, answers_first: bool
) -> None:
    """A switch that forgot its connections still inspects those that a policy inspects (or drops them)."""
    if not isinstance(decide_first(policies, pair, Protocol.TCP, family, port), Inspect):
        return
    simulator = Simulator(compile_for(policies), Conntrack())
    first = build_first(pair, Protocol.TCP, family, port)
    frame = Frame(
        **{**{n: getattr(first, n) for n in first.__dataclass_fields__}, "syn": False, "ack": True}
    )
    if answers_first:
        frame = frame.answer(pair[1])
    journey = simulator.send(frame)
    assert not journey.normal


@many
@given(
    policy_sets(),
    pairs,
    st.sampled_from([Protocol.TCP, Protocol.UDP]),
    st.sampled_from(Family),
    st.integers(0, 1500),
)
def test_all_fragments_of_what_is_inspected_take_one_lane_no_laxer_than_its_own(
    policies: PolicySet, pair: list[int], protocol: Protocol, family: Family, port: int
) -> None:
    """Or a deny takes some; none goes direct, and prevention does not become detection."""
    action = decide_first(policies, pair, protocol, family, port)
    if not isinstance(action, Inspect):
        return
    simulator = Simulator(compile_for(policies))
    first = build_first(pair, protocol, family, port)
    simulator.send(first)
    pieces = [replace(first, syn=False, ack=True, fragment=which) for which in ("first", "later")]
    journeys = [simulator.send(piece) for piece in pieces]
    assert not any(journey.normal for journey in journeys)
    lanes = {vlan for journey in journeys for _, vlan in journey.outputs}
    assert len(lanes) <= 1
    if action.profile is Profile.PREVENT:
        assert lanes <= {LANES[0].vlan}


@many
@given(policy_sets(), policy_sets())
def test_apply_is_stable_and_revert_restores(one: PolicySet, two: PolicySet) -> None:
    first, second = compile_for(one), compile_for(two)
    assert not build_bundle(first, build_present(first))
    there = build_bundle(second, build_present(first))
    back = build_bundle(first, build_present(second))
    assert there.count("add") == back.count("delete")
    assert there.count("modify") == back.count("modify")
    assert there.count("delete") == back.count("add")
    assert build_bundle(first, Present()).count("add") == len(first.flows) + len(first.groups)


@many
@given(policy_sets())
def test_frames_that_lie_are_dropped(policies: PolicySet) -> None:
    """In scope: another's MAC as sender, a tag of one's own, a false ARP or neighbour advertisement."""
    program = compile_for(policies)
    simulator = Simulator(program)
    scoped = {
        flow.cookie & 0xFFFF
        for flow in program.flows
        if flow.cookie >> 40 & 0xFF == CookieKind.TAGGED
    }
    for here in scoped:
        mine, other = PORTS[here - 1].mac, PORTS[here % 6].mac
        lies = [
            Frame(here, other, mine),
            Frame(here, mine, other, vlan=LANES[0].vlan),
            Frame(here, mine, other, vlan=7),
            Frame(
                here,
                mine,
                "ff:ff:ff:ff:ff:ff",
                ip="arp",
                extra=(("arp_sha", other), ("arp_spa", "10.0.0.1")),
            ),
            Frame(
                here,
                mine,
                other,
                ip=6,
                protocol=58,
                extra=(("icmp_type", "136"), ("nd_tll", other)),
            ),
            Frame(
                here,
                mine,
                other,
                ip=6,
                protocol=58,
                extra=(("icmp_type", "135"), ("nd_sll", other)),
            ),
        ]
        for lie in lies:
            journey = simulator.send(lie)
            assert (journey.outputs, journey.normal, journey.learned) == ([], False, 0), lie
        truth = Frame(
            here,
            mine,
            "ff:ff:ff:ff:ff:ff",
            ip="arp",
            extra=(("arp_sha", mine), ("arp_spa", "10.0.0.1")),
        )
        journey = simulator.send(truth)
        assert journey.normal
        assert journey.learned == 1
    for port in PORTS:
        for here in scoped - {port.ofport}:
            assert not simulator.send(Frame(port.ofport, PORTS[here - 1].mac, port.mac)).normal


def test_the_steer_keys_of_lanes_never_meet() -> None:
    keys = [
        build_group_id(build_steer_key(lane, on_failure, answer=answer))
        for lane in LANES
        for on_failure in OnFailure
        for answer in (False, True)
    ]
    assert len(set(keys)) == len(keys)


@many
@given(policy_sets(), pairs, protocols, st.sampled_from(Family), st.integers(0, 1500))
def test_explain_tells_the_tables_that_the_packet_really_meets(
    policies: PolicySet, pair: list[int], protocol: Protocol, family: Family, port: int
) -> None:
    machines = resolve_machines(policies, PORTS)
    connection = Connection(family, protocol, None if protocol is Protocol.ICMP else port)
    ends = [f"vm-{number}" for number in pair]
    said = explain(policies, machines, LANES, ends[0], ends[1], connection)
    if said.action is None and protocol is not Protocol.TCP:
        return  # without a SYN its first packet may be an answer to something; see the walk
    simulator = Simulator(compile_for(policies))
    met = simulator.send(build_first(pair, protocol, family, port)).tables
    # CONNECTION is met again with conntrack's answer, and a bucket is no table.
    met = [table for table, before in zip(met, ["", *met], strict=False) if table != before]
    told = [step.name for step in said.forward]
    until_leg = told[: told.index("leg A")] if "leg A" in told else told
    assert met == until_leg


@many
@given(
    policy_sets(),
    pairs,
    protocols,
    st.sampled_from(Family),
    st.integers(0, 1500),
    st.integers(1, 6),
)
def test_a_forged_opener_does_not_make_an_attack_an_answer(
    policies: PolicySet,
    pair: list[int],
    protocol: Protocol,
    family: Family,
    port: int,
    accomplice: int,
) -> None:
    """Somebody but the target opens a connection in its name first, by forged addresses."""
    if (
        not isinstance(decide_first(policies, pair, protocol, family, port), Inspect)
        or accomplice == pair[1]
    ):
        return
    simulator = Simulator(compile_for(policies))
    attack = build_first(pair, protocol, family, port)
    forged = replace(
        attack,
        in_port=accomplice,
        dl_src=PORTS[accomplice - 1].mac,
        dl_dst=PORTS[accomplice % 6].mac,
        src_ip=attack.dl_dst,
        dst_ip=attack.dl_src,
        tp_src=attack.tp_dst,
        tp_dst=attack.tp_src,
    )
    simulator.send(forged)
    journey = simulator.send(attack)
    assert not journey.normal, "inspected, or dropped by a deny that may take it"


@many
@given(policy_sets(), pairs)
def test_unicast_in_a_frame_for_many_is_not_flooded(policies: PolicySet, pair: list[int]) -> None:
    program = compile_for(policies)
    simulator = Simulator(program)
    scoped = {
        flow.cookie & 0xFFFF
        for flow in program.flows
        if flow.cookie >> 40 & 0xFF == CookieKind.TAGGED
    }
    frame = build_first(pair, Protocol.UDP, Family.IPV4, 53)
    for address in ("ff:ff:ff:ff:ff:ff", "01:00:5e:00:00:01"):
        flooded = simulator.send(replace(frame, dl_dst=address)).normal
        assert flooded == (pair[0] not in scoped)
        many = replace(frame, dl_dst=address, extra=(("nw_dst", "224.0.0.0/4"),))
        assert simulator.send(many).normal, "multicast goes as it went"


@many
@given(policy_sets(), pairs)
def test_what_is_not_ip_does_not_pass_between_vms_in_scope(
    policies: PolicySet, pair: list[int]
) -> None:
    """It may carry IP (MPLS, PPPoE); ARP and what is for many pass, and VMs out of scope are left alone."""
    program = compile_for(policies)
    simulator = Simulator(program)
    scoped = {
        flow.cookie & 0xFFFF
        for flow in program.flows
        if flow.cookie >> 40 & 0xFF == CookieKind.UNREAD
    }
    here, there = (PORTS[number - 1] for number in pair)
    journey = simulator.send(Frame(here.ofport, here.mac, there.mac, ip=None))
    assert journey.normal == (not {*pair} <= scoped)
    assert journey.outputs == []
    for address in ("ff:ff:ff:ff:ff:ff", "01:80:c2:00:00:0e"):
        assert simulator.send(Frame(here.ofport, here.mac, address, ip=None)).normal
    asked = (("arp_sha", here.mac), ("arp_spa", "10.0.0.1"))
    assert simulator.send(Frame(here.ofport, here.mac, there.mac, ip="arp", extra=asked)).normal


def test_an_answer_counts_only_where_the_one_that_it_is_for_opened_the_connection() -> None:
    """Else an accomplice opens one in another VM's name, and what it then is sent goes uninspected."""
    inspect = Inspect(Profile.PREVENT, OnFailure.CLOSED)
    policies = PolicySet(
        tuple(build_record(n) for n in (1, 2, 3)),
        (),
        tuple(
            Policy(name, priority, (Peer(vm=source),), (Peer(vm=to),), (Service(),), tuple(Family), action)
            for name, priority, source, to, action in (
                ("backup", 20, "vm-2", "vm-1", Direct("trusted")),
                ("rest", 10, "vm-1", "vm-2", inspect),
                ("others", 10, "vm-3", "vm-1", inspect),
            )
        ),
    )  # fmt: skip
    ways = []
    for opener in (PORTS[1], PORTS[2]):
        simulator = Simulator(compile_for(policies))
        named = {"tp_src": 80, "tp_dst": 40_000, "src_ip": "10.0.0.2", "dst_ip": "10.0.0.1"}
        simulator.send(Frame(opener.ofport, opener.mac, PORTS[0].mac, syn=True, **named))
        back = {"tp_src": 40_000, "tp_dst": 80, "src_ip": "10.0.0.1", "dst_ip": "10.0.0.2"}
        ways.append(simulator.send(Frame(1, PORTS[0].mac, PORTS[1].mac, ack=True, **back)).normal)
    assert ways == [True, False], "VM 2 opened it; VM 3 did, in its name"
