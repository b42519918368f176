"""The door to the store: one writer thread, a few read-only connections, every failure typed.

The main database, and the partitions of alerts in a directory beside it (`partitions.py`). Configuration in it is
compared with its digest when it is opened (`configuration.py`).

The file belongs to the management service alone, and a lock beside it holds that. WAL, so that
readers never wait for the writer. `synchronous=FULL`, because what a commit covers is given up
elsewhere: drained EVE files are deleted and a SIEM is told on the strength of it; NORMAL may lose
the last commits when the host loses power. Ingest commits whole batches, so FULL costs one fsync a
batch (https://www.sqlite.org/pragma.html#pragma_synchronous).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import structlog
from sqlite_utils import Database

from appliance.alerts.packing import Damaged, expecting_damage, is_damage
from appliance.alerts.partition import Partition
from appliance.alerts.partitions import AlertWrite, Limits, Partitions
from appliance.alerts.schema import open_tables
from steering.errors import HairpinError

log = structlog.get_logger("store")

T = TypeVar("T")

_READERS = 3
_BUSY_SECONDS = 10.0
_SETTLE_SECONDS = 0.1
DAMAGE_MEND = (
    "move the file aside and restore it from a backup, or start a new appliance (the image, the same seed), "
    "and apply the policies and quarantines again"
)


class StoreError(HairpinError):
    """The database could not be opened, read or written. ``full`` says the disk is full, ``damaged``

    that it, or a partition of alerts, is not what was written.
    """

    def __init__(
        self, reason: str, mend: str = "", *, full: bool = False, damaged: bool = False
    ) -> None:
        super().__init__(reason, mend)
        self.full = full
        self.damaged = damaged


def explain_fault(
    path: Path, fault: sqlite3.Error | OSError | UnicodeDecodeError, *, opening: bool = False
) -> StoreError:
    """What a failure of SQLite or of the disk means for ``path``, and what to do about it.

    ``opening`` as in `is_damage`.
    """
    if isinstance(fault, OSError):
        full = fault.errno in (errno.ENOSPC, errno.EDQUOT)
        mend = "free space on" if full else "check"
        return StoreError(f"{path}: {fault}", f"{mend} the disk of {path}", full=full)
    if isinstance(fault, Damaged) and fault.path is not None:
        mend = "restore it from a backup, or move it away: alerts go on without it"
        return StoreError(f"{fault.path} is damaged: {fault}", mend, damaged=True)
    reason = f"database {path}: {fault}"
    if isinstance(fault, UnicodeDecodeError):
        # What SQLite says of a name that is no text any more, before it comes to an error of its own.
        return StoreError(reason, DAMAGE_MEND, damaged=True)
    code = getattr(fault, "sqlite_errorcode", None)
    primary = None if code is None else code & 0xFF
    if primary == sqlite3.SQLITE_FULL:
        return StoreError(reason, f"free space on the disk of {path.parent}", full=True)
    if is_damage(fault, opening=opening):
        return StoreError(reason, DAMAGE_MEND, damaged=True)
    if primary in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY):
        return StoreError(reason, f"check the disk and the permissions of {path.parent}")
    return StoreError(reason)


class Store:
    """The database at ``path``, created with mode 0600 and brought to the newest tables.

    Its alerts stand in partitions of ``limits`` in the directory `find_directory` beside it. Raises
    StoreError when it can't be opened or another process owns it. Close it with `close`.
    """

    def __init__(
        self,
        path: Path,
        limits: Limits | None = None,
        *,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.path = path
        self._clock = clock
        self._limits = limits or Limits()
        self._lock = _lock_owner(path)
        self._local = threading.local()
        self._connections: list[sqlite3.Connection] = []
        self._unsettled = False
        self.mended: tuple[str, ...] = ()
        self._partitions: Partitions = None  # type: ignore[assignment]  # set by the writer thread
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="store-writer")
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="store-reader")
        try:
            self._database = self._writer.submit(self._open_writer).result()
        except BaseException:
            self.close()
            raise

    async def write(self, change: Callable[[Database], T]) -> T:
        """Run ``change`` in one transaction on the writer thread and return what it returns.

        When it raises, nothing of it stays. Raises StoreError for failures of the database.
        """
        result = await asyncio.get_running_loop().run_in_executor(self._writer, self._write, change)
        if self._unsettled:
            with contextlib.suppress(RuntimeError):  # closed meanwhile, which empties the log, too
                self._writer.submit(self._settle)  # nobody waits for it
        return result

    async def write_lasting(self, change: Callable[[Database], T]) -> T:
        """As `write`, for configuration: soon it stands in the file, and no longer in the log alone.

        SQLite reads a damaged log up to the damage, which would bring back what was before, and tell nobody.
        """

        def write(db: Database) -> T:
            self._unsettled = True  # also where it fails: no harm in an empty log
            return change(db)

        return await self.write(write)

    async def read(self, question: Callable[[Database], T]) -> T:
        """Run ``question`` on a read-only connection, which sees one consistent state.

        Raises StoreError for failures of the database.
        """
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._read, question)

    async def write_alerts(self, change: Callable[[AlertWrite], T]) -> T:
        """Run ``change`` in one transaction of the youngest partition, on the writer thread.

        Alerts and the bookmarks of their files stand there. What it notes is recorded as events of the
        main database afterwards. When it raises, nothing of it stays. Raises StoreError.
        """
        return await asyncio.get_running_loop().run_in_executor(
            self._writer, self._guard, lambda: self._partitions.transact(change)
        )

    async def read_alerts(self, question: Callable[[AlertView], T]) -> T:
        """Run ``question`` on all alerts. Each partition is seen in one consistent state.

        Raises StoreError for failures of the database.
        """
        return await asyncio.get_running_loop().run_in_executor(
            self._readers, self._guard, lambda: question(AlertView(self))
        )

    async def roll(self) -> None:
        """End the youngest partition, if there is anything in it. Raises StoreError."""
        await asyncio.get_running_loop().run_in_executor(
            self._writer, self._guard, self._partitions.roll
        )

    async def note_missing(self) -> None:
        """Tell of partitions whose files somebody else removed. Raises StoreError."""
        await asyncio.get_running_loop().run_in_executor(
            self._writer, self._guard, self._partitions.note_missing
        )

    async def drop(self, partition: Partition, record: Callable[[Database], None]) -> None:
        """Remove an ended partition; ``record`` tells why, in the main database.

        Raises StoreError, or OSError when the file can't be removed: the next start tries again.
        """
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(
            self._writer, self._guard, lambda: self._partitions.drop(partition, record)
        )
        await loop.run_in_executor(self._readers, self._partitions.unlink, partition)

    @property
    def partitions(self) -> tuple[Partition, ...]:
        """Oldest first; the last is the one that is written to."""
        return self._partitions.all

    def close(self) -> None:
        """Wait for what is running, then close. May be called twice."""
        self._writer.shutdown()
        self._readers.shutdown()
        if self._partitions is not None:
            self._partitions.close()
        while self._connections:
            self._connections.pop().close()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _guard(self, work: Callable[[], T]) -> T:
        try:
            return work()
        except (sqlite3.Error, OSError) as fault:
            raise explain_fault(find_directory(self.path), fault) from fault

    def _write(self, change: Callable[[Database], T]) -> T:
        try:
            with self._database.atomic():
                return change(self._database)
        except (sqlite3.Error, UnicodeDecodeError) as fault:
            raise explain_fault(self.path, fault) from fault

    def _settle(self) -> None:
        """Empty the log into the file; where a reader is in the way, after the next write."""
        if self._unsettled:
            try:
                self._unsettled = not empty_log(self._database.conn)
            except sqlite3.Error as fault:
                log.warning(
                    "log of the database not emptied", path=str(self.path), fault=str(fault)
                )

    def _read(self, question: Callable[[Database], T]) -> T:
        try:
            database = getattr(self._local, "database", None)
            if database is None:
                database = self._local.database = self._open_reader()
            with database.atomic():
                return question(database)
        except (sqlite3.Error, UnicodeDecodeError) as fault:
            raise explain_fault(self.path, fault) from fault

    def _connect(self, uri: str) -> sqlite3.Connection:
        # Each connection is used by its own thread only; close() is the exception, after they ended.
        connection = sqlite3.connect(uri, uri=True, timeout=_BUSY_SECONDS, check_same_thread=False)
        self._connections.append(connection)
        return connection

    def _open_writer(self) -> Database:
        try:
            _create_private(self.path)
            connection = self._connect(f"{self.path.absolute().as_uri()}?mode=rw")
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            connection.execute("PRAGMA foreign_keys=ON")
            connection.execute("PRAGMA journal_size_limit=67108864")
            database = Database(connection, execute_plugins=False)
            with expecting_damage():
                self.mended = open_tables(database, self._clock())
            self._unsettled = not empty_log(connection)
            self._partitions = Partitions(
                find_directory(self.path), database, self._limits, self._clock
            )
            return database
        except (sqlite3.Error, UnicodeDecodeError, OSError) as fault:
            raise explain_fault(self.path, fault, opening=True) from fault

    def _open_reader(self) -> Database:
        connection = self._connect(f"{self.path.absolute().as_uri()}?mode=ro")
        connection.execute("PRAGMA query_only=ON")
        return Database(connection, execute_plugins=False)


class AlertView:
    """What a question about alerts is asked of: the partitions, and the main database."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self.partitions = store.partitions

    def ask(self, partition: Partition, question: Callable[[Database], T]) -> T | None:
        """None where the partition was removed meanwhile."""
        with self._store._partitions.lease(partition) as database:
            return None if database is None else question(database)

    def ask_main(self, question: Callable[[Database], T]) -> T:
        return self._store._read(question)


def find_directory(database: Path) -> Path:
    """Where the partitions of ``database`` are: `hairpin-alerts` beside `hairpin.db`."""
    return database.with_name(f"{database.stem}-alerts")


def empty_log(connection: sqlite3.Connection) -> bool:
    """Whether all of it stands in the file now. Raises sqlite3.Error."""
    connection.execute(f"PRAGMA busy_timeout = {int(_SETTLE_SECONDS * 1000)}")
    try:
        busy, _, _ = connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
        return not busy
    finally:
        connection.execute(f"PRAGMA busy_timeout = {int(_BUSY_SECONDS * 1000)}")


def _create_private(path: Path) -> None:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as fault:
        raise StoreError(f"{path}: {fault.strerror}", "check the state directory") from fault
    try:
        os.fchmod(descriptor, 0o600)
    finally:
        os.close(descriptor)


def _lock_owner(path: Path) -> int:
    lock = path.with_name(path.name + ".lock")
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as fault:
        raise StoreError(f"{lock}: {fault.strerror}", "check the state directory") from fault
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as fault:
        os.close(descriptor)
        raise StoreError(
            f"database {path} belongs to another running process",
            "stop the other `hairpin serve` first",
        ) from fault
    return descriptor
