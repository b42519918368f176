"""`inspect` makes probes on request: the Unix socket that `serve` asks on.

The socket belongs to the owner of `stateDir`, the management service, and is closed to everybody
else. Every request is bounded in size, time and number; one probe at a time for each lane.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable

import structlog
from pydantic import ValidationError

from appliance.inspection.canary_client import (
    REQUEST_LIMIT,
    ProbeReport,
    ProbeRequest,
)
from appliance.inspection.canary_door import run_probe
from appliance.inspection.netfilter import QueueCounters
from appliance.settings import Settings
from steering.errors import HairpinError

log = structlog.get_logger("inspection.canary")

WAITING_LIMIT = 8
"""Requests that may be open at once; one more is refused."""
READ_LIMIT = 2.0
"""Seconds that a client has to say what it wants."""
RETRY = 2.0


class CanaryService:
    """Answers on the socket until cancelled; `note` is told of what forbids it, "" when nothing does."""

    def __init__(
        self,
        settings: Settings,
        read_counters: Callable[[], tuple[QueueCounters, ...]],
        note: Callable[[str, str], None],
    ) -> None:
        self.settings = settings
        self.path = settings.canary_socket
        self.lanes = {lane.name: lane for lane in settings.build_lanes()}
        self._locks = {name: asyncio.Lock() for name in self.lanes}
        self._read_counters = read_counters
        self._note = note
        self._open = 0

    async def run(self) -> None:
        """Serve until cancelled; a socket that can't be made is tried again."""
        while True:
            try:
                listener = open_listener(self.settings)
            except OSError as fault:
                self._note(f"no canary socket at {self.path}: {fault.strerror}", "see the path")
                await asyncio.sleep(RETRY)
                continue
            self._note("", "")
            server = await asyncio.start_unix_server(
                self._serve, sock=listener, limit=REQUEST_LIMIT
            )
            try:
                await server.serve_forever()
            finally:
                # Not waited for: a probe that runs ends by itself within its seconds.
                server.close()
                self.path.unlink(missing_ok=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        try:
            report = await self._answer(reader)
            writer.write(report.model_dump_json().encode() + b"\n")
            async with asyncio.timeout(READ_LIMIT):
                await writer.drain()
        except (OSError, TimeoutError):
            pass  # the client went away; nobody is there to be told
        finally:
            self._open -= 1
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader) -> ProbeReport:
        if self._open > WAITING_LIMIT:
            return _refuse(f"{WAITING_LIMIT} probes are asked for already; ask again later")
        try:
            async with asyncio.timeout(READ_LIMIT):
                line = await reader.readuntil(b"\n")
            request = ProbeRequest.model_validate_json(line)
        except TimeoutError:
            return _refuse(f"no request within {READ_LIMIT:g} s")
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            return _refuse(f"no line of at most {REQUEST_LIMIT} bytes")
        except ValidationError as fault:
            first = fault.errors()[0]
            return _refuse(f"not a request: {first['loc']}: {first['msg']}")
        lane = self.lanes.get(request.lane)
        if lane is None:
            return _refuse(f"there is no lane `{request.lane[:64]}`")
        async with self._locks[lane.name]:
            try:
                return await asyncio.to_thread(
                    run_probe, lane, self.settings.canary.device, request, self._read_counters
                )
            except (HairpinError, OSError) as fault:
                log.error("canary failed", lane=lane.name, reason=str(fault))
                return _refuse(str(fault))


def open_listener(settings: Settings) -> socket.socket:
    """The listening socket, closed to all but the owner of `stateDir`. Raises OSError."""
    path = settings.canary_socket
    owner = os.stat(settings.state_dir)
    path.unlink(missing_ok=True)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # Before it has a name: there is no moment in which others could connect (unix(7)).
        os.fchmod(listener.fileno(), 0o600)
        listener.bind(str(path))
        os.chown(path, owner.st_uid, owner.st_gid, follow_symlinks=False)
        listener.listen(WAITING_LIMIT)
    except OSError:
        listener.close()
        raise
    return listener


def _refuse(reason: str) -> ProbeReport:
    return ProbeReport(lane="", probe="", fault=reason)
