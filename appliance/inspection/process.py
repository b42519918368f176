"""The door to engine processes: start one that outlives us, recognise it again, watch and end it.

An engine is no child to be waited for: after its supervisor was killed it goes on inspecting, and the
next supervisor adopts it. A process is known by its pid and its start time, so a reused pid is not
taken for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import structlog
from pydantic import BaseModel, ValidationError

from appliance.inspection.placement import Cores, ThreadSight
from appliance.inspection.publish import write_atomically
from steering.errors import CommandFailed
from steering.tasks import wait_at_most

log = structlog.get_logger("inspection.process")


class EngineRecord(BaseModel):
    """What is written of a started engine, for the next supervisor. `ticks` is its start time in
    clock ticks since boot (proc(5), stat field 22); `config` a digest of its configuration."""

    pid: int
    ticks: int
    started: float
    config: str


@dataclass(frozen=True, slots=True)
class ProcessSight:
    """A process at one moment. `cpu` is the seconds of processor time it has used; `stopped` that
    it was stopped by a signal."""

    cpu: float
    stopped: bool


def parse_stat(text: str) -> tuple[str, float, int]:
    """State, processor seconds and start ticks from /proc/PID/stat (proc(5)). Raises ValueError."""
    fields = text.rpartition(")")[2].split()
    if len(fields) < 20:
        raise ValueError("a stat line of fewer fields than proc(5) knows")
    ticks_a_second = os.sysconf("SC_CLK_TCK")
    return fields[0], (int(fields[11]) + int(fields[12])) / ticks_a_second, int(fields[19])


def _read_stat(pid: int) -> tuple[str, float, int] | None:
    try:
        return parse_stat(Path(f"/proc/{pid}/stat").read_text())
    except (OSError, ValueError):
        return None


def read_cores() -> Cores:
    """Of this machine, and of this process: what it starts may use the same."""
    usable = tuple(sorted(os.sched_getaffinity(0)))
    return Cores(max(os.cpu_count() or 1, len(usable)), usable)


def read_threads(pid: int) -> tuple[ThreadSight, ...]:
    """The threads of a process, by /proc/PID/task; those that end meanwhile are left out."""
    found = []
    for task in sorted(Path(f"/proc/{pid}/task").glob("[0-9]*")):
        with contextlib.suppress(OSError):
            number = int(task.name)
            name = (task / "comm").read_text().strip()
            cores = tuple(sorted(os.sched_getaffinity(number)))
            found.append(ThreadSight(name, cores, os.getpriority(os.PRIO_PROCESS, number)))
    return tuple(found)


AUTOGROUP_SECONDS = 0.15


def write_group_nice(pid: int, nice: int) -> str:
    """Give the process's session a niceness among sessions (sched(7), the autogroup feature); why not, or "".

    Where the kernel groups sessions, a thread's own niceness counts only among its session's threads, and an
    engine has a session of its own.
    """
    path = Path(f"/proc/{pid}/autogroup")
    try:
        present = path.read_text().split()
        # Read first: to write takes locks of the whole scheduler.
        if present[:1] and present[0].startswith("/autogroup-") and present[-1] != str(nice):
            try:
                path.write_text(str(nice))
            except BlockingIOError:
                # Another lane's was set just now: without CAP_SYS_ADMIN the kernel takes one such change in 100 ms,
                # of all processes together (kernel/sched/autogroup.c).
                time.sleep(AUTOGROUP_SECONDS)
                path.write_text(str(nice))
    except FileNotFoundError:
        return ""
    except OSError as fault:
        return f"its session's niceness can't be set: {fault.strerror}"
    return ""


class EngineProcess:
    """A running engine, started or adopted."""

    def __init__(self, record: EngineRecord, *, adopted: bool) -> None:
        self.record = record
        self.adopted = adopted
        self.gone = asyncio.Event()
        self._descriptor = os.pidfd_open(record.pid)
        asyncio.get_running_loop().add_reader(self._descriptor, self._on_exit)

    @property
    def pid(self) -> int:
        return self.record.pid

    def _on_exit(self) -> None:
        self.close()
        # An adopted engine is init's to reap; one of ours would stay a zombie.
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)
        self.gone.set()

    def close(self) -> None:
        """Stop watching; the process goes on."""
        if self._descriptor >= 0:
            asyncio.get_running_loop().remove_reader(self._descriptor)
            os.close(self._descriptor)
            self._descriptor = -1

    def send(self, number: signal.Signals) -> None:
        if self._descriptor >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, number)

    def read_sight(self) -> ProcessSight | None:
        stat = _read_stat(self.pid)
        if stat is None or stat[2] != self.record.ticks:
            return None
        return ProcessSight(cpu=stat[1], stopped=stat[0] in "Tt")

    async def stop(self, grace: float) -> None:
        """End it in order, or after `grace` seconds by force."""
        self.send(signal.SIGTERM)
        # A stopped process would not see the signal before it goes on.
        self.send(signal.SIGCONT)
        try:
            await wait_at_most(self.gone.wait(), grace)
        except TimeoutError:
            log.warning("engine killed", pid=self.pid, grace=grace)
            await self.kill()

    async def kill(self) -> None:
        self.send(signal.SIGKILL)
        await wait_at_most(self.gone.wait(), 10.0)


def start_engine(argv: Sequence[str], log_file: Path, config: str, now: float) -> EngineProcess:
    """Start an engine whose output goes to `log_file`, in a session of its own.

    Not a pipe: the engine must not depend on us being there to read. Raises CommandFailed.
    """
    log.info("start", command=shlex.join(argv))
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
    try:
        descriptor = os.open(log_file, flags, 0o640)
        try:
            child = subprocess.Popen(
                list(argv),
                stdin=subprocess.DEVNULL,
                stdout=descriptor,
                stderr=descriptor,
                start_new_session=True,
                cwd="/",
                umask=0o027,
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"},
            )
        finally:
            os.close(descriptor)
    except OSError as fault:
        raise CommandFailed(shlex.join(argv), 127, str(fault)) from fault
    stat = _read_stat(child.pid)
    record = EngineRecord(
        pid=child.pid, ticks=0 if stat is None else stat[2], started=now, config=config
    )
    engine = EngineProcess(record, adopted=False)
    # We wait by the pidfd; a Popen that is dropped unreaped would warn.
    child.returncode = 0
    return engine


def write_record(path: Path, record: EngineRecord) -> None:
    write_atomically(path, record.model_dump_json(), 0o644)


def adopt_engine(path: Path, binary: Path, config: Path) -> EngineProcess | None:
    """The engine that an earlier supervisor recorded at `path`, if that very process still runs.

    It must be the recorded process, run `binary`, and have been started on `config`.
    """
    try:
        record = EngineRecord.model_validate_json(path.read_text())
    except (OSError, ValidationError):
        return None
    stat = _read_stat(record.pid)
    if stat is None or stat[2] != record.ticks or stat[0] == "Z":
        return None
    try:
        argv = psutil.Process(record.pid).cmdline()
    except psutil.Error:
        return None
    if argv[:1] != [str(binary)] or str(config) not in argv:
        return None
    try:
        return EngineProcess(record, adopted=True)
    except OSError:
        return None
