"""What the store gives up: by age, by size, never silently; and what a kill -9 at each moment leaves."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlite_utils import Database

from appliance.alerts.history import (
    end_holdings,
    find_rows,
    record_cursor,
    record_event,
    record_flow_counters,
    record_flows,
    record_holding,
)
from appliance.alerts.losses import count_lost
from appliance.alerts.model import FlowRecord
from appliance.alerts.partition import Partition
from appliance.alerts.partitions import Limits
from appliance.alerts.query import AlertFilter, EventFilter, find_alerts, find_events
from appliance.alerts.retention import DAY, Held, Keep, Retention, choose_drops, measure_table
from appliance.alerts.store import Store
from tests.support.alerts import check_stores, fill_table, store_alerts
from tests.support.store_crash import LIMIT, MOMENTS
from tests.unit.test_alerts_partitions import PLAIN
from tests.unit.test_alerts_query import APP, WEB

NOW = 1_000 * DAY


def hold(number: int, *, age: float, size: int = 100, alerts: int = 10) -> Held:
    ended = NOW - age * DAY
    return Held(Partition(Path(f"p{number}"), number * 10, 0.0, ended, alerts), size)


PARTS = (hold(0, age=30), hold(1, age=20), hold(2, age=10), hold(3, age=0))


def chosen(keep: Keep, cursors: dict[str, int] | None = None) -> list[tuple[str, dict[str, int]]]:
    drops = choose_drops(PARTS, keep, cursors or {}, NOW)
    return [(drop.partition.path.name, dict(drop.lost)) for drop in drops]


def test_what_is_old_goes_when_every_exporter_has_it() -> None:
    assert chosen(Keep(days=15)) == [("p0", {}), ("p1", {})]
    assert chosen(Keep(days=15), {"siem": 20, "other": 99}) == [("p0", {}), ("p1", {})]
    assert chosen(Keep(days=15), {"siem": 12}) == [("p0", {})]
    assert chosen(Keep(days=15), {"siem": 9}) == []
    assert chosen(Keep(days=15), {"siem": 99, "never connected": 0}) == []


def test_what_is_too_much_goes_also_undelivered_and_is_counted() -> None:
    assert chosen(Keep(bytes=250)) == [("p0", {}), ("p1", {})]
    assert chosen(Keep(bytes=250), {"siem": 13, "other": 99}) == [("p0", {}), ("p1", {"siem": 7})]
    assert chosen(Keep(bytes=399), {"siem": 0}) == [("p0", {"siem": 10})]


def test_the_youngest_partition_never_goes() -> None:
    assert chosen(Keep(days=0, bytes=0)) == [("p0", {}), ("p1", {}), ("p2", {})]


@given(
    st.integers(0, 50),
    st.integers(0, 50),
    st.dictionaries(st.sampled_from("abc"), st.integers(0, 120)),
)
def test_lost_is_what_lies_between_cursor_and_end(
    base: int, alerts: int, cursors: dict[str, int]
) -> None:
    expected = {
        name: sum(base < n <= base + alerts and n > cursor for n in range(1, 200))
        for name, cursor in cursors.items()
    }
    found = count_lost(base, base + alerts, cursors)
    assert found == {name: count for name, count in expected.items() if count}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "hairpin.db", Limits(alerts=4))
    yield store
    store.close()


async def add(store: Store, *counts: int) -> None:
    for count in counts:
        await store.write_alerts(partial(store_alerts, stored=[PLAIN] * count))


async def read_events(store: Store) -> list[tuple[str, str, object]]:
    found = (await find_events(store, EventFilter(kind="retention."))).items
    return [
        (one.kind, one.subject, one.detail.get("alerts", one.detail.get("count")))
        for one in reversed(found)
    ]


async def test_an_undelivered_alert_that_must_go_is_told(store: Store) -> None:
    await add(store, 4, 4, 1)
    await store.write(lambda db: record_cursor(db, "siem", 6, 1.0))
    retention = Retention(store, Keep(days=1, bytes=1), ["siem", "new"])
    await retention.look()
    left = await find_alerts(store, AlertFilter())
    assert [one.id for one in left.items] == [9]
    assert await read_events(store) == [
        ("retention.removed", "alerts-0000000000000000", 4),
        ("retention.lost", "new", 8),
        ("retention.removed", "alerts-0000000000000004", 4),
        ("retention.lost", "siem", 2),
    ]
    status = retention.status()
    assert (status.partitions, status.removed_alerts, status.lost_alerts) == (1, 8, 10)


async def test_age_waits_for_the_exporter(store: Store) -> None:
    await add(store, 4, 1)
    late = time.time() + 3 * DAY
    retention = Retention(store, Keep(days=1), ["siem"], clock=lambda: late)
    await retention.look()
    assert len(store.partitions) == 2
    await store.write(lambda db: record_cursor(db, "siem", 4, 1.0))
    await retention.look()
    assert [one.base for one in store.partitions] == [4]
    assert await read_events(store) == [("retention.removed", "alerts-0000000000000000", 4)]


async def test_the_table_of_before_goes_by_the_same_rules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.alerts.retention.SLICE_ROWS", 2)
    path = tmp_path / "hairpin.db"
    fill_table(path, [PLAIN] * 5)  # stored long ago
    store = Store(path)
    await add(store, 1)
    await store.write(lambda db: record_cursor(db, "siem", 3, 1.0))
    await Retention(store, Keep(days=1), ["siem"]).look()
    page = await find_alerts(store, AlertFilter(), ascending=True)
    assert [one.id for one in page.items] == [3, 4, 5, 6]
    await Retention(store, Keep(bytes=1), ["siem"]).look()
    page = await find_alerts(store, AlertFilter(), ascending=True)
    assert [one.id for one in page.items] == [6]
    assert await read_events(store) == [
        ("retention.removed", "alerts", 5),
        ("retention.lost", "siem", 2),
    ]
    store.close()


async def test_what_else_is_in_the_database_takes_no_alert_away(tmp_path: Path) -> None:
    path = tmp_path / "hairpin.db"
    fill_table(path, [PLAIN] * 5)
    store = Store(path)
    await store.write(lambda db: record_event(db, 1.0, "a.b", "info", "x" * 2**22))
    assert path.with_name("hairpin.db-wal").stat().st_size > 2**22
    await Retention(store, Keep(days=36500, bytes=2**20), []).look()
    page = await find_alerts(store, AlertFilter())
    assert len(page.items) == 5
    first, last, _, size = await store.read(measure_table)
    assert (first, last) == (1, 5)
    assert 5_000 < size < 50_000
    store.close()


async def test_flow_records_and_holdings_go_by_age_and_number(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("appliance.alerts.retention.SLICE_ROWS", 3)
    now = time.time()

    def fill(db: Database) -> None:
        for at in [1.0] * 7 + [now] * 9:
            record_flows(db, [FlowRecord(at, at, WEB, APP, "tcp")])
        record_flow_counters(db, 0.0, 1.0, 5, 5)
        record_flow_counters(db, now - 1, now, 5, 5)
        for vm, at in (("vm-1", 1.0), ("vm-2", 2.0), ("vm-3", now)):
            record_holding(db, "10.9.0.1", vm, at)
        record_holding(db, "10.9.0.2", "vm-1", 1.0)
        end_holdings(db, "vm-3", now)

    await store.write(fill)
    await Retention(store, Keep(days=1, flow_records=5), []).look()

    def read(db: Database) -> tuple[int, int, list[str]]:
        held = [row["vm_id"] for row in find_rows(db, "SELECT vm_id FROM holdings ORDER BY id", ())]
        return db.table("flow_records").count, db.table("flow_counters").count, held

    # vm-2 held it until now, vm-1 the other still; what ended long ago is gone.
    assert await store.read(read) == (5, 1, ["vm-2", "vm-3", "vm-1"])


# A kill -9 at each moment


def crash(moment: str, database: Path) -> None:
    argv = [sys.executable, "-m", "tests.support.store_crash", moment, str(database)]
    done = subprocess.run(argv, cwd=Path(__file__).parents[2], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL


@pytest.mark.parametrize("moment", MOMENTS)
async def test_a_kill_loses_nothing_and_tells_nothing_twice(tmp_path: Path, moment: str) -> None:
    database = tmp_path / "hairpin.db"
    crash(moment, database)
    store = Store(database, Limits(alerts=LIMIT))
    bookmark = await store.write_alerts(
        lambda tx: tx.db.execute("SELECT offset FROM bookmarks").fetchone()[0]
    )
    # What the bookmark says is stored, and no more; the rest is read again by whoever reads the file.
    first = 5 if moment.startswith("removal") else 1
    page = await find_alerts(store, AlertFilter(), ascending=True)
    assert [one.id for one in page.items] == list(range(first, bookmark + 1))
    assert bookmark == (9 if moment in ("notes wait", "notes are recorded") else 8)
    events = await store.read(
        lambda db: [row["message"] for row in db.query("SELECT message FROM events ORDER BY id")]
    )
    assert events[:2] == ["up to 4", "up to 8"]
    assert events[2:] == {"notes wait": ["up to 9"], "notes are recorded": ["up to 9"]}.get(
        moment, ["x"] if moment.startswith("removal") else []
    )
    assert not list(tmp_path.glob("hairpin-alerts/*.new*"))
    await add(store, 1)
    page = await find_alerts(store, AlertFilter(), limit=1)
    assert page.items[0].id == bookmark + 1
    store.close()
    assert check_stores(database) == "ok"
