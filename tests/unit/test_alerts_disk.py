"""The store when its files are taken away, in the way or damaged: it goes on, and tells what is lost."""

from __future__ import annotations

import resource
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import zstandard
from sqlite_utils import Database

from appliance.alerts.attribute import Attributed
from appliance.alerts.eve import parse_event
from appliance.alerts.history import find_rows, record_cursor
from appliance.alerts.model import Endpoint, EveAlert, Opener
from appliance.alerts.partition import build_path
from appliance.alerts.partitions import AlertWrite, Limits
from appliance.alerts.query import (
    AlertFilter,
    EventFilter,
    find_alerts,
    find_events,
    find_latest_alert_id,
)
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


async def deliver(store: Store, last_id: int) -> None:
    await store.write(lambda db: record_cursor(db, "siem", last_id, 1.0))


@pytest.mark.parametrize("what", ["directory", "newest"])
async def test_no_id_comes_back_when_files_are_removed_by_hand(path: Path, what: str) -> None:
    store = Store(path, Limits(alerts=4))
    for _ in range(3):
        await add(store, 3)
    last = await find_latest_alert_id(store)
    await deliver(store, 2)
    newest = store.partitions[-1].path
    store.close()
    if what == "directory":
        shutil.rmtree(newest.parent)
    else:
        newest.unlink()
    store = Store(path, Limits(alerts=4))
    first = await add(store, 1)
    assert first > last + 1000
    left = [] if what == "directory" else [1, 2, 3, 4, 5, 6]
    store.close()
    for _ in range(2):
        store = Store(path, Limits(alerts=4))
        assert await read_ids(store) == [*left, first]
        told = await read_events(store, "store.lost")
        gone = 2 if what == "directory" else 1
        assert len(told) == 2 * gone, "each once, and once for the exporter"
        assert sum("exporter siem" in one for one in told) == gone
        store.close()


async def test_a_kill_between_an_end_and_the_next_beginning_is_no_loss(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object) -> None:
        raise OSError("the process ends here")

    store = Store(path, Limits(alerts=4))
    await add(store, 4)
    with monkeypatch.context() as patch:
        patch.setattr("appliance.alerts.partitions.create_partition", fail)
        with pytest.raises(StoreError):
            await add(store, 1)
    store.close()
    store = Store(path)
    assert await add(store, 1) == 5
    assert await read_events(store, "store.") == []
    store.close()


async def test_a_directory_that_was_emptied_before_the_upgrade_is_told(path: Path) -> None:
    store = Store(path)
    await add(store, 3)
    await deliver(store, 3)
    await store.write(lambda db: db.execute("DELETE FROM begun"))
    store.close()
    shutil.rmtree(find_directory(path))
    store = Store(path)
    assert await add(store, 1) > 1000
    assert len(await read_events(store, "store.lost")) == 2
    store.close()


async def test_an_older_state_of_the_directory_is_not_written_on(path: Path) -> None:
    store = Store(path)
    await add(store, 2)
    store.close()
    kept = path.with_name("backup")
    shutil.copytree(find_directory(path), kept)
    store = Store(path, Limits(alerts=4))
    await add(store, 2)
    await add(store, 2)
    store.close()
    shutil.rmtree(find_directory(path))
    kept.rename(find_directory(path))
    store = Store(path)
    assert await add(store, 1) > 1000
    assert (await read_ids(store))[:2] == [1, 2]
    assert len(await read_events(store, "store.lost")) == 1
    store.close()


@pytest.mark.parametrize("place", [1, -1])
@pytest.mark.parametrize("when", ["running", "stopped"])
async def test_a_partition_that_was_removed_by_hand_is_told_once(
    path: Path, place: int, when: str
) -> None:
    store = Store(path, Limits(alerts=4))
    for _ in range(4):
        await add(store, 4)
    await deliver(store, 6)
    gone = store.partitions[place]
    if when == "running":
        gone.path.unlink()
        await store.note_missing()
    else:
        store.close()
        gone.path.unlink()
        store = Store(path, Limits(alerts=4))
    for _ in range(2):
        await store.note_missing()
        told = await read_events(store, "store.lost")
        assert len(told) == 2
        assert f"alerts {gone.base + 1} to" in told[0]
        assert "exporter siem" in told[1]
        assert await add(store, 1) > 16
        assert gone.base + 1 not in await read_ids(store)
        assert 1 in await read_ids(store)
        store.close()
        store = Store(path, Limits(alerts=4))
    store.close()


# Damage


def spoil(path: Path, how: str) -> None:
    if how == "garbage":
        path.write_bytes(b"x" * 20_000)
    elif how == "empty":
        path.write_bytes(b"")
    else:
        db = Database(path)
        db.execute("DELETE FROM span" if how == "no span" else "UPDATE span SET base = base + 1")
        db.conn.commit()
        db.close()


@pytest.mark.parametrize("how", ["garbage", "empty", "no span", "another's"])
async def test_a_damaged_file_is_left_out_and_told_with_its_path(path: Path, how: str) -> None:
    store = Store(path, Limits(alerts=4))
    for _ in range(3):
        await add(store, 4)
    old, newest = store.partitions[1].path, store.partitions[-1].path
    store.close()
    spoil(old, how)
    store = Store(path, Limits(alerts=4))
    assert await read_ids(store) == [1, 2, 3, 4, 9, 10, 11, 12]
    assert await add(store, 1) == 13
    (told,) = await read_events(store, "store.")
    assert str(old) in told
    store.close()
    spoil(max(find_directory(path).glob("*.db")), how)
    with pytest.raises(StoreError, match=newest.name[:20]) as caught:
        Store(path)
    assert "move it away" in caught.value.mend


def build_bomb() -> bytes:
    packer = zstandard.ZstdCompressor().compressobj(size=2**28)
    return b"".join(packer.compress(bytes(2**20)) for _ in range(2**8)) + packer.flush()


def change_ended(path: Path, change: str, data: bytes = b"") -> None:
    db = Database(path)
    db.execute(change, {"data": data} if ":data" in change else {})
    db.conn.commit()
    db.close()


@pytest.mark.parametrize(
    "change",
    [
        "UPDATE chunks SET data = x'00112233'",
        "UPDATE chunks SET data = :data",
        "UPDATE texts SET data = :data",
        "UPDATE texts SET data = x''",
        "UPDATE alerts SET detail = '{}'",
    ],
)
async def test_damage_inside_is_a_fault_of_the_store_that_names_the_file(
    store: Store, change: str
) -> None:
    await add(store, 4)
    await store.roll()
    part = store.partitions[0]
    change_ended(part.path, change, build_bomb())
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    wanted = AlertFilter(text="nowhere at all") if "texts" in change else None
    with pytest.raises(StoreError, match=part.name):
        await read_ids(store, wanted)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000


async def test_damage_inside_the_youngest_refuses_the_start_and_names_the_file(path: Path) -> None:
    store = Store(path)
    await add(store, 4)
    youngest = store.partitions[-1].path
    store.close()
    change_ended(youngest, "UPDATE chunks SET data = x'00112233'")
    with pytest.raises(StoreError, match=youngest.name) as caught:
        Store(path)
    assert "move it away" in caught.value.mend
    youngest.rename(path.with_name("away"))
    store = Store(path)
    assert await add(store, 1) > 1000
    store.close()


@pytest.mark.parametrize("change", ["DELETE FROM chunks", "DELETE FROM chunks WHERE first > 1"])
async def test_a_raw_event_that_is_missing_costs_itself_only(store: Store, change: str) -> None:
    await add(store, 4)
    await store.roll()
    change_ended(store.partitions[0].path, change)
    assert await read_ids(store) == [1, 2, 3, 4]
