"""The API on aiohttp: routes from the table, one middleware for everything that cuts across.

Order of refusals: 401, 404 and 405, 415, 428, 400 (query), 413, 400 (syntax), then what Control
says (412, 422, ...). Every error is a problem document, except a request that is not HTTP at all,
which the parser refuses with a plain 400.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import AsyncIterator
from uuid import uuid4

import structlog
from aiohttp import web
from aiohttp.typedefs import Handler
from prometheus_client import CONTENT_TYPE_LATEST

from appliance.api.auth import REALM, check_token
from appliance.api.control import Control
from appliance.api.openapi import build_openapi
from appliance.api.problems import (
    MEDIA_TYPE,
    Refused,
    build_error_problem,
    build_problem,
    find_status,
)
from appliance.api.requests import read_call
from appliance.api.routes import EVENT_STREAM, JSON, METRICS, ROUTES, Reply, Route
from appliance.api.stream import StreamLimits, Streams
from appliance.api.tls import build_server_context
from appliance.settings import ApiSettings
from appliance.version import find_version
from steering.errors import HairpinError

log = structlog.get_logger("api")

_ID = web.RequestKey("id", str)
_REQUEST_ID = re.compile(r"[A-Za-z0-9-]{1,64}", re.ASCII)
_RETRY_SECONDS = "5"
_STOP_SECONDS = 5.0
_BACKLOG = 128
_BASE_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
}


def build_app(
    control: Control,
    settings: ApiSettings,
    token: str,
    *,
    stream_limits: StreamLimits | None = None,
) -> web.Application:
    """The API of one appliance. Call it inside the event loop that will serve it."""
    streams = Streams(stream_limits or StreamLimits())
    public = frozenset(route.path for route in ROUTES if route.public)
    description = json.dumps(build_openapi(ROUTES, find_version()))

    @web.middleware
    async def handle(request: web.Request, handler: Handler) -> web.StreamResponse:
        return await _handle(request, handler, token, public)

    app = web.Application(middlewares=[handle], client_max_size=settings.body_limit_bytes)

    def add(route: Route) -> None:
        async def answer(request: web.Request) -> web.StreamResponse:
            call = await read_call(request, route)
            if route.media_type == EVENT_STREAM:
                return await streams.run(request, control, call.query)
            if route.media_type == METRICS:
                page = await control.render_metrics()
                return web.Response(body=page, headers={"Content-Type": CONTENT_TYPE_LATEST})
            if route.handler is None:
                return web.Response(text=description, content_type=JSON)
            return build_response(route, await route.handler(control, call))

        app.router.add_route(
            route.method, route.path, answer, name=route.operation, expect_handler=_continue
        )

    for route in ROUTES:
        add(route)

    async def close_streams(app: web.Application) -> None:
        streams.close()

    app.on_shutdown.append(close_streams)
    app.on_response_prepare.append(_set_headers)
    return app


def build_response(route: Route, reply: Reply) -> web.Response:
    """A reply as the route table declares it; anything else is a fault of the program."""
    if reply.status not in route.responses:
        raise TypeError(f"{route.operation} does not declare status {reply.status}")
    model = route.responses[reply.status]
    if model is None:
        return web.Response(status=reply.status, headers=reply.headers)
    # Exactly the declared model: a subclass would carry keys that the description denies.
    if type(reply.document) is not model:
        raise TypeError(f"{route.operation} answers {reply.status} with {model.__name__} only")
    return web.Response(
        status=reply.status,
        body=reply.document.model_dump_json().encode(),
        content_type=route.media_type,
        headers=reply.headers,
    )


async def _continue(request: web.Request) -> None:
    """Answer `Expect: 100-continue`; other expectations are ignored (RFC 9110, 10.1.1)."""
    wanted = request.headers.get("Expect", "").lower()
    if wanted == "100-continue" and request.transport is not None:
        request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")


async def _set_headers(request: web.Request, response: web.StreamResponse) -> None:
    for name, value in _BASE_HEADERS.items():
        response.headers.setdefault(name, value)
    response.headers["X-Request-Id"] = request.get(_ID, "")
    response.headers["Server"] = "hairpin"


async def _handle(
    request: web.Request, handler: Handler, token: str, public: frozenset[str]
) -> web.StreamResponse:
    """Identify, authenticate, answer, turn failures into problems, write the access log."""
    given = request.headers.get("X-Request-Id", "")
    request_id = given if _REQUEST_ID.fullmatch(given) else uuid4().hex[:16]
    request[_ID] = request_id
    started = time.monotonic()
    status = 499  # what nginx logs for a client that went away before it was answered
    with structlog.contextvars.bound_contextvars(request=request_id):
        try:
            response = await _answer(request, handler, token, public, request_id)
            status = response.status
            return response
        finally:
            log.info(
                "access",
                method=request.method,
                path=request.rel_url.raw_path[:500],
                status=status,
                milliseconds=round((time.monotonic() - started) * 1000, 1),
                client=request.remote,
            )


async def _answer(
    request: web.Request,
    handler: Handler,
    token: str,
    public: frozenset[str],
    request_id: str,
) -> web.StreamResponse:
    had_body = request.method in ("PUT", "POST")
    try:
        if request.path not in public and not check_token(
            request.headers.get("Authorization"), token
        ):
            raise Refused(
                401,
                "no token, or a wrong one",
                "send `Authorization: Bearer TOKEN` with the token of the service's token file",
                headers=[("WWW-Authenticate", REALM)],
            )
        return await handler(request)
    except HairpinError as error:
        status = find_status(error, had_body=had_body)
        headers = dict(error.headers) if isinstance(error, Refused) else {}
        if status >= 500:
            log.error("request failed", reason=error.reason, mend=error.mend)
        if status == 503:
            headers["Retry-After"] = _RETRY_SECONDS
        problem = build_error_problem(error, had_body=had_body, request_id=request_id)
    except web.HTTPException as error:
        status = error.status
        kept = ("Allow", "Retry-After", "Location")
        headers = {name: error.headers[name] for name in kept if name in error.headers}
        problem = build_problem(status, error.reason, request_id=request_id)
    except (ConnectionError, asyncio.CancelledError):
        raise
    except Exception:
        log.exception("request failed by a fault of the program")
        status, headers = 500, {}
        problem = build_problem(
            500,
            "a fault of the program",
            mend="the service's log tells more under this request's id",
            request_id=request_id,
        )
    return web.Response(
        status=status,
        body=problem.model_dump_json().encode(),
        content_type=MEDIA_TYPE,
        headers=headers,
    )


@contextlib.asynccontextmanager
async def open_server(
    control: Control,
    settings: ApiSettings,
    token: str,
    *,
    stream_limits: StreamLimits | None = None,
) -> AsyncIterator[str]:
    """Serve while the context lasts; gives the URL. Raises HairpinError when it can't listen.

    On leaving, live streams end at once and other requests have five seconds.
    """
    tls = None
    if settings.cert_file is not None and settings.key_file is not None:
        tls = build_server_context(settings.cert_file, settings.key_file)
    app = build_app(control, settings, token, stream_limits=stream_limits)
    runner = web.AppRunner(
        app, access_log=None, shutdown_timeout=_STOP_SECONDS, keepalive_timeout=30.0
    )
    await runner.setup()
    try:
        site = web.TCPSite(
            runner, settings.listen, settings.port, backlog=_BACKLOG, ssl_context=tls
        )
        try:
            await site.start()
        except OSError as fault:
            raise HairpinError(
                f"the API can't listen on {settings.listen} port {settings.port}: {fault.strerror}",
                "stop what listens there, or set `api.listen` and `api.port` in the settings",
            ) from fault
        host, port = runner.addresses[0][:2]
        scheme = "http" if tls is None else "https"
        url = f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"
        log.info("listening", url=url)
        yield url
    finally:
        await runner.cleanup()
