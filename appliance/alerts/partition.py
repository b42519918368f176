"""One partition of the alert store: a SQLite file with the alerts of a span of time, and all about them.

Alerts and the bookmark that covers them stand in one file, so one transaction commits both; SQLite does
not commit several files in WAL mode as one. The ids of a partition begin after ``base``; inside, rows are
numbered from 1 without gaps, so that blocks are found by arithmetic.

    alerts      one narrow row an alert: what is filtered by, and whose it is
    chunks      the raw events, 32 of them compressed as one (`CHUNK_ALERTS`)
    texts       URL and payload, in small letters, 512 of them compressed as one (`sieve.BLOCK_ALERTS`)
    sieves      which four bytes in a row a block's texts hold; `grams`: the same of 128 blocks, turned round
    marks       which blocks of a group of 128 have alerts of a VM, an address, a signature, ... (`Mark`)
    batches     one row a transaction: where its alerts came from, and the times that they are of
    hours       how often each signature fired in each hour
    bookmarks   how far each EVE file was read
    notes       events to record in the main database, which is another file: see `Store.write_alerts`

There is no index by row: an index on VMs or signatures scatters its entries over as many pages as there
are VMs and signatures, and writing those pages cost twice what all the rest did. Marks of a group stand
side by side, and a block's 512 narrow rows are read in a tenth of a millisecond.

What repeats (signatures, VMs, policies) stands once in a partition and is named by number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from sqlite_utils import Database
from sqlite_utils.migrations import Migrations

migrations = Migrations("hairpin-alerts")

PAGE_BYTES = 8192
CHUNK_ALERTS = 32
_NAME = re.compile(r"alerts-([0-9]{16})\.db")


class Mark(IntEnum):
    """What blocks are found by. Numbers are those of the partition's own tables."""

    END = 1
    SIGNATURE = 2
    POLICY = 3
    LANE = 4
    BLOCKED = 5
    ADDRESS = 6


_FIRST = (
    # `began`: when the partition did; base: the id before its first. The others are set when it ends.
    """CREATE TABLE span (
        base INTEGER NOT NULL,
        began REAL NOT NULL,
        ended REAL,
        alerts INTEGER,
        oldest REAL,
        newest REAL
    ) STRICT""",
    """CREATE TABLE lanes (
        id INTEGER PRIMARY KEY, lane TEXT NOT NULL, profile TEXT NOT NULL, UNIQUE (lane, profile)
    ) STRICT""",
    """CREATE TABLE signatures (
        id INTEGER PRIMARY KEY,
        sid INTEGER NOT NULL,
        gid INTEGER NOT NULL,
        rev INTEGER NOT NULL,
        signature TEXT NOT NULL,
        category TEXT NOT NULL,
        severity INTEGER NOT NULL,
        cves TEXT NOT NULL,
        affected_products TEXT NOT NULL,
        UNIQUE (sid, gid, rev, signature, category, severity, cves, affected_products)
    ) STRICT""",
    """CREATE TABLE ends (
        id INTEGER PRIMARY KEY,
        vm_id TEXT NOT NULL,
        vm TEXT NOT NULL,
        zones TEXT NOT NULL,
        UNIQUE (vm_id, vm, zones)
    ) STRICT""",
    """CREATE TABLE policies (
        id INTEGER PRIMARY KEY, policy TEXT NOT NULL, revision INTEGER, UNIQUE (policy, revision)
    ) STRICT""",
    # `detail`: the alert as JSON where its raw event was too long to be kept whole.
    """CREATE TABLE alerts (
        id INTEGER PRIMARY KEY,
        at REAL NOT NULL,
        lane INTEGER NOT NULL,
        blocked INTEGER NOT NULL,
        signature INTEGER NOT NULL,
        source_address TEXT,
        destination_address TEXT,
        source_end INTEGER,
        destination_end INTEGER,
        opener TEXT,
        policy INTEGER,
        reasons TEXT,
        detail TEXT
    ) STRICT""",
    # One bit for each of a group's blocks, the first block's the highest.
    """CREATE TABLE marks (
        grp INTEGER NOT NULL,
        kind INTEGER NOT NULL,
        key ANY NOT NULL,
        blocks BLOB NOT NULL,
        PRIMARY KEY (grp, kind, key)
    ) STRICT, WITHOUT ROWID""",
    "CREATE TABLE chunks (first INTEGER PRIMARY KEY, data BLOB NOT NULL) STRICT",
    "CREATE TABLE texts (first INTEGER PRIMARY KEY, data BLOB NOT NULL) STRICT",
    "CREATE TABLE sieves (block INTEGER PRIMARY KEY, bits BLOB NOT NULL) STRICT",
    "CREATE TABLE grams (page INTEGER PRIMARY KEY, bits BLOB NOT NULL) STRICT",
    """CREATE TABLE batches (
        first INTEGER PRIMARY KEY,
        last INTEGER NOT NULL,
        lane INTEGER NOT NULL,
        stored_at REAL NOT NULL,
        generation INTEGER NOT NULL,
        offset INTEGER NOT NULL,
        oldest REAL NOT NULL,
        newest REAL NOT NULL,
        UNIQUE (lane, generation, offset)
    ) STRICT""",
    """CREATE TABLE hours (
        hour INTEGER NOT NULL,
        signature INTEGER NOT NULL,
        alerts INTEGER NOT NULL,
        blocked INTEGER NOT NULL,
        PRIMARY KEY (hour, signature)
    ) STRICT, WITHOUT ROWID""",
    """CREATE TABLE bookmarks (
        lane TEXT NOT NULL,
        generation INTEGER NOT NULL,
        device TEXT NOT NULL,
        inode TEXT NOT NULL,
        offset INTEGER NOT NULL,
        fingerprint_length INTEGER NOT NULL,
        fingerprint TEXT NOT NULL,
        finished_at REAL,
        PRIMARY KEY (lane, generation)
    ) STRICT""",
    "CREATE TABLE notes (id INTEGER PRIMARY KEY AUTOINCREMENT, body TEXT NOT NULL) STRICT",
)


@migrations()
def first_tables(db: Database) -> None:
    for statement in _FIRST:
        db.execute(statement)


@dataclass(frozen=True, slots=True)
class Partition:
    """``base``: the id before its first alert. ``alerts``, ``oldest`` and ``newest`` (times of

    packets) are None while it is the one that is written to, or was not ended properly. ``settled``:
    nothing of it is left in a write-ahead log.
    """

    path: Path
    base: int
    began: float
    ended: float | None = None
    alerts: int | None = None
    oldest: float | None = None
    newest: float | None = None
    settled: bool = False

    @property
    def name(self) -> str:
        return self.path.stem


def build_path(directory: Path, base: int) -> Path:
    return directory / f"alerts-{base:016d}.db"


def read_base(path: Path) -> int:
    """The base that the name of a partition's file tells."""
    return int(path.stem.removeprefix("alerts-"))


def find_paths(directory: Path) -> tuple[Path, ...]:
    """The partitions in ``directory``, oldest first."""
    return tuple(sorted(path for path in directory.iterdir() if _NAME.fullmatch(path.name)))


def measure_pages(db: Database) -> int:
    """Bytes of a database's pages, those in the write-ahead log included."""
    return int(db.execute("PRAGMA page_count").fetchone()[0]) * PAGE_BYTES


def read_size(path: Path) -> int:
    """Bytes on disk, the write-ahead log included."""
    total = 0
    for one in (path, path.with_name(path.name + "-wal")):
        try:
            total += one.stat().st_size
        except FileNotFoundError:
            continue
    return total
