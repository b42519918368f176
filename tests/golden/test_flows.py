"""Compiled programs as the whole lines that OVS prints; read them beside `docs/pipeline.md`.

A change of what is compiled shows here as a diff of lines. To accept one: check each line, then
write the file anew with `python -m tests.golden.test_flows`.
"""

from __future__ import annotations

from pathlib import Path

from steering.check import check_program
from steering.compile import compile_program
from steering.decide import resolve_machines
from steering.diff import build_bundle
from steering.flows import FlowKey, Present, PresentFlow, Program, build_match, build_port_matches
from steering.parse import parse_documents
from tests.support.pipeline_doc import build_example
from tests.support.worlds import LANES, THREE_LEGGED, build_port

HERE = Path(__file__).resolve().parent

POLICIES = """
apiVersion: hairpin/v1
kind: VirtualMachine
metadata: {name: a}
spec: {vmId: vm-1, tags: {tier: one}}
---
apiVersion: hairpin/v1
kind: VirtualMachine
metadata: {name: b}
spec: {vmId: vm-2, tags: {tier: two}}
---
apiVersion: hairpin/v1
kind: Zone
metadata: {name: one}
spec: {selector: {matchTags: {tier: one}}}
---
apiVersion: hairpin/v1
kind: SteeringPolicy
metadata: {name: deny-telnet}
spec:
  priority: 300
  from: [{zone: one}]
  to: [{vm: b}]
  services: [{protocol: tcp, ports: [23]}]
  families: [ipv4]
  action: {deny: {}}
---
apiVersion: hairpin/v1
kind: SteeringPolicy
metadata: {name: backup-direct}
spec:
  priority: 200
  from: [{zone: one}]
  to: [{vm: b}]
  services: [{protocol: tcp, ports: ["872-875"]}]
  families: [ipv4]
  action: {direct: {reason: trusted backup}}
---
apiVersion: hairpin/v1
kind: SteeringPolicy
metadata: {name: rest-detect}
spec:
  priority: 100
  from: [{zone: one}]
  to: [{vm: b}]
  families: [ipv6]
  action: {inspect: {profile: detect, onFailure: open}}
"""


def render(program: Program) -> str:
    return "".join(f"{line}\n" for line in (*program.flows, *program.groups))


def build_actions() -> Program:
    policies = parse_documents(POLICIES)
    ports = (build_port(1, tag=10), build_port(2, tag=10))
    return compile_program(policies, resolve_machines(policies, ports), LANES)


SHORTCUT = """
apiVersion: hairpin/v1
kind: VirtualMachine
metadata: {name: a}
spec: {vmId: vm-1}
---
apiVersion: hairpin/v1
kind: VirtualMachine
metadata: {name: b}
spec: {vmId: vm-2}
---
apiVersion: hairpin/v1
kind: SteeringPolicy
metadata: {name: backup}
spec:
  priority: 100
  from: [{vm: vm-1}]
  to: [{vm: vm-2}]
  services: [{protocol: tcp, ports: [873]}]
  families: [ipv4]
  action:
    inspect:
      profile: prevent
      onFailure: closed
      shortcut: {after: 10MB, maxFlows: 50}
"""


def build_shortcut() -> Program:
    policies = parse_documents(SHORTCUT)
    ports = (build_port(1), build_port(2))
    return compile_program(policies, resolve_machines(policies, ports), THREE_LEGGED)


PROGRAMS = {
    "web-to-app.flows": build_example,
    "actions.flows": build_actions,
    "shortcut.flows": build_shortcut,
}


def test_compiled_programs_are_the_golden_lines() -> None:
    for name, build in PROGRAMS.items():
        assert render(build()).splitlines() == (HERE / name).read_text().splitlines(), name


def test_what_no_policy_names_is_left_as_it_was() -> None:
    program = compile_program(parse_documents(POLICIES), (), LANES)
    assert not [
        flow
        for flow in program.flows
        if flow.table.name in ("ENDPOINT", "POLICY") and flow.priority > 1
    ]


def test_a_lane_without_legs_drops_when_closed_and_delivers_when_open() -> None:
    legless = tuple(
        type(lane)(lane.number, lane.profile, lane.vlan, lane.queues,
                   type(lane.leg_a)("x", "y"), type(lane.leg_b)("x", "y"))
        for lane in LANES
    )  # fmt: skip
    policies = parse_documents(POLICIES)
    program = compile_program(
        policies, resolve_machines(policies, (build_port(1), build_port(2))), legless
    )
    assert check_program(program, legless) == ()
    assert {group.buckets for group in program.groups if group.kind == "ff"} == {
        ("watch_group:1213267967,actions=drop",),
        ("watch_group:1213267967,actions=resubmit(,70)",),
    }


def test_a_bundle_reads_as_commands_in_an_order_that_works() -> None:
    program = build_example()
    old = PresentFlow(FlowKey(40, 1, "tcp,tp_dst=9"), "drop", 0x4850_0300_0000_0001)
    bundle = build_bundle(program, Present(flows=(old,)))
    lines = bundle.text.splitlines()
    assert lines[0] == "group add group_id=1213267967,type=all,bucket=actions=resubmit(,70)"
    assert lines[-1] == (
        "flow delete_strict cookie=0x4850030000000001/-1,table=40,priority=1,tcp,tp_dst=9"
    )
    kinds = [line.split()[0] for line in lines]
    assert kinds == sorted(kinds, reverse=True), "groups before the flows that point to them"


def test_matches_are_written_as_ovs_writes_them() -> None:
    assert (
        build_match("tcp", tp_dst=80, in_port=3, reg1="0x1/0x1")
        == "tcp,reg1=0x1/0x1,in_port=3,tp_dst=80"
    )
    assert build_port_matches(80, 80) == ("80",)
    assert build_port_matches(8000, 8080) == ("0x1f40/0xffc0", "0x1f80/0xfff0", "8080")
    assert build_port_matches(0, 1023) == ("0x0/0xfc00",)


if __name__ == "__main__":
    for file, make in PROGRAMS.items():
        (HERE / file).write_text(render(make()))
