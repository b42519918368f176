"""Watches a lane that is down for its engine's return, and has the switch look at its path anew.

Without it BFD finds the path whole after one to two seconds; the lane would stay closed, or open and
uninspected, for that long. An engine has returned when it answers its command socket after a silence,
or when another engine answers, which `hairpin inspect` says has its rules. The same is done when the
link of a leg comes back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from appliance.inspection.publish import InspectionState
from appliance.inspection.socket import EngineRefused, EngineSilent, EngineSocket
from steering.errors import HairpinError
from steering.model import Lane

log = structlog.get_logger("revive")

LOOK_SECONDS = 0.1
ANSWER_SECONDS = 0.15
AGAIN_SECONDS = (0.4, 30.0)
"""How long after a revival that brought nothing the next one is tried, and at most."""
QUICK_TRIES = 2
"""So many are tried before the pauses grow. While sessions are off the switch takes the path for whole, so

each try costs *open* some packets, and lets the switch's counts of a failure go astray.
"""


@dataclass(frozen=True, slots=True)
class Sight:
    """A lane's engine at one moment: which one, and whether it answered. ``engine`` None: none runs."""

    engine: tuple[int | None, float | None] | None
    answered: bool


@dataclass(frozen=True, slots=True)
class Tried:
    """What was tried while the lane is down: for which engine, when (monotonic), and how long to wait."""

    engine: tuple[int | None, float | None] | None = None
    at: float = 0.0
    wait: float = 0.0
    times: int = 0


def find_due(before: Sight, now: Sight, tried: Tried, at: float) -> bool:
    """Whether the engine has just returned, or the last revival for it came to nothing."""
    if now.engine is None or not now.answered:
        return False
    returned = not before.answered or before.engine != now.engine
    return returned or tried.engine != now.engine or at - tried.at >= tried.wait


def note_tried(tried: Tried, now: Sight, at: float) -> Tried:
    """After the quick tries the pause doubles with each revival of one engine."""
    least, most = AGAIN_SECONDS
    times = 1 if tried.engine != now.engine else tried.times + 1
    wait = least if times <= QUICK_TRIES else min(most, tried.wait * 2)
    return Tried(now.engine, at, wait, times)


class ReviveWatch:
    """``revive`` has the switch look anew; run it as one task: `run`."""

    def __init__(
        self,
        lanes: Sequence[Lane],
        find_socket: Callable[[Lane], Path],
        is_down: Callable[[Lane], bool],
        has_links: Callable[[Lane], bool],
        read_inspection: Callable[[], InspectionState | None],
        revive: Callable[[Lane], Awaitable[None]],
    ) -> None:
        self._lanes = tuple(lanes)
        self._find_socket = find_socket
        self._is_down = is_down
        self._has_links = has_links
        self._read_inspection = read_inspection
        self._revive = revive

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for lane in self._lanes:
                group.create_task(self._watch(lane), name=f"revive {lane.name}")

    async def _watch(self, lane: Lane) -> None:
        before, tried = Sight(None, False), Tried()
        while True:
            if not self._is_down(lane) or not self._has_links(lane):
                # It answers while frames pass: only a silence from now on is one. And a link's return
                # counts as an engine's: before it nothing can be revived.
                before, tried = Sight(None, False), Tried()
            else:
                now = await self._look(lane)
                at = time.monotonic()
                if find_due(before, now, tried, at):
                    tried = note_tried(tried, now, at)
                    try:
                        await self._revive(lane)
                    except HairpinError as fault:
                        log.warning("lane not revived", lane=lane.name, reason=fault.reason)
                    else:
                        took = round(time.monotonic() - at, 3)
                        log.info("lane revived", lane=lane.name, engine=now.engine, seconds=took)
                    await asyncio.sleep(0.2)  # until OVSDB tells of it
                before = now
            await asyncio.sleep(LOOK_SECONDS)

    async def _look(self, lane: Lane) -> Sight:
        state = self._read_inspection()
        found = (
            next((one for one in state.lanes if one.number == lane.number), None) if state else None
        )
        if found is None or not found.inspecting:
            return Sight(None, False)
        try:
            await EngineSocket(self._find_socket(lane), limit=ANSWER_SECONDS).read_uptime()
        except (EngineSilent, EngineRefused):
            return Sight((found.pid, found.started), False)
        return Sight((found.pid, found.started), True)
