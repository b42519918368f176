"""The reconciler on a real switch: what is compiled is what the switch has, and stays so."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace

import pytest

from appliance.lab import LabState, add_vm, move_vm, remove_vm, restart_vswitchd
from steering.accounting import Meter, read_growth
from steering.compile import compile_program
from steering.counters import Count
from steering.decide import resolve_machines
from steering.diff import build_bundle
from steering.errors import SwitchError, WrongInput
from steering.events import AddressSeen, DriftMended, LaneChanged, PortsChanged, SteeringEvent
from steering.model import MachineRecord, Peer, Policy, PolicySet, Zone
from steering.parse import parse_documents
from steering.reconcile import Reconciler
from steering.run import run
from steering.switch.openflow import OpenFlowSwitch
from tests.support.lab import run_in_vm

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
kind: SteeringPolicy
metadata: {name: web-to-app}
spec:
  priority: 100
  from: [{zone: web}]
  to: [{zone: app}]
  services: [{protocol: tcp, ports: [80, "8000-8080"]}, {protocol: icmp}]
  action: {inspect: {profile: prevent, onFailure: open}}
---
apiVersion: hairpin/v1
kind: SteeringPolicy
metadata: {name: app-to-web-closed}
spec:
  priority: 200
  from: [{zone: app}]
  to: [{zone: web}]
  services: [{protocol: udp, ports: [53]}, {protocol: any}]
  families: [ipv6]
  action: {inspect: {profile: detect, onFailure: closed}}
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
---
apiVersion: hairpin/v1
kind: SteeringPolicy
metadata: {name: backup}
spec:
  priority: 50
  from: [{zone: app}]
  to: [{zone: web}]
  services: [{protocol: tcp, ports: ["873-875"]}]
  families: [ipv4]
  action: {direct: {reason: trusted backup}}
"""


def build_policies(lab: LabState, *more: Policy) -> PolicySet:
    declared = parse_documents(POLICIES)
    records = tuple(
        MachineRecord(vm.vm_id, vm.name, {"tier": vm.name.split("-")[0]}) for vm in lab.vms
    )
    zones = (*declared.zones, Zone("db", {"tier": "db"}))
    return PolicySet(records, zones, (*declared.policies, *more))


@dataclass
class Rig:
    """A reconciler on the lab's bridge and all that it told."""

    lab: LabState
    reconciler: Reconciler
    events: list[SteeringEvent] = field(default_factory=list)

    def told(self, kind: type[SteeringEvent]) -> list[SteeringEvent]:
        return [event for event in self.events if isinstance(event, kind)]

    async def wait(self, condition: Callable[[], object], seconds: float) -> float:
        """Seconds until the condition became true; fails after the limit."""
        began = time.monotonic()
        while not condition():
            assert time.monotonic() - began < seconds, (
                f"not within {seconds} s; told: {self.events[-5:]}"
            )
            await asyncio.sleep(0.02)
        return time.monotonic() - began

    async def is_settled(self) -> bool:
        """Does the switch have exactly what the policies in force mean for the VMs that are there?"""
        observed = self.reconciler.observed
        machines = resolve_machines(self.reconciler.policies, observed.ports)
        program = compile_program(
            self.reconciler.policies, machines, observed.lanes, observed.canary, observed.ghosts
        )
        try:
            present = await OpenFlowSwitch(self.lab.openflow).read_present()
        except SwitchError:
            return False
        return not build_bundle(program, present)

    async def wait_settled(self, seconds: float) -> float:
        began = time.monotonic()
        while not await self.is_settled():
            assert time.monotonic() - began < seconds, f"not settled within {seconds} s"
            await asyncio.sleep(0.05)
        return time.monotonic() - began


@pytest.fixture
async def rig(bare_lab: LabState) -> AsyncIterator[Rig]:
    events: list[SteeringEvent] = []
    reconciler = Reconciler(
        ovsdb=bare_lab.ovsdb,
        openflow=bare_lab.openflow,
        bridge="br-int",
        lanes=bare_lab.settings.build_lanes(),
        on_event=events.append,
        canary=bare_lab.settings.canary.interface,
    )
    await reconciler.start(PolicySet())
    rig = Rig(bare_lab, reconciler, events)
    await rig.wait_settled(5)
    yield rig
    await reconciler.apply(PolicySet())
    await reconciler.close()


def find_all_flows(lab: LabState) -> list[str]:
    shown = run([*lab.ofctl_argv(["dump-flows"]), "--no-stats"]).stdout
    lines = (line.strip() for line in shown.splitlines() if "actions=" in line)
    return [
        line for line in lines if not re.search(r"table=9[01],", line)
    ]  # learned addresses come and go


async def test_machines_are_found_with_what_libvirt_wrote(rig: Rig) -> None:
    machines = rig.reconciler.machines(build_policies(rig.lab))
    assert [machine.name for machine in machines] == sorted(vm.name for vm in rig.lab.vms)
    web = next(machine for machine in machines if machine.name == "web-1")
    assert (web.vm_id, web.ports[0].mac, web.zones) == (
        rig.lab.vm("web-1").vm_id,
        rig.lab.vm("web-1").mac,
        ("web",),
    )


async def test_what_was_applied_is_what_the_switch_reads_back(rig: Rig) -> None:
    policies = build_policies(rig.lab)
    plan = await rig.reconciler.plan(policies)
    assert plan.bundle.count("add") > 20
    assert await rig.is_settled(), "a plan changes nothing"
    applied = await rig.reconciler.apply(policies)
    assert applied.bundle == plan.bundle
    assert await rig.is_settled()
    assert not (await rig.reconciler.apply(policies)).bundle, "applying twice changes nothing"
    assert "priority=0 actions=NORMAL" in " ".join(find_all_flows(rig.lab)), "a foreign flow stays"
    await rig.reconciler.apply(PolicySet())
    assert await rig.is_settled()


async def test_flows_deleted_by_hand_are_mended_and_recorded(rig: Rig) -> None:
    await rig.reconciler.apply(build_policies(rig.lab))
    before = find_all_flows(rig.lab)
    run(rig.lab.ofctl_argv(["del-flows", "cookie=0x4850000000000000/0xffff000000000000"]))
    assert await rig.wait_settled(2) < 2
    assert sorted(find_all_flows(rig.lab)) == sorted(before)
    await rig.wait(lambda: rig.told(DriftMended), 2)


async def test_a_group_changed_by_hand_is_mended(rig: Rig) -> None:
    await rig.reconciler.apply(build_policies(rig.lab))
    group = next(
        group
        for group in (await OpenFlowSwitch(rig.lab.openflow).read_groups())
        if group.kind == "ff"
    )
    target = rig.lab.ofctl_argv(["mod-group"])
    run([*target, f"group_id={group.group_id},type=all,bucket=actions=drop"])
    assert not await rig.is_settled()
    assert await rig.wait_settled(2) < 2


async def test_foreign_flows_survive_apply_and_mending(rig: Rig) -> None:
    foreign = "cookie=0x77,table=40,priority=9,udp,tp_dst=4789,actions=drop"
    run(rig.lab.ofctl_argv(["add-flow", foreign]))
    await rig.reconciler.apply(build_policies(rig.lab))
    run(rig.lab.ofctl_argv(["del-flows", "table=30"]))
    await rig.wait_settled(2)
    await rig.reconciler.apply(PolicySet())
    assert any("cookie=0x77" in flow for flow in find_all_flows(rig.lab))
    run(rig.lab.ofctl_argv(["del-flows", "cookie=0x77/-1"]))


async def test_a_restarted_switch_is_steered_again(rig: Rig) -> None:
    await rig.reconciler.apply(build_policies(rig.lab))
    await asyncio.to_thread(restart_vswitchd, rig.lab)
    assert await rig.wait_settled(2) < 2
    assert (
        run_in_vm(rig.lab, "web-1", "ping", "-c1", "-W2", rig.lab.vm("db-1").address4).status == 0
    )


async def test_ports_that_come_go_and_move_change_the_flows_within_a_second(rig: Rig) -> None:
    await rig.reconciler.apply(build_policies(rig.lab))
    state = await asyncio.to_thread(add_vm, rig.lab, "late-1")
    interface = state.vm("late-1").interface
    await rig.wait(lambda: any(p.interface == interface for p in rig.reconciler.observed.ports), 1)
    assert await rig.wait_settled(1) < 1
    await asyncio.to_thread(move_vm, state, "web-1")
    assert await rig.wait_settled(1) < 1
    assert any("in_port=" in flow for flow in find_all_flows(rig.lab))
    await asyncio.to_thread(move_vm, state, "web-1")
    await asyncio.to_thread(remove_vm, state, "late-1")
    await rig.wait(lambda: all(p.interface != interface for p in rig.reconciler.observed.ports), 1)
    assert await rig.wait_settled(1) < 1
    assert rig.told(PortsChanged)


async def test_addresses_are_learned_and_change_hands(rig: Rig) -> None:
    web, app = rig.lab.vm("web-1"), rig.lab.vm("app-1")
    run_in_vm(rig.lab, "app-1", "ip", "neigh", "flush", "all")
    run_in_vm(rig.lab, "web-1", "ip", "neigh", "flush", "all")
    for address in (app.address4, app.address6):
        run_in_vm(rig.lab, "web-1", "ping", "-c1", "-W1", address)

    def claims(address: str) -> list[str]:
        return [e.vm_id for e in rig.events if isinstance(e, AddressSeen) and e.address == address]

    for vm in (web, app):
        await rig.wait(
            lambda vm=vm: vm.vm_id in claims(vm.address4) and vm.vm_id in claims(vm.address6), 3
        )
    spare = "10.77.0.200"
    for holder in ("web-1", "app-1", "web-1"):
        run_in_vm(rig.lab, holder, "ip", "addr", "add", f"{spare}/24", "dev", "eth0")
        run_in_vm(rig.lab, holder, "ping", "-c1", "-W1", "-I", spare, rig.lab.vm("db-1").address4)
        run_in_vm(rig.lab, "db-1", "ip", "neigh", "flush", "all")
        run_in_vm(rig.lab, "db-1", "ping", "-c1", "-W1", spare)
        expected = rig.lab.vm(holder).vm_id
        await rig.wait(lambda e=expected: claims(spare)[-1:] == [e], 3)
        run_in_vm(rig.lab, holder, "ip", "addr", "del", f"{spare}/24", "dev", "eth0")
        run_in_vm(rig.lab, "db-1", "ip", "neigh", "flush", "all")
        run_in_vm(rig.lab, "web-2", "ip", "neigh", "flush", "all")


async def test_a_lane_without_an_engine_is_down_and_fails_as_told(rig: Rig) -> None:
    """No service host here: the open policy passes, the closed one does not, and both are counted."""
    await rig.reconciler.apply(build_policies(rig.lab))
    lanes = rig.reconciler.lanes
    assert [rig.reconciler.is_forwarding(lane) for lane in lanes] == [False, False]
    assert rig.told(LaneChanged)
    app = rig.lab.vm("app-1")
    assert run_in_vm(rig.lab, "web-1", "ping", "-c3", "-i0.2", "-W1", app.address4).status == 0
    assert (
        run_in_vm(rig.lab, "app-1", "ping", "-6", "-c1", "-W1", rig.lab.vm("web-1").address6).status
        != 0
    )
    await asyncio.sleep(1.5)  # the switch gathers statistics from its datapath every half second
    counters = await rig.reconciler.read_counters()
    prevent, detect = counters.lanes["prevent"], counters.lanes["detect"]
    assert (prevent.bypassed.packets, prevent.blocked.packets) == (6, 0)
    assert prevent.steered == prevent.bypassed, "requests and answers"
    assert (detect.bypassed.packets, detect.blocked.packets) == (0, 1)
    assert detect.steered == detect.blocked
    assert prevent.into == detect.into == prevent.returned == Count()
    assert counters.policies["web-to-app"].packets == 6


async def test_no_counter_starts_anew_when_policies_change_that_are_not_its_own(rig: Rig) -> None:
    policies = build_policies(rig.lab)
    await rig.reconciler.apply(policies)
    app = rig.lab.vm("app-1")
    assert run_in_vm(rig.lab, "web-1", "ping", "-c3", "-i0.2", "-W1", app.address4).status == 0
    await asyncio.sleep(1.5)
    meter = read_growth(Meter(), await rig.reconciler.read_counters())[1]
    await rig.reconciler.apply(replace(policies, policies=policies.policies[:2]))
    state = await asyncio.to_thread(add_vm, rig.lab, "web-9")
    try:
        await rig.wait(lambda: len(rig.reconciler.observed.ports) == len(state.vms), 2)
        await rig.wait_settled(2)
        counters = await rig.reconciler.read_counters()
        growth, meter = read_growth(meter, counters)
        assert counters.lanes["prevent"].bypassed.packets >= 6
        assert growth.lanes["prevent"].bypassed.packets == 0
    finally:
        await asyncio.to_thread(remove_vm, state, "web-9")
    await asyncio.to_thread(restart_vswitchd, rig.lab)
    await rig.wait_settled(5)
    assert run_in_vm(rig.lab, "web-1", "ping", "-c2", "-i0.2", "-W1", app.address4).status == 0
    await asyncio.sleep(1.5)
    growth, _ = read_growth(meter, await rig.reconciler.read_counters())
    assert growth.lanes["prevent"].bypassed.packets == 4, "a restarted switch counts from 0"


async def test_wrong_policies_are_refused_and_change_nothing(rig: Rig) -> None:
    await rig.reconciler.apply(build_policies(rig.lab))
    before = find_all_flows(rig.lab)
    absent = build_policies(rig.lab)
    absent = PolicySet(
        (*absent.machines, MachineRecord("11111111-2222-3333-4444-555555555555", "ghost", {})),
        absent.zones,
        (*absent.policies, Policy("haunted", 7, (Peer(vm="ghost"),), (Peer(zone="app"),),
                                  absent.policies[0].services, absent.policies[0].families,
                                  absent.policies[0].action)),
    )  # fmt: skip
    with pytest.raises(WrongInput, match="ghost"):
        await rig.reconciler.apply(absent)
    assert find_all_flows(rig.lab) == before


async def test_a_bridge_that_would_fail_standalone_is_not_steered(rig: Rig) -> None:
    run(rig.lab.vsctl_argv(["set-fail-mode", "br-int", "standalone"]))
    try:
        await rig.wait(lambda: rig.reconciler.status.fail_mode == "standalone", 2)
        with pytest.raises(SwitchError, match="fail_mode"):
            await rig.reconciler.apply(build_policies(rig.lab))
    finally:
        run(rig.lab.vsctl_argv(["set-fail-mode", "br-int", "secure"]))
        await rig.wait(lambda: rig.reconciler.status.fail_mode == "secure", 2)
