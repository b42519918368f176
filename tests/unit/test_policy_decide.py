"""What policies say of a connection, and what the switch must have for them."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steering.decide import (
    Connection,
    check_against_switch,
    decide,
    find_members,
    order_policies,
    resolve_machines,
)
from steering.documents import MAX_FAULTS
from steering.model import (
    Deny,
    Direct,
    Family,
    Peer,
    PolicySet,
    PortRange,
    Protocol,
    Service,
    Zone,
)
from steering.parse import parse_objects, render_documents
from steering.services import EVERYTHING, build_space, build_spaces, covers, find_example
from tests.support.policies import (
    APP,
    DB,
    DETECT,
    LANES,
    PORTS,
    PREVENT,
    RECORDS,
    WEB,
    ZONES,
    build_policy,
    build_port,
    build_record,
    build_set,
    build_vm_id,
    connections,
    find_machines,
    policy_sets,
    services,
    tcp,
)

HTTP = Connection(Family.IPV4, Protocol.TCP, 80)


def decide_names(
    policies: PolicySet, source: int, destination: int, said: Connection
) -> str | None:
    decision = decide(
        policies, find_machines(policies), build_vm_id(source), build_vm_id(destination), said
    )
    return decision.policy.name if decision.policy else None


def test_machines_are_grouped_by_vm_id_and_described_by_the_documents() -> None:
    second = replace(build_port(9), vm_id=build_vm_id(1), mac="52:54:00:00:00:aa")
    stray = replace(build_port(10), vm_id="")
    machines = resolve_machines(build_set(), (*reversed(PORTS), second, stray))
    assert [(m.name, m.zones, len(m.ports)) for m in machines] == [
        (build_vm_id(6), (), 1),
        ("app-1", ("app",), 1),
        ("app-2", ("app",), 1),
        ("db-1", ("db",), 1),
        ("web-1", ("web",), 2),
        ("web-2", ("web",), 1),
    ]
    assert [port.ofport for port in machines[4].ports] == [1, 9]


def test_a_zone_demands_every_tag_of_its_selector() -> None:
    zones = (*ZONES, Zone("test-app", {"tier": "app", "env": "test"}))
    machines = resolve_machines(PolicySet(RECORDS, zones), PORTS)
    assert {m.name: m.zones for m in machines}["app-2"] == ("app", "test-app")
    assert {m.name: m.zones for m in machines}["app-1"] == ("app",)


def test_members_are_found_vms_by_zone_name_or_vm_id() -> None:
    policies = build_set()
    machines = find_machines(policies)
    named = (APP, Peer(vm="web-1"), Peer(vm=build_vm_id(6)), Peer(vm="web-9"))
    wanted = frozenset(build_vm_id(number) for number in (1, 3, 4, 6))
    assert find_members(policies, machines, named) == wanted
    assert find_members(policies, machines[:1], named) == {build_vm_id(6)}


def test_the_highest_priority_that_matches_wins() -> None:
    policies = build_set(
        build_policy("low", WEB, APP, PREVENT, priority=10),
        build_policy("high", WEB, APP, Deny("no telnet"), tcp(23), priority=20),
        build_policy("other", APP, WEB, Direct("backup"), priority=30),
    )
    assert decide_names(policies, 1, 3, HTTP) == "low"
    assert decide_names(policies, 1, 3, Connection(Family.IPV4, Protocol.TCP, 23)) == "high"
    assert decide_names(policies, 1, 3, Connection(Family.IPV4, Protocol.UDP, 23)) == "low"


def test_a_decision_is_about_who_opens_the_connection() -> None:
    policies = build_set(build_policy("web-to-app", WEB, APP))
    assert decide_names(policies, 1, 3, HTTP) == "web-to-app"
    assert decide_names(policies, 3, 1, HTTP) is None
    assert decide_names(policies, 1, 2, HTTP) is None


def test_what_no_policy_names_says_so() -> None:
    policies = build_set()
    decision = decide(policies, find_machines(policies), build_vm_id(1), build_vm_id(5), HTTP)
    assert decision.action is None
    assert "no policy names it" in decision.reason


def test_a_vm_that_has_left_is_judged_by_its_document() -> None:
    policies = build_set(build_policy("web-to-app", WEB, APP))
    decision = decide(policies, (), build_vm_id(1), build_vm_id(3), HTTP)
    assert decision.policy is not None
    assert decide(policies, (), "unheard-of", build_vm_id(3), HTTP).policy is None


@pytest.mark.parametrize(
    ("service", "protocol", "port", "wanted"),
    [
        (tcp(80), Protocol.TCP, 80, True),
        (tcp(80), Protocol.TCP, 81, False),
        (tcp(80), Protocol.UDP, 80, False),
        (tcp(80), Protocol.TCP, None, False),
        (tcp(), Protocol.TCP, None, True),
        (Service(Protocol.TCP, (PortRange(0, 65535),)), Protocol.TCP, None, True),
        (Service(Protocol.ICMP), Protocol.ICMP, None, True),
        (Service(Protocol.ICMP), Protocol.ANY, None, False),
        (Service(Protocol.ANY), Protocol.ANY, None, True),
        (Service(Protocol.ANY), Protocol.SCTP, 9, True),
    ],
)
def test_what_a_service_covers(
    service: Service, protocol: Protocol, port: int | None, wanted: bool
) -> None:
    assert covers(service, protocol, port) is wanted


@given(services, connections)
def test_a_space_holds_exactly_what_its_service_covers(service: Service, said: Connection) -> None:
    port = () if said.destination_port is None else (PortRange(*[said.destination_port] * 2),)
    point = Service(said.protocol, port)
    if said.protocol is Protocol.ANY:  # a protocol without a name: all that the named ones leave
        named = [Service(one) for one in Protocol if one is not Protocol.ANY]
        space = EVERYTHING & ~build_spaces(named)
    else:
        space = build_space(point)
    assert bool(build_space(service) & space) is covers(
        service, said.protocol, said.destination_port
    )


@given(st.lists(services, min_size=1, max_size=3))
def test_the_example_of_a_space_lies_within_it(some: list[Service]) -> None:
    space = build_spaces(some)
    example = find_example(space)
    if example.protocol is not Protocol.ANY:
        assert build_space(example) & ~space == 0


@given(policy_sets(), connections, st.integers(1, 6), st.integers(1, 6), st.randoms())
@settings(deadline=None)
def test_the_order_of_the_documents_does_not_matter(
    policies: PolicySet, said: Connection, source: int, destination: int, random: Random
) -> None:
    shuffled = list(policies.policies)
    random.shuffle(shuffled)
    other = replace(policies, policies=tuple(shuffled))
    machines = find_machines(policies)
    ends = build_vm_id(source), build_vm_id(destination)
    first = decide(policies, machines, *ends, said)
    assert first == decide(policies, machines, *ends, said)
    assert first == decide(other, machines, *ends, said)
    assert order_policies(shuffled) == order_policies(policies.policies)


# Against the switch


def test_policies_that_the_switch_can_serve_have_no_faults() -> None:
    policies = build_set(build_policy("a", WEB, APP), build_policy("b", APP, DB, DETECT))
    assert check_against_switch(policies, PORTS, LANES) == ()


def test_what_the_switch_lacks_is_told_at_its_document() -> None:
    policies = replace(
        build_set(
            build_policy("a", WEB, APP, DETECT),
            build_policy("b", Peer(vm=build_vm_id(8)), Peer(vm="gone-1")),
        ),
        machines=(*RECORDS, build_record("gone-1", 7)),
    )
    faults = check_against_switch(policies, PORTS, LANES[:1])
    assert [fault.path for fault in faults] == [
        "items[5].spec.vmId",
        "items[9].spec.action.inspect.profile",
        "items[10].spec.from[0].vm",
    ]
    assert "is in no bridge" in faults[0].reason
    assert "no lane has the profile detect; the lanes are: prevent" in faults[1].reason
    rendered = render_documents(policies)["items"]
    assert isinstance(rendered, list)
    assert rendered[5]["metadata"]["name"] == "gone-1"
    assert rendered[9]["metadata"]["name"] == "a"
    assert parse_objects(render_documents(policies)) == policies


def test_a_shared_mac_is_refused_where_a_policy_names_one_of_its_vms() -> None:
    twin = replace(build_port(6), mac=PORTS[0].mac.upper(), tag=7)
    ports = (*PORTS[:5], twin)
    assert check_against_switch(build_set(), ports, LANES) == ()
    faults = check_against_switch(build_set(build_policy("a", WEB, APP)), ports, LANES)
    assert [fault.path for fault in faults] == ["items[0].spec.vmId"]
    assert "2 ports of br-int have the MAC 52:54:00:00:00:01: tap1" in faults[0].reason
    both = build_set(build_policy("a", WEB, Peer(vm=build_vm_id(6))))
    assert [fault.path for fault in check_against_switch(both, ports, LANES)] == [
        "items[0].spec.vmId",
        "items[8].spec.to[0].vm",
    ]
    elsewhere = (*PORTS[:5], replace(twin, bridge="br-other"))
    assert check_against_switch(both, elsewhere, LANES) == ()


def test_a_port_without_a_mac_is_refused_where_a_policy_names_its_vm() -> None:
    ports = (replace(PORTS[0], mac=""), *PORTS[1:5], replace(PORTS[5], mac=""))
    faults = check_against_switch(build_set(build_policy("a", WEB, APP)), ports, LANES)
    assert [fault.path for fault in faults] == ["items[0].spec.vmId"]
    assert "has no attached-mac" in faults[0].reason


def test_faults_against_the_switch_are_bounded_and_the_rest_is_counted() -> None:
    records = tuple(build_record(f"vm-{number}", number) for number in range(MAX_FAULTS + 50))
    faults = check_against_switch(PolicySet(records), (), LANES)
    assert len(faults) == MAX_FAULTS + 1
    assert faults[-1].reason == "and 50 more faults"
