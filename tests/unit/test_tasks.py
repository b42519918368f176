"""Tasks that are told to end while what they wait for comes: they end."""

from __future__ import annotations

import asyncio

import pytest

from steering.tasks import cancel_all, wait_at_most


async def test_a_loop_ends_that_is_cancelled_just_as_it_is_woken() -> None:
    event = asyncio.Event()

    async def run() -> None:
        while True:
            try:
                await wait_at_most(event.wait(), 60)
            except TimeoutError:
                continue
            event.clear()

    loop = asyncio.create_task(run())
    for _ in range(5):
        await asyncio.sleep(0)
    event.set()
    await asyncio.sleep(0)  # the waiter has what it waited for, the loop was not told yet
    await asyncio.wait_for(cancel_all([loop]), 10)
    assert loop.cancelled()


async def test_what_takes_too_long_is_broken_off() -> None:
    waiting = asyncio.create_task(asyncio.Event().wait())
    with pytest.raises(TimeoutError):
        await wait_at_most(waiting, 0.01)
    assert waiting.cancelled()
    assert await wait_at_most(asyncio.sleep(0, "done"), 5) == "done"
