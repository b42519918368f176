"""Keeps each lane's balance: reads the switch and what `inspect` published, and tells when it stays open."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

import structlog

from appliance.alerts.history import end_event, find_open_events, record_event
from appliance.alerts.store import Store, StoreError
from appliance.assurance.balance import (
    Balance,
    LaneBook,
    build_balance,
    build_engine_sample,
    build_host_sample,
    build_switch_sample,
    record_host,
    record_switch,
    settle_book,
)
from appliance.inspection.publish import InspectionState
from steering.counters import Counters
from steering.errors import HairpinError
from steering.model import Lane

log = structlog.get_logger("balance")

LOOK_SECONDS = 2.0
EVENT = "balance.open"


class BalanceWatch:
    """Run it as one task: `run`. ``balances`` is by lane name, empty before the first two readings."""

    def __init__(
        self,
        lanes: Sequence[Lane],
        store: Store,
        read_counters: Callable[[], Awaitable[Counters]],
        read_inspection: Callable[[], InspectionState | None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._read_counters = read_counters
        self._read_inspection = read_inspection
        self._clock = clock
        self._books = {lane.name: LaneBook(lane.name) for lane in lanes}
        self._events: dict[str, int] = {}
        self.balances: Mapping[str, Balance] = {}

    async def run(self) -> None:
        rows = await self._store.read(lambda db: find_open_events(db, EVENT))
        self._events = {str(row["subject"]): int(row["id"]) for row in rows}
        while True:
            try:
                counters = await self._read_counters()
            except HairpinError as fault:
                log.debug("counters not read", reason=fault.reason)
            else:
                self.take(self._clock(), counters, self._read_inspection())
                await self._tell()
            await asyncio.sleep(LOOK_SECONDS)

    def take(self, at: float, counters: Counters, state: InspectionState | None) -> None:
        """One reading of the switch at ``at`` (epoch), and what `inspect` last published."""
        published = {lane.name: lane.counters for lane in state.lanes} if state else {}
        found = {}
        for name, book in self._books.items():
            book = record_switch(book, build_switch_sample(at, counters, name))
            if (seen := published.get(name)) is not None:
                book = record_host(book, build_host_sample(seen), build_engine_sample(seen))
            self._books[name] = book = settle_book(book, at)
            if (balance := build_balance(book, at)) is not None:
                found[name] = balance
        self.balances = found

    async def _tell(self) -> None:
        """An event for as long as a balance stays open."""
        now = self._clock()
        for name, balance in self.balances.items():
            event = self._events.get(name)
            try:
                if not balance.closes and event is None:
                    text = f"lane {name}: its packets are not accounted for: {balance.reason}"
                    detail = {"unexplained": balance.unexplained, "into": balance.into}
                    since = balance.unclosed_since or now
                    self._events[name] = await self._record(name, since, text, detail)
                elif balance.closes and event is not None:
                    await self._end(event, now)
                    del self._events[name]
            except StoreError as fault:
                log.error("balance not told", lane=name, reason=fault.reason)

    async def _record(self, lane: str, at: float, text: str, detail: Mapping[str, int]) -> int:
        return await self._store.write(
            lambda db: record_event(db, at, EVENT, "error", text, subject=lane, detail=detail)
        )

    async def _end(self, event: int, at: float) -> None:
        await self._store.write(lambda db: end_event(db, event, at))
