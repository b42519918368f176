"""EVE files -> alerts in the youngest partition, one transaction a batch, bookmark included.

What a kill at any moment leaves is the last committed transaction: its alerts and the bookmark
behind them. So nothing is lost and nothing is stored twice. A rotated file is deleted only after
its last line was committed, a younger file of its lane exists, and nothing was written to it for
`GRACE_SECONDS`; the reader alone deletes.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import structlog
from sqlite_utils import Database

from appliance.alerts.attribute import Context, Decide, leave_unattributed
from appliance.alerts.attributor import Attribution, Attributor, shorten
from appliance.alerts.canary import Arrival, find_arrival, record_arrival
from appliance.alerts.history import load_bookmarks, record_repeated
from appliance.alerts.model import Malformed
from appliance.alerts.partitions import AlertWrite
from appliance.alerts.query import find_latest_alert_id
from appliance.alerts.quick import Sighting, parse_line
from appliance.alerts.rows import build_bookmark_row, insert_sql
from appliance.alerts.store import Store, StoreError
from appliance.alerts.tail import (
    Batch,
    Bookmark,
    find_files,
    index_bookmarks,
    is_rotated,
    read_batch,
    remove_rotated,
)
from appliance.alerts.writing import Item, Origin
from steering.model import Lane

log = structlog.get_logger("ingest")

POLL_SECONDS = 0.1
BATCH_LINES = 8192
GRACE_SECONDS = 10.0
_BACKOFF_SECONDS = (0.1, 5.0)
_FINISHED_KEPT = 16
_SHORT = 16
"""Bytes; what is longer is no blank line, or malformed."""

FindContext = Callable[[Lane, float], Context]
"""What was known of a lane's VMs and policies at a time. Called in a thread, once an alert."""


@dataclass(frozen=True, slots=True)
class LaneStatus:
    """How a lane's reading goes. ``behind_bytes`` is what is written and not yet stored;
    ``fault`` is empty while all works; counts are since the start of the process."""

    lane: str
    present: bool = False
    behind_bytes: int = 0
    rotated_files: int = 0
    lines: int = 0
    alerts: int = 0
    malformed: int = 0
    unattributed: int = 0
    stored_at: float | None = None
    fault: str = ""


@dataclass(frozen=True, slots=True)
class Prepared:
    """What a batch comes to: alerts to store, and what was wrong with it.

    ``arrivals`` are by the place of their alert in ``items``: it is one only if no probe of ours has
    sent it.
    """

    items: tuple[Item, ...] = ()
    arrivals: Mapping[int, Arrival] = field(default_factory=dict)
    malformed: tuple[tuple[int, Malformed], ...] = ()
    unattributed: int = 0


@dataclass(slots=True)
class _Tail:
    """One lane's place in its files."""

    lane: Lane
    live: Path
    attributor: Attributor
    bookmarks: dict[tuple[int, int], Bookmark] = field(default_factory=dict)
    next_generation: int = 1
    finished: set[int] = field(default_factory=set)
    """Generations whose file this reader gave up, or was about to: none of it is owed."""
    missing_since: dict[tuple[int, int], float] = field(default_factory=dict)
    status: LaneStatus = LaneStatus("")

    def keep(self, bookmark: Bookmark) -> None:
        """The only one of its generation: of a file whose disk has another number now, too."""
        for identity, one in tuple(self.bookmarks.items()):
            if one.generation == bookmark.generation:
                del self.bookmarks[identity]
                self.missing_since.pop(identity, None)
        self.bookmarks[bookmark.identity] = bookmark
        self.finished.discard(bookmark.generation)

    def finish(self, bookmark: Bookmark) -> None:
        """As `finish_bookmark`: the last finished ones are kept, for their files may come back."""
        self.finished.add(bookmark.generation)
        for identity, one in tuple(self.bookmarks.items()):
            old = one.generation < bookmark.generation - _FINISHED_KEPT
            if old and one.generation in self.finished:
                del self.bookmarks[identity]
        self.finished.intersection_update(one.generation for one in self.bookmarks.values())


class Ingest:
    """Reads every lane's EVE file until cancelled.

    ``lanes`` gives each lane's live file (`Settings.eve_file`). Run it as one task: `run`.
    """

    def __init__(
        self,
        store: Store,
        lanes: Mapping[Lane, Path],
        find_context: FindContext,
        decide: Decide,
        *,
        clock: Callable[[], float] = time.time,
        poll_seconds: float = POLL_SECONDS,
        grace_seconds: float = GRACE_SECONDS,
    ) -> None:
        self._store = store
        self._find_context = find_context
        self._clock = clock
        self._poll = poll_seconds
        self._grace = grace_seconds
        self._tails = [
            _Tail(lane, live, Attributor(decide), status=LaneStatus(lane.name))
            for lane, live in lanes.items()
        ]
        self._stored = asyncio.Condition()
        self._latest = 0

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            for tail in self._tails:
                group.create_task(self._run_lane(tail), name=f"ingest {tail.lane.name}")

    def status(self) -> tuple[LaneStatus, ...]:
        return tuple(tail.status for tail in self._tails)

    async def wait_newer(self, last_id: int) -> int:
        """Return once an alert with an id above ``last_id`` is stored: the newest id."""
        latest = max(self._latest, await find_latest_alert_id(self._store))
        async with self._stored:
            self._latest = max(self._latest, latest)
            await self._stored.wait_for(lambda: self._latest > last_id)
            return self._latest

    async def _run_lane(self, tail: _Tail) -> None:
        delay = 0.0
        loaded = False
        while True:
            try:
                if not loaded:
                    await self._load(tail)
                    loaded = True
                more, fault = await self._step(tail)
                await self._change_fault(tail, fault)
                delay = 0.0 if more else self._poll
            except (StoreError, OSError) as failure:
                # Nothing was committed, so the same lines are read again after the pause.
                if tail.status.fault != str(failure):
                    log.error("ingest failed", lane=tail.lane.name, fault=str(failure))
                tail.status = replace(tail.status, fault=str(failure))
                delay = min(max(delay * 2, _BACKOFF_SECONDS[0]), _BACKOFF_SECONDS[1])
            await asyncio.sleep(delay)

    async def _load(self, tail: _Tail) -> None:
        # By the writer, behind whatever a cancelled run before this one left in its queue.
        rows, bookmarks = await self._store.write_alerts(
            lambda write: load_bookmarks(write.db, tail.lane.name)
        )
        tail.bookmarks = index_bookmarks(bookmarks)
        tail.finished = {int(row["generation"]) for row in rows if row["finished_at"] is not None}
        tail.next_generation = 1 + max((int(row["generation"]) for row in rows), default=0)

    async def _step(self, tail: _Tail) -> tuple[bool, str]:
        """One batch of each file, oldest first: whether there is more to read at once, and a fault.

        A file that can't be read or deleted is a fault, and does not hold up the others.
        """
        files = await asyncio.to_thread(find_files, tail.live)
        more, behind, fault = False, 0, ""
        seen: set[tuple[int, int]] = set()
        for path in files:
            try:
                batch = await asyncio.to_thread(
                    read_batch,
                    path,
                    tail.lane.name,
                    tail.bookmarks,
                    tail.next_generation,
                    BATCH_LINES,
                )
                if batch is None:
                    continue
                seen.add(batch.bookmark.identity)
                await self._store_batch(tail, batch)
                behind += batch.behind
                # A younger file is begun only when the older is read to its end, so that alerts
                # are stored in the order of their files.
                if not batch.at_end:
                    more = True
                    break
                if path != files[-1] and is_rotated(tail.live, path.name):
                    await self._retire(tail, batch)
            except OSError as failure:
                fault = f"{path}: {failure.strerror or failure}"
        if not more and not fault:
            await self._note_vanished(tail, seen)
        tail.status = replace(
            tail.status,
            present=tail.live in files,
            behind_bytes=behind,
            rotated_files=len(files) - (tail.live in files),
        )
        return more, fault

    async def _store_batch(self, tail: _Tail, batch: Batch) -> None:
        known = tail.bookmarks.get(batch.bookmark.identity)
        if known == batch.bookmark:
            return
        if known is not None and known.generation in tail.finished:
            # Its inode was used again: of a file that was given up nothing is owed.
            batch = replace(batch, replaced=False)
        prepared = await asyncio.to_thread(self._prepare, tail, batch)
        now = self._clock()
        canaries: frozenset[int] = frozenset()
        if prepared.arrivals:
            # Before the alerts, and in the other database: recording an arrival again changes nothing.
            canaries = await self._store.write(
                lambda db: find_canaries(db, tail.lane, prepared, now)
            )

        def commit(write: AlertWrite) -> int:
            return commit_batch(write, tail.lane, batch, prepared, canaries, now)

        latest = await self._store.write_alerts(commit)
        tail.keep(batch.bookmark)
        tail.next_generation = max(tail.next_generation, batch.bookmark.generation + 1)
        status = tail.status
        tail.status = replace(
            status,
            lines=status.lines + len(batch.lines),
            alerts=status.alerts + len(prepared.items) - len(canaries),
            malformed=status.malformed + len(prepared.malformed),
            unattributed=status.unattributed + prepared.unattributed,
            stored_at=now if batch.lines else status.stored_at,
        )
        if latest > self._latest:
            async with self._stored:
                self._latest = max(self._latest, latest)
                self._stored.notify_all()

    def _prepare(self, tail: _Tail, batch: Batch) -> Prepared:
        """Parse and attribute; the work of a thread, without I/O of its own."""
        items: list[Item] = []
        malformed: list[tuple[int, Malformed]] = []
        arrivals: dict[int, Arrival] = {}
        unattributed = 0
        for line in batch.lines:
            if len(line.raw) < _SHORT and not line.raw.strip():
                continue
            for event in parse_line(line.raw):
                if isinstance(event, Malformed):
                    malformed.append((line.offset, event))
                    continue
                attribution = self._attribute(tail, event)
                arrival = None if event.event is None else find_arrival(event.event)
                if arrival is not None:
                    arrivals[len(items)] = arrival
                else:
                    unattributed += attribution.policy is None
                items.append((event, attribution))
        return Prepared(tuple(items), arrivals, tuple(malformed), unattributed)

    def _attribute(self, tail: _Tail, alert: Sighting) -> Attribution:
        try:
            return tail.attributor.attribute(alert, self._find_context(tail.lane, alert.at))
        except Exception as fault:
            # An alert is worth more than its attribution: it is stored with what is known of it.
            log.exception("attribution failed", lane=tail.lane.name)
            reason = f"attribution failed: {type(fault).__name__}: {fault}"
            return shorten(leave_unattributed(alert, reason))

    async def _retire(self, tail: _Tail, batch: Batch) -> None:
        """Delete a drained file that nothing is written to any more, and forget it."""
        if self._clock() - batch.changed_at < self._grace:
            return
        bookmark = batch.bookmark
        if bookmark.generation not in tail.finished:
            # Before the file goes: a kill in between must not leave an open bookmark of an inode
            # that is free to be used again.
            now = self._clock()
            await self._store.write_alerts(
                lambda write: finish_lane_file(write, bookmark, batch.path.name, batch.torn, now)
            )
            tail.finish(bookmark)
        size = bookmark.offset + batch.behind
        if not await asyncio.to_thread(remove_rotated, batch.path, tail.live, bookmark, size):
            return
        log.info("EVE file drained and deleted", file=str(batch.path), bytes=bookmark.offset)

    async def _note_vanished(self, tail: _Tail, seen: set[tuple[int, int]]) -> None:
        """Tell of files that someone else removed, and forget them.

        Only after a while: a listing that is taken during a rename may miss a file.
        """
        now = self._clock()
        for identity, bookmark in tuple(tail.bookmarks.items()):
            known = identity in seen or bookmark.generation in tail.finished
            since = None if known else tail.missing_since.get(identity, now)
            if since is None:
                tail.missing_since.pop(identity, None)
                continue
            tail.missing_since[identity] = since
            if now - since < self._grace:
                continue
            await self._store.write_alerts(partial(note_vanished, bookmark=bookmark, now=now))
            tail.finish(bookmark)
            del tail.missing_since[identity]

    async def _change_fault(self, tail: _Tail, fault: str) -> None:
        """The step went through; record a new fault of a single file, or the end of one."""
        before = tail.status.fault
        if before == fault:
            return
        now = self._clock()
        message = (
            f"an EVE file can't be read or deleted: {fault}"
            if fault
            else f"alerts are stored again, none was lost; the fault was: {before}"
        )
        await self._store.write(
            lambda db: record_repeated(
                db,
                now,
                "ingest.fault" if fault else "ingest.recovered",
                "error" if fault else "info",
                message,
                subject=tail.lane.name,
            )
        )
        tail.status = replace(tail.status, fault=fault)


def find_canaries(db: Database, lane: Lane, prepared: Prepared, now: float) -> frozenset[int]:
    """Record the arrivals of our own probes; the places of their alerts."""
    return frozenset(
        place
        for place, arrival in prepared.arrivals.items()
        if record_arrival(db, lane.name, arrival, now)
    )


def commit_batch(
    write: AlertWrite,
    lane: Lane,
    batch: Batch,
    prepared: Prepared,
    canaries: frozenset[int],
    now: float,
) -> int:
    """Store a batch but its ``canaries``, and its bookmark: the newest alert's id, 0 for none."""
    items = prepared.items
    if canaries:
        items = tuple(item for place, item in enumerate(items) if place not in canaries)
    offset = batch.lines[0].offset if batch.lines else batch.bookmark.offset
    write.writer.write(items, Origin(lane, batch.bookmark.generation, offset, now))
    if prepared.malformed:
        place, first = prepared.malformed[0]
        write.note_repeated(
            now,
            "eve.malformed",
            "warning",
            f"EVE lines that are no events: {first.reason}",
            subject=lane.name,
            count=len(prepared.malformed),
            detail={"file": batch.path.name, "offset": place, "excerpt": first.excerpt},
        )
    if batch.replaced:
        write.note_event(
            now,
            "eve.replaced",
            "warning",
            "the EVE file was truncated or replaced; it is read from its start,"
            " and what was not read before is lost",
            subject=lane.name,
            detail={"file": batch.path.name},
        )
        # The one that is superseded would come back at the next start.
        write.db.execute(
            "UPDATE bookmarks SET finished_at = ? WHERE lane = ? AND device = ? AND inode = ?"
            " AND generation < ? AND finished_at IS NULL",
            (
                now,
                lane.name,
                str(batch.bookmark.device),
                str(batch.bookmark.inode),
                batch.bookmark.generation,
            ),
        )
    row = build_bookmark_row(batch.bookmark)
    write.db.execute(insert_sql("bookmarks", row).replace("INSERT", "INSERT OR REPLACE", 1), row)
    return write.base + write.writer.last if items else 0


def note_vanished(write: AlertWrite, bookmark: Bookmark, now: float) -> None:
    """A file is gone that this reader has not deleted; what it held behind the bookmark is lost."""
    write.note_event(
        now,
        "eve.vanished",
        "warning",
        f"an EVE file was removed by someone else after {bookmark.offset} bytes of it were read;"
        " alerts behind them, if there were any, are lost",
        subject=bookmark.lane,
        detail={"generation": bookmark.generation, "offset": bookmark.offset},
    )
    finish_bookmark(write.db, bookmark, now)


def finish_lane_file(
    write: AlertWrite, bookmark: Bookmark, name: str, torn: int, now: float
) -> None:
    """The file is gone; its bookmark no longer counts, and the oldest such are removed."""
    finish_bookmark(write.db, bookmark, now)
    if torn:
        write.note_repeated(now, **build_torn_event(bookmark, name, torn))


def finish_file(db: Database, bookmark: Bookmark, name: str, torn: int, now: float) -> None:
    """As `finish_lane_file`, of a file whose bookmark stands in the main database."""
    finish_bookmark(db, bookmark, now)
    if torn:
        record_repeated(db, now, **build_torn_event(bookmark, name, torn))


def build_torn_event(bookmark: Bookmark, name: str, torn: int) -> dict[str, Any]:
    return {
        "kind": "eve.malformed",
        "severity": "warning",
        "message": f"a rotated EVE file ended in a torn line of {torn} bytes",
        "subject": bookmark.lane,
        "detail": {"file": name, "offset": bookmark.offset},
    }


def finish_bookmark(db: Database, bookmark: Bookmark, now: float) -> None:
    db.execute(
        "UPDATE bookmarks SET finished_at = ? WHERE lane = ? AND generation = ?",
        (now, bookmark.lane, bookmark.generation),
    )
    db.execute(
        "DELETE FROM bookmarks WHERE lane = ? AND finished_at IS NOT NULL AND generation < ?",
        (bookmark.lane, bookmark.generation - _FINISHED_KEPT),
    )
