"""Commands that are broken off: they end, and whoever waits for them goes on."""

from __future__ import annotations

import asyncio
import time

import pytest

from steering.errors import CommandFailed
from steering.run import run_async

ENDLESS = ["cat", "/dev/zero"]
"""Prints more than is read at a time: the pipe is full, and the reader pauses, whenever it is broken off."""


async def test_a_command_that_is_cancelled_while_its_output_waits_ends_at_once() -> None:
    asking = asyncio.create_task(run_async(ENDLESS))
    await asyncio.sleep(0.2)
    asking.cancel()
    began = time.monotonic()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(asking, 10)
    assert time.monotonic() - began < 5


async def test_a_command_that_takes_too_long_while_its_output_waits_is_ended() -> None:
    with pytest.raises(CommandFailed):
        await asyncio.wait_for(run_async(ENDLESS, timeout=0.2), 10)


async def test_many_that_are_cancelled_at_any_moment_end() -> None:
    big = ["head", "-c", "1000000", "/dev/zero"]
    for step in range(60):
        asking = asyncio.create_task(run_async(big))
        await asyncio.sleep(step * 0.0005)
        asking.cancel()
        _, left = await asyncio.wait([asking], timeout=10)
        assert not left, f"cancelled after {step * 0.5} ms it does not end"
