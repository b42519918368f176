"""The store when its files are taken away, in the way or damaged: it goes on, and tells what is lost."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from appliance.alerts.attribute import Attributed
from appliance.alerts.eve import parse_event
from appliance.alerts.history import find_rows
from appliance.alerts.model import Endpoint, EveAlert, Opener
from appliance.alerts.partition import build_path
from appliance.alerts.partitions import AlertWrite, Limits
from appliance.alerts.query import AlertFilter, EventFilter, find_alerts, find_events
from appliance.alerts.store import Store, StoreError, find_directory
from tests.support.alerts import Stored, store_alerts
from tests.support.eve import render_eve
from tests.support.worlds import LANES


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "hairpin.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    store = Store(path, Limits(alerts=4))
    yield store
    store.close()


def build(**changes: object) -> Stored:
    event = parse_event(render_eve(**changes))
    assert isinstance(event, EveAlert)
    ends = Endpoint("10.9.0.1", 40000), Endpoint("10.9.0.2", 80)
    return event, Attributed(*ends, Opener.SOURCE, None, None, ()), LANES[0]


async def add(store: Store, count: int) -> int:
    return await store.write_alerts(partial(store_alerts, stored=[build()] * count))


def note(write: AlertWrite, kind: str) -> None:
    write.note_event(1.0, kind, "info", "x")


async def read_ids(store: Store, wanted: AlertFilter | None = None) -> list[int]:
    page = await find_alerts(store, wanted or AlertFilter(), limit=1000, ascending=True)
    return [alert.id for alert in page.items]


async def read_events(store: Store, kind: str) -> list[str]:
    page = await find_events(store, EventFilter(kind=kind))
    return [event.message for event in reversed(page.items)]


# A roll that fails in its middle


async def test_what_stops_a_roll_stops_nothing_for_good(store: Store, path: Path) -> None:
    await add(store, 4)
    obstacle = build_path(find_directory(path), 4).with_name("alerts-0000000000000004.db.new")
    obstacle.mkdir()
    for _ in range(2):
        with pytest.raises(StoreError, match="hairpin-alerts"):
            await add(store, 1)
        with pytest.raises(StoreError):
            await store.roll()
    assert await read_ids(store) == [1, 2, 3, 4]
    assert store.partitions[-1].alerts == 4, "it is ended, and known to be"
    obstacle.rmdir()
    assert await add(store, 2) == 6
    assert await read_ids(store) == [1, 2, 3, 4, 5, 6]


async def test_what_a_failed_beginning_left_is_no_obstacle(store: Store, path: Path) -> None:
    await add(store, 4)
    find_directory(path).joinpath("alerts-0000000000000004.db.new").write_bytes(b"half of it")
    assert await add(store, 1) == 5
    assert not list(find_directory(path).glob("*.new*"))


async def test_a_closed_store_stays_closed(path: Path) -> None:
    store = Store(path)
    partitions = store._partitions
    store.close()
    with pytest.raises(RuntimeError, match="closed"):
        partitions.roll()


# Names and ids


async def test_a_partition_of_a_name_that_was_removed_once_lives(path: Path) -> None:
    store = Store(path)
    await add(store, 3)
    for number in range(3):
        await store.write_alerts(partial(note, kind=f"old.{number}"))
    await store.roll()
    old = store.partitions[0]
    kept = old.path.read_bytes()
    await store.drop(old, lambda db: None)
    store.close()
    Store(path).close()
    old.path.write_bytes(kept)  # from a backup
    for _ in range(2):
        store = Store(path)
        assert await read_ids(store) == [1, 2, 3]
        taken = await store.read(
            lambda db: find_rows(
                db, "SELECT * FROM notes_taken WHERE partition = ?", (old.path.stem,)
            )
        )
        assert taken == [], "notes of the new one are not those of the old"
        store.close()
