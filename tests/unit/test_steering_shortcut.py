"""What a policy may say of shortcuts, and what sends connections back: values in, lines out."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from steering.compile import compile_program
from steering.decide import resolve_machines
from steering.errors import WrongInput
from steering.model import (
    Deny,
    Family,
    Inspect,
    OnFailure,
    Peer,
    Policy,
    PolicySet,
    Profile,
    Service,
    Shortcut,
    Trigger,
)
from steering.parse import parse_documents, render_documents
from steering.pipeline import Table
from steering.shortcut import (
    HOLD_SECONDS,
    PRIORITY_CODES,
    Connection,
    Hold,
    Return,
    build_port_return,
    build_return,
    build_untaught,
    find_held,
    find_shortcut_problems,
)
from tests.support.worlds import LANES, THREE_LEGGED, build_cut_policy, build_port, build_record

DOCUMENTS = """
apiVersion: hairpin/v1
kind: VirtualMachine
metadata: {{name: a}}
spec: {{vmId: vm-1}}
---
apiVersion: hairpin/v1
kind: VirtualMachine
metadata: {{name: b}}
spec: {{vmId: vm-2}}
---
apiVersion: hairpin/v1
kind: SteeringPolicy
metadata: {{name: backup}}
spec:
  priority: 100
  from: [{{vm: a}}]
  to: [{{vm: b}}]
  action: {{inspect: {{profile: prevent, onFailure: open, shortcut: {shortcut}}}}}
"""


def read(shortcut: str) -> Shortcut | None:
    (policy,) = parse_documents(DOCUMENTS.format(shortcut=shortcut)).policies
    assert isinstance(policy.action, Inspect)
    return policy.action.shortcut


def build_policies(*names: str, shortcut: Shortcut | None = None) -> PolicySet:
    cut = shortcut or Shortcut(Trigger.ONE_MEGABYTE, 10)
    policies = tuple(
        build_cut_policy(name, cut, priority=100 + number) for number, name in enumerate(names)
    )
    return PolicySet(tuple(build_record(n) for n in (1, 2, 3)), (), policies)


@pytest.mark.parametrize("trigger", list(Trigger))
def test_a_policy_names_one_trigger_and_a_bound(trigger: Trigger) -> None:
    found = read(f"{{after: {trigger}, maxFlows: 50}}")
    assert found == Shortcut(trigger, 50, return_on_alert=True)
    assert str(found) == f"shortcut after {trigger}, at most 50, back on alert"
    assert read(f"{{after: {trigger}, maxFlows: 1, returnOnAlert: false}}") == Shortcut(
        trigger, 1, return_on_alert=False
    )


@pytest.mark.parametrize(
    ("shortcut", "path", "reason"),
    [
        ("{maxFlows: 5}", "", "after"),
        ("{after: 1MB}", "", "maxFlows"),
        ("{after: 2MB, maxFlows: 5}", ".after", "1MB"),
        ("{after: 1MB, maxFlows: 0}", ".maxFlows", "1"),
        ("{after: 1MB, maxFlows: 10001}", ".maxFlows", "10000"),
        ("{after: 1MB, maxFlows: 5, returnOnAlert: 1}", ".returnOnAlert", "true or false"),
        ("{after: 1MB, maxFlows: 5, until: now}", ".until", ""),
        ("always", "", ""),
    ],
)
def test_what_a_shortcut_may_not_be(shortcut: str, path: str, reason: str) -> None:
    with pytest.raises(WrongInput) as refused:
        parse_documents(DOCUMENTS.format(shortcut=shortcut))
    told = [str(fault) for fault in refused.value.faults]
    assert any(f".inspect.shortcut{path}" in one and reason in one for one in told), told


def test_documents_say_again_what_they_said() -> None:
    text = DOCUMENTS.format(shortcut="{after: rule, maxFlows: 7, returnOnAlert: false}")
    policies = parse_documents(text)
    assert parse_documents(json.dumps(render_documents(policies))) == policies


def test_each_trigger_has_a_code_of_its_own_and_none_has_that_of_plain_frames() -> None:
    codes = [PRIORITY_CODES[trigger] for trigger in Trigger]
    assert len(set(codes)) == len(codes)
    assert set(codes) <= set(range(1, 7))


def test_a_shortcut_without_a_way_is_told_and_the_policy_inspects() -> None:
    policies = build_policies("backup")
    assert find_shortcut_problems(policies, THREE_LEGGED, ()) == ()
    assert find_shortcut_problems(policies, LANES, ()) == (
        "policy backup asks for a shortcut, and lane prevent has no third leg: its connections stay "
        "inspected; give the lane a `legC` in the settings",
    )


def test_what_is_sent_back_as_lines() -> None:
    head = "flow delete cookie=0x48500f0000000000/0xffffff0000000000,table=25"
    machines = resolve_machines(build_policies("backup"), (build_port(1), build_port(2)))
    connection = Connection("backup", Family.IPV6, "fd00::1", 40_000, "fd00::2", 443)
    assert build_return(Return(), machines) == (head,)
    assert build_return(Return(vm_ids=frozenset({"vm-1"})), machines) == (
        f"{head},in_port=1",
        f"{head},dl_dst=02:00:00:00:00:01",
    )
    assert build_return(Return(connections=frozenset({connection})), machines) == (
        f"{head},tcp6,ipv6_src=fd00::1,ipv6_dst=fd00::2,tp_src=40000,tp_dst=443",
        f"{head},tcp6,ipv6_src=fd00::2,ipv6_dst=fd00::1,tp_src=443,tp_dst=40000",
    )
    assert build_return(Return(policies=frozenset({"backup"})), machines) == (
        "flow delete cookie=0x48500f0011e8cdf6/-1,table=25",
    )
    assert build_untaught({"backup"}) == ("flow delete cookie=0x48500f0011e8cdf6/-1,table=55",)
    assert build_port_return([3]) == (f"{head},in_port=3",)
    assert build_return(Return(vm_ids=frozenset({"vm-3"})), machines) == (), "it has no port"


def test_what_was_sent_back_learns_nothing_for_a_second() -> None:
    policies = build_policies("backup", "web")
    machines = resolve_machines(policies, (build_port(1), build_port(2), build_port(3)))
    connection = Connection("web", Family.IPV4, "10.0.0.1", 1, "10.0.0.2", 2)
    assert find_held(Return(), policies, machines) == {"backup", "web"}
    assert find_held(Return(ids=frozenset({"a"})), policies, machines) == {"backup", "web"}
    assert find_held(Return(policies=frozenset({"web"})), policies, machines) == {"web"}
    assert find_held(Return(connections=frozenset({connection})), policies, machines) == {"web"}
    assert find_held(Return(vm_ids=frozenset({"vm-2"})), policies, machines) == {"backup", "web"}
    assert find_held(Return(vm_ids=frozenset({"vm-3"})), policies, machines) == frozenset()
    hold = Hold().extend({"backup"}, 10.0).extend({"web"}, 10.5)
    assert hold.find_untaught(10.9) == {"backup", "web"}
    assert hold.find_untaught(10.0 + HOLD_SECONDS) == {"web"}
    assert hold.extend({"web"}, 20.0).until == {"web": 20.0 + HOLD_SECONDS}, (
        "what is over is forgotten"
    )


def test_a_policy_without_a_shortcut_is_never_held() -> None:
    policies = build_policies("backup")
    plain = tuple(
        replace(one, action=Inspect(Profile.PREVENT, OnFailure.OPEN)) for one in policies.policies
    )
    assert find_held(Return(), replace(policies, policies=plain), ()) == frozenset()


def test_a_deny_the_other_way_withholds_the_shortcut_and_is_told() -> None:
    """A connection that came back would be cut by it, as conntrack missed what the shortcut passed."""
    policies = build_policies("backup")
    deny = Policy(
        "never", 300, (Peer(vm="vm-2"),), (Peer(vm="vm-1"),), (Service(),), (Family.IPV4,), Deny()
    )
    with_deny = replace(policies, policies=(*policies.policies, deny))
    machines = resolve_machines(with_deny, (build_port(1), build_port(2)))
    (problem,) = find_shortcut_problems(with_deny, THREE_LEGGED, machines)
    assert "policy never denies the other way" in problem
    program = compile_program(with_deny, machines, THREE_LEGGED)
    assert not [flow for flow in program.flows if flow.table in (Table.TAKE, Table.TEACH)]
    assert not [flow for flow in program.flows if "->reg8" in flow.actions]
    lower = replace(with_deny, policies=(*policies.policies, replace(deny, priority=99)))
    assert find_shortcut_problems(lower, THREE_LEGGED, machines) == ()
    compiled = compile_program(lower, machines, THREE_LEGGED)
    assert [flow for flow in compiled.flows if flow.table is Table.TEACH]
