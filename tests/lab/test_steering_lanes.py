"""What is told of lanes when BFD flaps, and when the switch or its database is gone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator

import pytest

from appliance.lab import LabState, find_process, kill_process, restart_vswitchd
from steering.events import LaneChanged, SwitchChanged
from steering.run import run
from tests.support.wire import WIRE, Follower, follow, wire_first_lane

pytestmark = [pytest.mark.lab, pytest.mark.timeout(120)]


@pytest.fixture(scope="module")
def wired_lab(bare_lab: LabState) -> Iterator[LabState]:
    with wire_first_lane(bare_lab):
        yield bare_lab


@pytest.fixture
async def follower(wired_lab: LabState) -> AsyncIterator[Follower]:
    async with follow(wired_lab) as one:
        await one.wait(lambda: one.reconciler.is_forwarding(one.reconciler.lanes[0]), 10)
        yield one


async def test_a_lane_of_a_dead_switch_does_not_count_as_forwarding(follower: Follower) -> None:
    lab, reconciler = follower.lab, follower.reconciler
    lane = reconciler.lanes[0]
    killed = time.monotonic()
    await asyncio.to_thread(kill_process, lab, "ovs-vswitchd")
    await follower.wait(lambda: not reconciler.is_forwarding(lane), 2)
    took = time.monotonic() - killed
    told = run(lab.vsctl_argv(["get", "interface", lane.leg_a.interface, "bfd_status:forwarding"]))
    assert told.stdout.strip().strip('"') == "true", "the database still says so"
    await asyncio.sleep(1.5)
    assert not reconciler.is_forwarding(lane)
    assert [e.reachable for e in follower.events if isinstance(e, SwitchChanged)][-1] is False
    await asyncio.to_thread(restart_vswitchd, lab)
    await follower.wait(lambda: reconciler.is_forwarding(lane), 10)
    print(f"a dead switch was noticed after {took:.3f} s")


async def test_a_lane_that_flaps_is_told_and_its_flaps_are_counted(follower: Follower) -> None:
    reconciler, lane = follower.reconciler, follower.reconciler.lanes[0]
    before = reconciler.flaps
    assert set(before) == {lane.name for lane in reconciler.lanes}
    link = ("ip", "-n", follower.lab.service_host, "link", "set", WIRE)
    for _ in range(2):
        run([*link, "down"])
        await follower.wait(lambda: not reconciler.is_forwarding(lane), 5)
        run([*link, "up"])
        await follower.wait(lambda: reconciler.is_forwarding(lane), 10)
    told = [e.forwarding for e in follower.events if isinstance(e, LaneChanged)]
    assert told[-4:] == [False, True, False, True]
    await follower.wait(lambda: reconciler.flaps[lane.name] - before[lane.name] >= 4)
    other = reconciler.lanes[1].name
    assert reconciler.flaps[other] == before[other]


async def test_a_lane_does_not_count_as_forwarding_while_the_database_is_gone(
    follower: Follower,
) -> None:
    lab, reconciler = follower.lab, follower.reconciler
    lane = reconciler.lanes[0]
    pid, _ = find_process(lab, "ovsdb-server")
    run(["kill", "-STOP", str(pid)])
    try:
        # Nobody tells of it while the connection stands: the probe of the IDL has to fail.
        await follower.wait(lambda: not reconciler.is_forwarding(lane), 15)
        await asyncio.sleep(1.5)
        assert not reconciler.is_forwarding(lane)
    finally:
        run(["kill", "-CONT", str(pid)])
    await follower.wait(lambda: reconciler.is_forwarding(lane), 10)
