"""Runs inside a lab VM: sends numbered UDP packets to a peer at a steady rate, and takes the peer's.

    python talker.py PEER PORT RATE SECONDS

Prints one JSON line: how many it sent, how many of the peer's arrived, and the longest time without one.
"""

from __future__ import annotations

import json
import select
import socket
import sys
import time


def main() -> None:
    peer, port, rate, seconds = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4])
    family = socket.AF_INET6 if ":" in peer else socket.AF_INET
    door = socket.socket(family, socket.SOCK_DGRAM)
    door.bind(("", port))
    door.setblocking(False)
    began = last = time.monotonic()
    sent = arrived = 0
    longest = 0.0
    while (now := time.monotonic()) - began < seconds:
        while sent < (now - began) * rate:
            sent += 1
            try:
                door.sendto(b"number %d" % sent, (peer, port))
            except OSError:
                continue  # no way to the peer just now: it counts as sent and lost
        if select.select([door], [], [], 1 / rate)[0]:
            now = time.monotonic()
            longest, last = max(longest, now - last), now
            while True:
                try:
                    door.recv(2000)
                except OSError:
                    break
                arrived += 1
    print(json.dumps({"sent": sent, "arrived": arrived, "gap": round(longest, 3)}))


if __name__ == "__main__":
    main()
