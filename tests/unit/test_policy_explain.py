"""An explanation says what decides, what did not and why, and the way of the packets."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steering.decide import Connection, decide, resolve_machines
from steering.errors import WrongInput
from steering.explain import Explanation, Verdict, explain
from steering.model import Deny, Direct, Family, Inspect, OnFailure, Peer, PolicySet, Protocol
from steering.pipeline import Table
from tests.support.policies import (
    APP,
    DB,
    DETECT,
    LANES,
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

HTTP = Connection(Family.IPV4, Protocol.TCP, 80)


def ask(policies: PolicySet, source: str, destination: str, said: Connection = HTTP) -> Explanation:
    return explain(policies, find_machines(policies), LANES, source, destination, said)


def list_steps(steps: tuple[object, ...]) -> list[str]:
    return [str(step) for step in steps]


def test_an_inspected_connection_goes_round_by_its_lane() -> None:
    said = ask(build_set(build_policy("web-to-app", WEB, APP, PREVENT, tcp(80))), "web-1", "app-1")
    assert said.inspected
    assert (said.policy, said.priority, said.profile) == ("web-to-app", 100, "prevent")
    assert said.on_failure is OnFailure.CLOSED
    assert said.lane == LANES[0]
    assert said.reason == (
        "policy web-to-app (priority 100) says inspect (prevent, closed on failure)"
    )
    head = [
        "CLASSIFY",
        "GUARD",
        "LEARN",
        "ENDPOINT",
        "CONNECTION",
        "SENDER",
        "RECEIVER",
        "POLICY",
        "COMMIT",
    ]
    assert list_steps(said.forward) == [
        *head,
        "STEER (lane prevent, VLAN 3901)",
        "leg A (leg-p-a)",
        "service host (queue 0, 1, engine prevent)",
        "leg B (leg-p-b)",
        "CLASSIFY (from a leg)",
        "RETURN",
        "DELIVER",
    ]
    assert list_steps(said.answers) == [
        *head,
        "STEER (lane prevent, VLAN 3901)",
        "leg B (leg-p-b)",
        "service host (queue 0, 1, engine prevent)",
        "leg A (leg-p-a)",
        "CLASSIFY (from a leg)",
        "RETURN",
        "DELIVER",
    ]


def test_what_was_passed_over_and_what_was_shadowed_is_told_with_reasons() -> None:
    v6 = (Family.IPV6,)
    policies = build_set(
        build_policy("ports", WEB, APP, Deny(), tcp(22, 23), priority=60),
        build_policy("family", WEB, APP, Deny(), families=v6, priority=50),
        build_policy("ends", DB, Peer(vm="app-2"), Deny(), priority=40),
        build_policy("decides", WEB, APP, DETECT, priority=30),
        build_policy("shadowed", WEB, APP, PREVENT, priority=20),
        build_policy("unrelated", DB, APP, PREVENT, priority=10),
    )
    said = ask(policies, "web-1", "app-1")
    assert said.policy == "decides"
    assert [(one.policy, one.reasons) for one in said.passed_over] == [
        ("ports", ("tcp/80 is not in tcp/22,23",)),
        ("family", ("ipv4 is not in ipv6",)),
        (
            "ends",
            (
                "source web-1 (in zone web) is not in zone db",
                "destination app-1 (in zone app) is not in vm app-2",
            ),
        ),
    ]
    assert [(one.policy, one.reasons) for one in said.shadowed] == [
        ("shadowed", ("decides comes before it",))
    ]


def test_direct_and_denied_connections() -> None:
    policies = build_set(
        build_policy("backup", WEB, DB, Direct("encrypted")),
        build_policy("closed", DB, WEB, Deny("databases open nothing")),
    )
    said = ask(policies, "web-1", "db-1")
    assert (said.verdict, said.inspected) == (Verdict.DIRECT, False)
    assert list_steps(said.forward) == [
        "CLASSIFY",
        "GUARD",
        "LEARN",
        "ENDPOINT",
        "CONNECTION",
        "SENDER",
        "RECEIVER",
        "POLICY",
        "COMMIT",
        "STEER",
        "DIRECT",
    ]
    assert said.answers == said.forward
    said = ask(policies, "db-1", "web-1")
    assert said.verdict is Verdict.DENIED
    assert str(said.forward[-1]).startswith("POLICY (drop; answers to connections that the other")
    assert said.answers == ()


def test_what_no_policy_names_goes_direct_by_the_shortest_way() -> None:
    policies = build_set(build_policy("web-to-app", WEB, APP))
    said = ask(policies, "db-1", build_vm_id(6))
    assert (said.verdict, said.policy) == (Verdict.BLIND, None)
    assert list_steps(said.forward) == list_steps(said.answers) == ["CLASSIFY", "GUARD", "DIRECT"]
    assert "no policy names it" in said.reason
    assert said.passed_over[0].reasons[1] == (
        f"destination {build_vm_id(6)} (in no zone) is not in zone app"
    )
    one_named = ask(policies, "db-1", "web-1")
    assert [step.name for step in one_named.forward] == ["CLASSIFY", "GUARD", "DIRECT"]
    assert [step.name for step in one_named.answers] == [
        "CLASSIFY",
        "GUARD",
        "LEARN",
        "ENDPOINT",
        "DIRECT",
    ]
    both_named = ask(policies, "app-1", "web-1")
    assert [step.name for step in both_named.forward][-2:] == ["POLICY", "DIRECT"]


def test_a_profile_without_a_lane_is_dropped_and_says_so() -> None:
    policies = build_set(build_policy("a", WEB, APP, DETECT))
    said = explain(policies, find_machines(policies), LANES[:1], "web-1", "app-1", HTTP)
    assert (said.verdict, said.lane, said.answers) == (Verdict.DENIED, None, ())
    assert "no lane has that profile, so it is dropped" in said.reason


def test_vms_that_cannot_reach_each_other_are_told() -> None:
    policies = build_set(build_policy("a", WEB, APP))
    machines = resolve_machines(policies, [build_port(1, tag=10), build_port(3, tag=20)])
    said = explain(policies, machines, LANES, "web-1", "app-1", HTTP)
    assert not said.reachable
    assert "share no bridge and VLAN" in said.reason


@pytest.mark.parametrize(
    ("source", "destination", "said", "faults"),
    [
        (
            "wbe-1",
            "app-9",
            HTTP,
            [
                (
                    "source",
                    "no VM on the switch has the name or vm-id 'wbe-1'; did you mean web-1?",
                ),
                ("destination", "'app-9'; did you mean app-"),
            ],
        ),
        ("web-1", build_vm_id(1), HTTP, [("destination", "is the source too")]),
        (
            "web-1",
            "app-1",
            Connection(Family.IPV4, Protocol.ICMP, 80),
            [("port", "icmp has no ports")],
        ),
        (
            "web-1",
            "app-1",
            Connection(Family.IPV4, Protocol.TCP, 70000),
            [("port", "70000 is not")],
        ),
    ],
)
def test_wrong_input_is_told_at_once(
    source: str, destination: str, said: Connection, faults: list[tuple[str, str]]
) -> None:
    with pytest.raises(WrongInput) as caught:
        ask(build_set(), source, destination, said)
    assert [fault.path for fault in caught.value.faults] == [path for path, _ in faults]
    for fault, (_, reason) in zip(caught.value.faults, faults, strict=True):
        assert reason in fault.reason


@given(policy_sets(), connections, st.integers(1, 6), st.integers(1, 6))
@settings(deadline=None)
def test_an_explanation_agrees_with_the_decision(
    policies: PolicySet, said: Connection, source: int, destination: int
) -> None:
    if source == destination:
        return
    machines = find_machines(policies)
    ends = build_vm_id(source), build_vm_id(destination)
    found = explain(policies, machines, LANES, *ends, said)
    decision = decide(policies, machines, *ends, said)
    assert found.action == decision.action
    assert found.inspected is isinstance(decision.action, Inspect)
    below = [one.priority for one in found.shadowed]
    above = [one.priority for one in found.passed_over]
    assert found.priority is None or max(below, default=0) <= found.priority <= min(
        above, default=9
    )
    places = {"leg A", "leg B", "service host"} | {table.name for table in Table}
    assert {step.name for step in (*found.forward, *found.answers)} <= places
    if found.inspected:
        assert [s.name for s in found.forward].index("leg A") < [
            s.name for s in found.forward
        ].index("leg B")
        assert [s.name for s in found.answers].index("leg B") < [
            s.name for s in found.answers
        ].index("leg A")
