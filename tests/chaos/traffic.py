"""Runs inside a lab VM: numbered UDP streams out, and a record of every packet that came in.

    python traffic.py '{"out": PATH, "drain": 1.0, "streams": [{"name": "closed-1-benign4", "port": 6001,
        "family": 4, "peer": "10.77.0.2", "rate": 200, "text": "..."}], "ports": [[4, 6001], ...]}'

Sends each stream at its rate (packets/s) until SIGTERM, receives ``drain`` seconds longer, and writes
one JSON object to PATH: ``sent`` (stream -> times), ``unsent`` (stream -> how many the VM's own kernel
refused), ``arrived`` (stream -> [numbers, times]). Times are CLOCK_MONOTONIC, which all namespaces of a
machine share. A packet is `NAME NUMBER TEXT`; its number is its place in ``sent``. Standard library only.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sys
import time
from typing import Any

FAMILIES = {4: socket.AF_INET, 6: socket.AF_INET6}
BUFFER_BYTES = 8 * 2**20
LATE_SECONDS = 0.25
"""A sender that was held up for longer than this skips what it missed: no burst afterwards."""


def open_socket(family: int, port: int) -> socket.socket:
    end = socket.socket(FAMILIES[family], socket.SOCK_DGRAM)
    for option in (socket.SO_RCVBUF, 33):  # 33: SO_RCVBUFFORCE, past the limit, for root
        end.setsockopt(socket.SOL_SOCKET, option, BUFFER_BYTES)
    if family == 6:
        end.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    end.bind(("", port))
    end.setblocking(False)
    return end


class Stream:
    """One way of one kind of packet, and when each was sent."""

    def __init__(self, told: dict[str, Any], end: socket.socket, began: float) -> None:
        self.name = told["name"]
        self.to = (told["peer"], told["port"])
        self.head, self.tail = f"{self.name} ".encode(), f" {told['text']}".encode()
        self.step = 1.0 / told["rate"]
        self.due = began
        self.end = end
        self.sent: list[float] = []
        self.unsent = 0

    def send(self, now: float) -> None:
        if now - self.due > LATE_SECONDS:
            self.due = now
        self.due += self.step
        try:
            self.end.sendto(self.head + b"%d" % len(self.sent) + self.tail, self.to)
        except OSError:
            self.unsent += 1
        else:
            self.sent.append(round(now, 5))


def receive(end: socket.socket, arrived: dict[str, tuple[list[int], list[float]]]) -> None:
    while True:
        try:
            data = end.recv(2048)
        except OSError:
            return
        name, _, rest = data.partition(b" ")
        numbers, times = arrived.setdefault(name.decode(), ([], []))
        numbers.append(int(rest.partition(b" ")[0]))
        times.append(round(time.monotonic(), 5))


def main() -> None:
    told = json.loads(sys.argv[1])
    ends = {(family, port): open_socket(family, port) for family, port in told["ports"]}
    began = time.monotonic()
    streams = [Stream(one, ends[one["family"], one["port"]], began) for one in told["streams"]]
    # Not all in the same moment: the sender would be a burst generator.
    for number, stream in enumerate(streams):
        stream.due += stream.step * number / len(streams)
    arrived: dict[str, tuple[list[int], list[float]]] = {}
    poll = select.epoll()
    by_number = {end.fileno(): end for end in ends.values()}
    for number in by_number:
        poll.register(number, select.EPOLLIN)
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: stopped.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started this
    until = float("inf")
    while (now := time.monotonic()) < until:
        if stopped and until == float("inf"):
            until = now + told["drain"]
        due = until
        if not stopped:
            for stream in streams:
                if stream.due <= now:
                    stream.send(now)
            due = min((stream.due for stream in streams), default=now + 0.1)
        for number, _ in poll.poll(max(0.0, min(due - time.monotonic(), 0.1))):
            receive(by_number[number], arrived)
    document = {
        "sent": {stream.name: stream.sent for stream in streams},
        "unsent": {stream.name: stream.unsent for stream in streams},
        "arrived": arrived,
    }
    scratch = f"{told['out']}.part"
    with open(scratch, "w") as file:
        json.dump(document, file)
    os.replace(scratch, told["out"])


if __name__ == "__main__":
    main()
