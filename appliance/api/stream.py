"""Alerts as they come, as server-sent events (HTML standard, section 9.2), with resume.

The store is the queue: what a client has not read yet is read again from there by id, so a slow
client costs no memory beyond one batch and the socket's own bounded buffer. A client that does not
take a batch within ``write_seconds`` is cut and resumes by Last-Event-ID when it comes back.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
from dataclasses import dataclass

import structlog
from aiohttp import web

from appliance.api.control import Control, Unavailable
from appliance.api.documents import Alert
from appliance.api.problems import Refused, build_error_problem, build_problem
from appliance.api.queries import EVENT_ID_PATTERN, AlertFilter, AlertStreamQuery
from steering.errors import HairpinError

log = structlog.get_logger("api")

_EVENT_ID = re.compile(EVENT_ID_PATTERN, re.ASCII)
_BATCH = 100


@dataclass(frozen=True, slots=True)
class StreamLimits:
    """Bounds of the live stream. ``longest_seconds`` None: as long as the client stays."""

    heartbeat_seconds: float = 15.0
    write_seconds: float = 10.0
    clients: int = 32
    longest_seconds: float | None = None


class Streams:
    """The live streams of one server: how many there are, and that all must end."""

    def __init__(self, limits: StreamLimits) -> None:
        self.limits = limits
        self._open = 0
        self._closing = asyncio.Event()

    def close(self) -> None:
        """Let every stream end now, so that the server can stop."""
        self._closing.set()

    async def run(
        self, request: web.Request, control: Control, query: AlertStreamQuery
    ) -> web.StreamResponse:
        """Send alerts to one client until it goes, is too slow, or the server stops."""
        after = parse_event_id(request.headers.get("Last-Event-ID"), query.after)
        if self._open >= self.limits.clients or self._closing.is_set():
            raise Unavailable(
                f"{self._open} clients watch already", "close one of them or try again later"
            )
        self._open += 1
        try:
            # What comes while the client is being answered must not be missed: the position first.
            newest = (await control.read_alerts_after(None, query, 0)).last
            # An id of the future is of another database: nothing would ever come after it.
            position = newest if after is None else min(after, newest)
            response = web.StreamResponse(
                headers={"Content-Type": "text/event-stream", "Cache-Control": "no-store"}
            )
            await response.prepare(request)
            with contextlib.suppress(ConnectionError):
                async with asyncio.timeout(self.limits.longest_seconds):
                    await self._send_all(response, request, control, query, position)
        except TimeoutError:
            pass  # as long as a stream may last; the client takes it up again
        finally:
            self._open -= 1
        return response

    async def _send_all(
        self,
        response: web.StreamResponse,
        request: web.Request,
        control: Control,
        wanted: AlertFilter,
        position: int,
    ) -> None:
        await self._write(response, request, render_position(position))
        try:
            while not self._closing.is_set():
                batch = await control.read_alerts_after(position, wanted, _BATCH)
                if batch.alerts:
                    events = "".join(render_event(alert) for alert in batch.alerts)
                    await self._write(response, request, events)
                if batch.last > position:
                    position = batch.last
                elif not await self._wait(control, position):
                    await self._write(response, request, render_position(position))
        except HairpinError as fault:
            problem = build_error_problem(fault, had_body=False)
        except (ConnectionError, TimeoutError):
            raise
        except Exception:
            # The answer has begun, so it's too late for a status: the last event tells it.
            log.exception("stream failed by a fault of the program")
            problem = build_problem(500, "a fault of the program")
        else:
            return
        text = f"event: problem\ndata: {problem.model_dump_json()}\n\n"
        await self._write(response, request, text)

    async def _wait(self, control: Control, position: int) -> bool:
        """Whether something came within a heartbeat."""
        tasks = [
            asyncio.ensure_future(control.wait_for_alerts(position)),
            asyncio.ensure_future(self._closing.wait()),
        ]
        try:
            done, _ = await asyncio.wait(
                tasks,
                timeout=self.limits.heartbeat_seconds,
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in done:
            task.result()  # raises what the wait met, which else would be met again at once
        return bool(done)

    async def _write(self, response: web.StreamResponse, request: web.Request, text: str) -> None:
        try:
            async with asyncio.timeout(self.limits.write_seconds):
                await response.write(text.encode())
        except TimeoutError:
            log.warning("slow client cut", client=request.remote)
            if request.transport is not None:
                request.transport.abort()
            raise ConnectionResetError("slow client cut") from None


def parse_event_id(header: str | None, after: int | None) -> int | None:
    """Where to resume: the header that clients send by themselves goes before the query."""
    if header is None:
        return after
    if not _EVENT_ID.fullmatch(header):
        raise Refused(400, "Last-Event-ID is not the id of an alert", "leave it out to start now")
    return int(header)


def render_event(alert: Alert) -> str:
    """One alert as an event; JSON has no line break, so one `data` line holds it."""
    return f"id: {alert.id}\nevent: alert\ndata: {alert.model_dump_json()}\n\n"


def render_position(position: int) -> str:
    """A heartbeat; an event without data only moves the client's last event id."""
    return f": heartbeat\nid: {position}\n\n"
