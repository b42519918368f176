"""Waiting in tests for what another task, thread or process brings about."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable


async def wait_until(condition: Callable[[], object], seconds: float = 5.0) -> None:
    """Return once ``condition()`` (which may be a coroutine function) is true. TimeoutError else."""
    async with asyncio.timeout(seconds):
        while True:
            answer = condition()
            if isinstance(answer, Awaitable):
                answer = await answer
            if answer:
                return
            await asyncio.sleep(0.01)
