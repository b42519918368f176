"""Watches the disks that events are written to: an engine whose disk is full loses them without a word."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import structlog

from appliance.alerts.history import end_event, find_open_events, record_event
from appliance.alerts.store import Store, StoreError

log = structlog.get_logger("disk")

LOOK_SECONDS = 1.0
EVENT = "disk.full"
LOW_SHARE = 0.05
FULL_BYTES = 256 * 2**10
"""Less than one batch of events needs; what is written then may be torn."""


@dataclass(frozen=True, slots=True)
class Space:
    """Of one disk, in bytes, as a process without privilege may use it."""

    free: int
    total: int


@dataclass(frozen=True, slots=True)
class DiskState:
    """``full``: events are being lost, or soon will be. ``since`` is in seconds since the epoch."""

    what: str
    full: bool
    reason: str
    since: float


def judge_space(what: str, place: str, space: Space | None) -> tuple[bool, str]:
    """Whether it is full, and a sentence when it is full or low; "" while there is room."""
    if space is None:
        return True, f"{what} at {place} can't be reached"
    left = f"{space.free // 2**10} KiB of {space.total // 2**10} KiB left at {place}"
    if space.free < FULL_BYTES:
        return True, f"the disk of {what} is full ({left}): events are lost"
    if space.free < LOW_SHARE * space.total:
        return False, f"the disk of {what} is nearly full ({left})"
    return False, ""


def read_space(path: Path) -> Space | None:
    """Of the disk that ``path`` is on, or will be on when it is made. None: it does not answer."""
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        found = os.statvfs(path)
    except OSError:
        return None
    return Space(found.f_bavail * found.f_frsize, found.f_blocks * found.f_frsize)


class DiskWatch:
    """``places`` by what is written there. Run it as one task: `run`."""

    def __init__(
        self,
        places: Mapping[str, Path],
        store: Store,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._places = dict(places)
        self._store = store
        self._clock = clock
        self._events: dict[str, int] = {}
        self._states: dict[str, DiskState] = {}

    @property
    def states(self) -> tuple[DiskState, ...]:
        """Disks that are full or nearly so."""
        return tuple(self._states.values())

    async def run(self) -> None:
        rows = await self._store.read(lambda db: find_open_events(db, EVENT))
        self._events = {str(row["subject"]): int(row["id"]) for row in rows}
        while True:
            for what, path in self._places.items():
                space = await asyncio.to_thread(read_space, path)
                await self._take(what, *judge_space(what, str(path), space))
            await asyncio.sleep(LOOK_SECONDS)

    async def _take(self, what: str, full: bool, reason: str) -> None:
        now, before = self._clock(), self._states.get(what)
        if reason:
            since = before.since if before is not None and before.full is full else now
            self._states[what] = DiskState(what, full, reason, since)
        else:
            self._states.pop(what, None)
        try:
            if full and what not in self._events:
                self._events[what] = await self._store.write(
                    lambda db: record_event(db, now, EVENT, "error", reason, subject=what)
                )
            elif not full and what in self._events:
                event = self._events.pop(what)
                await self._store.write(lambda db: end_event(db, event, now))
        except StoreError as fault:
            # Its own disk may be the one that is full; health tells of it from memory meanwhile.
            log.error("full disk not stored", what=what, reason=fault.reason)
