"""Runs inside a lab VM: small UDP datagrams to one address, at a rate, for some seconds.

    python flood.py ADDRESS PORT RATE SECONDS TEXT        prints {"sent": n, "unsent": n, "seconds": s}
    python flood.py sink PORT                             takes them and throws them away, until SIGTERM

Standard library only.
"""

from __future__ import annotations

import json
import socket
import sys
import time

BURST_SECONDS = 0.002


def flood(address: str, port: int, rate: float, seconds: float, text: str) -> None:
    end = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    end.connect((address, port))
    data = text.encode().ljust(100, b".")
    sent = unsent = 0
    began = time.perf_counter()
    while (gone := time.perf_counter() - began) < seconds:
        for _ in range(int(rate * gone) - sent - unsent):
            try:
                end.send(data)
                sent += 1
            except OSError:
                unsent += 1
        time.sleep(BURST_SECONDS)
    print(json.dumps({"sent": sent, "unsent": unsent, "seconds": time.perf_counter() - began}))


def sink(port: int) -> None:
    end = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    end.setsockopt(
        socket.SOL_SOCKET, socket.SO_RCVBUF, 4096
    )  # not read: the kernel throws them away
    end.bind(("", port))
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    if sys.argv[1] == "sink":
        sink(int(sys.argv[2]))
    else:
        host, number, speed, duration, what = sys.argv[1:]
        flood(host, int(number), float(speed), float(duration), what)
