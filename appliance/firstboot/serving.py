"""The server that answers while nothing is configured: what is wrong, and nothing else.

Plain HTTP, since there may be no certificate; it has no secret, takes no token and changes nothing.
It runs only where first boot failed; where all is well the ordinary API has the port.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator

import structlog
from aiohttp import web

from appliance.api.documents import (
    ComponentHealth,
    Health,
    HealthComponents,
    HealthProblem,
    RulesHealth,
    build_time,
)
from appliance.api.problems import MEDIA_TYPE, build_problem
from appliance.api.routes import BASE, JSON
from appliance.firstboot.faults import FaultReport
from steering.errors import HairpinError

log = structlog.get_logger("firstboot")

HEALTH_PATHS = ("/health", f"{BASE}/health")
_BODY_LIMIT = 1024
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Server": "hairpin",
    "Connection": "close",
}


def build_fault_health(report: FaultReport) -> Health:
    """The same document as that of an appliance at work: `failing`, with a problem for each fault."""
    reason = "not configured: first boot failed"
    since = build_time(report.at)
    failing = ComponentHealth(status="failing", detail=reason, since=since)
    return Health(
        status="failing",
        name=report.name,
        version=report.version,
        started_at=since,
        components=HealthComponents(
            switch=failing,
            store=failing,
            rules=RulesHealth(status="failing", detail=reason, since=since),
        ),
        problems=tuple(
            HealthProblem(reason=str(fault), mend=fault.mend, since=since)
            for fault in report.faults
        ),
    )


def build_fault_app(report: FaultReport) -> web.Application:
    """Every request is answered with 503: the health paths with the faults, others with a problem."""
    health = build_fault_health(report).model_dump_json().encode()
    problem = build_problem(
        503,
        "not configured: first boot failed",
        mend=f"GET {HEALTH_PATHS[0]} tells why (docs/first-boot.md)",
        request_id="",
    )
    other = problem.model_dump_json().encode()

    async def answer(request: web.Request) -> web.Response:
        asked = request.method in ("GET", "HEAD") and request.path in HEALTH_PATHS
        return web.Response(
            status=503,
            body=health if asked else other,
            content_type=JSON if asked else MEDIA_TYPE,
            headers=_HEADERS,
        )

    app = web.Application(client_max_size=_BODY_LIMIT)
    app.router.add_route("*", "/{path:.*}", answer)
    return app


@contextlib.asynccontextmanager
async def open_fault_server(
    report: FaultReport, port: int | None = None
) -> AsyncIterator[tuple[str, ...]]:
    """Serve while the context lasts; gives the addresses. On loopback only unless the management network is
    configured. Raises HairpinError when it can't listen. ``port`` None: the report's."""
    runner = web.AppRunner(
        build_fault_app(report), access_log=None, shutdown_timeout=1.0, keepalive_timeout=5.0
    )
    await runner.setup()
    try:
        wanted = report.port if port is None else port
        site = web.TCPSite(runner, None if report.reachable else "127.0.0.1", wanted, backlog=32)
        try:
            await site.start()
        except OSError as fault:
            raise HairpinError(
                f"faults can't be served on port {wanted}: {fault.strerror}",
                "see what else listens there",
            ) from fault
        addresses = tuple(f"{one[0]} port {one[1]}" for one in runner.addresses)
        log.info("serving faults", addresses=addresses, faults=len(report.faults))
        yield addresses
    finally:
        await runner.cleanup()


async def serve_faults(report: FaultReport) -> None:
    """Until SIGTERM or SIGINT. Raises HairpinError."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with open_fault_server(report):
        await stop.wait()
