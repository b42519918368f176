"""Ending asyncio tasks in one place."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable
from typing import TypeVar

T = TypeVar("T")


async def cancel_all(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancel and wait for all; what they raised on the way out is not raised here."""
    running = list(tasks)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


async def wait_at_most(awaited: Awaitable[T], seconds: float) -> T:
    """As `asyncio.wait_for`, which before Python 3.12 swallows a cancellation that comes as its wait ends.

    A loop that was told to end then goes on for ever, and who waits for it, too. Raises TimeoutError.
    """
    async with asyncio.timeout(seconds):
        return await awaited
