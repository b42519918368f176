"""The one declaration of the management service's tables, as sqlite-utils migrations.

A migration that was ever released is never changed; a change of the tables is a new one below.
"""

from __future__ import annotations

from sqlite_utils import Database
from sqlite_utils.migrations import Migrations

from appliance.alerts.configuration import (
    TABLES,
    Part,
    keep_configuration,
    mend_configuration,
)
from appliance.alerts.history import record_event

migrations = Migrations("hairpin")

# AUTOINCREMENT: an id must never come back after its row was removed, since cursors of exporters
# and of clients are ids.
_FIRST = (
    """CREATE TABLE alerts (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        at REAL NOT NULL,
        stored_at REAL NOT NULL,
        lane TEXT NOT NULL,
        profile TEXT NOT NULL,
        verdict TEXT NOT NULL CHECK (verdict IN ('blocked', 'allowed')),
        source_address TEXT,
        source_port INTEGER,
        source_vm_id TEXT,
        source_vm TEXT,
        source_zones TEXT NOT NULL DEFAULT '[]',
        destination_address TEXT,
        destination_port INTEGER,
        destination_vm_id TEXT,
        destination_vm TEXT,
        destination_zones TEXT NOT NULL DEFAULT '[]',
        protocol TEXT NOT NULL,
        family TEXT,
        direction TEXT,
        opener TEXT,
        sid INTEGER NOT NULL,
        gid INTEGER NOT NULL,
        rev INTEGER NOT NULL,
        signature TEXT NOT NULL,
        category TEXT NOT NULL,
        severity INTEGER NOT NULL,
        cves TEXT NOT NULL DEFAULT '[]',
        affected_products TEXT NOT NULL DEFAULT '[]',
        policy TEXT,
        revision INTEGER,
        app_proto TEXT,
        payload TEXT NOT NULL,
        payload_printable TEXT NOT NULL,
        http_hostname TEXT,
        http_url TEXT,
        http_method TEXT,
        community_id TEXT,
        flow_id INTEGER,
        reasons TEXT NOT NULL DEFAULT '[]',
        raw TEXT NOT NULL,
        file_generation INTEGER NOT NULL,
        file_offset INTEGER NOT NULL,
        file_part INTEGER NOT NULL,
        UNIQUE (lane, file_generation, file_offset, file_part)
    ) STRICT""",
    "CREATE INDEX alerts_at ON alerts (at)",
    "CREATE INDEX alerts_source ON alerts (source_vm_id)",
    "CREATE INDEX alerts_destination ON alerts (destination_vm_id)",
    "CREATE INDEX alerts_sid ON alerts (sid)",
    # How far each EVE file was read. `generation` numbers the files of a lane; device and inode
    # are text because they are unsigned 64-bit numbers.
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
    """CREATE TABLE holdings (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        address TEXT NOT NULL,
        vm_id TEXT NOT NULL,
        since REAL NOT NULL,
        until REAL
    ) STRICT""",
    "CREATE INDEX holdings_address ON holdings (address, since)",
    "CREATE UNIQUE INDEX holdings_current ON holdings (address) WHERE until IS NULL",
    """CREATE TABLE events (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        at REAL NOT NULL,
        ended_at REAL,
        kind TEXT NOT NULL,
        severity TEXT NOT NULL CHECK (severity IN ('info', 'warning', 'error')),
        subject TEXT NOT NULL DEFAULT '',
        message TEXT NOT NULL,
        detail TEXT NOT NULL DEFAULT '{}'
    ) STRICT""",
    "CREATE INDEX events_kind ON events (kind, subject, at)",
    """CREATE TABLE revisions (
        number INTEGER PRIMARY KEY AUTOINCREMENT,
        at REAL NOT NULL,
        author TEXT NOT NULL,
        documents TEXT NOT NULL,
        applied_at REAL,
        report TEXT
    ) STRICT""",
    """CREATE TABLE flow_records (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        first_seen REAL NOT NULL,
        last_seen REAL NOT NULL,
        source_address TEXT,
        source_port INTEGER,
        source_vm_id TEXT,
        source_vm TEXT,
        source_zones TEXT NOT NULL DEFAULT '[]',
        destination_address TEXT,
        destination_port INTEGER,
        destination_vm_id TEXT,
        destination_vm TEXT,
        destination_zones TEXT NOT NULL DEFAULT '[]',
        protocol TEXT NOT NULL,
        application TEXT NOT NULL,
        category TEXT NOT NULL,
        packets_sent INTEGER NOT NULL,
        bytes_sent INTEGER NOT NULL,
        packets_received INTEGER NOT NULL,
        bytes_received INTEGER NOT NULL,
        treatment TEXT,
        policy TEXT
    ) STRICT""",
    "CREATE INDEX flow_records_last_seen ON flow_records (last_seen)",
    # What the switch counted and what the records tell of, over the same time.
    """CREATE TABLE flow_counters (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        since REAL NOT NULL,
        until REAL NOT NULL,
        switch_packets INTEGER NOT NULL,
        recorded_packets INTEGER NOT NULL
    ) STRICT""",
    """CREATE TABLE export_cursors (
        name TEXT PRIMARY KEY,
        last_id INTEGER NOT NULL,
        updated_at REAL NOT NULL
    ) STRICT""",
)


@migrations()
def first_tables(db: Database) -> None:
    for statement in _FIRST:
        db.execute(statement)


_PROOF = (
    # One row a lane and probe. `nonce` is what a VM can't know: an alert of the canary's rule
    # without it is an alert like any other. `arrived` lists the parts whose alerts were stored.
    """CREATE TABLE canaries (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        at REAL NOT NULL,
        lane TEXT NOT NULL,
        cause TEXT NOT NULL,
        nonce TEXT NOT NULL UNIQUE,
        arrived TEXT NOT NULL DEFAULT '[]',
        arrived_at REAL,
        ended_at REAL,
        result TEXT CHECK (result IN ('passed', 'failed')),
        stage TEXT NOT NULL DEFAULT '',
        detail TEXT NOT NULL DEFAULT ''
    ) STRICT""",
    "CREATE INDEX canaries_lane ON canaries (lane, at)",
    # What was counted last, so that what passes while nobody watches is told afterwards.
    """CREATE TABLE meters (
        name TEXT PRIMARY KEY,
        at REAL NOT NULL,
        value TEXT NOT NULL
    ) STRICT""",
    # The coverage over time: one row after every change, and now and then. `ledger` is what the
    # traces proved, `shares` the percentages, both JSON.
    """CREATE TABLE coverage (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        at REAL NOT NULL,
        revision INTEGER NOT NULL,
        cause TEXT NOT NULL,
        shares TEXT NOT NULL,
        ledger TEXT NOT NULL DEFAULT '{}'
    ) STRICT""",
    "CREATE INDEX coverage_at ON coverage (at)",
)


@migrations()
def proof_tables(db: Database) -> None:
    for statement in _PROOF:
        db.execute(statement)


_QUARANTINE = (
    # Who is shut off now; what was is told by events. `until` NULL: until somebody ends it.
    """CREATE TABLE quarantines (
        vm_id TEXT PRIMARY KEY,
        vm TEXT NOT NULL,
        since REAL NOT NULL,
        until REAL,
        reason TEXT NOT NULL DEFAULT ''
    ) STRICT""",
)


@migrations()
def quarantine_tables(db: Database) -> None:
    for statement in _QUARANTINE:
        db.execute(statement)


_PARTITIONS = (
    # Alerts stand in partitions (`partition.py`); the table `alerts` holds those from before, until
    # they are old enough to go. `last`: the note of a partition that was recorded last.
    """CREATE TABLE notes_taken (
        partition TEXT PRIMARY KEY,
        last INTEGER NOT NULL
    ) STRICT""",
    # Recorded before the file is removed, so that it is told once.
    """CREATE TABLE dropped_partitions (
        name TEXT PRIMARY KEY,
        at REAL NOT NULL
    ) STRICT""",
)


@migrations()
def partition_tables(db: Database) -> None:
    for statement in _PARTITIONS:
        db.execute(statement)


_BEGUN = (
    # Every partition that was ever begun, so that no id comes back whatever happens to the files.
    # `gone`: its file is not expected any more.
    """CREATE TABLE begun (
        base INTEGER PRIMARY KEY,
        gone INTEGER NOT NULL DEFAULT 0
    ) STRICT""",
)


@migrations()
def begun_tables(db: Database) -> None:
    for statement in _BEGUN:
        db.execute(statement)


@migrations()
def configuration_tables(db: Database) -> None:
    for statement in TABLES:
        db.execute(statement)


def open_tables(db: Database, at: float) -> tuple[str, ...]:
    """Compare configuration, then bring the tables to the newest; sentences on what was mended.

    Raises sqlite3.Error, Damaged: then nothing was changed.
    """
    mended: tuple[str, ...] = ()
    if db.table("configuration").exists():
        with db.atomic():
            mended = mend_configuration(db)
            for told in mended:
                record_event(db, at, "configuration.mended", "error", told)
    with db.atomic():
        if migrations.pending(db):
            migrations.apply(db)
            for part in Part:  # as the new tables have it
                keep_configuration(db, part)
    return mended
