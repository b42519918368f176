"""The command socket of an engine that is busy: who asks waits for its turn, within its limit."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from pathlib import Path

import pytest

from appliance.inspection.socket import EngineSilent, EngineSocket

BACKLOG = 1  # Suricata's own (UnixNew)


def fill(path: Path) -> list[socket.socket]:
    """Connections that nobody accepts, as many as the backlog takes."""
    waiting: list[socket.socket] = []
    while True:
        link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            link.connect(str(path))
        except BlockingIOError:
            link.close()
            return waiting
        waiting.append(link)


def serve(server: socket.socket) -> None:
    """As an engine: one after the other, those too that are gone."""
    while True:
        try:
            link, _ = server.accept()
        except OSError:
            return
        with link, link.makefile("rwb") as stream:
            for answer in ({"return": "OK"}, {"return": "OK", "message": 7}):
                if stream.readline():
                    stream.write(json.dumps(answer).encode() + b"\n")
                    stream.flush()


@pytest.fixture
def server(tmp_path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(tmp_path / "s"))
    listener.listen(BACKLOG)
    return listener


async def test_a_command_waits_until_the_engine_accepts(server: socket.socket) -> None:
    path = Path(server.getsockname())
    waiting = fill(path)
    assert len(waiting) == BACKLOG + 1
    asked = asyncio.create_task(EngineSocket(path).read_uptime())
    await asyncio.sleep(0.2)
    assert not asked.done()
    for link in waiting:
        link.close()
    thread = threading.Thread(target=serve, args=(server,))
    thread.start()
    assert await asked == 7
    server.shutdown(socket.SHUT_RDWR)
    server.close()
    await asyncio.to_thread(thread.join)


async def test_one_that_never_accepts_is_silent_at_the_limit(server: socket.socket) -> None:
    path = Path(server.getsockname())
    waiting = fill(path)
    with pytest.raises(EngineSilent, match=r"did not answer `uptime` in 0\.2 s"):
        await EngineSocket(path, limit=0.2).read_uptime()
    for link in (*waiting, server):
        link.close()
