"""Runs inside lab namespaces: sends frames made elsewhere, or counts those with our mark.

    python frames.py send DEVICE FILE            FILE: one frame in hex a line
    python frames.py listen OUT DEVICE...        until SIGTERM; OUT: {device: {"KIND NUMBER": count}}

A frame carries `CHAOSFRAME KIND NUMBER ` somewhere. Standard library only.
"""

from __future__ import annotations

import json
import re
import select
import signal
import socket
import sys
import time

ETH_P_ALL = 3
MARK = re.compile(rb"CHAOSFRAME ([a-z0-9-]+) (\d+) ")


def open_device(device: str) -> socket.socket:
    end = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    end.bind((device, ETH_P_ALL))
    end.setblocking(False)
    return end


def send(device: str, path: str) -> None:
    end = open_device(device)
    with open(path) as file:
        for line in file:
            end.send(bytes.fromhex(line))
            time.sleep(0.002)


def listen(out: str, devices: list[str]) -> None:
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _frame: stopped.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ends = {open_device(device): device for device in devices}
    found: dict[str, dict[str, int]] = {device: {} for device in devices}
    while not stopped:
        for end in select.select(list(ends), [], [], 0.1)[0]:
            try:
                data, address = end.recvfrom(65535)
            except OSError:
                continue
            mark = MARK.search(data)
            if mark and address[2] != socket.PACKET_OUTGOING:
                key = f"{mark[1].decode()} {int(mark[2])}"
                seen = found[ends[end]]
                seen[key] = seen.get(key, 0) + 1
    with open(out, "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    if sys.argv[1] == "send":
        send(sys.argv[2], sys.argv[3])
    else:
        listen(sys.argv[2], sys.argv[3:])
