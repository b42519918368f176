"""One TCP connection of a VM that a test holds in its hands: it sends, waits, and looks, when it wants to."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.support.appliance import Appliance

# Commands as lines of JSON, an answer to each: ["send", text, seconds] -> status line and bytes of the HTTP
# answer, or null; ["trickle", count, seconds] -> null, while single header bytes are sent; ["close"].
CLIENT = r"""
import json, re, socket, sys, time
address, port, source = json.loads(sys.argv[1])
peer = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET)
peer.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
if source:
    peer.bind(("", source))
peer.settimeout(5)
peer.connect((address, port))
peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
print(json.dumps(peer.getsockname()[1]), flush=True)
for line in sys.stdin:
    command, *said = json.loads(line)
    answer = None
    try:
        if command == "send":
            text, seconds = said
            peer.settimeout(seconds)
            peer.sendall(text.encode())
            head = b""
            while b"\r\n\r\n" not in head:
                part = peer.recv(1 << 16)
                if not part:
                    raise OSError("it closed the connection")
                head += part
            head, _, body = head.partition(b"\r\n\r\n")
            left = int(re.search(rb"(?i)content-length: (\d+)", head)[1]) - len(body)
            got = len(body)
            while left > 0:
                part = peer.recv(min(left, 1 << 20))
                if not part:
                    raise OSError("it closed the connection")
                left, got = left - len(part), got + len(part)
            answer = [head.split(b"\r\n")[0].decode(), got]
        elif command == "trickle":
            count, seconds = said
            for _ in range(count):
                peer.sendall(b"x")
                time.sleep(seconds)
        elif command == "close":
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            peer.close()
    except OSError as fault:
        answer = None
    print(json.dumps(answer), flush=True)
"""


class Session:
    """HTTP/1.1 over one connection, kept alive. ``port`` is the client's own."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self._process = process
        self.port = port

    def _ask(self, *command: Any) -> Any:
        self.tell(*command)
        return self.hear()

    def tell(self, *command: Any) -> None:
        """A command whose answer is `hear`d later."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()

    def hear(self) -> Any:
        assert self._process.stdout is not None
        return json.loads(self._process.stdout.readline())

    def get(self, path: str, agent: str = "test", seconds: float = 3) -> tuple[str, int] | None:
        """(status line, bytes of the body), or None where no whole answer came in time."""
        text = f"GET {path} HTTP/1.1\r\nHost: h\r\nUser-Agent: {agent}\r\n\r\n"
        answer = self._ask("send", text, seconds)
        return None if answer is None else (answer[0], answer[1])

    def close(self) -> None:
        """With a reset."""
        self._ask("close")


@contextmanager
def open_session(
    appliance: Appliance, source: str, target: str, *, family: int = 4, port: int = 0
) -> Iterator[Session]:
    """``port``: the client's, 0 for any."""
    said = json.dumps([appliance.address(target, family), 80, port])
    argv = appliance.lab.netns_argv(source, [sys.executable, "-c", CLIENT, said])
    with subprocess.Popen(
        argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            assert process.stdout is not None
            own = process.stdout.readline()
            assert own, "no connection"
            yield Session(process, json.loads(own))
        finally:
            process.kill()
            process.wait(5)
