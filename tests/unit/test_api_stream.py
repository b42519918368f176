"""The live stream of alerts: resume, filters, heartbeats, bounds, and the end."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import pytest

from appliance.api.server import open_server
from appliance.api.stream import StreamLimits
from steering.errors import SwitchError
from tests.support.api_samples import build_alert
from tests.support.api_server import ANY_PORT, TOKEN
from tests.support.fake_control import FakeControl

Event = dict[str, str]


@asynccontextmanager
async def open_stream(
    url: str, query: str = "", **headers: str
) -> AsyncIterator[AsyncIterator[Event]]:
    async with (
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {TOKEN}"}) as session,
        session.get(f"{url}/api/v1/alerts/stream{query}", headers=headers) as got,
    ):
        assert got.status == 200, await got.text()
        assert got.content_type == "text/event-stream"
        yield read_events(got)


async def read_events(got: aiohttp.ClientResponse) -> AsyncIterator[Event]:
    event: Event = {}
    async for line in got.content:
        text = line.decode().rstrip("\n")
        if text:
            name, _, value = text.partition(": ")
            event[name] = value
        else:
            yield event
            event = {}


async def find_end(reader: asyncio.StreamReader) -> int:
    """How many bytes were still on their way when the server cut the connection."""
    total = 0
    with contextlib.suppress(ConnectionError):
        while data := await asyncio.wait_for(reader.read(65536), 2):
            total += len(data)
    return total


async def find_alert(events: AsyncIterator[Event]) -> Any:
    async for event in events:
        if "data" in event:
            document = json.loads(event["data"])
            assert str(document["id"]) == event["id"]
            return document
    raise AssertionError("the stream ended")


async def test_only_what_comes_now_is_sent_without_a_position() -> None:
    control = FakeControl(alerts=3)
    async with open_server(control, ANY_PORT, TOKEN) as url, open_stream(url) as events:
        assert (await anext(events))["id"] == "3"
        control.add_alert()
        assert (await find_alert(events))["id"] == 4


@pytest.mark.parametrize(
    ("query", "headers"),
    [("", {"Last-Event-ID": "2"}), ("?after=2", {}), ("?after=0", {"Last-Event-ID": "2"})],
)
async def test_it_resumes_after_the_last_event(query: str, headers: dict[str, str]) -> None:
    control = FakeControl(alerts=250)
    async with (
        open_server(control, ANY_PORT, TOKEN) as url,
        open_stream(url, query, **headers) as events,
    ):
        assert [(await find_alert(events))["id"] for _ in range(248)] == list(range(3, 251))
        control.add_alert()
        assert (await find_alert(events))["id"] == 251


async def test_a_position_of_another_database_starts_now() -> None:
    control = FakeControl(alerts=3)
    async with (
        open_server(control, ANY_PORT, TOKEN) as url,
        open_stream(url, **{"Last-Event-ID": "999"}) as events,
    ):
        assert (await anext(events))["id"] == "3"
        control.add_alert()
        assert (await find_alert(events))["id"] == 4


async def test_a_filter_that_lets_nothing_pass_still_moves_on_and_stays_calm() -> None:
    control = FakeControl(alerts=0)
    reads = 0
    read = control.read_alerts_after

    async def count_reads(*args: Any) -> Any:
        nonlocal reads
        reads += 1
        return await read(*args)

    control.read_alerts_after = count_reads  # type: ignore[method-assign]
    limits = StreamLimits(heartbeat_seconds=0.1)
    async with (
        open_server(control, ANY_PORT, TOKEN, stream_limits=limits) as url,
        open_stream(url, "?verdict=allowed") as events,
    ):
        await anext(events)
        control.add_alert()
        beat = await anext(events)
        assert beat["id"] == "1"
        assert "data" not in beat
        control.add_alert()
        assert (await find_alert(events))["id"] == 2
        assert reads < 20


async def test_a_wrong_position_is_refused() -> None:
    async with (
        open_server(FakeControl(), ANY_PORT, TOKEN) as url,
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {TOKEN}"}) as session,
    ):
        for headers, query in (({"Last-Event-ID": "x"}, ""), ({}, "?after=-1"), ({}, "?limit=1")):
            async with session.get(f"{url}/api/v1/alerts/stream{query}", headers=headers) as got:
                assert got.status == 400


async def test_too_many_clients_are_told_to_come_back() -> None:
    limits = StreamLimits(clients=1)
    async with (
        open_server(FakeControl(), ANY_PORT, TOKEN, stream_limits=limits) as url,
        open_stream(url) as first,
        aiohttp.ClientSession(headers={"Authorization": f"Bearer {TOKEN}"}) as session,
    ):
        await anext(first)
        async with session.get(f"{url}/api/v1/alerts/stream") as got:
            assert got.status == 503
            assert "Retry-After" in got.headers


async def test_a_slow_client_is_cut_and_costs_a_bounded_buffer() -> None:
    control = FakeControl(alerts=1)
    big = build_alert(1).model_copy(update={"payload": "x" * 4096})
    control.alerts = [big.model_copy(update={"id": number}) for number in range(1, 20_001)]
    highest = 0
    read = control.read_alerts_after

    async def note_position(after: int | None, *args: Any) -> Any:
        nonlocal highest
        highest = max(highest, after or 0)
        return await read(after, *args)

    control.read_alerts_after = note_position  # type: ignore[method-assign]
    limits = StreamLimits(write_seconds=0.3)
    async with open_server(control, ANY_PORT, TOKEN, stream_limits=limits) as url:
        host, _, port = url.removeprefix("http://").partition(":")
        reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
        writer.write(
            b"GET /api/v1/alerts/stream?after=0 HTTP/1.1\r\nHost: x\r\n"
            + f"Authorization: Bearer {TOKEN}\r\n\r\n".encode()
        )
        await reader.readline()  # and then not a byte more
        await asyncio.sleep(1.5)
        assert 0 < highest < 20_000
        stopped_at = highest
        assert await find_end(reader) < 20_000 * 4096
        assert highest == stopped_at
        writer.close()


async def test_a_failure_ends_the_stream_with_a_problem() -> None:
    control = FakeControl(alerts=1)
    async with open_server(control, ANY_PORT, TOKEN) as url, open_stream(url) as events:
        await anext(events)
        control.fault = SwitchError("the store is gone")
        control.add_alert()
        last = await anext(events)
        assert last["event"] == "problem"
        assert json.loads(last["data"])["detail"] == "the store is gone"
        assert [event async for event in events] == []


async def test_a_wait_that_fails_ends_the_stream_and_tells_no_secrets() -> None:
    control = FakeControl(alerts=1)

    async def fail(after: int) -> None:
        raise RuntimeError("the password is sesame")

    control.wait_for_alerts = fail  # type: ignore[method-assign]
    async with open_server(control, ANY_PORT, TOKEN) as url, open_stream(url) as events:
        await anext(events)
        last = await anext(events)
        assert json.loads(last["data"])["status"] == 500
        assert "sesame" not in last["data"]


async def test_stopping_ends_the_streams_at_once() -> None:
    async with asyncio.timeout(3):
        server = open_server(FakeControl(), ANY_PORT, TOKEN)
        url = await server.__aenter__()
        async with open_stream(url) as events:
            await anext(events)
            await server.__aexit__(None, None, None)
            assert [event async for event in events] == []
