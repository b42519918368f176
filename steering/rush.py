"""A change goes first: what may be done later makes way while one is on its way to the switch."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, TypeVar

from steering.tasks import wait_at_most

T = TypeVar("T")

MOST_SECONDS = 5.0
"""For so long at most anybody makes way at a time: changes without an end must not stop what proves them."""


class GaveWay(Exception):
    """Work was broken off for a change; it is to be begun anew."""


class Rush:
    """Claimed by changes on the event loop; asked by everything else, also from threads."""

    def __init__(self) -> None:
        self._claims = 0
        self._free = threading.Event()
        self._free.set()
        self._waiting: set[asyncio.Event] = set()
        self._working: set[asyncio.Task[Any]] = set()

    @property
    def is_claimed(self) -> bool:
        return not self._free.is_set()

    @contextlib.contextmanager
    def claim(self) -> Iterator[None]:
        """While a change waits or is sent. Work under `give_way` is broken off."""
        self._claims += 1
        self._free.clear()
        for task in self._working:
            task.cancel()
        try:
            yield
        finally:
            self._claims -= 1
            if not self._claims:
                self._free.set()
                for waiting in self._waiting:
                    waiting.set()

    def wait_free(self) -> None:
        """In a thread: until no change waits, or MOST_SECONDS."""
        self._free.wait(MOST_SECONDS)

    async def wait_free_async(self) -> None:
        """On the event loop: as `wait_free`."""
        if not self.is_claimed:
            return
        event = asyncio.Event()
        self._waiting.add(event)
        try:
            with contextlib.suppress(TimeoutError):
                await wait_at_most(event.wait(), MOST_SECONDS)
        finally:
            self._waiting.discard(event)

    async def give_way(self, work: Callable[[], Awaitable[T]]) -> T:
        """What ``work`` returns. It only reads: it is cancelled once a change comes, and GaveWay raised."""

        async def run() -> T:
            return await work()

        if self.is_claimed:
            raise GaveWay
        task: asyncio.Task[T] = asyncio.create_task(run())
        self._working.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if current is not None and current.cancelling():
                task.cancel()
                raise
            raise GaveWay from None
        finally:
            self._working.discard(task)
