"""The partitions of the alert store: one is written to, the others are ended and never change again.

Belongs to `Store`: everything that writes runs on its writer thread, readers lease connections. A new
partition is made beside its place and renamed into it, so that it is whole or not there. Removing one is
removing its file, whatever is in it.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import structlog
from sqlite_utils import Database

from appliance.alerts import losses
from appliance.alerts.history import find_rows, record_event, record_repeated
from appliance.alerts.packing import Damaged, is_damage
from appliance.alerts.partition import (
    PAGE_BYTES,
    Partition,
    build_path,
    find_paths,
    measure_pages,
    migrations,
    read_base,
)
from appliance.alerts.reading import find_last
from appliance.alerts.rows import insert_sql
from appliance.alerts.writing import Writer

log = structlog.get_logger("store")

T = TypeVar("T")

_IDLE_CONNECTIONS = 128
_BUSY_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Limits:
    """A partition is ended when it has so many alerts, or is so many seconds old and not empty,

    or takes so many bytes: only what is ended can be removed.
    """

    alerts: int = 1_000_000
    seconds: float = 86_400.0
    bytes: int = 20 * 2**30 // 8


@dataclass(slots=True)
class AlertWrite:
    """One transaction of the youngest partition. What is noted is recorded in the main database

    after it was committed, exactly once, whatever moment the process is killed at.
    """

    db: Database
    writer: Writer
    base: int
    _notes: list[str] = field(default_factory=list)

    def note_event(self, at: float, kind: str, severity: str, message: str, **more: Any) -> None:
        """As `history.record_event`."""
        self._note(False, at=at, kind=kind, severity=severity, message=message, **more)

    def note_repeated(self, at: float, kind: str, severity: str, message: str, **more: Any) -> None:
        """As `history.record_repeated`."""
        self._note(True, at=at, kind=kind, severity=severity, message=message, **more)

    def _note(self, repeated: bool, **values: Any) -> None:
        self._notes.append(json.dumps({"repeated": repeated, "values": values}))

    def _keep_notes(self) -> bool:
        self.db.conn.executemany(
            "INSERT INTO notes (body) VALUES (?)", [(body,) for body in self._notes]
        )
        return bool(self._notes)


class Partitions:
    """Those in ``directory``, which is made (0700) where it is not there. ``main`` is the main database,

    written by the same thread.
    """

    def __init__(
        self,
        directory: Path,
        main: Database,
        limits: Limits,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._directory = directory
        self._main = main
        self._limits = limits
        self._clock = clock
        self._lock = threading.Lock()
        self._idle: dict[Partition, list[sqlite3.Connection]] = {}
        self._db: Database | None = None
        self._writer: Writer | None = None
        self._notes_wait = False
        self._closed = False
        directory.mkdir(mode=0o700, exist_ok=True)
        directory.chmod(0o700)
        for stale in directory.glob("*.new*"):
            stale.unlink()
        self._finish_drops()
        self._all: tuple[Partition, ...] = ()
        self._begin()
        self._deliver()

    @property
    def all(self) -> tuple[Partition, ...]:
        """Oldest first; the last is the one that is written to. Of any thread."""
        return self._all

    @property
    def _open_db(self) -> Database:
        if self._db is None:
            raise RuntimeError("the partitions are closed")
        return self._db

    def transact(self, change: Callable[[AlertWrite], T]) -> T:
        """Run ``change`` in one transaction of the youngest partition; nothing of it stays if it raises."""
        self._resume_if_stopped()
        self._roll_if_due()
        db = self._open_db
        try:
            if self._writer is None:
                self._writer = self._make_writer(db)
            with db.atomic():
                write = AlertWrite(db, self._writer, self._all[-1].base)
                result = change(write)
                noted = write._keep_notes()
        except BaseException:
            # What the writer remembers may be of the transaction that is gone.
            self._writer = None
            raise
        if noted or self._notes_wait:
            self._deliver()
        return result

    def drop(self, partition: Partition, record: Callable[[Database], None]) -> None:
        """Take an ended partition out; ``record`` writes to the main database why, once and before.

        Its file is removed by `unlink`, for which the writer need not wait.
        """
        if partition.path == self._all[-1].path:
            raise ValueError(f"{partition.name} is written to")
        with self._main.atomic():
            told = find_rows(
                self._main, "SELECT name FROM dropped_partitions WHERE name = ?", (partition.name,)
            )
            if not told:
                record(self._main)
                row = {"name": partition.name, "at": self._clock()}
                self._main.execute(insert_sql("dropped_partitions", row), row)
                losses.record_gone(self._main, partition.base)
        self._take_out(partition)

    def note_missing(self) -> None:
        """Tell of partitions whose files somebody removed. The one that is written to is begun anew."""
        self._resume_if_stopped()
        for one in [one for one in self._all[:-1] if not one.path.exists()]:
            self._record_loss(losses.Loss(one.base, one.base + (one.alerts or 0)))
            self._take_out(one)
        newest = self._all[-1]
        if self._db is None or newest.path.exists():
            return
        last = newest.base + find_last(self._db)
        bookmarks = find_rows(self._db, "SELECT * FROM bookmarks", ())
        self._close_newest()
        self._record_loss(losses.Loss(newest.base, last))
        _unlink(newest.path)
        # One id on, for a name that is not the one that is gone.
        self._start(last + 1, bookmarks)
        self._take_out(newest)

    def _take_out(self, partition: Partition) -> None:
        with self._lock:
            self._all = tuple(one for one in self._all if one.path != partition.path)
            known = [one for one in self._idle if one.path == partition.path]
            idle = [connection for one in known for connection in self._idle.pop(one)]
        for connection in idle:
            connection.close()

    def _record_loss(self, loss: losses.Loss) -> None:
        name = build_path(self._directory, loss.base).stem
        log.error("partition gone", partition=name)
        with self._main.atomic():
            losses.record_loss(self._main, loss, name, self._clock())

    def unlink(self, partition: Partition) -> None:
        """Remove the file of a partition that was taken out. Of any thread."""
        _unlink(partition.path)

    @contextlib.contextmanager
    def lease(self, partition: Partition) -> Iterator[Database | None]:
        """A read-only connection in a transaction; None where the partition was removed meanwhile."""
        with self._lock:
            stack = self._idle.get(partition)
            connection = stack.pop() if stack else None
        if connection is None:
            try:
                connection = _connect_reader(partition)
            except sqlite3.OperationalError:
                if partition.path.exists():
                    raise
                yield None
                return
        try:
            database = Database(connection, execute_plugins=False)
            with database.atomic():
                yield database
        except BaseException as fault:
            connection.close()
            if isinstance(fault, sqlite3.Error) and is_damage(fault):
                raise Damaged(str(fault), partition.path) from fault
            raise
        with self._lock:
            count = sum(map(len, self._idle.values()))
            keep = partition in self._all and count < _IDLE_CONNECTIONS
            if keep:
                self._idle.setdefault(partition, []).append(connection)
        if not keep:
            connection.close()

    def close(self) -> None:
        self._closed = True
        if self._db is not None:
            self._db.close()
            self._db = None
        with self._lock:
            idle = [connection for stack in self._idle.values() for connection in stack]
            self._idle.clear()
        for connection in idle:
            connection.close()

    def roll(self) -> None:
        """End the youngest partition and begin the next. Notes that wait keep it from ending."""
        self._resume_if_stopped()
        self._deliver()
        if self._notes_wait:
            return
        db = self._open_db
        try:
            if self._writer is None:
                self._writer = self._make_writer(db)
            if not self._writer.last:
                return
            with db.atomic():
                self._writer.finish(self._clock())
        except BaseException:
            self._writer = None
            raise
        self._begin_next()

    def _roll_if_due(self) -> None:
        newest = self._all[-1]
        if self._writer is None or self._writer.last == 0:
            return
        old = self._clock() - newest.began >= self._limits.seconds
        large = measure_pages(self._open_db) >= self._limits.bytes
        if old or large or self._writer.last >= self._limits.alerts:
            self.roll()

    def _resume_if_stopped(self) -> None:
        if self._db is None and not self._closed:
            self._resume()

    def _resume(self) -> None:
        """Also where a process, or a full disk, stopped between an end and the next beginning."""
        if self._load(self._all[-1].path).ended is None:
            self._open_newest()
        else:
            self._begin_next()

    def _close_newest(self) -> None:
        if self._db is not None:
            self._db.close()  # the last connection but readers': what is in the log goes into the file
        self._db = self._writer = None

    def _begin_next(self, least: int = 0) -> None:
        """Behind the youngest, and behind the id ``least``."""
        newest = self._all[-1]
        self._close_newest()
        with contextlib.closing(_connect_writer(newest.path)) as connection:
            database = Database(connection, execute_plugins=False)
            bookmarks = find_rows(database, "SELECT * FROM bookmarks", ())
        ended = self._load(newest.path)
        with self._lock:
            stale = self._idle.pop(newest, [])
            self._all = (*self._all[:-1], ended)
        for connection in stale:
            connection.close()
        self._start(max(ended.base + (ended.alerts or 0), least), bookmarks)

    def _start(self, base: int, bookmarks: list[dict[str, Any]]) -> None:
        path = build_path(self._directory, base)
        began = self._clock()
        create_partition(path, base, began, bookmarks)
        with self._main.atomic():
            losses.record_begun(self._main, base)
        with self._lock:
            self._all = (*self._all, Partition(path, base, began))
        self._open_newest()

    def _open_newest(self) -> None:
        database = Database(_connect_writer(self._all[-1].path), execute_plugins=False)
        migrations.apply(database)
        self._db, self._writer = database, self._make_writer(database)

    def _make_writer(self, db: Database) -> Writer:
        try:
            return Writer(db)
        except sqlite3.Error as fault:
            if is_damage(fault):
                raise Damaged(str(fault), self._all[-1].path) from fault
            raise

    def _begin(self) -> None:
        """Load what there is, tell what is gone, and open or begin the youngest."""
        paths = find_paths(self._directory)
        self._all = tuple(one for one in map(self._load_or_tell, paths[:-1]) if one is not None)
        self._all += tuple(map(self._load, paths[-1:]))
        present = {read_base(path) for path in paths}
        highest = losses.find_highest(self._main)
        gone = losses.find_losses(self._main, present)
        with self._main.atomic():
            losses.adopt(self._main, present)
        least = 0
        if highest is not None and (not paths or highest > max(present)):
            least = highest + losses.SKIP_IDS
        cursor = max(losses.load_cursors(self._main).values(), default=0)
        if not paths:
            base, bookmarks = self._find_beginning()
            if highest is None and cursor > base:
                # Of a version that did not know what was begun.
                gone, least = (losses.Loss(base, None),), cursor + losses.SKIP_IDS
            self._start(max(base, least, cursor), bookmarks)
        elif least:
            self._finish_newest()
            self._begin_next(max(least, cursor))
        else:
            self._resume()
        # Last: after a kill before here it is found and told again.
        for loss in gone:
            self._record_loss(loss)

    def _finish_newest(self) -> None:
        """End it, though younger ones were begun: an older state of the directory was put back."""
        if self._all[-1].ended is None:
            self._open_newest()
            if self._writer is not None:
                with self._open_db.atomic():
                    self._writer.finish(self._clock())

    def _find_beginning(self) -> tuple[int, list[dict[str, Any]]]:
        """Behind the alerts of the table that was used before, with the bookmarks that cover them."""
        rows = find_rows(
            self._main, "SELECT seq FROM sqlite_sequence WHERE name = 'alerts'", ()
        ) + find_rows(self._main, "SELECT coalesce(max(id), 0) AS seq FROM alerts", ())
        # A name in brackets is none of a lane's: the flow spool's bookmark stays where it is.
        bookmarks = find_rows(self._main, "SELECT * FROM bookmarks WHERE lane NOT LIKE '(%'", ())
        return max(int(row["seq"]) for row in rows), bookmarks

    def _load(self, path: Path) -> Partition:
        """What a partition tells of itself; what a killed process left in its log is put into the file."""
        try:
            return self._read_span(path)
        except sqlite3.Error as fault:
            if is_damage(fault):
                raise Damaged(str(fault), path) from fault
            raise

    def _load_or_tell(self, path: Path) -> Partition | None:
        """None for one that is damaged: the others are found all the same."""
        try:
            return self._load(path)
        except Damaged as fault:
            log.error("partition damaged", path=str(path), fault=str(fault))
            with self._main.atomic():
                losses.record_damage(self._main, path.stem, str(path), str(fault), self._clock())
            return None

    def _read_span(self, path: Path) -> Partition:
        with contextlib.closing(_connect_writer(path)) as connection:
            database = Database(connection, execute_plugins=False)
            rows = find_rows(database, "SELECT * FROM span", ())
            if len(rows) != 1 or rows[0]["base"] != read_base(path):
                raise Damaged("it is not the partition that its name tells")
            row = rows[0]
            busy = 1
            connection.execute("PRAGMA busy_timeout = 100")  # a long question holds nobody up
            if row["ended"] is not None:
                busy = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()[0]
        return Partition(path, settled=not busy, **row)

    def _deliver(self) -> None:
        """Record what was noted. A failure is not the transaction's: it was committed; try again later."""
        db, name = self._open_db, self._all[-1].name
        try:
            notes = db.conn.execute("SELECT id, body FROM notes ORDER BY id").fetchall()
            if notes:
                with self._main.atomic():
                    take_notes(self._main, name, notes)
                with db.atomic():
                    db.execute("DELETE FROM notes WHERE id <= ?", (notes[-1][0],))
            self._notes_wait = False
        except sqlite3.Error as fault:
            self._notes_wait = True
            log.error("events not recorded yet", partition=name, fault=str(fault))

    def _finish_drops(self) -> None:
        """Files whose removal was recorded, and then not done."""
        for row in find_rows(self._main, "SELECT name FROM dropped_partitions", ()):
            _unlink(self._directory / f"{row['name']}.db")
        _sync(self._directory)
        # A partition of the same name may begin one day; it is not the one that was removed.
        with self._main.atomic():
            for table, column in (("notes_taken", "partition"), ("dropped_partitions", "name")):
                self._main.execute(
                    f"DELETE FROM {table} WHERE {column} IN (SELECT name FROM dropped_partitions)"  # noqa: S608
                )


def take_notes(main: Database, name: str, notes: list[tuple[int, str]]) -> None:
    """Record those notes of partition ``name`` that were not yet recorded."""
    rows = find_rows(main, "SELECT last FROM notes_taken WHERE partition = ?", (name,))
    last = int(rows[0]["last"]) if rows else 0
    for number, body in notes:
        if number <= last:
            continue
        note: Mapping[str, Any] = json.loads(body)
        (record_repeated if note["repeated"] else record_event)(main, **note["values"])
    main.execute(
        "INSERT INTO notes_taken (partition, last) VALUES (?, ?)"
        " ON CONFLICT (partition) DO UPDATE SET last = excluded.last",
        (name, notes[-1][0]),
    )


def create_partition(path: Path, base: int, began: float, bookmarks: list[dict[str, Any]]) -> None:
    """An empty partition at ``path``, whole or not at all."""
    new = path.with_name(path.name + ".new")
    _unlink(new)  # of an attempt that failed, on a full disk
    descriptor = os.open(
        new, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
    )
    os.fchmod(descriptor, 0o600)
    os.close(descriptor)
    with contextlib.closing(_connect_writer(new)) as connection:
        database = Database(connection, execute_plugins=False)
        migrations.apply(database)
        with database.atomic():
            database.execute("INSERT INTO span (base, began) VALUES (?, ?)", (base, began))
            for row in bookmarks:
                database.execute(insert_sql("bookmarks", row), row)
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    os.rename(new, path)
    _sync(path.parent)


def _sync(directory: Path) -> None:
    """What was renamed or removed in it outlives a power cut."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _connect_writer(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=rw",
        uri=True,
        timeout=_BUSY_SECONDS,
        check_same_thread=False,
    )
    for pragma in (
        f"page_size = {PAGE_BYTES}",
        "journal_mode = WAL",
        "synchronous = FULL",
        "secure_delete = OFF",
        "cache_size = -65536",
        "wal_autocheckpoint = 1000",
        "journal_size_limit = 67108864",
    ):
        connection.execute(f"PRAGMA {pragma}")
    return connection


def _connect_reader(partition: Partition) -> sqlite3.Connection:
    # `immutable`: no locks and no log beside a file that never changes again.
    immutable = "&immutable=1" if partition.settled else ""
    connection = sqlite3.connect(
        f"{partition.path.absolute().as_uri()}?mode=ro{immutable}",
        uri=True,
        timeout=_BUSY_SECONDS,
        check_same_thread=False,
    )
    connection.execute("PRAGMA query_only = ON")
    connection.execute("PRAGMA cache_size = -8192")
    return connection


def _unlink(path: Path) -> None:
    for one in (path, path.with_name(path.name + "-wal"), path.with_name(path.name + "-shm")):
        one.unlink(missing_ok=True)
