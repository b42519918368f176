"""Addresses that documents give to VMs: read, held by the switch, and told when two VMs claim one."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steering.check import check_program
from steering.compile import compile_program
from steering.contests import CONTEST_SECONDS, HELD_LIMIT, Claims, record_claim
from steering.counters import Count, build_counters, find_tallies
from steering.decide import resolve_machines
from steering.errors import WrongInput
from steering.model import PolicySet
from steering.parse import parse_documents, parse_objects, render_documents
from tests.support.simulator import Frame, Simulator
from tests.support.worlds import LANES, build_port, policy_sets

PORTS = tuple(build_port(number) for number in range(1, 7))
OWN4, OWN6, OTHER4, OTHER6 = "10.0.0.1", "fd00::1", "10.0.0.9", "fd00::9"
LOCAL = "fe80::1"
NONE = "00:00:00:00:00:00"
MANY = "ff:ff:ff:ff:ff:ff"

DOCUMENT = """
apiVersion: hairpin/v1
kind: VirtualMachine
metadata: {name: a}
spec: {vmId: vm-1, addresses: %s}
"""


def give(policies: PolicySet, number: int, *addresses: str) -> PolicySet:
    """The set with these addresses given to a VM."""
    machines = tuple(
        replace(one, addresses=addresses) if one.vm_id == f"vm-{number}" else one
        for one in policies.machines
    )
    return replace(policies, machines=machines)


def build_simulator(policies: PolicySet) -> Simulator:
    program = compile_program(policies, resolve_machines(policies, PORTS), LANES)
    assert check_program(program, LANES) == ()
    return Simulator(program)


def build_arp(number: int, address: str) -> Frame:
    mac = PORTS[number - 1].mac
    return Frame(number, mac, MANY, ip="arp", extra=(("arp_sha", mac), ("arp_spa", address)))


def build_solicitation(number: int, source: str, link: str | None = None) -> Frame:
    mac = PORTS[number - 1].mac
    extra = (("icmp_type", "135"), ("ipv6_src", source), ("nd_sll", link or mac))
    return Frame(number, mac, "33:33:00:00:00:01", ip=6, protocol=58, extra=extra)


def build_advertisement(number: int, target: str, link: str | None = None) -> Frame:
    mac = PORTS[number - 1].mac
    extra = (("icmp_type", "136"), ("nd_target", target), ("nd_tll", link or mac))
    return Frame(number, mac, "33:33:00:00:00:01", ip=6, protocol=58, extra=extra)


def build_packet(
    number: int, source: str, *, to: int = 0, tp_src: int = 40_000, tp_dst: int = 53
) -> Frame:
    ip, field = (6, "ipv6_src") if ":" in source else (4, "nw_src")
    mac = PORTS[to - 1].mac if to else "02:99:00:00:00:01"
    extra = ((field, source),)
    return Frame(number, PORTS[number - 1].mac, mac, ip, 17, tp_src, tp_dst, extra=extra)


def find_scoped(policies: PolicySet) -> set[int]:
    named = {peer.vm for p in policies.policies for peer in (*p.sources, *p.destinations)}
    zones = {peer.zone for p in policies.policies for peer in (*p.sources, *p.destinations)}
    machines = resolve_machines(policies, PORTS)
    return {
        port.ofport
        for machine in machines
        for port in machine.ports
        if machine.vm_id in named or zones & set(machine.zones)
    }


@settings(max_examples=150, deadline=None)
@given(policy_sets(), st.integers(1, 6), st.integers(1, 6))
def test_nobody_but_its_vm_claims_a_given_address(
    policies: PolicySet, owner: int, other: int
) -> None:
    simulator = build_simulator(give(policies, owner, OWN4, OWN6))
    claims = [
        build_arp(other, OWN4),
        build_solicitation(other, OWN6),
        build_solicitation(other, OWN6, NONE),
        build_advertisement(other, OWN6),
        build_advertisement(other, OWN6, NONE),
    ]
    for claim in claims:
        journey = simulator.send(claim)
        assert journey.normal == (other == owner), claim
        assert journey.learned == (1 if other == owner else 0)
        stranger = simulator.send(replace(claim, in_port=99, dl_src="02:77:00:00:00:01"))
        assert (stranger.normal, stranger.learned) == (False, 0), "an uplink does not either"


@settings(max_examples=150, deadline=None)
@given(policy_sets(), st.integers(1, 6), st.integers(1, 6))
def test_a_vm_in_scope_uses_the_addresses_given_to_it_and_no_others(
    policies: PolicySet, owner: int, peer: int
) -> None:
    given_ = give(policies, owner, OWN4, OWN6)
    simulator, before = build_simulator(given_), build_simulator(policies)
    scoped = owner in find_scoped(policies)
    others = [
        build_arp(owner, OTHER4),
        build_solicitation(owner, OTHER6),
        build_advertisement(owner, OTHER6),
        build_packet(owner, OTHER4, to=peer),
        build_packet(owner, OTHER6, to=peer),
        build_packet(owner, "0.0.0.0", to=peer),
        build_packet(owner, "::", to=peer),
    ]
    for frame in others:
        journey = simulator.send(frame)
        if scoped:
            assert (journey.outputs, journey.normal, journey.learned) == ([], False, 0), frame
        else:
            assert journey == before.send(frame), "who is in no policy is left as it was"
    own = [
        build_arp(owner, OWN4),
        build_arp(owner, "0.0.0.0"),
        build_solicitation(owner, OWN6),
        build_solicitation(owner, "::", NONE),
        build_solicitation(owner, LOCAL),
        build_advertisement(owner, LOCAL),
        build_packet(owner, "0.0.0.0", tp_src=68, tp_dst=67),
        build_packet(owner, OWN4, to=peer),
        build_packet(owner, OWN6, to=peer),
        build_packet(owner, LOCAL, to=peer),
    ]
    for frame in own:
        now, then = simulator.send(frame), before.send(frame)
        assert (now.outputs, now.normal, now.learned) == (then.outputs, then.normal, then.learned)


@settings(max_examples=50, deadline=None)
@given(policy_sets(), st.integers(1, 6))
def test_a_vm_in_scope_still_lies_about_no_mac(policies: PolicySet, owner: int) -> None:
    if owner not in find_scoped(policies):
        return
    simulator, other = build_simulator(give(policies, owner, OWN4, OWN6)), PORTS[owner % 6].mac
    arp = build_arp(owner, OWN4)
    for lie in (
        replace(arp, extra=(("arp_sha", other), ("arp_spa", OWN4))),
        replace(arp, dl_src=other),
        build_solicitation(owner, OWN6, other),
        build_advertisement(owner, OWN6, other),
        build_advertisement(owner, LOCAL, other),
    ):
        journey = simulator.send(lie)
        assert (journey.normal, journey.learned) == (False, 0), lie


def test_an_address_given_to_two_is_claimed_by_both_and_by_no_third() -> None:
    policies = parse_documents(
        DOCUMENT % f"[{OWN4}]" + "---" + (DOCUMENT % f"[{OWN4}]").replace("vm-1", "vm-2")
        .replace("name: a", "name: b")
    )  # fmt: skip
    simulator = build_simulator(policies)
    assert [simulator.send(build_arp(n, OWN4)).normal for n in (1, 2, 3)] == [True, True, False]


def test_an_address_is_shut_with_its_holders_ghost_and_free_where_its_vm_is_not() -> None:
    document = (
        DOCUMENT % f"[{OWN4}]"
        + """---
apiVersion: hairpin/v1
kind: VirtualMachine
metadata: {name: b}
spec: {vmId: vm-2}
---
apiVersion: hairpin/v1
kind: SteeringPolicy
metadata: {name: p}
spec: {priority: 1, from: [{vm: a}], to: [{vm: b}], action: {deny: {}}}
"""
    )
    policies = parse_documents(document)
    left = resolve_machines(policies, PORTS[1:])
    ghostly = Simulator(compile_program(policies, left, LANES, 0, PORTS[:1]))
    assert not ghostly.send(build_arp(3, OWN4)).normal
    without = Simulator(compile_program(policies, left, LANES))
    assert without.send(build_arp(3, OWN4)).normal, "on another host, it is claimed by the uplink"


def test_false_claims_are_counted_by_their_holder_and_spoofs_by_their_sender() -> None:
    policies = parse_documents(DOCUMENT % f"[{OWN4}, '{OWN6}']")
    program = compile_program(policies, resolve_machines(policies, PORTS), LANES)
    flows = [(flow.key, flow.cookie, 2, 120) for flow in program.flows]
    counters = build_counters(find_tallies(flows, [], policies, LANES), policies, LANES)
    assert counters.claims == {1: Count(6, 360)}, "ARP, solicitation, advertisement"


# What a document may say


def test_addresses_are_read_in_one_form_and_rendered_again() -> None:
    policies = parse_documents(DOCUMENT % "[10.0.0.1, '2001:DB8::0:1']")
    assert policies.machines[0].addresses == ("10.0.0.1", "2001:db8::1")
    assert parse_objects(render_documents(policies)) == policies
    assert parse_documents(DOCUMENT.replace(", addresses: %s", "")).machines[0].addresses == ()


@pytest.mark.parametrize(
    ("said", "faults"),
    [
        ("[]", ["spec.addresses: must not be empty"]),
        ("10.0.0.1", ["spec.addresses: must be a list, not '10.0.0.1'"]),
        ("[10]", ["spec.addresses[0]: must be text, not 10: put it in quotes"]),
        ("[a, 10.0.0.256]", [
            "spec.addresses[0]: 'a' is not an IPv4 or IPv6 address without a prefix",
            "spec.addresses[1]: '10.0.0.256' is not an IPv4 or IPv6 address without a prefix",
        ]),
        ("[10.0.0.0/24]", ["spec.addresses[0]: '10.0.0.0/24' is not an IPv4 or IPv6 address without a prefix"]),
        ("['fe80::1%eth0']", ["spec.addresses[0]: 'fe80::1%eth0' is not an IPv4 or IPv6 address without a prefix"]),
        ("[0.0.0.0, 127.0.0.1, 224.0.0.1, 169.254.1.1, 255.255.255.255]", [
            f"spec.addresses[{number}]: {address} is no address that a VM holds for itself"
            for number, address in enumerate(
                ("0.0.0.0", "127.0.0.1", "224.0.0.1", "169.254.1.1", "255.255.255.255"))
        ]),
        ("['::', '::1', 'ff02::1', 'fe80::1', '::ffff:10.0.0.1']", [
            f"spec.addresses[{number}]: {address} is no address that a VM holds for itself"
            for number, address in enumerate(("::", "::1", "ff02::1", "fe80::1", "::ffff:a00:1"))
        ]),
        ("['fd00::1', 'fd00:0::1']", ["spec.addresses[1]: fd00::1 stands here more than once"]),
        (str([f"10.0.0.{n}" for n in range(1, 18)]), ["spec.addresses: has 17 entries; at most 16 are taken"]),
    ],
)  # fmt: skip
def test_what_is_no_list_of_addresses_is_told_where_and_why(said: str, faults: list[str]) -> None:
    with pytest.raises(WrongInput) as caught:
        parse_documents(DOCUMENT % said)
    assert [str(fault) for fault in caught.value.faults] == [
        f"items[0].{fault} (VirtualMachine a)" for fault in faults
    ]


@given(st.lists(st.ip_addresses(), max_size=20, unique=True))
def test_every_address_that_is_read_is_written_as_the_switch_writes_it(
    addresses: list[object],
) -> None:
    try:
        policies = parse_documents(DOCUMENT % [str(address) for address in addresses])
    except WrongInput:
        return
    assert policies.machines[0].addresses == tuple(str(address) for address in addresses)
    assert parse_objects(render_documents(policies)) == policies


# Contests


def test_a_contest_is_told_once_for_each_two_while_the_holder_is_there() -> None:
    told = []
    claims = Claims()
    both, alone = {"a", "b"}, {"b"}
    for now, claimant, present in (
        (0.0, "a", both), (1.0, "a", both), (2.0, "b", both), (3.0, "a", both), (4.0, "b", both),
        (700.0, "a", both), (701.0, "b", alone), (702.0, "a", both), (1400.0, "b", both),
    ):  # fmt: skip
        claims, holder = record_claim(claims, OWN4, claimant, present, now)
        if holder is not None:
            told.append((now, holder, claimant))
    assert told == [(2.0, "a", "b"), (700.0, "b", "a"), (1400.0, "a", "b")]


@given(
    st.lists(
        st.tuples(st.sampled_from(["x", "y"]), st.sampled_from("abc"), st.floats(0, 500)),
        max_size=60,
    )
)
def test_what_is_told_is_bounded_by_time_and_names_who_claimed_last(
    seen: list[tuple[str, str, float]],
) -> None:
    claims, now = Claims(), 0.0
    last: dict[str, str] = {}
    told: dict[tuple[str, frozenset[str]], float] = {}
    for address, claimant, wait in seen:
        now += wait
        claims, holder = record_claim(claims, address, claimant, {"a", "b"}, now)
        if holder is not None:
            assert holder == last[address] != claimant
            assert holder != "c", "who is not on the switch contests nothing"
            pair = address, frozenset((holder, claimant))
            assert pair not in told or now - told[pair] >= CONTEST_SECONDS
            told[pair] = now
        last[address] = claimant
        assert claims.holders == last


def test_claims_are_kept_for_a_bounded_number_of_addresses() -> None:
    full = Claims({f"10.0.0.{n}": "a" for n in range(HELD_LIMIT)})
    claims, _ = record_claim(full, OWN6, "b", (), 0.0)
    assert len(claims.holders) == HELD_LIMIT
    assert "10.0.0.0" not in claims.holders
