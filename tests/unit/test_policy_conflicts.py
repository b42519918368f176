"""Policies that contradict at equal priority are always refused, and nothing else is."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import combinations, product

import pytest
from hypothesis import HealthCheck, given, settings

from steering.conflicts import find_contradictions, find_outcome
from steering.decide import Connection, find_mismatches, find_subject
from steering.documents import MAX_FAULTS
from steering.errors import WrongInput
from steering.model import (
    Deny,
    Direct,
    Family,
    MachineRecord,
    Peer,
    Policy,
    PolicySet,
    PortRange,
    Protocol,
    Service,
    Zone,
)
from steering.parse import parse_objects, render_documents
from steering.services import PORTED
from tests.support.policies import (
    APP,
    DB,
    DETECT,
    EDGES,
    PREVENT,
    WEB,
    build_policy,
    build_set,
    build_vm_id,
    connections,
    policy_sets,
    tcp,
)

UDP = Service(Protocol.UDP)
V4, V6 = (Family.IPV4,), (Family.IPV6,)


@pytest.mark.parametrize(
    ("one", "other", "overlap"),
    [
        ((WEB, APP, PREVENT), (WEB, APP, DETECT), "web-1, web-2 to app-1, app-2, any"),
        ((WEB, APP, PREVENT, tcp(80)), (WEB, APP, Deny(), tcp(79, 80)), "tcp/80"),
        ((WEB, APP, PREVENT, tcp(80)), (WEB, APP, Deny()), "tcp/80"),
        ((WEB, APP, PREVENT, tcp()), (WEB, APP, Deny(), UDP, tcp(22)), "tcp/22"),
        ((WEB, Peer(vm="app-1"), PREVENT), (WEB, APP, Deny()), "to app-1"),
        ((WEB, APP, PREVENT), (WEB, Peer(vm="app-1"), Deny()), "to app-1"),
        ((Peer(vm="web-1"), APP, PREVENT), (Peer(vm=build_vm_id(1)), APP, Deny()), "web-1 to"),
        (
            (Peer(vm=build_vm_id(9)), APP, PREVENT),
            (Peer(vm=build_vm_id(9)), APP, Deny()),
            "0009 to",
        ),
        # nothing in common:
        ((WEB, APP, PREVENT), (APP, WEB, Deny()), None),
        ((WEB, APP, PREVENT), (WEB, DB, Deny()), None),
        ((WEB, APP, PREVENT, tcp(80)), (WEB, APP, Deny(), tcp(81)), None),
        ((WEB, APP, PREVENT, tcp(80)), (WEB, APP, Deny(), UDP), None),
        ((WEB, Peer(vm="db-1"), PREVENT), (WEB, APP, Deny()), None),
        ((WEB, Peer(vm=build_vm_id(9)), PREVENT), (WEB, APP, Deny()), None),
        # the same outcome:
        ((WEB, APP, PREVENT), (WEB, APP, PREVENT, tcp(80)), None),
        ((WEB, APP, Direct("backup")), (WEB, APP, Direct("replication")), None),
    ],
)
def test_two_policies_of_one_priority(
    one: tuple[Peer, Peer], other: tuple[Peer, Peer], overlap: str | None
) -> None:
    policies = build_set(build_policy("one", *one), build_policy("other", *other))
    found = list(find_contradictions(policies))
    if overlap is None:
        assert found == []
    else:
        assert [(clash.first, clash.second) for clash in found] == [(0, 1)]
        assert overlap in found[0].overlap
    apart = replace(
        policies, policies=(policies.policies[0], replace(policies.policies[1], priority=99))
    )
    assert list(find_contradictions(apart)) == []


def test_policies_of_different_families_do_not_contradict() -> None:
    policies = build_set(
        build_policy("one", WEB, APP, PREVENT, families=V4),
        build_policy("other", WEB, APP, Deny(), families=V6),
    )
    assert list(find_contradictions(policies)) == []


def test_zones_that_may_share_a_vm_some_day_contradict_today() -> None:
    zones = (Zone("a", {"tier": "web"}), Zone("b", {"env": "prod"}), Zone("c", {"tier": "app"}))
    a, b, c = (Peer(zone=zone.name) for zone in zones)

    def build(first: Peer, second: Peer) -> PolicySet:
        one = build_policy("one", first, c, PREVENT)
        return PolicySet((), zones, (one, build_policy("other", second, c, Deny())))

    found = list(find_contradictions(build(a, b)))
    assert "any VM that is in zone a and in zone b" in found[0].overlap
    assert list(find_contradictions(build(a, c))) == []


def test_the_fault_names_both_documents() -> None:
    policies = build_set(build_policy("one", WEB, APP), build_policy("other", WEB, APP, Deny()))
    with pytest.raises(WrongInput) as caught:
        parse_objects(render_documents(policies))
    (fault,) = caught.value.faults
    assert fault.path == "items[9].spec.priority"
    assert fault.reason == (
        "SteeringPolicy other contradicts one (items[8]) at equal priority 100: deny against "
        "inspect (prevent, closed on failure), both for web-1, web-2 to app-1, app-2, any, "
        "ipv4 and ipv6"
    )


# A second opinion: no index, no bit sets, but every VM, every edge of every range, one by one.

POINTS = [
    Connection(family, protocol, port)
    for family, protocol in product(Family, Protocol)
    for port in (EDGES if protocol in PORTED else (None,))
]


def find_clashes(policies: PolicySet) -> set[tuple[int, int]]:
    """Pairs of policies that give one connection of some declared VMs two outcomes."""
    vm_ids = {record.vm_id for record in policies.machines} | {build_vm_id(6)}
    subjects = [find_subject(policies, (), vm_id) for vm_id in vm_ids]
    clashes: set[tuple[int, int]] = set()
    for (n, one), (m, other) in combinations(enumerate(policies.policies), 2):
        if one.priority != other.priority or find_outcome(one.action) == find_outcome(other.action):
            continue
        ends = [
            (source, destination)
            for source, destination in product(subjects, subjects)
            if all(
                source.is_named_by(policy.sources) and destination.is_named_by(policy.destinations)
                for policy in (one, other)
            )
        ]
        if ends and any(
            not find_mismatches(one, *ends[0], point)
            and not find_mismatches(other, *ends[0], point)
            for point in POINTS
        ):
            clashes.add((n, m))
    return clashes


def add_every_possible_vm(policies: PolicySet) -> PolicySet:
    """The set with a VM for each two zones that allow one."""
    records = list(policies.machines)
    for one, other in product(policies.zones, policies.zones):
        if all(other.match_tags.get(key, value) == value for key, value in one.match_tags.items()):
            number = 100 + len(records)
            tags = {**one.match_tags, **other.match_tags}
            records.append(MachineRecord(build_vm_id(number), f"vm-{number}", tags))
    return replace(policies, machines=tuple(records))


@given(policy_sets(consistent=False, priorities=(1, 2)))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_exactly_the_contradicting_pairs_are_found(policies: PolicySet) -> None:
    found = {(clash.first, clash.second) for clash in find_contradictions(policies)}
    assert found >= find_clashes(policies)
    assert found == find_clashes(add_every_possible_vm(policies))


@given(policy_sets(consistent=False, priorities=(1,)), connections)
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_an_accepted_set_never_has_two_outcomes(policies: PolicySet, said: Connection) -> None:
    try:
        parse_objects(render_documents(policies))
    except WrongInput:
        assert find_clashes(add_every_possible_vm(policies))
        return
    subjects = [find_subject(policies, (), build_vm_id(number)) for number in range(1, 7)]
    for source, destination in product(subjects, subjects):
        outcomes = {
            find_outcome(policy.action)
            for policy in policies.policies
            if not find_mismatches(policy, source, destination, said)
        }
        assert len(outcomes) <= 1


def build_large_set(*, contradicting: bool) -> PolicySet:
    """10,000 VMs in 100 zones, 1,000 policies of one priority."""
    zones = tuple(Zone(f"z{n}", {"group": f"g{n}"}) for n in range(100))
    records = tuple(
        MachineRecord(build_vm_id(n), f"vm-{n}", {"group": f"g{n % 100}"}) for n in range(10_000)
    )
    policies: list[Policy] = []
    for n in range(1000):
        # Each source zone is named ten times, each time for ports of its own, unless contradicting.
        first = 1 if contradicting else n // 100 * 100
        service = Service(Protocol.TCP, (PortRange(first, first + 99),))
        peers = Peer(zone=f"z{n % 100}"), Peer(vm=f"vm-{n}")
        action = PREVENT if n // 100 % 2 else Deny()
        policy = build_policy(f"p{n}", *peers, action, service)
        policies.append(replace(policy, destinations=(peers[1], Peer(zone="z0"))))
    return PolicySet(records, zones, tuple(policies))


@pytest.mark.parametrize("contradicting", [False, True])
def test_a_thousand_policies_and_ten_thousand_vms_take_seconds(contradicting: bool) -> None:
    policies = build_large_set(contradicting=contradicting)
    started = time.monotonic()
    found = [
        clash for _, clash in zip(range(MAX_FAULTS), find_contradictions(policies), strict=False)
    ]
    assert time.monotonic() - started < 10  # 0.4 s on an idle core
    assert len(found) == (MAX_FAULTS if contradicting else 0)
