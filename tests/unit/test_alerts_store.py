"""The database: private, owned by one process, one transaction a write, faults typed."""

from __future__ import annotations

import asyncio
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlite_utils import Database

from appliance.alerts import canary
from appliance.alerts.history import record_event
from appliance.alerts.store import Store, StoreError


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "hairpin.db")
    yield store
    store.close()


def count_events(db: Database) -> int:
    return int(db.table("events").count)


async def test_the_file_is_private_whatever_the_umask_and_whatever_it_was(tmp_path: Path) -> None:
    path = tmp_path / "hairpin.db"
    path.touch(0o666)
    path.chmod(0o666)
    before = os.umask(0)
    try:
        store = Store(path)
        await store.write(lambda db: record_event(db, 1.0, "a.b", "info", "x"))
    finally:
        os.umask(before)
    modes = {entry.name: stat.S_IMODE(entry.stat().st_mode) for entry in tmp_path.rglob("*")}
    store.close()
    assert modes.pop("hairpin-alerts") == 0o700
    assert set(modes.values()) == {0o600}, modes
    assert {"hairpin.db", "hairpin.db-wal", "alerts-0000000000000000.db"} <= set(modes)


async def test_a_second_owner_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    first = Store(tmp_path / "hairpin.db")
    with pytest.raises(StoreError, match="belongs to another"):
        Store(tmp_path / "hairpin.db")
    first.close()
    first.close()
    Store(tmp_path / "hairpin.db").close()


async def test_a_write_that_raises_leaves_nothing(store: Store) -> None:
    def half(db: Database) -> None:
        record_event(db, 1.0, "a.b", "info", "x")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        await store.write(half)
    assert await store.read(count_events) == 0


async def test_reading_cannot_write_and_writes_are_seen_at_once(store: Store) -> None:
    with pytest.raises(StoreError, match="readonly"):
        await store.read(lambda db: record_event(db, 1.0, "a.b", "info", "x"))
    await store.write(lambda db: record_event(db, 1.0, "a.b", "info", "x"))
    counts = await asyncio.gather(*(store.read(count_events) for _ in range(20)))
    assert counts == [1] * 20


async def test_commits_are_durable_and_the_journal_is_a_wal(store: Store) -> None:
    def ask(db: Database) -> tuple[str, int]:
        return (
            str(db.execute("PRAGMA journal_mode").fetchone()[0]),
            int(db.execute("PRAGMA synchronous").fetchone()[0]),
        )

    assert await store.write(ask) == ("wal", 2)
    assert await store.write_alerts(lambda write: ask(write.db)) == ("wal", 2)


async def test_migrations_are_applied_once(tmp_path: Path) -> None:
    for _ in range(2):
        store = Store(tmp_path / "hairpin.db")
        names = await store.read(lambda db: set(db.table_names()))
        applied = await store.read(
            lambda db: [
                row["name"] for row in db.query("SELECT name FROM _sqlite_migrations ORDER BY name")
            ]
        )
        store.close()
    assert applied == [
        "begun_tables",
        "configuration_tables",
        "first_tables",
        "partition_tables",
        "proof_tables",
        "quarantine_tables",
    ]
    assert {
        "alerts",
        "bookmarks",
        "events",
        "export_cursors",
        "flow_counters",
        "flow_records",
        "holdings",
        "revisions",
    } <= names


async def test_what_is_no_database_is_refused_with_a_mend(tmp_path: Path) -> None:
    path = tmp_path / "hairpin.db"
    path.write_bytes(b"not a database at all, but long enough to have a header" * 100)
    with pytest.raises(StoreError, match="not a database") as caught:
        Store(path)
    assert "move the file aside" in caught.value.mend
    with pytest.raises(StoreError, match="state directory"):
        Store(tmp_path / "absent" / "hairpin.db")


async def test_a_full_database_is_told_as_such_and_recovers(store: Store) -> None:
    await store.write(lambda db: db.execute("PRAGMA max_page_count = 40").fetchall())

    async def fill() -> None:
        for _ in range(1000):
            await store.write(lambda db: record_event(db, 1.0, "a.b", "info", "x" * 1000))

    with pytest.raises(StoreError) as caught:
        await fill()
    assert caught.value.full
    before = await store.read(count_events)
    await store.write(lambda db: db.execute("PRAGMA max_page_count = 100000").fetchall())
    await store.write(lambda db: record_event(db, 1.0, "a.b", "info", "x"))
    assert await store.read(count_events) == before + 1
    assert await store.read(lambda db: db.execute("PRAGMA integrity_check").fetchall()) == [("ok",)]


async def test_old_canaries_are_forgotten_and_failed_ones_later(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(canary, "FAILED_KEPT", 3)

    def fill(db: Database) -> None:
        for at in range(6):
            probe = canary.record_probe(db, float(at), "prevent", "schedule", f"{at:032x}")
            canary.record_result(db, probe, at + 0.5, passed=at in (0, 4))
        canary.remove_probes(db, 5.0)

    await store.write(fill)
    left = await store.read(lambda db: canary.find_probes(db))
    # The passed one of 4.0 and what failed long ago are gone; the last three but it stay.
    assert [probe.at for probe in left] == [5.0, 3.0]
