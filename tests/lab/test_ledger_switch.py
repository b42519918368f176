"""The ledger on a real switch: green where the switch does what the policies say, and only there.

No appliance runs: the flows are sent once, and a plain bridge stands for the engines, so that lanes are
up and nobody mends what a test breaks.
"""

from __future__ import annotations

import asyncio
import shlex
import time
from collections import UserDict
from collections.abc import Iterator, KeysView
from dataclasses import dataclass

import pytest

from appliance import lab as the_lab
from appliance.lab import LabState
from steering.compile import compile_program
from steering.decide import resolve_machines
from steering.diff import build_bundle
from steering.errors import SwitchError
from steering.flows import Program
from steering.ledger import Ledger, Violation
from steering.model import Lane, Leg, Machine, MachineRecord, OnFailure, PolicySet, Port
from steering.parse import parse_documents
from steering.pipeline import (
    DELIVER_GROUP,
    build_conjunction_id,
    build_group_id,
    build_policy_number,
    build_policy_priority,
    build_steer_key,
)
from steering.prove import Prover
from steering.run import run
from steering.switch.openflow import OpenFlowSwitch
from tests.support.lab import build_name, wait_until

pytestmark = pytest.mark.lab

POLICIES = """
apiVersion: hairpin/v1
kind: Zone
metadata: {name: web}
spec: {selector: {matchTags: {tier: web}}}
---
apiVersion: hairpin/v1
kind: Zone
metadata: {name: app}
spec: {selector: {matchTags: {tier: app}}}
---
apiVersion: hairpin/v1
kind: Zone
metadata: {name: db}
spec: {selector: {matchTags: {tier: db}}}
---
apiVersion: hairpin/v1
kind: SteeringPolicy
metadata: {name: web-to-app}
spec:
  priority: 100
  from: [{zone: web}]
  to: [{zone: app}]
  services: [{protocol: tcp, ports: [80, "8000-8080"]}, {protocol: udp, ports: ["5000-5003"]}]
  action: {inspect: {profile: prevent, onFailure: open}}
---
apiVersion: hairpin/v1
kind: SteeringPolicy
metadata: {name: app-to-db}
spec:
  priority: 100
  from: [{zone: app}]
  to: [{zone: db}]
  services: [{protocol: any}]
  action: {inspect: {profile: detect, onFailure: closed}}
---
apiVersion: hairpin/v1
kind: SteeringPolicy
metadata: {name: backup}
spec:
  priority: 200
  from: [{zone: app}]
  to: [{zone: db}]
  services: [{protocol: tcp, ports: [873]}]
  families: [ipv4]
  action: {direct: {reason: trusted backup}}
---
apiVersion: hairpin/v1
kind: SteeringPolicy
metadata: {name: no-telnet}
spec:
  priority: 300
  from: [{zone: web}]
  to: [{zone: app}]
  services: [{protocol: tcp, ports: [23]}]
  action: {deny: {reason: nobody needs telnet}}
"""


@dataclass
class Bench:
    """A lab whose switch has the flows of POLICIES, put there anew by `reset`."""

    lab: LabState
    policies: PolicySet
    machines: tuple[Machine, ...]
    lanes: tuple[Lane, ...]

    @property
    def program(self) -> Program:
        return compile_program(self.policies, self.machines, self.lanes)

    def reset(self) -> None:
        async def put() -> None:
            switch = OpenFlowSwitch(self.lab.openflow)
            await switch.send_bundle(build_bundle(self.program, await switch.read_present()))

        asyncio.run(put())

    def prove(self, *, up: bool = True, budget: int = 20_000) -> Ledger:
        """One run over everything, all lanes told to be up or down."""
        addresses = {vm.vm_id: (vm.address4, vm.address6) for vm in self.lab.vms}
        prover = Prover(self.lab.vswitchd, self.lab.openflow, pause=0.0)
        forwarding = {lane.name: up for lane in self.lanes}
        return asyncio.run(
            prover.prove(
                self.policies, self.machines, self.lanes, forwarding, 0, budget, addresses=addresses
            )
        )

    def ofctl(self, command: str, text: str) -> None:
        run(self.lab.ofctl_argv([command, text]))


def build_machines(state: LabState, policies: PolicySet) -> tuple[Machine, ...]:
    ports = [
        Port(vm.interface, vm.ofport, vm.mac, vm.iface_id, vm.vm_id, "br-int") for vm in state.vms
    ]
    return resolve_machines(policies, ports)


def build_lanes(state: LabState) -> tuple[Lane, ...]:
    declared = state.settings.build_lanes()
    return tuple(
        Lane(
            lane.number,
            lane.profile,
            lane.vlan,
            lane.queues,
            Leg(lane.leg_a.interface, lane.leg_a.device, made.ofport_a),
            Leg(lane.leg_b.interface, lane.leg_b.device, made.ofport_b),
        )
        for lane, made in zip(declared, state.lanes, strict=True)
    )


def bridge_lanes(state: LabState) -> None:
    """A bridge per lane in the service host: frames pass, as if an engine let them all through."""
    for lane in state.lanes:
        name = f"br{lane.vlan}"
        commands = [
            f"link add {name} type bridge mcast_snooping 0",
            f"link set {name} up",
            *(f"link set {device} master {name} up" for _, device, _ in lane.legs),
            *(f"link set {device} type bridge_slave learning off" for _, device, _ in lane.legs),
        ]
        for command in commands:
            run(["ip", "-n", state.service_host, *command.split()])


def set_lane(state: LabState, vlan: int, change: str) -> None:
    run(["ip", "-n", state.service_host, "link", "set", f"br{vlan}", change])


def is_forwarding(state: LabState) -> bool:
    shown = run(state.vsctl_argv(["--columns=bfd_status", "list", "Interface"])).stdout
    return shown.count('forwarding="true"') == 4


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    name = build_name("g")
    try:
        state = the_lab.bring_up(name, 6, serve=False)
        bridge_lanes(state)
        declared = parse_documents(POLICIES)
        # Two VMs are held to the addresses of their documents; db-2 has none in IPv4.
        own = {
            "db-1": (state.vm("db-1").address4, state.vm("db-1").address6),
            "db-2": (state.vm("db-2").address6,),
        }
        records = tuple(
            MachineRecord(vm.vm_id, vm.name, {"tier": vm.name.split("-")[0]}, own.get(vm.name, ()))
            for vm in state.vms
        )
        policies = PolicySet(records, declared.zones, declared.policies)
        bench = Bench(state, policies, build_machines(state, policies), build_lanes(state))
        bench.reset()
        assert wait_until(lambda: is_forwarding(state), 5)
        yield bench
    finally:
        the_lab.take_down(name)


@pytest.fixture
def broken(bench: Bench) -> Iterator[Bench]:
    """For a test that breaks the switch: as it should be before, and put right after."""
    bench.reset()
    yield bench
    bench.ofctl("del-flows", "cookie=0x77/-1")
    bench.reset()


def test_a_switch_that_does_what_the_policies_say_is_green(bench: Bench) -> None:
    ledger = bench.prove()
    assert ledger.violations == ()
    assert ledger.violation_count == ledger.bypassed == ledger.blocked == ledger.foreign_count == 0
    assert ledger.classes_traced == ledger.classes > 300
    assert ledger.pairs_traced == ledger.pairs == 30
    assert min(ledger.inspected, ledger.direct, ledger.denied) > 20
    assert ledger.traced == ledger.witnesses + ledger.inspected, "what is inspected, also back"


def test_a_lane_that_is_down_is_told_as_a_gap_or_as_blocked(bench: Bench) -> None:
    for lane in bench.lanes:
        set_lane(bench.lab, lane.vlan, "down")
    try:
        assert wait_until(lambda: not is_forwarding(bench.lab), 5)
        assert wait_until(lambda: bench.prove(up=False, budget=400).inspected == 0, 5)
        ledger = bench.prove(up=False)
        assert ledger.violations == ()
        assert ledger.inspected == 0
        assert ledger.bypassed > 20, "web-to-app is open"
        assert ledger.blocked > 20, "app-to-db is closed"
        reasons = {gap.reason for gap in ledger.gaps}
        assert reasons == {
            "bypassed by failure policy: lane prevent is down, and policy web-to-app is open"
        }
        assert bench.prove().violation_count > 0, "a lane said to be up must inspect"
    finally:
        for lane in bench.lanes:
            set_lane(bench.lab, lane.vlan, "up")
        assert wait_until(lambda: is_forwarding(bench.lab), 5)


# Ways to break it


@dataclass(frozen=True)
class Break:
    """``commands`` of ovs-ofctl; what each violation then must match, and what its reason says."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    matches: dict[str, str]
    reason: str


def find_conjunction(bench: Bench, policy: str, *, answer: bool) -> str:
    number = build_conjunction_id(build_policy_number(policy), answer=answer)
    priority = build_policy_priority(next(p for p in bench.policies.policies if p.name == policy))
    return f"table=40,priority={priority},conj_id={number}"


def build_breaks(bench: Bench) -> list[Break]:
    vm = bench.lab.vm
    web, app, other_app = vm("web-1"), vm("app-1"), vm("app-2")
    prevent, detect = bench.lanes
    open_group = build_group_id(build_steer_key(prevent, OnFailure.OPEN, answer=False))
    closed_group = build_group_id(build_steer_key(detect, OnFailure.CLOSED, answer=False))
    leg, back = prevent.leg_a.ofport, prevent.leg_b.ofport
    into = f"actions=push_vlan:0x8100,set_field:{0x1000 | prevent.vlan}->vlan_vid,output:{leg}"
    deliver = f"watch_group:{DELIVER_GROUP},actions=resubmit(,70)"
    strange = f"set_field:{0x1000 | 3999}->vlan_vid,output:{detect.leg_a.ofport}"
    return [
        Break(
            "CLASSIFY puts web-1 into another network",
            (
                (
                    "mod-flows",
                    f"table=0,in_port={web.ofport},actions=set_field:5->reg0,resubmit(,10)",
                ),
            ),
            {"source|destination": "web-1"},
            f"prevent by {prevent.leg_a.interface}",
        ),
        Break(
            "GUARD has lost web-1's own flow",
            (("del-flows", "--strict", f"table=10,priority=100,in_port=1,dl_src={web.mac}"),),
            {"source|destination": "web-1"},
            "it goes nowhere",
        ),
        Break(
            "ENDPOINT has lost app-1 in IPv4",
            (
                ("del-flows", f"table=20,ip,dl_dst={app.mac}"),
                # It would take the place of the other: what is IP is steered by it all the same.
                ("del-flows", "--strict", f"table=20,priority=70,reg0=0,dl_dst={app.mac}"),
            ),
            {"source|destination": "app-1", "family": "ipv4"},
            f"it goes to {app.interface}",
        ),
        Break(
            "what openers of one policy send goes direct",
            (
                (
                    "mod-flows",
                    "--strict",
                    find_conjunction(bench, "web-to-app", answer=False)
                    + ",actions=set_field:0->reg2,resubmit(,45)",
                ),
            ),
            {"source|destination": "web-", "expected": "inspected in lane prevent"},
            f"it must enter lane prevent by {prevent.leg_a.interface} with VLAN 3901, once",
        ),
        Break(
            "a flow of somebody else's goes first",
            (
                (
                    "add-flow",
                    f"cookie=0x77,table=0,priority=500,ip,in_port={web.ofport},dl_dst={app.mac},"
                    f"actions=output:{app.ofport}",
                ),
            ),
            {"source|destination": "web-1", "family": "ipv4"},
            f"it goes to {app.interface}",
        ),
        Break(
            "RETURN has lost a leg",
            (("del-flows", f"table=60,in_port={back}"),),
            {"source|destination": "web-", "expected": "inspected in lane prevent"},
            f"back from {prevent.leg_b.interface} it must leave once",
        ),
        Break(
            "a group delivers before it inspects",
            (
                (
                    "mod-group",
                    f"group_id={open_group},type=ff,bucket={deliver},bucket=watch_port:{leg},{into}",
                ),
            ),
            {"source|destination": "web-", "expected": "inspected in lane prevent"},
            "it must enter lane prevent",
        ),
        Break(
            "a group delivers and inspects",
            (
                (
                    "mod-group",
                    f"group_id={open_group},type=all,bucket={into},bucket=actions=resubmit(,70)",
                ),
            ),
            {"source|destination": "web-", "expected": "inspected in lane prevent"},
            "with VLAN 3901, vnet",
        ),
        Break(
            "a group watches a port that is down",
            (
                (
                    "mod-group",
                    f"group_id={open_group},type=ff,bucket=watch_port:4000,{into},bucket={deliver}",
                ),
            ),
            {"source|destination": "web-", "expected": "inspected in lane prevent"},
            "it must enter lane prevent",
        ),
        Break(
            "a bucket pushes a strange VLAN",
            (
                (
                    "mod-group",
                    f"group_id={closed_group},type=ff,bucket=watch_port:{detect.leg_a.ofport},"
                    f"actions=push_vlan:0x8100,{strange}",
                ),
            ),
            {"source|destination": "app-", "expected": "inspected in lane detect"},
            f"it goes to {detect.leg_a.interface} with VLAN 3999",
        ),
        Break(
            "DELIVER sends app-1's frames to app-2",
            (("mod-flows", f"table=70,dl_dst={app.mac},actions=output:{other_app.ofport}"),),
            {"source|destination": "app-1", "expected": "inspected"},
            f"it must leave once, by {app.interface}; it goes to {other_app.interface}",
        ),
        Break(
            "a deny has become direct",
            (
                (
                    "mod-flows",
                    "--strict",
                    find_conjunction(bench, "no-telnet", answer=False)
                    + ",actions=set_field:0->reg2,resubmit(,45)",
                ),
            ),
            {"expected": "denied (policy no-telnet)"},
            "it must be dropped; it goes to vnet",
        ),
        Break(
            "CONNECTION has forgotten what app-1 opened",
            (("del-flows", f"table=30,in_port={app.ofport}"),),
            {"source": "app-1", "state": "established"},
            "it must pass no lane",
        ),
    ]


BREAKS = (
    "CLASSIFY puts web-1 into another network",
    "GUARD has lost web-1's own flow",
    "ENDPOINT has lost app-1 in IPv4",
    "what openers of one policy send goes direct",
    "a flow of somebody else's goes first",
    "RETURN has lost a leg",
    "a group delivers before it inspects",
    "a group delivers and inspects",
    "a group watches a port that is down",
    "a bucket pushes a strange VLAN",
    "DELIVER sends app-1's frames to app-2",
    "a deny has become direct",
    "CONNECTION has forgotten what app-1 opened",
)


def meets(violation: Violation, field: str, text: str) -> bool:
    return any(text in getattr(violation, name) for name in field.split("|"))


@pytest.mark.parametrize("name", BREAKS)
def test_what_is_broken_is_named(broken: Bench, name: str) -> None:
    told = next(one for one in build_breaks(broken) if one.name == name)
    for command in told.commands:
        run(broken.lab.ofctl_argv(command))
    ledger = broken.prove(budget=4_000)
    assert 0 < ledger.violation_count < ledger.witnesses / 2
    for violation in ledger.violations:
        for field, text in told.matches.items():
            assert meets(violation, field, text), f"{field}: {violation}"
    assert any(told.reason in violation.reason for violation in ledger.violations), (
        ledger.violations[0]
    )


def test_what_was_traced_can_be_traced_by_hand(broken: Bench) -> None:
    run(broken.lab.ofctl_argv(["del-flows", "table=60"]))
    violation = broken.prove(budget=400).violations[0]
    command = ["ovs-appctl", "-t", str(broken.lab.vswitchd), "ofproto/trace"]
    shown = run([*command, *shlex.split(violation.traced)]).stdout
    assert "Datapath actions: drop" in shown
    assert violation.seen == "dropped"


def test_flows_of_others_are_told_where_no_witness_meets_them(broken: Bench) -> None:
    for flow in (
        "cookie=0x77,table=40,priority=20000,udp,tp_dst=5001,actions=NORMAL",
        "cookie=0x77,table=0,priority=250,udp,tp_dst=5002,actions=drop",
        "cookie=0x77,table=0,priority=150,udp,tp_dst=5002,actions=drop",
        "cookie=0x77,table=7,priority=250,udp,tp_dst=5002,actions=drop",
    ):
        broken.ofctl("add-flow", flow)
    ledger = broken.prove(budget=2_000)
    assert ledger.violations == (), "5001 and 5002 lie inside of a range: no witness goes there"
    assert [(one.table, one.reason) for one in ledger.foreign] == [
        (0, "in table 0 it goes before Hairpin's flow for VMs' packets (priority 200)"),
        (40, "it stands in Hairpin's table POLICY"),
    ]


class Mending(UserDict[str, bool]):
    """Lanes that are up; when a run looks at them again, the switch has been mended."""

    def __init__(self, bench: Bench) -> None:
        super().__init__({lane.name: True for lane in bench.lanes})
        self.bench = bench
        self.looks = 0

    def keys(self) -> KeysView[str]:
        self.looks += 1
        if self.looks == 2:
            self.bench.reset()
        return super().keys()


def test_a_break_that_is_mended_meanwhile_is_no_violation(broken: Bench) -> None:
    run(broken.lab.ofctl_argv(["del-flows", "table=60"]))
    prover = Prover(broken.lab.vswitchd, broken.lab.openflow)
    lanes = Mending(broken)
    proving = prover.prove(broken.policies, broken.machines, broken.lanes, lanes, 0, 300)
    ledger = asyncio.run(proving)
    assert ledger.violations == ()
    assert ledger.traced > ledger.witnesses + ledger.inspected, "some were traced once more"


def test_a_switch_that_is_gone_is_an_error_and_cancelling_ends_the_run(bench: Bench) -> None:
    gone = Prover(bench.lab.vswitchd.with_name("nobody.ctl"), bench.lab.openflow)
    run_ = gone.prove(bench.policies, bench.machines, bench.lanes, {}, 0)
    with pytest.raises(SwitchError, match=r"nobody\.ctl did not answer"):
        asyncio.run(run_)

    async def cancel() -> float:
        prover = Prover(bench.lab.vswitchd, bench.lab.openflow)
        proving = asyncio.create_task(
            prover.prove(bench.policies, bench.machines, bench.lanes, {}, 0)
        )
        await asyncio.sleep(0.3)
        began = time.monotonic()
        proving.cancel()
        await asyncio.wait([proving])
        return time.monotonic() - began

    assert asyncio.run(cancel()) < 1.0
