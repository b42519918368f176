"""What the store gives up, and when: whole partitions, oldest first, and told as events.

By age: a partition goes when its youngest alert is older than `keepDays`, but not before every exporter
has delivered it. By size: when all partitions together are larger than `keepBytes` the oldest goes,
delivered or not; what an exporter had not delivered is counted and told as `retention.lost`. The disk is
finite; silence is not an option.

Alerts in the table of before, flow records and who held an address go by age in small slices, since
their tables are one with others': a slice takes some milliseconds of the writer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import structlog
from sqlite_utils import Database

from appliance.alerts.history import find_rows, load_cursor, record_event, record_repeated
from appliance.alerts.losses import count_lost
from appliance.alerts.partition import Partition, read_size
from appliance.alerts.store import Store, StoreError

log = structlog.get_logger("retention")

LOOK_SECONDS = 60.0
SLICE_ROWS = 2_000
DAY = 86_400.0
_ROW_BYTES = 1_000
"""Of the table of before: an alert's short columns, and its entries in the indexes."""


@dataclass(frozen=True, slots=True)
class Keep:
    """``days`` of alerts, flow records and holdings; at most ``bytes`` of alerts; so many records."""

    days: float = 90.0
    bytes: int = 20 * 2**30
    flow_records: int = 5_000_000


@dataclass(frozen=True, slots=True)
class Held:
    """A partition and what it takes on disk."""

    partition: Partition
    bytes: int


@dataclass(frozen=True, slots=True)
class Drop:
    """``lost``: by exporter, how many of the alerts it had not delivered."""

    partition: Partition
    bytes: int
    reason: str
    lost: Mapping[str, int]


def choose_drops(
    held: Sequence[Held], keep: Keep, cursors: Mapping[str, int], now: float
) -> tuple[Drop, ...]:
    """Which partitions go, oldest first. ``held`` is oldest first, too; the last is written to.

    ``cursors``: the last id that each exporter delivered. Only the oldest go, so that what is left has
    no gap. Pure.
    """
    drops: list[Drop] = []
    left = sum(one.bytes for one in held)
    for one in held[:-1]:
        part = one.partition
        lost = count_lost(part.base, part.base + (part.alerts or 0), cursors)
        if left > keep.bytes:
            reason = f"the alerts took {left} bytes and may take {keep.bytes} (keepBytes)"
        elif part.ended is not None and now - part.ended > keep.days * DAY and not lost:
            reason = f"its alerts are older than {keep.days:g} days (keepDays)"
        else:
            break
        drops.append(Drop(part, one.bytes, reason, lost))
        left -= one.bytes
    return tuple(drops)


def record_drop(db: Database, drop: Drop, at: float) -> None:
    """Tell it as events: what went, and what an exporter had not delivered of it."""
    part = drop.partition
    first, last = part.base + 1, part.base + (part.alerts or 0)
    when = "" if part.ended is None else f", stored until {_render_minute(part.ended)}"
    record_event(
        db,
        at,
        "retention.removed",
        "info",
        f"alerts {first} to {last}{when} were removed: {drop.reason}",
        subject=part.name,
        detail={"first": first, "last": last, "alerts": last - first + 1, "bytes": drop.bytes},
        ended_at=at,
    )
    record_lost(db, drop.lost, drop.reason, at)


def record_lost(db: Database, lost: Mapping[str, int], reason: str, at: float) -> None:
    for name, count in lost.items():
        record_repeated(
            db,
            at,
            "retention.lost",
            "error",
            f"alerts were removed that exporter {name} had not delivered: {reason}",
            subject=name,
            count=count,
        )


@dataclass(frozen=True, slots=True)
class RetentionStatus:
    """``bytes``: of all partitions. Counts are since the start of the process."""

    partitions: int = 0
    bytes: int = 0
    removed_alerts: int = 0
    lost_alerts: int = 0
    fault: str = ""


class Retention:
    """``exporters`` are the names of those that are set up. Run it as one task: `run`."""

    def __init__(
        self,
        store: Store,
        keep: Keep,
        exporters: Sequence[str],
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._keep = keep
        self._exporters = tuple(exporters)
        self._clock = clock
        self._status = RetentionStatus()

    def status(self) -> RetentionStatus:
        return self._status

    async def run(self) -> None:
        while True:
            fault = ""
            try:
                await self.look()
            except (StoreError, OSError) as failure:
                fault = str(failure)
                if self._status.fault != fault:
                    log.error("retention failed", fault=fault)
            self._change(fault=fault)
            await asyncio.sleep(LOOK_SECONDS)

    async def look(self) -> None:
        """Remove what is due. Raises StoreError or OSError."""
        now = self._clock()
        await self._store.note_missing()
        names = self._exporters
        cursors = await self._store.read(lambda db: {name: load_cursor(db, name) for name in names})
        held = await asyncio.to_thread(self._measure)
        await self._trim_table(held, cursors, now)
        for drop in choose_drops(held, self._keep, cursors, now):
            await self._drop(drop, now)
        self._change(
            partitions=len(self._store.partitions),
            bytes=sum(one.bytes for one in await asyncio.to_thread(self._measure)),
        )
        cutoff = now - self._keep.days * DAY
        for sql, value in (
            ("holdings WHERE until < ?", cutoff),
            ("flow_records WHERE last_seen < ?", cutoff),
            (
                "flow_records WHERE id <= (SELECT max(id) FROM flow_records) - ?",
                self._keep.flow_records,
            ),
            ("flow_counters WHERE until < ?", cutoff),
        ):
            await self._delete(sql, value)

    def _measure(self) -> list[Held]:
        return [Held(one, read_size(one.path)) for one in self._store.partitions]

    async def _drop(self, drop: Drop, now: float) -> None:
        await self._store.drop(drop.partition, lambda db: record_drop(db, drop, now))
        log.info("partition removed", partition=drop.partition.name, reason=drop.reason)
        self._change(
            removed_alerts=self._status.removed_alerts + (drop.partition.alerts or 0),
            lost_alerts=self._status.lost_alerts + sum(drop.lost.values()),
        )

    async def _trim_table(
        self, held: Sequence[Held], cursors: Mapping[str, int], now: float
    ) -> None:
        """The table of before, as if it were the oldest partition; its bytes are an estimate."""
        while True:
            first, last, stored_at, size = await self._store.read(measure_table)
            if not last:
                return
            total = size + sum(one.bytes for one in held)
            too_large = total > self._keep.bytes
            too_old = now - stored_at > self._keep.days * DAY
            lost = count_lost(first - 1, last, cursors)
            if not too_large and (lost or not too_old):
                return
            reason = "keepBytes" if too_large else "keepDays"
            told = f"they were stored before there were partitions, and {reason} is exceeded"

            def remove(db: Database, first: int = first, last: int = last, told: str = told) -> int:
                count = db.execute("DELETE FROM alerts WHERE id <= ?", (last,)).rowcount
                record_repeated(
                    db,
                    now,
                    "retention.removed",
                    "info",
                    f"alerts were removed: {told}",
                    subject="alerts",
                    count=count,
                )
                record_lost(db, count_lost(first - 1, last, cursors), told, now)
                return count

            count = await self._store.write(remove)
            self._change(
                removed_alerts=self._status.removed_alerts + count,
                lost_alerts=self._status.lost_alerts + sum(lost.values()),
            )
            await asyncio.sleep(0)

    async def _delete(self, where: str, value: float) -> None:
        """Slice by slice; between two of them others write."""
        table = where.split(" ", 1)[0]
        sql = (
            f"DELETE FROM {table} WHERE id IN"  # noqa: S608 - the program's own words
            f" (SELECT id FROM {where} LIMIT {SLICE_ROWS})"
        )
        count = SLICE_ROWS
        while count >= SLICE_ROWS:
            count = await self._store.write(lambda db: db.execute(sql, (value,)).rowcount)

    def _change(self, **changes: object) -> None:
        self._status = replace(self._status, **changes)  # type: ignore[arg-type]


def measure_table(db: Database) -> tuple[int, int, float, int]:
    """The next slice of the table of before (first and last id, when the last was stored), and about

    how many bytes all of it takes: its rows are as long as those of the slice. What else is in the
    database is not counted. All 0 when it is empty.
    """
    rows = find_rows(
        db,
        "SELECT min(id) AS first, max(id) AS last, max(stored_at) AS at, avg(bytes) AS bytes,"
        " (SELECT max(id) FROM alerts) AS newest FROM (SELECT id, stored_at,"
        " length(raw) + length(payload) + length(payload_printable) AS bytes"
        " FROM alerts ORDER BY id LIMIT ?)",
        (SLICE_ROWS,),
    )
    row = rows[0]
    if row["last"] is None:
        return 0, 0, 0.0, 0
    count = row["newest"] - row["first"] + 1
    return row["first"], row["last"], row["at"], int(count * (row["bytes"] + _ROW_BYTES))


def _render_minute(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%d %H:%M UTC")
