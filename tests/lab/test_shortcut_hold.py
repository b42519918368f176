"""What was sent back does not take its shortcut again at once, and a port that is another VM's keeps none."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from steering.model import Shortcut, Trigger
from steering.shortcut import Return
from tests.support.shortcut_world import World, build_policies, build_segment, open_world
from tests.support.waiting import wait_until

pytestmark = pytest.mark.lab

FRAME = build_segment(1, 2, 40_000, 873)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    with tempfile.TemporaryDirectory(prefix="hp-") as name:
        async with open_world(Path(name), build_policies()) as world:
            yield world


async def let_go_for_a_while(world: World) -> None:
    """As frames that the engine let go before: at once, and once the reconciler has looked again."""
    for _ in range(4):
        world.let_go(FRAME)
        await asyncio.sleep(0.1)


async def test_what_was_sent_back_is_not_learned_again_at_once(world: World) -> None:
    world.open(1, 2, 40_000)
    assert await world.count() == 1
    await world.reconciler.return_shortcuts(Return(policies=frozenset({"backup"})))
    await let_go_for_a_while(world)
    assert await world.count() == 0
    await world.wait_taught()
    world.let_go(FRAME)
    assert await world.count() == 1, "once the second is over"


async def test_nor_what_a_change_of_policies_sent_back(world: World) -> None:
    world.open(1, 2, 40_000)
    await world.apply(build_policies(Shortcut(Trigger.ONE_MEGABYTE, max_flows=21)))
    await let_go_for_a_while(world)
    assert await world.count() == 0
    await world.wait_taught()
    world.let_go(FRAME)
    assert await world.count() == 1


async def test_a_port_that_is_another_vms_now_keeps_no_shortcut(world: World) -> None:
    world.open(3, 2, 50_000)
    dump = "ovs-ofctl", "-O", "OpenFlow15", "--no-names", "dump-flows", world.switch.target

    def takes() -> bool:
        return ",in_port=3," in world.switch.run(*dump, "table=25")

    assert takes()
    world.switch.vsctl("set", "Interface", "p3", "external_ids:vm-id=vm-9")
    await wait_until(lambda: not takes())
