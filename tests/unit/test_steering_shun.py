"""Shunning: what of a blocked flow the switch drops by itself, and for how long."""

from __future__ import annotations

from dataclasses import replace

import pytest

from appliance.alerts.model import Alert, Endpoint, Signature, Verdict
from appliance.management.shun import read_blocked
from steering.decide import resolve_machines
from steering.errors import WrongInput
from steering.flows import build_match_id
from steering.model import (
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
from steering.parse import parse_documents, render_documents
from steering.shun import Blocked, build_shun
from steering.switch.openflow import parse_shunned
from tests.support.worlds import ZONES, build_port, build_record

PORTS = tuple(build_port(number) for number in (1, 2))
POLICY = Policy(
    "web-to-app",
    100,
    (Peer(zone="web"),),
    (Peer(zone="app"),),
    (Service(),),
    tuple(Family),
    Inspect(Profile.PREVENT, OnFailure.CLOSED, 60),
)
POLICIES = PolicySet(tuple(map(build_record, (1, 2))), ZONES, (POLICY,))
MACHINES = resolve_machines(POLICIES, PORTS)
BLOCKED = Blocked(
    Family.IPV4, Protocol.TCP, "vm-1", "10.0.0.1", 40_000, "vm-2", "10.0.0.2", 80, "web-to-app"
)


def test_both_directions_are_dropped_each_from_its_own_port() -> None:
    flows = build_shun(BLOCKED, POLICIES, MACHINES)
    cookie = f"{flows[0].cookie:#x}"
    assert cookie.startswith("0x48500e")
    assert [flow.command for flow in flows] == [
        "flow add table=30,priority=110,tcp,in_port=1,nw_src=10.0.0.1,nw_dst=10.0.0.2,"
        f"tp_src=40000,tp_dst=80,hard_timeout=60,cookie={cookie},actions=drop",
        "flow add table=30,priority=110,tcp,in_port=2,nw_src=10.0.0.2,nw_dst=10.0.0.1,"
        f"tp_src=80,tp_dst=40000,hard_timeout=60,cookie={cookie},actions=drop",
    ]


def test_ipv6_is_matched_by_its_own_names() -> None:
    six = replace(
        BLOCKED, family=Family.IPV6, source_address="fd00::1", destination_address="fd00::2"
    )
    assert build_shun(six, POLICIES, MACHINES)[0].match == (
        "tcp6,in_port=1,ipv6_src=fd00::1,ipv6_dst=fd00::2,tp_src=40000,tp_dst=80"
    )


@pytest.mark.parametrize(
    "change",
    [
        {"policy": "another"},
        {"protocol": Protocol.ICMP},
        {"source_vm_id": "vm-8", "destination_vm_id": "vm-9"},
    ],
    ids=["no policy of that name", "no ports", "VMs that are gone"],
)
def test_nothing_is_shunned_where_it_would_be_a_guess(change: dict[str, object]) -> None:
    assert build_shun(replace(BLOCKED, **change), POLICIES, MACHINES) == ()  # type: ignore[arg-type]


def test_nothing_is_shunned_by_a_policy_that_does_not_say_so() -> None:
    silent = replace(POLICY, action=Inspect(Profile.PREVENT, OnFailure.CLOSED))
    assert build_shun(BLOCKED, replace(POLICIES, policies=(silent,)), MACHINES) == ()


def build_alert(**change: object) -> Alert:
    values: dict[str, object] = {
        "id": 1, "at": 0.0, "stored_at": 0.0, "lane": "prevent", "profile": "prevent",
        "verdict": Verdict.BLOCKED, "source": Endpoint("10.0.0.1", 40_000, "vm-1"),
        "destination": Endpoint("10.0.0.2", 80, "vm-2"), "protocol": "TCP", "family": Family.IPV4,
        "direction": None, "opener": None, "signature": Signature(1), "cves": (),
        "affected_products": (), "policy": "web-to-app", "revision": 1, "app_proto": None,
        "payload": "", "payload_printable": "", "http": None, "community_id": None,
        "flow_id": None, "reasons": (), "raw": "{}",
    }  # fmt: skip
    return Alert(**{**values, **change})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        {"verdict": Verdict.ALLOWED},
        {"policy": None},
        {"protocol": "ICMP"},
        {"source": Endpoint("10.0.0.1", 40_000)},
        {"destination": Endpoint("10.0.0.2", None, "vm-2")},
    ],
    ids=["allowed", "no policy", "no ports", "nobody known to hold it", "no port"],
)
def test_only_a_blocked_flow_between_two_known_vms_counts(change: dict[str, object]) -> None:
    assert read_blocked(build_alert()) == BLOCKED
    assert read_blocked(build_alert(**change)) is None


def test_what_the_switch_shows_is_read_back() -> None:
    flow = build_shun(BLOCKED, POLICIES, MACHINES)[0]
    line = (
        f" cookie={flow.cookie:#x}, duration=12.5s, table=30, n_packets=3, n_bytes=222, "
        f"hard_timeout=60, priority=110,{flow.match} actions=drop"
    )
    shunned = parse_shunned(line)
    assert shunned is not None
    assert (shunned.match, shunned.left, shunned.packets, shunned.bytes) == (
        flow.match,
        47.5,
        3,
        222,
    )
    assert shunned.id == build_match_id(flow.match)
    other = line.replace(f"{flow.cookie:#x}", "0x4850000000000000")
    assert parse_shunned(other) is None


DOCUMENT = """
apiVersion: hairpin/v1
kind: SteeringPolicy
metadata: {{name: p}}
spec:
  priority: 100
  from: [{{vm: 6d0c0e0a-3f0e-4b6e-9a54-0c1d7f1e0001}}]
  to: [{{vm: 6d0c0e0a-3f0e-4b6e-9a54-0c1d7f1e0002}}]
  action: {{inspect: {{profile: {profile}, onFailure: open, shunSeconds: {seconds}}}}}
"""


def test_a_policy_says_for_how_long() -> None:
    found = parse_documents(DOCUMENT.format(profile="prevent", seconds=90))
    assert found.policies[0].action == Inspect(Profile.PREVENT, OnFailure.OPEN, 90)
    spec = render_documents(found)["items"][0]["spec"]  # type: ignore[index]
    assert spec["action"]["inspect"]["shunSeconds"] == 90


@pytest.mark.parametrize(
    ("profile", "seconds"), [("prevent", 0), ("prevent", 3601), ("prevent", "long"), ("detect", 60)]
)
def test_a_wrong_time_or_profile_is_refused(profile: str, seconds: object) -> None:
    with pytest.raises(WrongInput) as caught:
        parse_documents(DOCUMENT.format(profile=profile, seconds=seconds))
    assert [fault.path for fault in caught.value.faults] == [
        "items[0].spec.action.inspect.shunSeconds"
    ]
