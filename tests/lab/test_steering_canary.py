"""Hairpin's own port on a real switch: a canary goes into its lane and comes back, nothing else passes.

In the place of the first lane's engine stands a plain bridge; the second lane has none.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass

import pytest

from appliance.lab import LabState
from steering.canary import DESTINATION, PORT, SOURCE, SOURCE_MAC, build_destination_mac
from steering.model import Family, Lane, OnFailure
from steering.pipeline import build_group_id, build_steer_key
from steering.reconcile import Reconciler
from steering.run import run
from tests.support.lab import run_in_vm
from tests.support.wire import follow, wire_first_lane

pytestmark = pytest.mark.lab

# Sends frames by a device and prints, as JSON, what other frames of a canary's arrived there.
EXCHANGE = """
import json, select, socket, sys, time
from scapy.all import Ether, IP, IPv6, UDP, Dot1Q
device, frames = sys.argv[1], json.loads(sys.argv[2])
door = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
door.bind((device, 0))
for one in frames:
    ip = (IPv6 if ":" in one["to"] else IP)(src=one["source"], dst=one["to"])
    head = Ether(src=one["src"], dst=one["dst"])
    if one.get("vlan"):
        head = head / Dot1Q(vlan=one["vlan"])
    door.send(bytes(head / ip / UDP(sport=50000, dport=4850) / b"hello"))
arrived, until = [], time.monotonic() + 1.0
while select.select([door], [], [], max(0.0, until - time.monotonic()))[0]:
    frame, address = door.recvfrom(2000)
    if address[2] != socket.PACKET_OUTGOING and b"hello" in frame:
        arrived.append(frame[:6].hex(":"))
print(json.dumps(sorted(arrived)))
"""


@dataclass
class Rig:
    lab: LabState
    reconciler: Reconciler

    @property
    def lane(self) -> Lane:
        return self.reconciler.lanes[0]

    def trace(self, match: str) -> str:
        """What `ofproto/trace` prints."""
        argv = ["ovs-appctl", "-t", str(self.lab.vswitchd), "ofproto/trace", "br-int", match]
        return run(argv).stdout

    async def exchange(self, *frames: dict[str, object]) -> list[str]:
        """The destination MACs of the frames that came back to the canary's device within a second."""
        argv = [
            *("ip", "netns", "exec", self.lab.service_host, sys.executable, "-c", EXCHANGE),
            *(self.lab.settings.canary.device, json.dumps(frames)),
        ]
        done = await asyncio.to_thread(run, argv, timeout=30)
        found: list[str] = json.loads(done.stdout)
        return found


def build_frame(lane: Lane, family: Family, *, answer: bool) -> dict[str, object]:
    mac = build_destination_mac(lane, answer=answer)
    return {
        "src": SOURCE_MAC, "dst": mac, "source": SOURCE[family], "to": DESTINATION[family],
    }  # fmt: skip


@pytest.fixture(scope="module")
def wired_lab(bare_lab: LabState) -> Iterator[LabState]:
    with wire_first_lane(bare_lab):
        yield bare_lab


@pytest.fixture
async def rig(wired_lab: LabState) -> AsyncIterator[Rig]:
    async with follow(wired_lab) as follower:
        reconciler = follower.reconciler
        await follower.wait(lambda: reconciler.is_forwarding(reconciler.lanes[0]), 10)
        yield Rig(wired_lab, reconciler)


async def test_a_canary_comes_back_by_its_lane_and_is_counted_on_its_way(rig: Rig) -> None:
    assert rig.reconciler.observed.canary > 0
    assert [p for p in rig.reconciler.status.problems if "canar" in p] == []
    frames = [build_frame(rig.lane, f, answer=a) for f in Family for a in (False, True)]
    before = await rig.reconciler.read_counters()
    assert await rig.exchange(*frames) == sorted(str(frame["dst"]) for frame in frames)
    await asyncio.sleep(1.2)  # the switch gathers statistics from its datapath every half second
    after = await rig.reconciler.read_counters()
    lane = rig.lane.name
    assert after.canary_port.packets - before.canary_port.packets == 4
    assert after.canary[lane].packets - before.canary[lane].packets == 4
    assert after.lanes[lane].into.packets - before.lanes[lane].into.packets == 4
    assert after.lanes[lane].returned.packets - before.lanes[lane].returned.packets == 4


async def test_a_canary_of_a_dead_lane_does_not_come_back(rig: Rig) -> None:
    dead = rig.reconciler.lanes[1]
    frames = [build_frame(dead, f, answer=a) for f in Family for a in (False, True)]
    before = await rig.reconciler.read_counters()
    assert await rig.exchange(*frames) == []
    await asyncio.sleep(1.2)
    after = await rig.reconciler.read_counters()
    assert after.canary[dead.name].packets - before.canary[dead.name].packets == 4
    assert after.lanes[dead.name].bypassed == before.lanes[dead.name].bypassed


async def test_nothing_but_canaries_leaves_the_port(rig: Rig) -> None:
    good = build_frame(rig.lane, Family.IPV4, answer=False)
    vm = rig.lab.vm("web-1")
    bad = [
        {**good, "src": vm.mac},
        {**good, "dst": vm.mac},
        {**good, "dst": "ff:ff:ff:ff:ff:ff"},
        {**good, "vlan": 7},
        {**good, "vlan": rig.lane.vlan},
    ]
    argv = ("tcpdump", "-lnni", "eth0", "-c1", "udp", "port", str(PORT))
    listening = asyncio.create_task(
        asyncio.to_thread(run_in_vm, rig.lab, "web-1", "timeout", "2.5", *argv)
    )
    await asyncio.sleep(0.7)
    assert await rig.exchange(*bad) == []
    assert "UDP" not in (await listening).stdout


async def test_what_is_flooded_does_not_enter_the_port(rig: Rig) -> None:
    """Broadcasts, and a frame to a MAC that nobody has, also a canary's, from a VM."""
    vm = rig.lab.vm("web-1")
    frames = [
        {"src": vm.mac, "dst": dst, "source": vm.address4, "to": "10.77.0.99"}
        for dst in ("ff:ff:ff:ff:ff:ff", "02:99:99:99:99:99",
                    build_destination_mac(rig.lane, answer=False))
    ]  # fmt: skip
    listening = asyncio.create_task(rig.exchange())
    await asyncio.sleep(0.5)
    argv = (sys.executable, "-c", EXCHANGE, "eth0", json.dumps(frames))
    sent = await asyncio.to_thread(run_in_vm, rig.lab, "web-1", *argv)
    assert sent.status == 0, sent.stderr
    assert await listening == []


async def test_the_trace_goes_by_the_closed_group_and_a_forger_nowhere(rig: Rig) -> None:
    port = rig.reconciler.observed.canary
    mac = build_destination_mac(rig.lane, answer=True)
    said = rig.trace(f"udp,in_port={port},dl_src={SOURCE_MAC},dl_dst={mac}")
    group = build_group_id(build_steer_key(rig.lane, OnFailure.CLOSED, answer=True))
    assert f"group:{group}" in said
    assert f"output:{rig.lane.leg_b.ofport}" in said
    web = next(p for p in rig.reconciler.observed.ports if p.mac == rig.lab.vm("web-1").mac)
    forged = rig.trace(f"udp,in_port={web.ofport},dl_src={SOURCE_MAC},dl_dst={mac}")
    assert f"10. dl_src={SOURCE_MAC}, priority 80, cookie 0x4850080000000000\n    drop" in forged


async def test_a_port_that_could_be_flooded_into_is_told(rig: Rig) -> None:
    vsctl, name = rig.lab.vsctl_argv, str(rig.lab.settings.canary.interface)

    def told() -> list[str]:
        return [p for p in rig.reconciler.status.problems if "canary port" in p]

    async def wait(words: str) -> None:
        until = time.monotonic() + 3
        while not any(words in problem for problem in told()):
            assert time.monotonic() < until, told()
            await asyncio.sleep(0.05)

    run(vsctl(["clear", "port", name, "tag"]))
    try:
        await wait("has tag None")
        run(vsctl(["set", "port", name, "vlan_mode=trunk"]))
        await wait("has vlan_mode trunk")
        run(vsctl(["set", "port", name, "protected=true"]))
        await wait("is protected")
    finally:
        run(vsctl(["clear", "port", name, "vlan_mode", "--", "set", "port", name,
                   f"tag={rig.lane.vlan}", "protected=false"]))  # fmt: skip
    until = time.monotonic() + 3
    while told():
        assert time.monotonic() < until, told()
        await asyncio.sleep(0.05)
