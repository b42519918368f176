"""The real API server on loopback in a thread of its own, for tests that speak to it from outside."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator

from appliance.api.server import open_server
from appliance.api.stream import StreamLimits
from appliance.settings import ApiSettings
from tests.support.fake_control import FakeControl

TOKEN = "test-token-0123456789"
ANY_PORT = ApiSettings.model_construct(
    listen="127.0.0.1",
    port=0,  # the settings refuse 0 on purpose; a test takes whatever port is free
    body_limit_bytes=64 * 1024,
)


@contextlib.contextmanager
def run_api(
    control: FakeControl,
    limits: StreamLimits | None = None,
    settings: ApiSettings = ANY_PORT,
) -> Iterator[str]:
    """Serve ``control`` while the context lasts; gives the URL."""
    ready: list[str] = []
    started = threading.Event()
    loops: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def serve() -> None:
        stop = asyncio.Event()
        async with open_server(control, settings, TOKEN, stream_limits=limits) as url:
            ready.append(url)
            loops.append((asyncio.get_running_loop(), stop))
            started.set()
            await stop.wait()

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    if not started.wait(60):
        raise RuntimeError("the API did not start")
    loop, stop = loops[0]
    try:
        yield ready[0]
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
