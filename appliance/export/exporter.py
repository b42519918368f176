"""Every stored alert to one SIEM, at least once, in the order of the alerts' ids.

How far it got is a cursor in the database. A cursor moves over an alert only when

1. the receiver's kernel acknowledged every byte of it (`transport`), and
2. the connection then stayed open for `SETTLE_SECONDS`.

The second, because a receiver that stops closes its sockets with bytes in them that it never read:
TCP had acknowledged those. It shows as a close or a reset shortly after, and then everything since
the cursor is sent again. So the receiver may see an alert twice (`hairpin.id` tells); it misses one
only if it takes an alert's bytes, leaves them unread or unwritten for longer than that, and then
dies. Nothing that speaks plain syslog can close that gap.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from enum import StrEnum

import structlog
from sqlite_utils import Database

from appliance.alerts.history import load_cursor, record_cursor, record_event
from appliance.alerts.model import Alert
from appliance.alerts.query import AlertFilter, find_alerts, find_latest_alert_id
from appliance.alerts.salvage import Unreadable, salvage_alerts
from appliance.alerts.store import Store, StoreError
from appliance.export.format import frame_message, render_message
from appliance.export.transport import Connection, Receiver, TransportError, open_connection
from appliance.settings import SyslogExport

log = structlog.get_logger("export")

SETTLE_SECONDS = 2.0
BATCH_ALERTS = 200
WINDOW_ALERTS = 20_000
ACKNOWLEDGE_SECONDS = 30.0
_BACKOFF_SECONDS = (0.5, 30.0)
_RANDOM = random.SystemRandom()


class State(StrEnum):
    STOPPED = "stopped"
    CONNECTING = "connecting"
    CONNECTED = "connected"
    WAITING = "waiting"


@dataclass(frozen=True, slots=True)
class ExporterStatus:
    """Health of an exporter. ``waiting`` is the pause before the next attempt to connect.

    ``last_sent_id`` was handed to the receiver, ``delivered_id`` is the cursor; ``backlog`` is the
    alerts stored and not yet delivered; ``sent`` counts since the start, repetitions included.
    ``skipped``, since the start: alerts that a damaged piece of the store kept from the receiver.
    """

    name: str
    receiver: str
    state: State = State.STOPPED
    backlog: int = 0
    last_sent_id: int = 0
    delivered_id: int = 0
    sent: int = 0
    repeated: int = 0
    skipped: int = 0
    connected_since: float | None = None
    last_error: str = ""
    last_error_at: float | None = None


@dataclass(frozen=True, slots=True)
class _Flight:
    """Alerts up to ``last_id`` were acknowledged at ``at`` (monotonic clock), but those ``lost``."""

    last_id: int
    at: float
    lost: tuple[Unreadable, ...] = ()


@dataclass(frozen=True, slots=True)
class _Next:
    """What is to be sent next. ``last_id``: where to go on; ``more``: at once."""

    alerts: tuple[Alert, ...]
    last_id: int
    more: bool
    lost: tuple[Unreadable, ...] = ()


class Exporter:
    """Exports to one receiver until cancelled; run it as one task: `run`.

    ``hostname`` is the appliance's name (`Settings.name`); ``wait_newer`` returns once an alert
    with an id above the one given is stored (`Ingest.wait_newer`).
    """

    def __init__(
        self,
        settings: SyslogExport,
        store: Store,
        hostname: str,
        wait_newer: Callable[[int], Awaitable[object]],
        *,
        clock: Callable[[], float] = time.time,
        settle_seconds: float = SETTLE_SECONDS,
        backoff_seconds: tuple[float, float] = _BACKOFF_SECONDS,
    ) -> None:
        self._name = settings.name
        self._receiver = build_receiver(settings)
        self._store = store
        self._hostname = hostname
        self._wait_newer = wait_newer
        self._clock = clock
        self._settle = settle_seconds
        self._backoff = backoff_seconds
        self._latest = 0
        self._status = ExporterStatus(settings.name, str(self._receiver))

    def status(self) -> ExporterStatus:
        backlog = max(self._latest - self._status.delivered_id, 0)
        return replace(self._status, backlog=backlog)

    async def run(self) -> None:
        failures = 0
        try:
            while True:
                delivered = self._status.delivered_id
                try:
                    await self._run_connection()
                except (TransportError, StoreError) as fault:
                    self._note_failure(fault)
                failures = 1 if self._status.delivered_id > delivered else failures + 1
                self._change(state=State.WAITING, connected_since=None)
                await asyncio.sleep(find_delay(failures, _RANDOM.random(), self._backoff))
        finally:
            self._change(state=State.STOPPED, connected_since=None)

    async def _run_connection(self) -> None:
        self._latest = await find_latest_alert_id(self._store)
        cursor = await self._store.read(lambda db: load_cursor(db, self._name))
        self._change(state=State.CONNECTING, delivered_id=cursor)
        connection = await open_connection(self._receiver)
        self._change(state=State.CONNECTED, connected_since=self._clock())
        log.info("exporter connected", exporter=self._name, receiver=str(self._receiver))
        newer: asyncio.Task[object] | None = None
        try:
            position = cursor
            flights: deque[_Flight] = deque()
            pause = max(min(self._settle / 4, 0.5), 0.05)
            while True:
                connection.check_open()
                full = position - self._status.delivered_id >= WINDOW_ALERTS
                more = False
                if not full:
                    position, more = await self._send_batch(connection, position, flights)
                await self._settle_flights(connection, flights)
                if full:
                    await asyncio.sleep(pause)
                if full or more:
                    continue
                if newer is None:
                    newer = asyncio.ensure_future(self._wait_newer(position))
                # A short pause even when idle: the receiver's closing is looked for in between.
                await asyncio.wait({newer}, timeout=pause)
                if newer.done():
                    newer.result()
                    newer = None
        finally:
            if newer is not None:
                newer.cancel()
            await connection.close()

    async def _send_batch(
        self, connection: Connection, position: int, flights: deque[_Flight]
    ) -> tuple[int, bool]:
        """Send what follows ``position``: the new position, and whether there is more at once."""
        page = await self._read_next(position)
        if page.last_id == position:
            return position, False
        data = b"".join(
            frame_message(render_message(alert, self._hostname)) for alert in page.alerts
        )
        repeated = sum(alert.id <= self._status.last_sent_id for alert in page.alerts)
        # Counted before: what fails on its way may have arrived all the same.
        self._latest = max(self._latest, page.last_id)
        self._change(
            last_sent_id=max(self._status.last_sent_id, page.last_id),
            sent=self._status.sent + len(page.alerts),
            repeated=self._status.repeated + repeated,
        )
        if data:
            await connection.send(data, ACKNOWLEDGE_SECONDS)
        flights.append(_Flight(page.last_id, time.monotonic(), page.lost))
        return page.last_id, page.more

    async def _read_next(self, position: int) -> _Next:
        """Around what is damaged, where anything is: the rest must not wait for its mending."""
        try:
            page = await find_alerts(
                self._store, AlertFilter(), str(position), limit=BATCH_ALERTS, ascending=True
            )
        except StoreError as fault:
            if not fault.damaged:
                raise
            found = await salvage_alerts(self._store, position, BATCH_ALERTS)
            if found.last == position:
                raise  # it is the youngest partition
            return _Next(found.alerts, found.last, True, found.lost)
        last_id = page.items[-1].id if page.items else position
        return _Next(page.items, last_id, page.next_cursor is not None)

    async def _settle_flights(self, connection: Connection, flights: deque[_Flight]) -> None:
        """Move the cursor over what was acknowledged long enough ago."""
        now = time.monotonic()
        done = [one for one in flights if now - one.at >= self._settle]
        if not done:
            return
        for _ in done:
            flights.popleft()
        connection.check_open()
        at, settled = self._clock(), done[-1].last_id
        lost = [one for flight in done for one in flight.lost]

        def write(db: Database) -> None:
            # In one transaction: each loss is told once, whatever is sent again.
            record_cursor(db, self._name, settled, at)
            for one in lost:
                record_skipped(db, one, self._name, at)

        await self._store.write(write)
        skipped = sum(one.count for one in lost)
        self._change(delivered_id=settled, skipped=self._status.skipped + skipped)

    def _note_failure(self, fault: TransportError | StoreError) -> None:
        if self._status.last_error != str(fault):
            log.warning("export interrupted", exporter=self._name, fault=str(fault))
        self._change(last_error=str(fault), last_error_at=self._clock())

    def _change(self, **changes: object) -> None:
        self._status = replace(self._status, **changes)  # type: ignore[arg-type]


def record_skipped(db: Database, lost: Unreadable, exporter: str, at: float) -> None:
    """Tell that an exporter went on without these alerts."""
    text = (
        f"exporter {exporter} can't deliver alerts {lost.first} to {lost.last}, and went on: "
        f"{lost.path} is damaged: {lost.reason}; restore it from a backup"
    )
    detail = {"first": lost.first, "last": lost.last, "path": lost.path}
    record_event(db, at, "export.skipped", "error", text, subject=exporter, detail=detail)


def build_receiver(settings: SyslogExport) -> Receiver:
    return Receiver(
        host=settings.host,
        port=settings.port,
        tls=settings.transport == "tls",
        ca_file=settings.ca_file,
        cert_file=settings.cert_file,
        key_file=settings.key_file,
    )


def find_delay(failures: int, fraction: float, bounds: tuple[float, float]) -> float:
    """Seconds before attempt ``failures`` + 1: doubling between ``bounds``, half of it jitter.

    ``fraction`` is random, 0 to 1: many appliances must not come back to one receiver at once.
    """
    least, most = bounds
    full = min(least * 2.0 ** min(max(failures - 1, 0), 16), most)
    return full / 2 + full / 2 * fraction
