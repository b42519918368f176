"""Runs inside lab VMs: many live TCP connections, each with a request every 200 ms, later an attack.

    python connections.py serve PORT OUT
    python connections.py talk ADDRESS PORT COUNT ATTACK OUT

`talk` sends numbered lines and reads the same lines back. On SIGUSR1 it first counts the connections that
still answer, then sends the ATTACK text in each and ends. `serve` counts the lines that it saw, those with
the attack's mark apart, until SIGTERM. Both write a JSON object to OUT. Standard library only.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
import time
from pathlib import Path

STEP = 0.2
ANSWER_SECONDS = 8.0
"""A connection that does not answer for so long did not survive (TCP sends again after 0.2, 0.4, ... s)."""


async def serve(port: int, out: Path) -> None:
    counts = {"lines": 0, "attacks": 0}
    stop = asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while line := await reader.readline():
                counts["attacks" if line.startswith(b"attack") else "lines"] += 1
                writer.write(line)
        writer.close()

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with await asyncio.start_server(answer, "", port, backlog=128):
        await stop.wait()
    out.write_text(json.dumps(counts))


class Talk:
    """One connection."""

    def __init__(self) -> None:
        self.requests = self.answers = self.attacks = 0
        self.longest_wait = 0.0
        self.opened = self.alive = False

    async def ask(self, line: bytes) -> bool:
        self.writer.write(line)
        began = time.monotonic()
        try:
            answer = await asyncio.wait_for(self.reader.readline(), ANSWER_SECONDS)
        except (TimeoutError, asyncio.TimeoutError, OSError):  # noqa: UP041
            return False
        self.longest_wait = max(self.longest_wait, time.monotonic() - began)
        return answer == line

    async def run(self, address: str, port: int, attack: str, go: asyncio.Event) -> None:
        self.reader, self.writer = await asyncio.open_connection(address, port)
        self.opened = self.alive = True
        while self.alive and not go.is_set():
            self.requests += 1
            self.alive = await self.ask(b"hello %d\n" % self.requests)
            self.answers += self.alive
            await asyncio.sleep(STEP)
        if self.alive:
            self.requests += 1
            self.alive = await self.ask(b"still here\n")
            self.answers += self.alive
        if self.alive:
            self.attacks += 1
            self.writer.write(f"attack {attack}\n".encode())
            with contextlib.suppress(TimeoutError, asyncio.TimeoutError, OSError):
                await asyncio.wait_for(self.reader.readline(), 2)


async def talk(address: str, port: int, count: int, attack: str, out: Path) -> None:
    go = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, go.set)
    talks = [Talk() for _ in range(count)]

    async def run(one: Talk, delay: float) -> None:
        await asyncio.sleep(delay)
        with contextlib.suppress(OSError):
            await one.run(address, port, attack, go)

    await asyncio.gather(*(run(one, n * STEP / count) for n, one in enumerate(talks)))
    document = {
        "opened": sum(one.opened for one in talks),
        "alive": sum(one.alive for one in talks),
        "requests": sum(one.requests for one in talks),
        "answers": sum(one.answers for one in talks),
        "attacks": sum(one.attacks for one in talks),
        "longest_wait": round(max(one.longest_wait for one in talks), 2),
    }
    out.write_text(json.dumps(document))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.argv[1] == "serve":
        asyncio.run(serve(int(sys.argv[2]), Path(sys.argv[3])))
    else:
        host, number, many, text, path = sys.argv[2:]
        asyncio.run(talk(host, int(number), int(many), text, Path(path)))
