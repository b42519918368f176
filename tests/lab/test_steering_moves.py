"""A VM's port that goes, comes back and moves under traffic: nothing passes uninspected meanwhile.

Without an engine a closed lane passes nothing, so every packet that arrives went round it.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

import pytest

from appliance.lab import LabState, move_vm
from appliance.lab.plan import LabVm, build_port_args
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
from tests.support import talker
from tests.support.lab import run_in_vm
from tests.support.wire import Follower, follow, wire_first_lane

pytestmark = [pytest.mark.lab, pytest.mark.timeout(120)]

RATE = 500
PORT = 9999
PAIR = ("web-1", "app-1")


@dataclass(frozen=True)
class Talk:
    """What one VM sent, what of the other's arrived, and the longest time in seconds without any."""

    sent: int
    arrived: int
    gap: float


def build_policies(lab: LabState) -> PolicySet:
    """Everything between web-1 and app-1 is inspected, closed on failure."""
    records = tuple(MachineRecord(lab.vm(name).vm_id, name) for name in PAIR)
    web, app = (Peer(vm=name) for name in PAIR)
    closed = Inspect(Profile.PREVENT, OnFailure.CLOSED)
    both = (Family.IPV4, Family.IPV6)
    return PolicySet(records, (), (Policy("pair", 9, (web,), (app,), (Service(),), both, closed),))


async def talk(lab: LabState, seconds: float, family: int = 4) -> list[Talk]:
    async def one(name: str, other: str) -> Talk:
        peer = getattr(lab.vm(other), f"address{family}")
        argv = (sys.executable, talker.__file__, peer, str(PORT), str(RATE), str(seconds))
        done = await asyncio.to_thread(run_in_vm, lab, name, *argv, timeout=seconds + 20)
        assert done.status == 0, done.stderr
        return Talk(**json.loads(done.stdout))

    return list(await asyncio.gather(one(*PAIR), one(*reversed(PAIR))))


def plug_out(lab: LabState, vm: LabVm) -> None:
    run(lab.vsctl_argv(["del-port", "br-int", vm.interface]))


def plug_in(lab: LabState, vm: LabVm) -> None:
    run(lab.vsctl_argv(build_port_args(vm)[1:]))


@pytest.fixture(scope="module")
def pair_lab(bare_lab: LabState) -> LabState:
    """The two know each other's MACs for good, so that no packet waits for an answer to ARP or ND."""
    for name, other in (PAIR, reversed(PAIR)):
        peer = bare_lab.vm(other)
        for address in (peer.address4, peer.address6):
            argv = (
                "ip",
                "neigh",
                "replace",
                address,
                "lladdr",
                peer.mac,
                "dev",
                "eth0",
                "nud",
                "permanent",
            )
            assert run_in_vm(bare_lab, name, *argv).status == 0
    return bare_lab


@pytest.fixture
async def closed(pair_lab: LabState) -> AsyncIterator[Follower]:
    async with follow(pair_lab) as follower:
        assert min(one.arrived for one in await talk(pair_lab, 1)) > 100, "what passes is seen"
        await follower.reconciler.apply(build_policies(pair_lab))
        await asyncio.sleep(0.2)
        yield follower


async def move(follower: Follower) -> None:
    await asyncio.to_thread(move_vm, follower.lab, "app-1")


async def replug(follower: Follower) -> None:
    """Out for longer than it takes the reconciler to see it."""
    vm = follower.lab.vm("app-1")
    await asyncio.to_thread(plug_out, follower.lab, vm)
    await asyncio.sleep(0.7)
    await asyncio.to_thread(plug_in, follower.lab, vm)


async def flap(follower: Follower) -> None:
    vm = follower.lab.vm("app-1")
    link = ("ip", "-n", follower.lab.hypervisor, "link", "set", vm.interface)
    run([*link, "down"])
    await asyncio.sleep(0.3)
    run([*link, "up"])


async def replug_while_nobody_watches(follower: Follower) -> None:
    """Out under one reconciler, in under the next."""
    vm, policies = follower.lab.vm("app-1"), follower.reconciler.policies
    await asyncio.to_thread(plug_out, follower.lab, vm)
    await asyncio.sleep(0.3)
    await follower.reconciler.close()
    async with follow(follower.lab, policies, keep=True):
        await asyncio.sleep(0.5)
    await asyncio.to_thread(plug_in, follower.lab, vm)
    await asyncio.sleep(0.3)
    async with follow(follower.lab, policies, keep=True):
        await asyncio.sleep(0.5)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("disturb", [move, replug, flap, replug_while_nobody_watches])
async def test_no_packet_passes_uninspected(
    closed: Follower, disturb: Callable[[Follower], Awaitable[None]], family: int
) -> None:
    talking = asyncio.create_task(talk(closed.lab, 5, family))
    await asyncio.sleep(0.8)
    for _ in range(2):  # the second time takes a moved port back to its number
        await disturb(closed)
        await asyncio.sleep(0.3)
    told = await talking
    assert min(one.sent for one in told) >= 4 * RATE
    assert [one.arrived for one in told] == [0, 0]


async def test_a_port_that_moves_is_steered_again_within_a_second(pair_lab: LabState) -> None:
    with wire_first_lane(pair_lab):
        async with follow(pair_lab, build_policies(pair_lab)) as follower:
            reconciler = follower.reconciler
            await follower.wait(lambda: reconciler.is_forwarding(reconciler.lanes[0]), 10)
            for disturb in (move, flap, move):
                talking = asyncio.create_task(talk(pair_lab, 3))
                await asyncio.sleep(1)
                began = time.monotonic()
                await disturb(follower)
                took = time.monotonic() - began
                told = await talking
                lost = [(one.sent - one.arrived) for one in told]
                print(f"{disturb.__name__}: took {took:.3f} s; lost {lost}, {told}")
                assert max(one.gap for one in told) < took + 1


async def test_a_known_mac_from_a_port_that_is_not_known_yet_is_dropped(closed: Follower) -> None:
    """Before OVSDB tells of it, and whether its old port is there or not."""
    lab, (web, app) = closed.lab, (closed.lab.vm(name) for name in PAIR)

    def trace(match: str) -> str:
        argv = ["ovs-appctl", "-t", str(lab.vswitchd), "ofproto/trace", "br-int", match]
        return run(argv).stdout

    forged = f"udp,in_port=77,dl_src={app.mac},dl_dst={web.mac}"
    assert f"10. dl_src={app.mac}, priority 80" in trace(forged)
    assert "NORMAL" not in trace(forged)
    plug_out(lab, app)
    try:
        await closed.wait(lambda: [g.mac for g in closed.reconciler.observed.ghosts] == [app.mac])
        await asyncio.sleep(0.5)
        assert f"10. dl_src={app.mac}, priority 80, cookie 0x4850090000000000" in trace(forged)
        before = (await closed.reconciler.read_counters()).ghosts
        run_in_vm(lab, "web-1", "ping", "-c2", "-i0.2", "-W1", app.address4)
        await asyncio.sleep(1.2)
        after = (await closed.reconciler.read_counters()).ghosts
        assert after.packets - before.packets == 2
    finally:
        plug_in(lab, app)
    await closed.wait(lambda: closed.reconciler.observed.ghosts == ())
