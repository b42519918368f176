"""Whose alert it is: who held the addresses when the packet passed, and which policy steered it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.alerts.attribute import LATE_SECONDS, Context, attribute, find_holder
from appliance.alerts.eve import parse_event
from appliance.alerts.model import EveAlert, Opener
from steering.decide import decide, resolve_machines
from steering.model import (
    Direct,
    Family,
    Holding,
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
from tests.support.eve import render_eve
from tests.support.worlds import LANES, ZONES, build_port, build_record

AT = 1700000000.03
WEB, APP, DB = "vm-1", "vm-2", "vm-3"
BOTH = (Family.IPV4, Family.IPV6)


def build_policy(name: str, source: str, destination: str, port: int) -> Policy:
    return Policy(
        name=name,
        priority=100,
        sources=(Peer(zone=source),),
        destinations=(Peer(zone=destination),),
        services=(Service(Protocol.TCP, (PortRange(port, port),)),),
        families=BOTH,
        action=Inspect(Profile.PREVENT, OnFailure.CLOSED),
    )


POLICIES = PolicySet(
    machines=tuple(build_record(number) for number in (1, 2, 3)),
    zones=ZONES,
    policies=(build_policy("web-to-app", "web", "app", 80),),
)
CONTEXT = Context(
    machines=resolve_machines(POLICIES, [build_port(number) for number in (1, 2, 3)]),
    policies=POLICIES,
    revision=7,
    lane=LANES[0],
    holdings={
        "10.9.0.1": (Holding("10.9.0.1", WEB, 1.0),),
        "10.9.0.2": (Holding("10.9.0.2", APP, 1.0),),
    },
)


def parse(**changes: object) -> EveAlert:
    alert = parse_event(render_eve(**changes))
    assert isinstance(alert, EveAlert)
    return alert


def test_both_vms_their_zones_and_the_policy_are_named() -> None:
    told = attribute(parse(), CONTEXT, decide)
    assert (told.source.vm_id, told.source.vm, told.source.zones) == (WEB, "host-1", ("web",))
    assert (told.destination.vm_id, told.destination.zones) == (APP, ("app",))
    assert (told.opener, told.policy, told.revision) == (Opener.SOURCE, "web-to-app", 7)
    assert told.reasons == ()


def test_an_answer_belongs_to_the_policy_of_its_connection() -> None:
    answer = parse(
        src_ip="10.9.0.2",
        src_port=80,
        dest_ip="10.9.0.1",
        dest_port=40000,
        direction="to_client",
    )
    told = attribute(answer, CONTEXT, decide)
    assert (told.source.vm_id, told.destination.vm_id) == (APP, WEB)
    assert (told.opener, told.policy, told.reasons) == (Opener.DESTINATION, "web-to-app", ())


def test_a_flow_picked_up_in_its_middle_is_turned_to_the_way_that_leads_to_the_lane() -> None:
    turned = parse(
        direction="to_client",
        flow={"src_ip": "10.9.0.2", "src_port": 80, "dest_ip": "10.9.0.1", "dest_port": 40000},
    )
    assert turned.opener is Opener.DESTINATION
    told = attribute(turned, CONTEXT, decide)
    assert (told.opener, told.policy) == (Opener.SOURCE, "web-to-app")
    assert "answering end" in told.reasons[0]


@pytest.mark.parametrize(
    "policies",
    [
        replace(POLICIES, policies=()),
        replace(POLICIES, policies=(build_policy("other-port", "web", "app", 443),)),
        replace(
            POLICIES,
            policies=(
                replace(POLICIES.policies[0], action=Inspect(Profile.DETECT, OnFailure.OPEN)),
            ),
        ),
        replace(POLICIES, policies=(replace(POLICIES.policies[0], action=Direct("x")),)),
    ],
)
def test_a_policy_that_does_not_lead_into_the_lane_is_not_named(policies: PolicySet) -> None:
    told = attribute(parse(), replace(CONTEXT, policies=policies), decide)
    assert (told.source.vm_id, told.policy, told.revision) == (WEB, None, None)
    assert told.reasons == ("no policy of revision 7 sends this connection to lane prevent",)


def test_an_address_that_nobody_held_is_told_and_the_other_end_still_named() -> None:
    told = attribute(parse(src_ip="10.9.0.77", flow=None), CONTEXT, decide)
    assert (told.source.address, told.source.vm_id) == ("10.9.0.77", None)
    assert told.destination.vm_id == APP
    assert told.reasons[0] == "no VM was known to hold 10.9.0.77 at 2023-11-14T22:13:20.030000Z"
    assert "both VMs" in told.reasons[1]


def test_an_event_without_addresses_is_kept() -> None:
    told = attribute(parse(src_ip=None, dest_ip=None, flow=None), CONTEXT, decide)
    assert (told.source.vm_id, told.policy) == (None, None)
    assert told.reasons[0] == "the event names no address"


def test_a_vm_that_left_the_switch_is_named_by_its_document() -> None:
    told = attribute(parse(), replace(CONTEXT, machines=()), decide)
    assert (told.source.vm, told.source.zones, told.policy) == ("host-1", ("web",), "web-to-app")


A = "10.9.0.1"


def hold(vm_id: str, since: float, until: float | None = None) -> Holding:
    return Holding(A, vm_id, since, until)


@pytest.mark.parametrize(
    ("holdings", "expected", "reason"),
    [
        ([hold("a", 0)], "a", ""),
        ([hold("a", 0, 50), hold("b", 50)], "b", ""),
        ([hold("a", 0, 150), hold("b", 150)], "a", ""),
        ([hold("a", 0, 100), hold("b", 100)], "b", ""),
        ([], None, "no VM was known"),
        ([hold("a", 104)], "a", "first seen 4.0 s after"),
        ([hold("a", 105)], None, "no VM was known"),
        # Somebody held it before, so the one who comes later is no heir of that packet.
        ([hold("a", 0, 50), hold("b", 101)], None, "no VM was known"),
        ([hold("a", 0, 97), hold("b", 101)], "a", "had just gone (3.0 s before)"),
        ([hold("a", 0, 95)], None, "no VM was known"),
        ([hold("a", 0), hold("b", 50)], None, "several VMs at once: a, b"),
    ],
)
def test_who_held_an_address_at_second_100(
    holdings: list[Holding], expected: str | None, reason: str
) -> None:
    holder = find_holder(A, holdings, 100.0)
    assert holder.vm_id == expected
    assert reason in holder.reason
    assert bool(holder.reason) == bool(reason)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=6, unique=True), st.integers(0, 320))
def test_with_handovers_without_gaps_the_holder_is_the_last_who_came(
    starts: list[int], at: int
) -> None:
    starts.sort()
    ends = [*map(float, starts[1:]), None]
    holdings = [
        hold(f"vm-{number}", float(start), end)
        for number, (start, end) in enumerate(zip(starts, ends, strict=True))
    ]
    holder = find_holder(A, holdings, float(at))
    came = [number for number, start in enumerate(starts) if start <= at]
    if came:
        assert holder.vm_id == f"vm-{came[-1]}"
    else:
        assert holder.vm_id == ("vm-0" if starts[0] - at < LATE_SECONDS else None)
