"""Client of an engine's command socket (Suricata, chapter "Interacting via Unix Socket").

JSON, one message a line (protocol 0.2). Every exchange is bounded in size and time, and what comes
back is parsed before anything believes it: a reload that answers `done` may have loaded nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import socket
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, TypeAdapter, ValidationError

from appliance.inspection.publish import EngineCounters
from steering.errors import HairpinError

PROTOCOL_VERSION = "0.2"
REPLY_LIMIT = 8 * 2**20
"""Longest reply taken, in bytes; 20,000 failed rules fit."""
FULL_SECONDS = 0.02
"""Between two tries to connect to an engine whose backlog is full."""


class EngineSilent(HairpinError):
    """The engine's command socket is missing, refuses, or did not answer in time."""


class EngineRefused(HairpinError):
    """The engine answered, with a refusal or with something that can't be understood."""


@dataclass(frozen=True, slots=True)
class FailedRule:
    """A rule the engine could not load, and why. `sid` is 0 when the rule shows none."""

    sid: int
    rule: str
    error: str


@dataclass(frozen=True, slots=True)
class RulesetStats:
    rules_loaded: int
    rules_failed: int


@dataclass(frozen=True, slots=True)
class ReloadReport:
    """A reload as the engine tells it. The times are the engine's own text, compared only."""

    reload_time_before: str
    reload_time_after: str
    rules_loaded: int
    rules_failed: int
    failed: tuple[FailedRule, ...]


class _Stats(BaseModel):
    rules_loaded: int
    rules_failed: int


class _Failed(BaseModel):
    rule: str = ""
    error: str = ""


class _ReloadTime(BaseModel):
    last_reload: str


class _Ips(BaseModel):
    accepted: int = 0
    blocked: int = 0
    rejected: int = 0
    replaced: int = 0
    drop_reason: dict[str, int] = {}


class _Decoder(BaseModel):
    pkts: int = 0
    invalid: int = 0
    max_pkt_size: int = 0


class _Counters(BaseModel):
    ips: _Ips
    decoder: _Decoder


_COUNTERS = TypeAdapter(_Counters)
_STATS = TypeAdapter(list[_Stats])
_FAILED = TypeAdapter(list[_Failed])
_RELOAD_TIMES = TypeAdapter(list[_ReloadTime])


def _understand(adapter: TypeAdapter[Any], message: object, command: str) -> Any:
    try:
        return adapter.validate_python(message)
    except ValidationError as fault:
        raise EngineRefused(
            f"the engine's answer to `{command}` can't be understood: {fault.error_count()} faults"
        ) from fault


def parse_reply(line: bytes, command: str) -> object:
    """The message of one reply. Raises EngineRefused for a refusal or nonsense."""
    try:
        reply = json.loads(line)
    except (ValueError, RecursionError) as fault:
        raise EngineRefused(f"the engine's answer to `{command}` is not JSON") from fault
    if not isinstance(reply, dict) or reply.get("return") != "OK":
        told = reply.get("message") if isinstance(reply, dict) else reply
        raise EngineRefused(f"the engine refused `{command}`: {str(told)[:300]}")
    return reply.get("message")


def parse_ruleset_stats(message: object) -> RulesetStats:
    tenants = _understand(_STATS, message, "ruleset-stats")
    return RulesetStats(
        sum(tenant.rules_loaded for tenant in tenants),
        sum(tenant.rules_failed for tenant in tenants),
    )


def parse_failed_rules(message: object) -> tuple[FailedRule, ...]:
    return tuple(
        FailedRule(
            int(sid[1]) if (sid := re.search(r"\bsid\s*:\s*(\d{1,10})", failed.rule)) else 0,
            failed.rule,
            failed.error,
        )
        for failed in _understand(_FAILED, message, "ruleset-failed-rules")
    )


def parse_reload_time(message: object) -> str:
    times = _understand(_RELOAD_TIMES, message, "ruleset-reload-time")
    return ",".join(time.last_reload for time in times)


def parse_counters(message: object, pid: int, started: float, now: float) -> EngineCounters:
    """What `dump-counters` tells of packets; `pid` and `started` are the engine's, `now` the epoch."""
    seen = _understand(_COUNTERS, message, "dump-counters")
    return EngineCounters(
        pid=pid,
        started=started,
        at=now,
        packets=seen.decoder.pkts,
        accepted=seen.ips.accepted,
        blocked=seen.ips.blocked,
        rejected=seen.ips.rejected,
        replaced=seen.ips.replaced,
        invalid=seen.decoder.invalid,
        queue_errors=seen.ips.drop_reason.get("nfq_error", 0),
        largest_packet=seen.decoder.max_pkt_size,
        drop_reasons={reason: count for reason, count in seen.ips.drop_reason.items() if count},
    )


def check_reload(
    report: ReloadReport, floor: int, known_failed: Collection[int] = ()
) -> tuple[str, ...]:
    """Why a reload must not be trusted, each a sentence; empty when it may be.

    `floor` is the least number of rules, `known_failed` the sids already known not to load here. A
    reload of a broken, empty or missing file answers `done` and leaves an engine without rules.
    """
    faults: list[str] = []
    if report.reload_time_after == report.reload_time_before:
        faults.append("the engine's reload time did not change")
    if report.rules_loaded < floor:
        faults.append(f"{report.rules_loaded} rules loaded, fewer than the floor of {floor}")
    fresh = [failed for failed in report.failed if failed.sid not in known_failed]
    if fresh:
        named = ", ".join(str(failed.sid) for failed in fresh[:10])
        faults.append(f"{len(fresh)} rules failed that loaded before (sid {named})")
    elif report.rules_failed > len(report.failed):
        faults.append(
            f"{report.rules_failed} rules failed, of which the engine names {len(report.failed)}"
        )
    return tuple(faults)


async def _connect(path: Path) -> socket.socket:
    """Connected, however long the engine takes to accept others first. Raises OSError.

    An engine that loads rules accepts nobody for seconds, and two fill its backlog. connect(2) says EAGAIN
    then, and nothing is under way; asyncio takes it for EINPROGRESS, and the first write is told
    "Connection lost".
    """
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
    try:
        while True:
            try:
                link.connect(str(path))
            except BlockingIOError:
                await asyncio.sleep(FULL_SECONDS)
            else:
                return link
    except BaseException:
        link.close()
        raise


class EngineSocket:
    """One engine's command socket; a connection of its own for every command.

    Every method raises EngineSilent or EngineRefused.
    """

    def __init__(self, path: Path, limit: float = 5.0) -> None:
        """`limit` is how long each command may take, in seconds."""
        self.path = path
        self.limit = limit

    async def run_command(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        limit: float | None = None,
    ) -> object:
        """The engine's message in answer to one command."""
        limit = self.limit if limit is None else limit
        try:
            async with asyncio.timeout(limit):
                return await self._exchange(command, arguments)
        except TimeoutError as fault:
            raise EngineSilent(
                f"the engine at {self.path} did not answer `{command}` in {limit:g} s"
            ) from fault
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError) as fault:
            raise EngineSilent(
                f"the engine at {self.path} can't be reached for `{command}`: {fault}"
            ) from fault

    async def _exchange(self, command: str, arguments: Mapping[str, object] | None) -> object:
        link = await _connect(self.path)
        reader, writer = await asyncio.open_unix_connection(sock=link, limit=REPLY_LIMIT)
        try:
            await self._send(writer, {"version": PROTOCOL_VERSION})
            parse_reply(await reader.readuntil(b"\n"), "version")
            request: dict[str, object] = {"command": command}
            if arguments:
                request["arguments"] = dict(arguments)
            await self._send(writer, request)
            return parse_reply(await reader.readuntil(b"\n"), command)
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    @staticmethod
    async def _send(writer: asyncio.StreamWriter, message: Mapping[str, object]) -> None:
        writer.write(json.dumps(message).encode() + b"\n")
        await writer.drain()

    async def read_uptime(self, limit: float | None = None) -> int:
        """Seconds since the engine started."""
        uptime = await self.run_command("uptime", limit=limit)
        if not isinstance(uptime, int):
            raise EngineRefused("the engine's answer to `uptime` is not a number")
        return uptime

    async def read_ruleset_stats(self, limit: float | None = None) -> RulesetStats:
        return parse_ruleset_stats(await self.run_command("ruleset-stats", limit=limit))

    async def read_failed_rules(self) -> tuple[FailedRule, ...]:
        return parse_failed_rules(await self.run_command("ruleset-failed-rules"))

    async def read_reload_time(self) -> str:
        return parse_reload_time(await self.run_command("ruleset-reload-time"))

    async def read_counters(self) -> dict[str, object]:
        """The engine's counters. Refused by the engine in its first seconds."""
        counters = await self.run_command("dump-counters")
        if not isinstance(counters, dict):
            raise EngineRefused("the engine's answer to `dump-counters` is not an object")
        return counters

    async def reopen_log_files(self) -> None:
        """Make the engine open its log files anew, after one was renamed."""
        await self.run_command("reopen-log-files")

    async def shutdown(self) -> None:
        await self.run_command("shutdown")


async def reload_rules(path: Path, limit: float = 300.0) -> ReloadReport:
    """Load the lane's ruleset anew in the running engine, and wait until it has.

    `path` is the command socket, `limit` in seconds. Traffic is inspected by the old rules until the
    new ones are in force. Judge the report with `check_reload`. Raises EngineSilent, EngineRefused.
    """
    engine = EngineSocket(path)
    before = await engine.read_reload_time()
    await engine.run_command("ruleset-reload-rules", limit=limit)
    stats = await engine.read_ruleset_stats()
    return ReloadReport(
        reload_time_before=before,
        reload_time_after=await engine.read_reload_time(),
        rules_loaded=stats.rules_loaded,
        rules_failed=stats.rules_failed,
        failed=await engine.read_failed_rules(),
    )
