"""EVE files into the database: every alert once, whatever happens to files, disk and process."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from appliance.alerts.attribute import Context
from appliance.alerts.ingest import Ingest, finish_lane_file
from appliance.alerts.model import Alert, Verdict
from appliance.alerts.query import (
    AlertFilter,
    EventFilter,
    find_alerts,
    find_alerts_after,
    find_events,
)
from appliance.alerts.store import Store, StoreError
from steering.decide import decide
from steering.model import Lane, PolicySet
from tests.support.eve import render_eve
from tests.support.waiting import wait_until
from tests.support.worlds import LANES

PREVENT, DETECT = LANES


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "hairpin.db")
    yield store
    store.close()


@pytest.fixture
def live(tmp_path: Path) -> Path:
    return tmp_path / "prevent" / "eve.json"


def find_context(lane: Lane, at: float) -> Context:
    return Context((), PolicySet(), None, lane, {})


@contextlib.asynccontextmanager
async def running(store: Store, live: Path, **options: Any) -> AsyncIterator[Ingest]:
    ingest = Ingest(
        store,
        {PREVENT: live},
        find_context,
        decide,
        poll_seconds=0.01,
        grace_seconds=options.pop("grace_seconds", 3600.0),
        **options,
    )
    task = asyncio.create_task(ingest.run())
    try:
        yield ingest
        assert not task.done()
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


def append(path: Path, *numbers: int, end: bytes = b"\n") -> None:
    path.parent.mkdir(exist_ok=True)
    with path.open("ab") as file:
        for number in numbers:
            file.write(render_eve(src_port=number) + end)


async def read_all(store: Store) -> list[Alert]:
    return list((await find_alerts(store, AlertFilter(), limit=1000, ascending=True)).items)


async def wait_for(store: Store, count: int) -> list[Alert]:
    async def enough() -> bool:
        return len(await read_all(store)) >= count

    await wait_until(enough)
    await asyncio.sleep(0.05)  # long enough for one too many to show
    alerts = await read_all(store)
    assert len(alerts) == count
    return alerts


async def wait_gone(path: Path) -> None:
    await wait_until(lambda: not path.exists())


def ports(alerts: list[Alert]) -> list[int | None]:
    return [alert.source.port for alert in alerts]


async def test_alerts_are_stored_in_order_and_other_events_are_not(
    store: Store, live: Path
) -> None:
    async with running(store, live) as ingest:
        assert not ingest.status()[0].present
        append(live, 1, 2)
        with live.open("ab") as file:
            file.write(render_eve(event_type="stats") + b"\n")
        append(live, 3)
        alerts = await wait_for(store, 3)
        status = ingest.status()[0]
    assert ports(alerts) == [1, 2, 3]
    assert [alert.id for alert in alerts] == [1, 2, 3]
    assert alerts[0].verdict is Verdict.BLOCKED
    assert (alerts[0].lane, alerts[0].profile) == ("prevent", "prevent")
    assert alerts[0].reasons[0].startswith("no VM was known to hold 10.9.0.1")
    assert (status.present, status.lines, status.alerts, status.behind_bytes) == (True, 4, 3, 0)


async def test_a_restart_reads_on_where_the_last_commit_ended(store: Store, live: Path) -> None:
    append(live, 1, 2)
    for last in (2, 4, 6):
        async with running(store, live):
            await wait_for(store, last)
        append(live, last + 1, last + 2)
    assert ports(await read_all(store)) == [1, 2, 3, 4, 5, 6]


async def test_several_rotations_during_downtime_are_drained_oldest_first_and_deleted(
    store: Store, live: Path
) -> None:
    append(live, 1, 2)
    async with running(store, live):
        await wait_for(store, 2)
    append(live, 3)
    first = live.rename(live.parent / "eve.json.1700000000000000001")
    append(live, 4)
    second = live.rename(live.parent / "eve.json.1700000000000000002")
    append(live, 5)
    async with running(store, live, grace_seconds=0.0):
        assert ports(await wait_for(store, 5)) == [1, 2, 3, 4, 5]
        await wait_gone(first)
        await wait_gone(second)
        append(live, 6)
        await wait_for(store, 6)
    assert live.exists()


async def test_what_the_engine_still_writes_to_a_renamed_file_is_stored_before_it_is_deleted(
    store: Store, live: Path
) -> None:
    append(live, 1)
    async with running(store, live, grace_seconds=1.0):
        await wait_for(store, 1)
        with live.open("ab", buffering=0) as engine:
            rotated = live.rename(live.parent / "eve.json.17")
            engine.write(render_eve(src_port=2) + b"\n")
            await wait_for(store, 2)
            append(live, 4)
            await wait_for(store, 3)
            engine.write(render_eve(src_port=3) + b"\n")
            await wait_for(store, 4)
            assert rotated.exists()
        await wait_gone(rotated)
    assert sorted(map(str, ports(await read_all(store)))) == ["1", "2", "3", "4"]


async def test_the_only_file_is_never_deleted_even_when_renamed(store: Store, live: Path) -> None:
    append(live, 1)
    rotated = live.rename(live.parent / "eve.json.17")
    async with running(store, live, grace_seconds=0.0):
        await wait_for(store, 1)
        await asyncio.sleep(0.1)
    assert rotated.exists()


async def test_a_used_again_inode_with_other_content_is_a_new_file(
    store: Store, live: Path
) -> None:
    append(live, 1, 2)
    async with running(store, live) as ingest:
        await wait_for(store, 2)
        os.truncate(live, 0)
        append(live, 7, 8, 9)
        assert ports(await wait_for(store, 5))[2:] == [7, 8, 9]
        assert ingest.status()[0].fault == ""
    (event,) = (await find_events(store, EventFilter(kind="eve.replaced"))).items
    assert (event.severity, event.subject) == ("warning", "prevent")


async def test_lines_that_are_no_events_are_counted_told_once_and_hold_nothing_up(
    store: Store, live: Path
) -> None:
    append(live, 1)
    with live.open("ab") as file:
        file.write(b"{broken\n\n\x00\xff\n" + render_eve(src_port=2)[:200])
    append(live, 3)
    async with running(store, live) as ingest:
        alerts = await wait_for(store, 2)
        with live.open("ab") as file:
            file.write(b"more\n")
        append(live, 4)
        await wait_for(store, 3)
        assert ingest.status()[0].malformed == 4
    assert ports(alerts) == [1, 3]
    (event,) = (await find_events(store, EventFilter(kind="eve."))).items
    assert event.detail["count"] == 4
    assert event.ended_at is not None


async def test_a_torn_end_of_a_rotated_file_is_recorded_when_it_is_deleted(
    store: Store, live: Path
) -> None:
    append(live, 1)
    append(live, 2, end=b"")
    rotated = live.rename(live.parent / "eve.json.17")
    append(live, 3)
    async with running(store, live, grace_seconds=0.0):
        assert len(await wait_for(store, 2)) == 2
        await wait_gone(rotated)
        await asyncio.sleep(0.05)
    (event,) = (await find_events(store, EventFilter(kind="eve.malformed"))).items
    assert "torn line" in event.message


async def test_a_file_that_someone_else_removed_is_told_once(store: Store, live: Path) -> None:
    append(live, 1)
    rotated = live.rename(live.parent / "eve.json.5")
    append(live, 2)
    async with running(store, live, grace_seconds=0.4):
        await wait_for(store, 2)
        rotated.unlink()

        async def told() -> bool:
            return bool((await find_events(store, EventFilter(kind="eve.vanished"))).items)

        await wait_until(told)
        append(live, 3)
        await wait_for(store, 3)
    async with running(store, live, grace_seconds=0.0):
        append(live, 4)
        await wait_for(store, 4)
    (event,) = (await find_events(store, EventFilter(kind="eve."))).items
    assert event.detail["offset"] == len(render_eve(src_port=1)) + 1


async def test_a_directory_that_was_away_doubles_nothing(store: Store, live: Path) -> None:
    append(live, 1, 2, 3)
    away = live.parent.with_name("away")
    async with running(store, live, grace_seconds=0.1):
        await wait_for(store, 3)
        live.parent.rename(away)

        async def told() -> bool:
            return bool((await find_events(store, EventFilter(kind="eve.vanished"))).items)

        await wait_until(told)
        away.rename(live.parent)
        append(live, 4)
        assert ports(await wait_for(store, 4)) == [1, 2, 3, 4]
        live.parent.rename(away)
    away.rename(live.parent)
    append(live, 5)
    async with running(store, live):
        assert ports(await wait_for(store, 5)) == [1, 2, 3, 4, 5]
    assert (await find_events(store, EventFilter(kind="eve.replaced"))).items == ()


async def test_another_device_number_doubles_nothing(store: Store, live: Path) -> None:
    """As after a reboot. A real one can't be had here, so the bookmark is given another."""
    append(live, 1, 2)
    async with running(store, live):
        await wait_for(store, 2)
    await store.write_alerts(
        lambda write: write.db.execute("UPDATE bookmarks SET device = device + 1")
    )
    append(live, 3)
    async with running(store, live, grace_seconds=0.1):
        assert ports(await wait_for(store, 3)) == [1, 2, 3]
        await asyncio.sleep(0.3)
    assert (await find_events(store, EventFilter(kind="eve."))).items == ()


async def test_an_inode_that_is_used_again_after_a_kill_is_no_replaced_file(
    store: Store, live: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader ends right after it removed a drained file, and the inode is used again.

    Where the disk gives inodes away, only it knows; the bookmark is given that of the next file.
    """

    def remove(path: Path, *arguments: Any) -> bool:
        path.unlink()
        raise OSError("the process ends here")

    append(live, *range(1, 10))
    rotated = live.rename(live.parent / "eve.json.17")
    append(live, 10)
    with monkeypatch.context() as patch:
        patch.setattr("appliance.alerts.ingest.remove_rotated", remove)
        async with running(store, live, grace_seconds=0.0):
            await wait_for(store, 10)
            await wait_gone(rotated)
    live.rename(live.parent / "eve.json.18")
    append(live, 11)
    status = live.stat()
    await store.write_alerts(
        lambda write: write.db.execute(
            "UPDATE bookmarks SET inode = ? WHERE generation = 1", (str(status.st_ino),)
        )
    )
    async with running(store, live):
        assert ports(await wait_for(store, 11)) == list(range(1, 12))
    assert (await find_events(store, EventFilter(kind="eve."))).items == ()


async def test_what_is_written_while_the_bookmark_is_finished_is_stored(
    store: Store, live: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append(live, 1)
    rotated = live.rename(live.parent / "eve.json.17")
    append(live, 3)

    def finish(*arguments: Any) -> None:
        if rotated.stat().st_size < 2 * len(render_eve(src_port=1)):
            append(rotated, 2)
        finish_lane_file(*arguments)

    monkeypatch.setattr("appliance.alerts.ingest.finish_lane_file", finish)
    async with running(store, live, grace_seconds=0.0):
        assert sorted(map(str, ports(await wait_for(store, 3)))) == ["1", "2", "3"]
        await wait_gone(rotated)


async def test_a_superseded_bookmark_does_not_come_back(store: Store, live: Path) -> None:
    append(live, 1, 2)
    async with running(store, live):
        await wait_for(store, 2)
        os.truncate(live, 0)
        append(live, 7, 8, 9)
        await wait_for(store, 5)
    open_ones = await store.write_alerts(
        lambda write: [
            row["generation"]
            for row in write.db.query("SELECT generation FROM bookmarks WHERE finished_at IS NULL")
        ]
    )
    assert open_ones == [2]


async def test_bookmarks_of_files_that_are_gone_do_not_pile_up(store: Store, live: Path) -> None:
    append(live, 0)
    async with running(store, live, grace_seconds=0.0) as ingest:
        for number in range(1, 40):
            rotated = live.rename(live.parent / f"eve.json.{number}")
            append(live, number)
            await wait_gone(rotated)
        await wait_for(store, 40)
        (tail,) = ingest._tails
        assert len(tail.bookmarks) <= 20
        assert len(tail.finished) <= 20


async def test_a_bookmark_that_cannot_be_stored_takes_its_alerts_with_it(
    store: Store, live: Path
) -> None:
    refuse = (
        "CREATE TRIGGER refuse BEFORE INSERT ON bookmarks WHEN new.offset > 0"
        " BEGIN SELECT RAISE(ABORT, 'refused'); END"
    )
    await store.write_alerts(lambda write: write.db.execute(refuse))
    append(live, 1, 2, 3)
    async with running(store, live) as ingest:
        await wait_until(lambda: "refused" in ingest.status()[0].fault)
        assert await read_all(store) == []
        await store.write_alerts(lambda write: write.db.execute("DROP TRIGGER refuse"))
        assert ports(await wait_for(store, 3)) == [1, 2, 3]


async def test_a_file_that_cannot_be_read_is_a_fault_and_the_others_go_on(
    store: Store, live: Path
) -> None:
    append(live, 1)
    bad = live.parent / "eve.json.5"
    bad.symlink_to("/etc/hostname")
    async with running(store, live) as ingest:
        await wait_for(store, 1)
        assert "eve.json.5" in ingest.status()[0].fault
        bad.unlink()
        append(live, 2)
        await wait_for(store, 2)
        await wait_until(lambda: not ingest.status()[0].fault)
    kinds = {event.kind for event in (await find_events(store, EventFilter())).items}
    assert kinds == {"ingest.fault", "ingest.recovered"}


async def limit_pages(store: Store, pages: int) -> None:
    pragma = f"PRAGMA max_page_count = {pages}"
    await store.write_alerts(lambda write: write.db.execute(pragma).fetchall())


async def test_a_full_disk_delays_alerts_and_loses_none(store: Store, live: Path) -> None:
    append(live, 1)
    async with running(store, live) as ingest:
        await wait_for(store, 1)
        await limit_pages(store, 40)
        append(live, *range(2, 802))
        await wait_until(lambda: "full" in ingest.status()[0].fault)
        assert len(await read_all(store)) < 801
        await limit_pages(store, 1_000_000)
        assert ports(await wait_for(store, 801)) == list(range(1, 802))
        await wait_until(lambda: not ingest.status()[0].fault)
    assert (await find_events(store, EventFilter(kind="ingest.recovered"))).items


async def test_a_failing_attribution_still_stores_the_alert(store: Store, live: Path) -> None:
    def fail(lane: Lane, at: float) -> Context:
        raise LookupError("no context yet")

    append(live, 1)
    ingest = Ingest(store, {PREVENT: live}, fail, decide, poll_seconds=0.01)
    task = asyncio.create_task(ingest.run())
    (alert,) = await wait_for(store, 1)
    task.cancel()
    assert alert.reasons == ("attribution failed: LookupError: no context yet",)
    assert alert.source.address == "10.9.0.1"


async def test_lanes_are_read_side_by_side(store: Store, tmp_path: Path) -> None:
    files = {lane: tmp_path / lane.name / "eve.json" for lane in LANES}
    ingest = Ingest(store, files, find_context, decide, poll_seconds=0.01)
    task = asyncio.create_task(ingest.run())
    for number, path in enumerate(files.values(), 1):
        append(path, number)
    alerts = await wait_for(store, 2)
    task.cancel()
    assert {(alert.lane, alert.source.port) for alert in alerts} == {("prevent", 1), ("detect", 2)}


async def watch_from(
    store: Store, after: int, ingest: Ingest, wanted: AlertFilter | None = None, limit: int = 200
) -> AsyncIterator[Alert]:
    """What the live stream does: read on, and wait where nothing is left."""
    while True:
        alerts, last = await find_alerts_after(store, after, wanted, limit=limit)
        for alert in alerts:
            yield alert
        if last == after:
            await ingest.wait_newer(after)
        after = last


async def test_watching_gives_each_alert_once_also_after_a_resume(store: Store, live: Path) -> None:
    append(live, *range(1, 6))
    async with running(store, live) as ingest:
        await wait_for(store, 5)
        watch = watch_from(store, 2, ingest, limit=2)
        seen = [await anext(watch) for _ in range(3)]
        asyncio.get_running_loop().call_later(0.1, append, live, 6, 7)
        async with asyncio.timeout(5):
            seen += [await anext(watch) for _ in range(2)]
        await watch.aclose()
    assert [alert.id for alert in seen] == [3, 4, 5, 6, 7]


async def test_a_watch_with_a_filter_waits_beyond_what_the_filter_held_back(
    store: Store, live: Path
) -> None:
    append(live, 1, 2)
    async with running(store, live) as ingest:
        await wait_for(store, 2)
        watch = watch_from(store, 0, ingest, AlertFilter(address="10.66.0.1"))
        assert await find_alerts_after(store, 0, AlertFilter(address="10.66.0.1")) == ((), 2)
        found = asyncio.ensure_future(anext(watch))
        await asyncio.sleep(0.1)
        assert not found.done()
        with live.open("ab") as file:
            file.write(render_eve(src_ip="10.66.0.1") + b"\n")
        async with asyncio.timeout(5):
            assert (await found).id == 3
        await watch.aclose()


async def test_a_burst_is_stored_within_seconds(store: Store, live: Path) -> None:
    append(live, *range(1, 4001))
    begun = time.monotonic()
    async with running(store, live) as ingest:
        async with asyncio.timeout(30):
            assert await ingest.wait_newer(3999) == 4000
    assert time.monotonic() - begun < 15


async def test_the_store_going_away_is_a_fault_not_an_end(tmp_path: Path, live: Path) -> None:
    """A fake stands in for a disk that fails at once, which no real one does on demand."""

    class Broken(Store):
        broken = True

        async def write_alerts(self, change: Any) -> Any:
            if self.broken:
                raise StoreError("disk I/O error")
            return await super().write_alerts(change)

    store = Broken(tmp_path / "hairpin.db")
    append(live, 1)
    async with running(store, live) as ingest:
        await asyncio.sleep(0.1)
        assert ingest.status()[0].fault == "disk I/O error"
        store.broken = False
        await wait_for(store, 1)
    store.close()
