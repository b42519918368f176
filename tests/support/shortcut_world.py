"""A real switch (dummy datapath), kept by a real reconciler, whose connections come to take shortcuts.

Frames are handed to its ports as VMs, and as a service host's third leg would send them; no engine runs.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from scapy.layers.inet import IP, TCP
from scapy.layers.l2 import Dot1Q, Ether
from scapy.packet import Packet, Raw

from appliance.alerts.attribute import Context
from appliance.alerts.ingest import Ingest
from appliance.alerts.store import Store
from appliance.assurance.shortcuts import ShortcutWatch
from appliance.inspection.publish import InspectionState
from appliance.management.shortcut import ShortcutWork
from steering.decide import decide
from steering.events import SteeringEvent
from steering.model import (
    Holding,
    Lane,
    PolicySet,
    Shortcut,
    Trigger,
)
from steering.reconcile import Reconciler
from steering.shortcut import PRIORITY_CODES
from tests.support.dummy_switch import BRIDGE, DummySwitch, open_dummy_switch
from tests.support.eve import render_eve
from tests.support.waiting import wait_until
from tests.support.worlds import THREE_LEGGED, build_cut_policy, build_record

VMS = (1, 2, 3)
LANES = tuple(
    replace(
        lane,
        leg_a=replace(lane.leg_a, interface=f"p{lane.leg_a.ofport}"),
        leg_b=replace(lane.leg_b, interface=f"p{lane.leg_b.ofport}"),
        leg_c=None
        if lane.leg_c is None
        else replace(lane.leg_c, interface=f"p{lane.leg_c.ofport}"),
    )
    for lane in THREE_LEGGED
)
LANE = LANES[0]
OFPORTS = (*VMS, *(leg.ofport for lane in LANES for leg in lane.legs))
LEG_A, LEG_B, LEG_C = (leg.ofport for leg in LANE.legs)
CODE = PRIORITY_CODES[Trigger.ONE_MEGABYTE]
PAYLOAD = b"x" * 64


def build_policies(cut: Shortcut | None = None) -> PolicySet:
    """`backup` from 1 to 2, and `quiet` from 3 to 2, whose connections alerts do not send back."""
    cut = cut or Shortcut(Trigger.ONE_MEGABYTE, max_flows=20)
    policies = (
        build_cut_policy("backup", cut),
        build_cut_policy("quiet", replace(cut, return_on_alert=False), priority=90, source=3),
    )
    return PolicySet(tuple(build_record(n) for n in VMS), (), policies)


def find_mac(vm: int) -> str:
    return f"02:00:00:00:00:{vm:02x}"


def attach_vms(switch: DummySwitch) -> None:
    """Tell whose the VMs' ports are, as libvirt does."""
    for vm in VMS:
        switch.vsctl(
            "set", "Interface", f"p{vm}", f"external_ids:vm-id=vm-{vm}",
            f'external_ids:attached-mac="{find_mac(vm)}"', f"external_ids:iface-id=if-{vm}",
        )  # fmt: skip


def tag_legs(switch: DummySwitch) -> None:
    """Make the legs' ports what a host's preparation makes them: of the lane's VLAN, and protected."""
    for lane in LANES:
        for leg in lane.legs:
            switch.vsctl("set", "Port", leg.interface, f"tag={lane.vlan}", "protected=true")


def build_segment(
    source: int, destination: int, sport: int, dport: int, flags: str = "A"
) -> Packet:
    """A TCP segment from one VM to another."""
    return (
        Ether(src=find_mac(source), dst=find_mac(destination))
        / IP(src=f"10.0.0.{source}", dst=f"10.0.0.{destination}")
        / TCP(flags=flags, sport=sport, dport=dport)
        / Raw(PAYLOAD)
    )


@dataclass
class World:
    """``inspection`` is what the service host would publish: none runs."""

    switch: DummySwitch
    reconciler: Reconciler
    store: Store
    ingest: Ingest
    eve: Path
    policies: PolicySet
    inspection: InspectionState | None = None
    ruleset: str = "r1"
    told: list[SteeringEvent] = field(default_factory=list)

    def build_watch(self) -> ShortcutWatch:
        return ShortcutWatch(
            self.store,
            self.reconciler.read_shortcuts,
            lambda: self.reconciler.shortcuts.read_counters(self.policies, self.reconciler.lanes),
            lambda: self.policies,
            self.reconciler.machines,
        )

    def build_work(self, watch: ShortcutWatch) -> ShortcutWork:
        return ShortcutWork(
            self.store,
            self.ingest,
            self.reconciler,
            watch,
            lambda: self.policies,
            lambda: self.inspection,
            lambda lane: self.ruleset,
        )

    async def apply(self, policies: PolicySet) -> None:
        await self.reconciler.apply(policies)
        self.policies = policies

    async def wait_taught(self) -> None:
        """Until the switch learns shortcuts (again): not in the second after a return."""

        async def teaches() -> bool:
            # Beside the event loop, on which the switch is kept.
            dump = "ovs-ofctl", "-O", "OpenFlow15", "dump-flows", self.switch.target, "table=55"
            text = await asyncio.to_thread(self.switch.run, *dump)
            await asyncio.sleep(0.05)
            # One flow a policy and family.
            lines = [line for line in text.splitlines() if "learn(" in line]
            return len(lines) == 2 * len(self.policies.policies)

        await wait_until(teaches, 15.0)

    def open(self, source: int, destination: int, sport: int, dport: int = 873) -> None:
        """A connection, of which the engine then lets one frame go."""
        forth = source, destination, sport, dport
        back = destination, source, dport, sport
        self.switch.send(source, build_segment(*forth, "S"))
        self.switch.send(destination, build_segment(*back, "SA"))
        self.let_go(build_segment(*forth))

    def let_go(self, frame: Packet) -> None:
        tagged = Ether(src=frame.src, dst=frame.dst) / Dot1Q(vlan=LANE.vlan, prio=CODE)
        self.switch.send(LEG_C, tagged / frame.payload)

    def account(self) -> None:
        """Has the switch's threads tell what they counted."""
        self.switch.appctl("revalidator/wait")
        self.switch.appctl("revalidator/purge")

    async def count(self) -> int:
        """Connections that take a shortcut now."""
        return len(await self.reconciler.read_shortcuts()) // 2

    def alert(self, source: int, destination: int, sport: int, *, blocked: bool) -> None:
        action = "blocked" if blocked else "allowed"
        verdict = "drop" if blocked else "alert"
        line = render_eve(
            src_ip=f"10.0.0.{source}",
            dest_ip=f"10.0.0.{destination}",
            src_port=sport,
            dest_port=873,
            alert={"action": action, "gid": 1, "signature_id": 7, "rev": 1, "signature": "odd"},
            verdict={"action": verdict},
        )
        self.eve.parent.mkdir(parents=True, exist_ok=True)
        with self.eve.open("ab") as file:
            file.write(line + b"\n")


@contextlib.asynccontextmanager
async def open_world(
    directory: Path, policies: PolicySet, lanes: Sequence[Lane] = LANES
) -> AsyncIterator[World]:
    """``directory``: short, since sockets lie in it."""
    ports = (*VMS, *(leg.ofport for lane in lanes for leg in lane.legs))
    with open_dummy_switch(directory, ports) as switch:
        attach_vms(switch)
        store = Store(directory / "hairpin.db")
        told: list[SteeringEvent] = []
        reconciler = Reconciler(
            ovsdb=f"unix:{directory}/db.sock",
            openflow=switch.target,
            bridge=BRIDGE,
            lanes=lanes,
            on_event=told.append,
        )
        eve = directory / "eve" / "eve.json"

        def find_context(lane: Lane, at: float) -> Context:
            held = {f"10.0.0.{vm}": (Holding(f"10.0.0.{vm}", f"vm-{vm}", 0.0),) for vm in VMS}
            return Context(reconciler.machines(), reconciler.policies, 1, lane, held)

        ingest = Ingest(store, {LANE: eve}, find_context, decide, poll_seconds=0.01)
        world = World(switch, reconciler, store, ingest, eve, policies, told=told)
        ingesting = asyncio.create_task(ingest.run())
        try:
            await reconciler.start(PolicySet())
            await wait_until(lambda: len(reconciler.machines()) == len(VMS))
            await world.apply(policies)
            await world.wait_taught()
            yield world
        finally:
            ingesting.cancel()
            await asyncio.gather(ingesting, return_exceptions=True)
            await reconciler.close()
            store.close()
