"""Coverage says of every pair what `decide` says of every connection, and counts it."""

from __future__ import annotations

import time
from dataclasses import replace
from itertools import product

from hypothesis import HealthCheck, given, settings

from steering.coverage import Coverage, PairCoverage, Share, Status, build_coverage
from steering.decide import Connection, decide, resolve_machines
from steering.model import (
    Deny,
    Direct,
    Family,
    MachineRecord,
    PolicySet,
    Protocol,
    Service,
    Shortcut,
    Trigger,
    Zone,
)
from steering.services import covers
from tests.support.policies import (
    APP,
    DB,
    PREVENT,
    WEB,
    build_policy,
    build_port,
    build_set,
    build_vm_id,
    connections,
    find_machines,
    policy_sets,
    tcp,
)


def find_pair(coverage: Coverage, source: str, destination: str) -> PairCoverage:
    return next(
        pair
        for pair in coverage.pairs
        if (pair.source.name, pair.destination.name) == (source, destination)
    )


def cover(policies: PolicySet) -> Coverage:
    return build_coverage(policies, find_machines(policies))


def test_each_status_and_its_gap() -> None:
    coverage = cover(
        build_set(
            build_policy("inspect", WEB, APP, PREVENT),
            build_policy("http", APP, WEB, PREVENT, tcp(80)),
            build_policy("backup", WEB, DB, Direct("encrypted end to end")),
            build_policy("none", DB, WEB, Deny("databases open nothing")),
        )
    )
    for source, destination, status, gap in (
        ("web-1", "app-1", Status.INSPECTED, None),
        (
            "app-1",
            "web-1",
            Status.PARTIAL,
            "goes direct, uninspected: everything else, which no policy names",
        ),
        (
            "web-1",
            "db-1",
            Status.DIRECT,
            "goes direct, uninspected: any by policy backup: encrypted end to end",
        ),
        ("db-1", "web-1", Status.DENIED, None),
        (
            "app-1",
            "db-1",
            Status.BLIND,
            "goes direct, uninspected: any, which no policy names",
        ),
    ):
        pair = find_pair(coverage, source, destination)
        assert (pair.status, pair.gap) == (status, gap)


def test_denying_the_rest_of_an_inspected_pair_leaves_no_gap() -> None:
    inspect = build_policy("http", WEB, APP, PREVENT, tcp(80), priority=200)
    pair = find_pair(
        cover(build_set(inspect, build_policy("rest", WEB, APP, Deny()))), "web-1", "app-1"
    )
    assert (pair.status, pair.gap) == (Status.INSPECTED, None)
    assert [(str(s.service), s.policy) for s in pair.services] == [
        ("tcp/80", "http"),
        ("any", "rest"),
    ]


def test_what_higher_policies_take_whole_is_left_out() -> None:
    v4 = (Family.IPV4,)
    pair = find_pair(
        cover(
            build_set(
                build_policy("all-v4", WEB, APP, PREVENT, families=v4, priority=9),
                build_policy("ssh", WEB, APP, Direct("audited"), tcp(22), priority=8),
                build_policy("never", WEB, APP, Deny(), tcp(22), priority=7),
            )
        ),
        "web-1",
        "app-1",
    )
    assert [(str(s.service), s.families, s.policy) for s in pair.services] == [
        ("any", v4, "all-v4"),
        ("tcp/22", (Family.IPV6,), "ssh"),
        ("any", (Family.IPV6,), None),
    ]
    assert pair.status is Status.PARTIAL
    assert pair.gap == (
        "goes direct, uninspected: tcp/22 ipv6 by policy ssh: audited; "
        "everything else ipv6, which no policy names"
    )


def test_the_summary_counts_ordered_pairs_and_rounds_down() -> None:
    summary = cover(build_set(build_policy("inspect", WEB, APP, PREVENT))).summary
    assert (summary.machines, summary.pairs, summary.unreachable) == (6, 30, 0)
    assert summary.inspected == Share(4, 13.3)
    assert summary.blind == Share(26, 86.6)
    assert summary.partial == summary.direct == summary.denied == Share(0, 0.0)
    assert build_coverage(PolicySet(), ()).summary.blind == Share(0, 0.0)


def test_vms_that_share_no_bridge_and_vlan_are_unreachable() -> None:
    policies = build_set()
    ports = (build_port(1, tag=10), build_port(2, tag=20), build_port(3, bridge="br-two", tag=10))
    coverage = build_coverage(policies, resolve_machines(policies, ports))
    assert (coverage.pairs, coverage.summary.unreachable) == ((), 6)
    router = replace(build_port(9, tag=20), vm_id=build_vm_id(1))
    coverage = build_coverage(policies, resolve_machines(policies, (*ports, router)))
    assert {(p.source.name, p.destination.name) for p in coverage.pairs} == {
        ("web-1", "web-2"),
        ("web-2", "web-1"),
    }
    assert coverage.summary.unreachable == 4


@given(policy_sets(), connections)
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_coverage_agrees_with_decide(policies: PolicySet, said: Connection) -> None:
    machines = find_machines(policies)
    pairs = {
        (p.source.vm_id, p.destination.vm_id): p for p in build_coverage(policies, machines).pairs
    }
    vm_ids = [machine.vm_id for machine in machines]
    assert pairs.keys() == {(a, b) for a, b in product(vm_ids, vm_ids) if a != b}
    for (source, destination), pair in pairs.items():
        decision = decide(policies, machines, source, destination, said)
        row = next(
            row
            for row in pair.services
            if said.family in row.families
            and covers(row.service, said.protocol, said.destination_port)
        )
        assert row.action == decision.action
        assert row.policy == (decision.policy.name if decision.policy else None)
        kind = type(decision.action)
        if pair.status is Status.INSPECTED:
            assert kind not in (Direct, type(None))
        if pair.status is Status.BLIND:
            assert kind in (Direct, Deny, type(None))
        if pair.status is Status.DENIED:
            assert kind is Deny
        assert (pair.gap is None) == (pair.status in (Status.INSPECTED, Status.DENIED))


def test_two_hundred_vms_and_fifty_policies_take_less_than_two_seconds() -> None:
    zones = tuple(Zone(f"z{n}", {"group": f"g{n}"}) for n in range(20))
    records = tuple(
        MachineRecord(build_vm_id(n), f"vm-{n}", {"group": f"g{n % 20}"}) for n in range(200)
    )
    actions = (PREVENT, Direct("backup"), Deny())
    peers = (WEB, APP, DB)
    policies = tuple(
        build_policy(
            f"p{n}",
            replace(peers[0], zone=f"z{n % 20}"),
            replace(peers[1], zone=f"z{n * 7 % 20}"),
            actions[n % 3],
            tcp(n, 8000 + n),
            Service(Protocol.UDP),
            priority=n + 1,
        )
        for n in range(50)
    )
    wanted = PolicySet(records, zones, policies)
    machines = resolve_machines(wanted, [build_port(n) for n in range(200)])
    started = time.process_time()
    coverage = build_coverage(wanted, machines)
    assert time.process_time() - started < 2  # 0.1 s
    assert len(coverage.pairs) == 200 * 199


CUT = replace(PREVENT, shortcut=Shortcut(Trigger.ONE_MEGABYTE, 50))


def test_what_may_leave_inspection_is_not_called_inspected() -> None:
    for services, status, leaves in (
        ((), Status.PARTIAL, True),
        ((tcp(80),), Status.PARTIAL, True),
        ((Service(Protocol.UDP),), Status.PARTIAL, False),
    ):
        pair = find_pair(
            cover(build_set(build_policy("backup", WEB, APP, CUT, *services))), "web-1", "app-1"
        )
        assert pair.status is status
        told = "TCP by policy backup leaves inspection after 1MB, at most 50 connections at a time"
        assert (told in (pair.gap or "")) is leaves, pair.gap
    # Of what is not TCP nothing ever leaves.
    udp = (Service(Protocol.UDP),)
    set_ = build_set(
        build_policy("dns", WEB, APP, CUT, *udp, priority=200),
        build_policy("rest", WEB, APP, PREVENT),
    )
    pair = find_pair(cover(set_), "web-1", "app-1")
    assert (pair.status, pair.gap) == (Status.INSPECTED, None)


def test_what_goes_direct_and_what_leaves_later_are_both_told() -> None:
    set_ = build_set(build_policy("backup", WEB, APP, CUT, tcp(80)))
    gap = find_pair(cover(set_), "web-1", "app-1").gap
    assert gap == (
        "goes direct, uninspected: everything else, which no policy names; TCP by policy backup leaves "
        "inspection after 1MB, at most 50 connections at a time"
    )
