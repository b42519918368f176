"""What failure policies let through or held back: every change of a lane's state as one event with counts.

The switch fails over by itself and counts what it does (group buckets); this watch reads the counts and
gives them to the event of the failure that they belong to. What grew while no failure was known, as in a
flap too short to be told, or while this service was down, gets an event of its own. The counts last
read are kept in the transaction of the event that they went into, so a kill loses and doubles none.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import structlog
from sqlite_utils import Database

from appliance.alerts.history import (
    end_event,
    find_open_events,
    find_rows,
    record_event,
    update_event,
)
from appliance.alerts.store import Store, StoreError
from steering.accounting import Meter, parse_meter, read_growth, render_meter
from steering.counters import Counters
from steering.errors import HairpinError
from steering.events import LaneChanged
from steering.tasks import wait_at_most

log = structlog.get_logger("failures")

DOWN = "lane.down"
BYPASSED = "lane.bypassed"
METER = "switch"
WATCH_SECONDS = 5.0
FAILING_SECONDS = 0.5
SETTLE_SECONDS = 2.5
"""After a lane is back its last counts still come: the userspace datapath tells them a second late."""


@dataclass(frozen=True, slots=True)
class Uninspected:
    """``packets`` and ``bytes`` passed uninspected (`open`), ``blocked`` packets were held back (`closed`)."""

    packets: int = 0
    bytes: int = 0
    blocked: int = 0

    def __add__(self, other: Uninspected) -> Uninspected:
        return Uninspected(
            self.packets + other.packets, self.bytes + other.bytes, self.blocked + other.blocked
        )

    @property
    def any(self) -> bool:
        return bool(self.packets or self.bytes or self.blocked)


@dataclass(frozen=True, slots=True)
class Concerned:
    """Whom a lane's failure concerns: names of policies by failure mode, and of VMs; sorted."""

    open: tuple[str, ...] = ()
    closed: tuple[str, ...] = ()
    vms: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Failure:
    """A failure that goes on, or ended less than `SETTLE_SECONDS` ago (``ended``)."""

    event: int
    began: float
    concerned: Concerned
    counted: Uninspected = Uninspected()
    ended: float | None = None
    settles: float = 0.0


def find_uninspected(growth: Counters) -> dict[str, Uninspected]:
    """By lane, from what the counters grew."""
    return {
        name: Uninspected(lane.bypassed.packets, lane.bypassed.bytes, lane.blocked.packets)
        for name, lane in growth.lanes.items()
    }


def render_failure(lane: str, concerned: Concerned, counted: Uninspected, *, over: bool) -> str:
    """The event's sentence."""
    text = f"lane {lane} {'was' if over else 'is'} down: its policies fail as onFailure says"
    if counted.packets:
        text += f"; {counted.packets} packets ({counted.bytes} bytes) passed uninspected"
    elif concerned.open:
        text += "; nothing passed uninspected"
    if counted.blocked:
        text += f"; {counted.blocked} were held back"
    return text


def build_detail(lane: str, concerned: Concerned, counted: Uninspected) -> dict[str, Any]:
    return {
        "lane": lane,
        "packets": counted.packets,
        "bytes": counted.bytes,
        "blockedPackets": counted.blocked,
        "policies": {"open": list(concerned.open), "closed": list(concerned.closed)},
        "vms": list(concerned.vms),
    }


class FailureWatch:
    """``find_concerned`` names whom a lane serves; run it as one task: `run`."""

    def __init__(
        self,
        store: Store,
        read_counters: Callable[[], Awaitable[Counters]],
        find_concerned: Callable[[str], Concerned],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._read_counters = read_counters
        self._find_concerned = find_concerned
        self._clock = clock
        self._failures: dict[str, Failure] = {}
        self._meter = Meter()
        self._kept = False
        self._last_at: float | None = None
        self._wake = asyncio.Event()
        self._ready = asyncio.Event()
        self.total: dict[str, Uninspected] = {}

    @property
    def down(self) -> Mapping[str, float]:
        """Lanes that are down, and since when."""
        return {lane: one.began for lane, one in self._failures.items() if one.ended is None}

    async def take(self, event: LaneChanged) -> None:
        """A lane went down or came back. Raises StoreError; then tell it again."""
        await self._ready.wait()
        failure = self._failures.get(event.lane)
        if event.forwarding:
            if failure is not None and failure.ended is None:
                settles = time.monotonic() + SETTLE_SECONDS
                self._failures[event.lane] = replace(failure, ended=event.at, settles=settles)
        elif failure is not None:
            # Down again before the counts of the last time were in: one failure that goes on.
            self._failures[event.lane] = replace(failure, ended=None)
        else:
            await self._begin(event)
        self._wake.set()

    async def _begin(self, event: LaneChanged) -> None:
        lane, concerned = event.lane, self._find_concerned(event.lane)
        none = Uninspected()
        text = render_failure(lane, concerned, none, over=False)
        detail = build_detail(lane, concerned, none)
        number = await self._store.write(
            lambda db: record_event(
                db, event.at, DOWN, "error", text, subject=f"lane {lane}", detail=detail
            )
        )
        self._failures[lane] = Failure(number, event.at, concerned)

    async def run(self) -> None:
        await self._load()
        self._ready.set()
        while True:
            try:
                await self._look()
            except StoreError as fault:
                log.error("counts of a failure not stored", reason=fault.reason)
            except HairpinError as fault:
                log.debug("counters not read", reason=fault.reason)
            self._wake.clear()
            try:
                pause = FAILING_SECONDS if self._failures else WATCH_SECONDS
                await wait_at_most(self._wake.wait(), pause)
            except TimeoutError:
                pass

    async def _load(self) -> None:
        """What a service before this one counted last, and the failures it left open."""

        def load(db: Database) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
            return (
                find_rows(db, "SELECT * FROM meters WHERE name = ?", (METER,)),
                find_open_events(db, DOWN),
            )

        meters, events = await self._store.read(load)
        for row in meters:
            self._last_at = row["at"]
            try:
                self._meter = parse_meter(json.loads(row["value"]))
            except (HairpinError, ValueError) as fault:
                log.error("readings of before are of no use", reason=str(fault))
        self._kept = bool(meters)
        for row in events:
            lane = str(row["subject"]).removeprefix("lane ")
            detail = row["detail"]
            counted = Uninspected(
                detail.get("packets", 0), detail.get("bytes", 0), detail.get("blockedPackets", 0)
            )
            concerned = self._find_concerned(lane)
            self._failures[lane] = Failure(int(row["id"]), row["at"], concerned, counted)

    async def _look(self) -> None:
        """Read the counts, and give what grew to the failures that it belongs to."""
        counters = await self._read_counters()
        now = self._clock()
        growth, meter = read_growth(self._meter, counters)
        grown = find_uninspected(growth)
        failures = dict(self._failures)
        settled = {
            lane
            for lane, one in failures.items()
            if one.ended is not None and time.monotonic() >= one.settles
        }
        if settled or not self._kept or any(one.any for one in grown.values()):
            await self._store.write(
                partial(
                    self._commit,
                    grown=grown,
                    failures=failures,
                    settled=settled,
                    meter=meter,
                    now=now,
                )
            )
            self._kept = True
        self._meter, self._last_at = meter, now
        for lane, counted in grown.items():
            self.total[lane] = self.total.get(lane, Uninspected()) + counted
            if lane not in failures:
                continue
            # Taken anew: `take` may have changed it while the store wrote.
            present = self._failures[lane]
            if lane in settled and present.ended is not None:
                del self._failures[lane]
            else:
                self._failures[lane] = replace(present, counted=failures[lane].counted + counted)

    def _commit(
        self,
        db: Database,
        grown: Mapping[str, Uninspected],
        failures: Mapping[str, Failure],
        settled: Collection[str],
        meter: Meter,
        now: float,
    ) -> None:
        """In one transaction with the readings, so that nothing is told twice."""
        for lane, counted in grown.items():
            failure = failures.get(lane)
            if failure is not None:
                self._update(db, lane, failure, failure.counted + counted)
                if lane in settled and failure.ended is not None:
                    end_event(db, failure.event, failure.ended)
            elif counted.any:
                self._record_moment(db, lane, counted, now)
        db.execute(
            "INSERT INTO meters (name, at, value) VALUES (?, ?, ?)"
            " ON CONFLICT (name) DO UPDATE SET at = excluded.at, value = excluded.value",
            (METER, now, json.dumps(render_meter(meter))),
        )

    def _update(self, db: Database, lane: str, failure: Failure, counted: Uninspected) -> None:
        text = render_failure(lane, failure.concerned, counted, over=failure.ended is not None)
        update_event(db, failure.event, text, build_detail(lane, failure.concerned, counted))

    def _record_moment(self, db: Database, lane: str, counted: Uninspected, now: float) -> None:
        """No failure was known: a flap too short to be told, or this service was down meanwhile."""
        text = (
            f"lane {lane} was down for a moment: {counted.packets} packets ({counted.bytes} bytes)"
            f" passed uninspected, {counted.blocked} were held back"
        )
        record_event(
            db,
            self._last_at if self._last_at is not None else now,
            BYPASSED,
            "error" if counted.packets else "warning",
            text,
            subject=f"lane {lane}",
            detail=build_detail(lane, self._find_concerned(lane), counted),
            ended_at=now,
        )
