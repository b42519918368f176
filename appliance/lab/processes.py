"""The lab's long-lived processes: started, recognised again, found and ended by their identity.

A pid alone is no identity: it is reused. Here it is the pid with the time the process was started.
Each process also carries the lab's name in its environment, so that one that was started but not
yet recorded is found too.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import structlog

from steering.errors import CommandFailed

MARKER = "HAIRPIN_LAB"
NETNS_DIR = Path("/run/netns")

log = structlog.get_logger("lab")

# Children of this very process have to be reaped by it; those of an earlier run are init's.
_children: dict[int, subprocess.Popen[bytes]] = {}


def read_started(pid: int) -> str:
    """When a process was started (boot id, clock ticks; proc(5)); "" when it's gone or a zombie."""
    child = _children.get(pid)
    if child is not None and child.poll() is not None:
        del _children[pid]
        return ""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return "" if fields[0] in ("Z", "X") else f"{boot}/{fields[19]}"


def is_running(pid: int, started: str) -> bool:
    """Whether the process with this pid is still the one that was started then."""
    return pid > 0 and started != "" and read_started(pid) == started


def start_process(
    argv: Sequence[str],
    *,
    lab: str,
    log_file: Path | None,
    env: Mapping[str, str] | None = None,
    umask: int = 0o022,
) -> tuple[int, str]:
    """Start a process in a session of its own that outlives this one; its pid and start time.

    Its environment is ``env`` and a few fixed values, nothing of this process's. What it prints
    goes to the end of ``log_file`` (None: nowhere). Raises CommandFailed when it can't be started.
    """
    log.debug("start", command=shlex.join(argv))
    clean = {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LANG": "C.UTF-8",
        "PYTHONUNBUFFERED": "1",
        **(env or {}),
        MARKER: lab,
    }
    out = os.open(log_file or "/dev/null", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
    try:
        child = subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env=clean,
            umask=umask,
            cwd="/",
            start_new_session=True,
        )
    except OSError as fault:
        raise CommandFailed(shlex.join(argv), 127, str(fault)) from fault
    finally:
        os.close(out)
    _children[child.pid] = child
    return child.pid, read_started(child.pid)


def _is_marked(pid: str, lab: str) -> bool:
    try:
        environment = Path("/proc", pid, "environ").read_bytes()
    except OSError:
        return False
    return f"{MARKER}={lab}".encode() in environment.split(b"\0")


def find_pids_in(namespaces: Iterable[str]) -> list[int]:
    """The processes inside any of these network namespaces, as `ip netns pids` finds them."""
    inodes = set()
    for name in namespaces:
        with contextlib.suppress(OSError):
            found = os.stat(NETNS_DIR / name)
            inodes.add((found.st_dev, found.st_ino))
    pids = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            found = os.stat(f"/proc/{pid}/ns/net")
            if (found.st_dev, found.st_ino) in inodes:
                pids.append(int(pid))
    return pids


def _find_ancestors(pid: int) -> set[int]:
    found = set()
    while pid > 1:
        found.add(pid)
        try:
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            break
        pid = int(fields[1])
    return found


def find_lab_processes(
    lab: str, namespaces: Iterable[str], recorded: Iterable[tuple[int, str]]
) -> dict[int, str]:
    """Every running process of a lab, pid to start time, but for this process and its ancestors.

    Three ways to find one: recorded in the state file, inside the lab's namespaces, or carrying the
    lab's mark in its environment.
    """
    pids = {pid for pid, started in recorded if is_running(pid, started)}
    pids.update(find_pids_in(namespaces))
    pids.update(int(pid) for pid in os.listdir("/proc") if pid.isdigit() and _is_marked(pid, lab))
    pids -= _find_ancestors(os.getpid())
    return {pid: started for pid in pids if (started := read_started(pid))}


def send_signal(pid: int, started: str, number: int) -> bool:
    """Signal a process if it is still the same one; whether it was sent.

    A pidfd holds the identity between the look and the signal (pidfd_open(2)).
    """
    try:
        handle = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        if not is_running(pid, started):
            return False
        signal.pidfd_send_signal(handle, number)
    except OSError:
        return False
    finally:
        os.close(handle)
    return True


def wait_gone(processes: Mapping[int, str], seconds: float) -> dict[int, str]:
    """Wait until these processes have ended, at most ``seconds``; the ones that have not."""
    deadline = time.monotonic() + seconds
    left = dict(processes)
    while True:
        left = {pid: started for pid, started in left.items() if is_running(pid, started)}
        if not left or time.monotonic() >= deadline:
            return left
        time.sleep(0.02)


def read_tail(path: Path, lines: int = 15) -> str:
    """The last lines of a log, for a message to a person; "" when there is none."""
    try:
        text = path.read_text(errors="replace")[-8000:]
    except OSError:
        return ""
    return "\n".join(text.splitlines()[-lines:])
