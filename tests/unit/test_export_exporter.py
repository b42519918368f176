"""The exporter against plain sockets: the cursor, repetition, and receivers that go away."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import sqlite3
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.alerts.history import load_cursor
from appliance.alerts.query import EventFilter, find_events
from appliance.export.exporter import Exporter, State, find_delay
from appliance.export.transport import Receiver, TransportError, open_connection
from appliance.settings import SyslogExport
from tests.support.export import Alerts
from tests.support.waiting import wait_until


class Peer:
    """A receiver of octet-counted messages that does as told. ``ids`` are what it was sent."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.connections = 0
        self.close_after: int | None = None
        self.half_close_after: int | None = None
        self.port = 0
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in self._writers:
            writer.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                length = int(await reader.readuntil(b" "))
                message = await reader.readexactly(length)
                self.ids.append(json.loads(message[message.index(b"{") :])["hairpin"]["id"])
                if self.close_after == len(self.ids):
                    break
                if self.half_close_after == len(self.ids):
                    writer.write_eof()
        self._writers.discard(writer)
        writer.close()


@pytest.fixture
async def peer() -> AsyncIterator[Peer]:
    peer = Peer()
    await peer.start()
    yield peer
    await peer.stop()


@pytest.fixture
async def alerts(tmp_path: Path) -> AsyncIterator[Alerts]:
    alerts = Alerts(tmp_path / "hairpin.db")
    yield alerts
    alerts.store.close()


@contextlib.asynccontextmanager
async def running(alerts: Alerts, peer: Peer, settle: float = 0.2) -> AsyncIterator[Exporter]:
    exporter = Exporter(
        SyslogExport(name="siem", transport="tcp", host="127.0.0.1", port=peer.port),
        alerts.store,
        "lab",
        alerts.wait_newer,
        settle_seconds=settle,
        backoff_seconds=(0.02, 0.1),
    )
    task = asyncio.create_task(exporter.run())
    try:
        yield exporter
        assert not task.done()
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task


async def read_cursor(alerts: Alerts) -> int:
    return await alerts.store.read(lambda db: load_cursor(db, "siem"))


async def test_alerts_arrive_in_order_once_and_the_cursor_follows(
    alerts: Alerts, peer: Peer
) -> None:
    await alerts.add(450)
    async with running(alerts, peer) as exporter:
        await wait_until(lambda: exporter.status().delivered_id == 450)
        await alerts.add(3)
        await wait_until(lambda: exporter.status().delivered_id == 453)
        status = exporter.status()
    assert peer.ids == list(range(1, 454))
    assert await read_cursor(alerts) == 453
    assert (status.state, status.backlog, status.last_sent_id) == (State.CONNECTED, 0, 453)
    assert (status.sent, status.repeated, status.last_error) == (453, 0, "")
    assert exporter.status().state is State.STOPPED


async def test_the_cursor_waits_until_the_connection_has_settled(
    alerts: Alerts, peer: Peer
) -> None:
    await alerts.add(5)
    async with running(alerts, peer, settle=30) as exporter:
        await wait_until(lambda: len(peer.ids) == 5)
        await asyncio.sleep(0.1)
        assert (exporter.status().delivered_id, exporter.status().backlog) == (0, 5)
    assert await read_cursor(alerts) == 0
    async with running(alerts, peer):
        await wait_until(lambda: len(peer.ids) == 10)
    assert peer.ids == [1, 2, 3, 4, 5] * 2


@pytest.mark.parametrize("how", ["close_after", "half_close_after"])
async def test_what_a_receiver_took_just_before_it_closed_is_sent_again(
    alerts: Alerts, peer: Peer, how: str
) -> None:
    setattr(peer, how, 5)
    await alerts.add(10)
    async with running(alerts, peer) as exporter:
        await wait_until(lambda: exporter.status().delivered_id == 10)
        assert exporter.status().repeated == 10
    assert peer.connections == 2
    assert peer.ids[-10:] == list(range(1, 11))
    assert "connection" in exporter.status().last_error


async def test_an_absent_receiver_is_waited_for(alerts: Alerts, peer: Peer) -> None:
    await peer.stop()
    await alerts.add(2)
    async with running(alerts, peer) as exporter:
        await wait_until(lambda: exporter.status().state is State.WAITING)
        assert "can't be reached" in exporter.status().last_error
        assert exporter.status().backlog == 2
        await peer.start()
        await wait_until(lambda: exporter.status().delivered_id == 2)


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """A receiver whose kernel takes a little, and which never reads."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    yield listener
    listener.close()


async def test_what_the_receiver_does_not_take_is_not_acknowledged(silent: socket.socket) -> None:
    connection = await open_connection(Receiver("127.0.0.1", silent.getsockname()[1], tls=False))
    try:
        await connection.send(b"x" * 100, 2)
        assert connection.count_unacknowledged() == 0
        with pytest.raises(TransportError, match="did not take"):
            await connection.send(b"x" * 8_000_000, 0.3)
        assert connection.count_unacknowledged() > 0
    finally:
        await connection.close()


async def test_a_reset_is_told(silent: socket.socket) -> None:
    connection = await open_connection(Receiver("127.0.0.1", silent.getsockname()[1], tls=False))
    accepted, _ = silent.accept()
    await connection.send(b"unread", 2)
    accepted.close()  # with bytes unread, the kernel resets
    with pytest.raises(TransportError, match=r"broke|closed|lost"):
        await connection.send(b"x", 2)
    await connection.close()


@given(st.integers(0, 10_000), st.floats(0, 1))
def test_pauses_grow_within_their_bounds(failures: int, fraction: float) -> None:
    delay = find_delay(failures, fraction, (0.5, 30.0))
    assert 0.25 <= delay <= 30.0
    assert find_delay(failures + 1, fraction, (0.5, 30.0)) >= delay


def damage(alerts: Alerts, partition: int, sql: str) -> None:
    with contextlib.closing(sqlite3.connect(alerts.store.partitions[partition].path)) as db, db:
        assert db.execute(sql).rowcount


async def find_skips(alerts: Alerts) -> list[tuple[int, int]]:
    page = await find_events(alerts.store, EventFilter(kind="export.skipped"))
    assert all(one.severity == "error" and one.subject == "siem" for one in page.items)
    return sorted((one.detail["first"], one.detail["last"]) for one in page.items)


@pytest.mark.parametrize(
    ("sql", "lost"),
    [
        ("UPDATE chunks SET data = x'00' WHERE first = 33", range(33, 34)),
        ("UPDATE chunks SET data = substr(data, 9) WHERE first > 30 AND first < 99", range(31, 99)),
        ("UPDATE alerts SET blocked = 9, lane = 1, detail = '{' WHERE id = 40", range(40, 41)),
        ("DROP TABLE alerts", range(1, 301)),
    ],
)
async def test_what_is_damaged_in_an_old_partition_is_left_out_and_told_once(
    alerts: Alerts, peer: Peer, sql: str, lost: range
) -> None:
    await alerts.add(300)
    await alerts.store.roll()
    await alerts.add(50)
    if sql.startswith("DROP"):
        path = alerts.store.partitions[0].path
        with contextlib.closing(sqlite3.connect(path)) as db, db:
            db.execute(sql)
    else:
        damage(alerts, 0, sql)
    async with running(alerts, peer) as exporter:
        await wait_until(lambda: exporter.status().delivered_id == 350, 30)
        assert exporter.status().skipped == len(lost)
        assert exporter.status().state is State.CONNECTED
    assert peer.ids == [number for number in range(1, 351) if number not in lost]
    assert await find_skips(alerts) == [(lost[0], lost[-1])]
    async with running(alerts, peer) as exporter:
        await wait_until(lambda: exporter.status().delivered_id == 350, 30)
    assert await find_skips(alerts) == [(lost[0], lost[-1])]


async def test_a_loss_is_told_once_though_the_receiver_went_away(
    alerts: Alerts, peer: Peer
) -> None:
    await alerts.add(300)
    await alerts.store.roll()
    await alerts.add(50)
    damage(alerts, 0, "UPDATE chunks SET data = x'00' WHERE first > 32 AND first < 65")
    peer.close_after = 310
    async with running(alerts, peer) as exporter:
        await wait_until(lambda: exporter.status().delivered_id == 350, 30)
    assert set(peer.ids) == set(range(1, 351)) - set(range(33, 65))
    assert peer.connections > 1
    assert await find_skips(alerts) == [(33, 64)]


async def test_damage_in_the_youngest_partition_holds_the_cursor(
    alerts: Alerts, peer: Peer
) -> None:
    await alerts.add(100)
    damage(alerts, -1, "UPDATE chunks SET data = x'00' WHERE first = 33")
    async with running(alerts, peer) as exporter:
        await wait_until(lambda: "damaged" in exporter.status().last_error)
        assert (exporter.status().delivered_id, exporter.status().skipped) == (0, 0)
    assert await find_skips(alerts) == []
