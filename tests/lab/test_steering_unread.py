"""Frames that no policy can read, and legs too narrow for what VMs send, on the real switch."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator

import pytest

from appliance.lab import LabState
from steering.model import (
    Family,
    Inspect,
    MachineRecord,
    OnFailure,
    Peer,
    Policy,
    PolicySet,
    Profile,
    Service,
)  # fmt: skip
from steering.run import run
from tests.support.lab import run_in_vm
from tests.support.wire import Follower, follow

pytestmark = [pytest.mark.lab, pytest.mark.timeout(120)]

# Ten frames of each ethertype to a MAC: MPLS, PPPoE, one for experiments, and an LLC frame's length.
SENDER = """
import json, socket, sys
t = json.loads(sys.argv[1])
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
s.bind(("eth0", 0))
for kind in (0x8847, 0x8864, 0x88b5, 0x0040):
    frame = bytes.fromhex((t["to"] + t["from"]).replace(":", "")) + kind.to_bytes(2, "big")
    for _ in range(10):
        s.send(frame + b"hairpin" * 10)
"""
# What of them arrives within a second, by ethertype.
LISTENER = """
import json, socket, time
s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
s.bind(("eth0", 3))
s.settimeout(0.2)
found, end = {}, time.monotonic() + 2.5
while time.monotonic() < end:
    try:
        frame = s.recv(2000)
    except TimeoutError:
        continue
    if b"hairpin" in frame:
        kind = frame[12:14].hex()
        found[kind] = found.get(kind, 0) + 1
print(json.dumps(found))
"""
ALL = {"8847": 10, "8864": 10, "88b5": 10, "0040": 10}
BROADCAST = "ff:ff:ff:ff:ff:ff"


@pytest.fixture
async def follower(bare_lab: LabState) -> AsyncIterator[Follower]:
    """A policy inspects all of IP from web-1 to app-1; no other VM is named."""
    records = tuple(
        MachineRecord(bare_lab.vm(name).vm_id, name) for name in ("web-1", "app-1", "db-1")
    )
    ends = (Peer(vm="web-1"),), (Peer(vm="app-1"),)
    action = Inspect(Profile.PREVENT, OnFailure.CLOSED)
    policy = Policy("pair", 9, *ends, (Service(),), tuple(Family), action)
    async with follow(bare_lab) as one:
        await one.reconciler.apply(PolicySet(records, (), (policy,)))
        yield one


async def send(lab: LabState, source: str, target: str, to: str) -> dict[str, int]:
    """What of 40 frames that ``source`` sends to the MAC ``to`` reaches ``target``, by ethertype."""
    listening = asyncio.create_task(
        asyncio.to_thread(run_in_vm, lab, target, sys.executable, "-c", LISTENER)
    )
    await asyncio.sleep(0.8)
    told = json.dumps({"from": lab.vm(source).mac, "to": to})
    sent = await asyncio.to_thread(run_in_vm, lab, source, sys.executable, "-c", SENDER, told)
    assert sent.status == 0, sent.stderr
    heard = await listening
    assert heard.status == 0, heard.stderr
    found: dict[str, int] = json.loads(heard.stdout)
    return found


async def test_what_is_not_ip_is_dropped_between_named_vms_and_counted(follower: Follower) -> None:
    lab, app, db = follower.lab, follower.lab.vm("app-1"), follower.lab.vm("db-1")
    web = next(p for p in follower.reconciler.observed.ports if p.mac == lab.vm("web-1").mac)
    assert await send(lab, "web-1", "db-1", db.mac) == ALL, "no policy names db-1"
    assert await send(lab, "db-1", "app-1", app.mac) == ALL
    assert await send(lab, "web-1", "app-1", app.mac) == {}
    before = (await follower.reconciler.read_counters()).many.packets
    assert await send(lab, "web-1", "app-1", BROADCAST) == ALL
    await asyncio.sleep(1.2)
    counters = await follower.reconciler.read_counters()
    dropped = {port: count.packets for port, count in counters.unread.items() if count.packets}
    assert dropped == {web.ofport: 40}
    assert counters.many.packets >= before + 40


async def test_a_leg_narrower_than_an_inspected_vm_s_port_is_told(follower: Follower) -> None:
    lab, web = follower.lab, follower.lab.vm("web-1")
    legs = [leg for lane in lab.lanes for leg, _device, _ofport in lane.all_legs]
    inside = ["ip", "netns", "exec", lab.hypervisor, "ip", "link", "set", "dev", web.interface]

    def find_told() -> list[str]:
        told = follower.reconciler.status.problems
        return [problem for problem in told if "sends up to" in problem]

    assert find_told() == []
    run([*inside, "mtu", "9000"])
    try:
        await follower.wait(find_told)
        assert find_told() == [
            f"leg {leg} carries 1504 bytes, VM port {web.interface} sends up to 9000: larger frames of "
            f"inspected pairs are lost; `ip link set dev {leg} mtu 9004`, and the same for its device "
            "in the service host"
            for leg in legs
        ]
    finally:
        run([*inside, "mtu", "1500"])
    await follower.wait(lambda: not find_told())
