"""The flow spool: each record once in the store, each drained file deleted, whenever the service is killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from appliance.alerts.history import find_rows
from appliance.alerts.store import Store
from appliance.alerts.tail import Bookmark, remove_rotated
from appliance.management import flows
from appliance.management.flows import GRACE_SECONDS, SPOOL, FlowIngest
from appliance.management.knowledge import Snapshot
from appliance.visibility.record import build_record, render_record
from tests.support.waiting import wait_until
from tests.unit.test_visibility_record import metered

LINE = render_record(build_record(metered()))
NOW = 2_000_000_000.0


async def run_until(store: Store, live: Path, done: Callable[[], Awaitable[object]]) -> None:
    """A service of its own, killed once that is so."""
    ingest = FlowIngest(store, live, lambda: Snapshot(0.0), dict, clock=lambda: NOW)
    task = asyncio.create_task(ingest.run())
    try:
        await wait_until(done)
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def read_bookmarks(store: Store) -> list[tuple[int, bool]]:
    rows = await store.read(
        lambda db: find_rows(db, "SELECT * FROM bookmarks WHERE lane = ?", (SPOOL,))
    )
    return [(int(row["offset"]), row["finished_at"] is not None) for row in rows]


async def count_flows(store: Store) -> int:
    rows = await store.read(lambda db: find_rows(db, "SELECT count(*) AS n FROM flow_records", ()))
    return int(rows[0]["n"])


@pytest.fixture
def spool(tmp_path: Path) -> Path:
    """A live file, and a rotated one of two lines that nobody writes to any more."""
    live = tmp_path / "flows.jsonl"
    live.write_bytes(b"")
    rotated = tmp_path / "flows.jsonl.1"
    rotated.write_bytes(LINE * 2)
    os.utime(rotated, (NOW - GRACE_SECONDS, NOW - GRACE_SECONDS))
    return live


@pytest.fixture
def rotated(spool: Path) -> Path:
    return spool.with_name("flows.jsonl.1")


async def test_a_bookmark_is_finished_before_its_file_goes(
    tmp_path: Path, spool: Path, rotated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "store.db")
    stood: list[list[tuple[int, bool]]] = []

    def remove(path: Path, live: Path, bookmark: Bookmark, size: int | None = None) -> bool:
        with contextlib.closing(store._open_reader().conn) as connection:
            row = "SELECT offset, finished_at IS NOT NULL FROM bookmarks WHERE generation = ?"
            stood.append(connection.execute(row, (bookmark.generation,)).fetchall())
        return remove_rotated(path, live, bookmark, size)

    monkeypatch.setattr(flows, "remove_rotated", remove)
    try:

        async def gone() -> bool:
            return not rotated.exists()

        await run_until(store, spool, gone)
        assert stood == [[(2 * len(LINE), 1)]]
        assert await count_flows(store) == 2
    finally:
        store.close()


async def test_killed_before_the_file_goes_nothing_is_read_twice(
    tmp_path: Path, spool: Path, rotated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A removal that is refused stands for the kill: no real part can be stopped between the two steps."""
    store = Store(tmp_path / "store.db")

    def refuse(path: Path, *_: object) -> bool:
        raise PermissionError(1, "not permitted", str(path))

    async def finished() -> bool:
        return (2 * len(LINE), True) in await read_bookmarks(store)

    async def gone() -> bool:
        return not rotated.exists()

    try:
        with monkeypatch.context() as broken:
            broken.setattr(flows, "remove_rotated", refuse)
            await run_until(store, spool, finished)
        assert rotated.exists()
        await run_until(store, spool, gone)
        assert await count_flows(store) == 2
        assert (2 * len(LINE), False) not in await read_bookmarks(store)
    finally:
        store.close()


async def test_what_is_written_to_a_finished_file_is_read_too(
    tmp_path: Path, spool: Path, rotated: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "store.db")

    def write_more(path: Path, live: Path, bookmark: Bookmark, size: int | None = None) -> bool:
        if bookmark.offset == 2 * len(LINE):  # once, between the last look and the removal
            with path.open("ab") as file:
                file.write(LINE)
            os.utime(path, (NOW - GRACE_SECONDS, NOW - GRACE_SECONDS))
        return remove_rotated(path, live, bookmark, size)

    monkeypatch.setattr(flows, "remove_rotated", write_more)

    async def gone() -> bool:
        return not rotated.exists()

    try:
        await run_until(store, spool, gone)
        assert await count_flows(store) == 3
        assert (3 * len(LINE), True) in await read_bookmarks(store)
    finally:
        store.close()
