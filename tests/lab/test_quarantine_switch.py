"""Quarantine while something else is being put in force, on a real switch with its reconciler."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from steering.diff import Bundle
from steering.model import Shortcut, Trigger
from steering.pipeline import CookieKind, build_cookie
from tests.support.shortcut_world import World, build_policies, open_world
from tests.support.waiting import wait_until

pytestmark = [pytest.mark.lab, pytest.mark.side_by_side]

OTHER = build_policies(Shortcut(Trigger.TEN_MEGABYTES, max_flows=20))
SHUT = frozenset({"vm-1"})
COOKIE = f"cookie={build_cookie(CookieKind.QUARANTINE, 1):#x}"


@pytest.fixture
async def world() -> AsyncIterator[World]:
    with tempfile.TemporaryDirectory(prefix="hp-") as name:
        async with open_world(Path(name), build_policies()) as world:
            yield world


@pytest.fixture
def sent(world: World, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every line about the quarantine of VM 1 that the switch is sent from now on."""
    lines: list[str] = []
    switch = world.reconciler._switch
    send = switch.send_bundle

    async def note(bundle: Bundle, more: Sequence[str] = ()) -> None:
        lines.extend(one.command for one in bundle.changes if COOKIE in one.command)
        await send(bundle, more)

    monkeypatch.setattr(switch, "send_bundle", note)
    return lines


async def has_settled(world: World) -> bool:
    flows = await world.reconciler._switch.read_flow_counters(CookieKind.QUARANTINE)
    return len(flows) == 3 * len(world.reconciler.policies.quarantined)


async def test_a_vm_shut_off_while_policies_change_stays_shut_off(
    world: World, sent: list[str]
) -> None:
    async def shut_off() -> None:
        await world.reconciler.shut_off(SHUT)

    await world.reconciler.apply(OTHER, record=shut_off)
    assert len(sent) >= 3, "from it, to it, and what was in a lane"
    assert all(line.startswith("flow add") for line in sent)
    assert world.reconciler.policies.quarantined == SHUT
    assert await has_settled(world)


async def test_a_vm_that_is_shut_off_stays_so_when_policies_change(
    world: World, sent: list[str]
) -> None:
    await world.reconciler.shut_off(SHUT)
    await world.reconciler.apply(OTHER)
    await wait_until(lambda: has_settled(world))
    sent.clear()
    await world.reconciler.apply(world.policies)  # what stands is known: nothing is read before
    await world.reconciler.apply(OTHER)
    assert not [line for line in sent if line.startswith("flow delete")]
    assert world.reconciler.policies.quarantined == SHUT
    assert await has_settled(world)


async def test_a_vm_let_go_while_policies_change_is_not_shut_off_again(
    world: World, sent: list[str]
) -> None:
    async def let_go() -> None:
        sent.clear()
        await world.reconciler.shut_off(frozenset())

    await world.reconciler.shut_off(SHUT)
    await world.reconciler.apply(OTHER, record=let_go)
    assert len(sent) >= 3
    assert all(line.startswith("flow delete") for line in sent)
    await wait_until(lambda: has_settled(world))


async def test_neither_is_undone_by_changes_that_come_close(world: World, sent: list[str]) -> None:
    for number in range(12):
        shut = number % 2 == 0
        sent.clear()
        policies = OTHER if shut else world.policies
        applying = asyncio.create_task(world.reconciler.apply(policies))
        await asyncio.sleep(0.002 * number)
        await world.reconciler.shut_off(SHUT if shut else frozenset())
        sent_so_far = len(sent)
        await applying
        await wait_until(lambda: has_settled(world))
        undoing = "flow delete" if shut else "flow add"
        assert not [line for line in sent[sent_so_far:] if line.startswith(undoing)], number
