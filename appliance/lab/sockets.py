"""Gives the lab's switch the receive buffers that super-packets need, and no other process.

A userspace datapath reads its ports by packet sockets (packet(7)). The usual buffer of 208 KiB holds three
super-packets: measured, 8 % of them were lost there, on the direct path too. An administrator sets
`net.core.rmem_default` before the switch starts; that is the whole machine's, which a lab leaves alone.
"""

from __future__ import annotations

import ctypes
import os
import socket
from pathlib import Path

import structlog

from steering.errors import HairpinError

log = structlog.get_logger("lab.sockets")

RECEIVE_BUFFER = 4 * 2**20
"""Bytes; the kernel doubles them for its own bookkeeping (socket(7))."""

_SO_RCVBUFFORCE = 33  # socket(7); CPython does not name it
_PIDFD_GETFD = 438  # pidfd_getfd(2); the same number on every architecture


def widen_packet_sockets(pid: int, size: int = RECEIVE_BUFFER) -> int:
    """Enlarge every packet socket of a process; how many there were. Needs root.

    Raises HairpinError when the process is gone or can't be looked into.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    widened = 0
    try:
        process = os.pidfd_open(pid)
    except OSError as fault:
        raise HairpinError(f"process {pid} can't be opened: {fault}") from fault
    try:
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            if not _is_socket(entry):
                continue
            copied = libc.syscall(_PIDFD_GETFD, process, int(entry.name), 0)
            if copied < 0:
                continue  # closed since
            with socket.socket(fileno=copied) as opened:
                if opened.family == socket.AF_PACKET:
                    opened.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, size)
                    widened += 1
    except OSError as fault:
        raise HairpinError(f"the sockets of process {pid} can't be enlarged: {fault}") from fault
    finally:
        os.close(process)
    log.info("packet sockets enlarged", pid=pid, sockets=widened, bytes=size)
    return widened


def _is_socket(entry: Path) -> bool:
    try:
        return os.readlink(entry).startswith("socket:")
    except FileNotFoundError:
        return False
