"""The supervisor of nfstream: ``python -m appliance.visibility.observer CONFIG``.

Starts the metering process in its own process group and control group, keeps its clock going,
writes its records to the spool, publishes the state, and replaces it when it dies or stalls.
Runs with CAP_NET_RAW only, arranged by `appliance.visibility.main`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import structlog
from pydantic import BaseModel, ConfigDict, ValidationError

from appliance.visibility import meter, watch
from appliance.visibility.group import Group, remove_group
from appliance.visibility.heartbeat import build_frame, build_mac, find_beat
from appliance.visibility.orientation import Orientation
from appliance.visibility.port import MirrorPort
from appliance.visibility.record import LINE_LIMIT, build_name, parse_record, render_record
from appliance.visibility.spool import Spool
from appliance.visibility.state import Isolation, ObserverState, Totals, write_state
from steering.errors import HairpinError, WrongInput
from steering.tasks import wait_at_most

log = structlog.get_logger("observe")

# nfstream expires at most 1,000 flows for each packet, so this is also how fast a quiet port tells.
BEAT_SECONDS = 0.25
# For the lag of records: more than an hour of beats.
BEATS_KEPT = 16000
STATE_SECONDS = 2.0
SAID_LENGTH = 200
SAID_KEPT = 100
BACKOFF_SECONDS = (1.0, 2.0, 5.0, 15.0, 30.0)
# A worker that lived this long did work: the next fault starts the backoff anew.
SETTLED_SECONDS = 60.0


class ObserverConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    device: str
    idle_seconds: int
    active_seconds: int
    spool: Path
    state: Path
    group: tuple[int, Path] | None
    isolation: Isolation


class Observer:
    def __init__(self, config: ObserverConfig) -> None:
        self._config = config
        self._group = Group(*config.group) if config.group else None
        self._port = MirrorPort(config.device)
        self._spool = Spool(config.spool)
        self._mac = build_mac(os.urandom(6))
        self._affinity = os.sched_getaffinity(0)
        self._said: set[str] = set()
        self._orientation = Orientation()
        self._started = time.time()
        self._beat = 0
        self._beats_sent: dict[int, float] = {}
        self._ended = Totals()
        self._worker: watch.Worker | None = None
        self._flows = 0
        self._unwritten = 0
        self._restarts = 0
        self._last_restart = ""
        self._lag: float | None = None
        self._stop = asyncio.Event()

    # What comes from the metering process

    def _take_record(self, worker: watch.Worker, line: bytes) -> None:
        port = watch.parse_beat(line)
        if port is not None:
            beat = find_beat(port, self._beat)
            worker.take_beat(beat, time.monotonic())
            sent = self._beats_sent.pop(beat, None)
            self._lag = None if sent is None else time.monotonic() - sent
            return
        try:
            record = self._orientation.build_oriented(parse_record(line))
        except WrongInput as fault:
            log.warning("a line from nfstream's process is no record", reason=fault.reason)
            return
        worker.recorded += record.packets
        try:
            self._spool.write_line(render_record(record))
        except OSError as fault:
            # Losing records is told in the state; stopping would lose more.
            self._unwritten += 1
            if self._unwritten == 1:
                log.error("flow records can't be written", reason=fault.strerror)
            return
        self._flows += 1

    def _take_report(self, worker: watch.Worker, line: bytes) -> None:
        worker.aborted += watch.count_aborted(line)
        report = watch.parse_report(line)
        if report is None:
            said = build_name(line.decode(errors="replace").strip(), SAID_LENGTH)
            if said and said not in self._said and len(self._said) < SAID_KEPT:
                self._said.add(said)
                log.warning("nfstream says (told once)", said=said)
            return
        worker.take_report(report, self._beat, time.monotonic())
        self._reset_affinity()

    def _reset_affinity(self) -> None:
        """Undo nfstream's pinning of its processes to single processors."""
        for process in psutil.Process().children(recursive=True):
            with contextlib.suppress(OSError):
                if os.sched_getaffinity(process.pid) != self._affinity:
                    os.sched_setaffinity(process.pid, self._affinity)

    # The metering process

    async def _start_meter(
        self,
    ) -> tuple[asyncio.subprocess.Process, asyncio.StreamReader, asyncio.StreamReader]:
        """The process, its standard output (reports) and its records."""
        reports, reports_end = os.pipe()
        records, records_end = os.pipe()
        config = meter.MeterConfig(
            parent=os.getpid(),
            device=self._config.device,
            mac=self._mac,
            idle_seconds=self._config.idle_seconds,
            active_seconds=self._config.active_seconds,
            records=records_end,
            group=self._group.meter if self._group else None,
        )
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-u",
                "-m",
                "appliance.visibility.meter",
                config.model_dump_json(),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=reports_end,
                pass_fds=(records_end,),
                process_group=0,
                # numpy would start a thread, with its memory, for each processor.
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            )
        finally:
            os.close(reports_end)
            os.close(records_end)
        return process, await _open_reader(reports), await _open_reader(records)

    def _kill_members(self, process: asyncio.subprocess.Process) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        if self._group is not None:
            for pid in self._group.read_members():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    async def _end_meter(self, process: asyncio.subprocess.Process) -> None:
        """Kill every process of the meter. Nothing is asked first: nfstream can't flush."""
        self._kill_members(process)
        await process.wait()
        while self._group is not None and self._group.read_members():
            await asyncio.sleep(0.02)
            self._kill_members(process)

    async def _run_meter(self) -> str:
        """Run one metering process until it must be replaced; the reason why."""
        process, reports, records = await self._start_meter()
        worker = self._worker = watch.Worker(time.monotonic(), first_beat=self._beat + 1)
        log.info("metering", device=self._config.device, pid=process.pid)
        tasks = [
            asyncio.create_task(_read_lines(records, lambda line: self._take_record(worker, line))),
            asyncio.create_task(_read_lines(reports, lambda line: self._take_report(worker, line))),
        ]
        try:
            while True:
                with contextlib.suppress(TimeoutError):
                    status = await wait_at_most(process.wait(), 0.5)
                    return f"nfstream's process ended with {status}"
                fault = watch.find_fault(
                    worker,
                    time.monotonic(),
                    self._config.idle_seconds,
                    self._config.active_seconds,
                    has_worker=_has_children(process.pid),
                )
                if fault is not None:
                    return fault
        finally:
            await self._end_meter(process)
            # What it had still written is in the pipes, which end now that every writer is dead.
            await asyncio.wait(tasks, timeout=1.0)
            for task in tasks:
                task.cancel()
            self._ended = watch.end_worker(self._ended, worker)
            self._worker = None

    # The four things that go on at the same time

    async def _keep_metering(self) -> None:
        faults = 0
        while True:
            started = time.monotonic()
            reason = await self._run_meter()
            self._restarts += 1
            self._last_restart = reason
            faults = 0 if time.monotonic() - started > SETTLED_SECONDS else faults
            pause = BACKOFF_SECONDS[min(faults, len(BACKOFF_SECONDS) - 1)]
            faults += 1
            log.warning("metering starts again", reason=reason, pause=pause)
            await asyncio.sleep(pause)

    async def _keep_beating(self) -> None:
        while True:
            self._beat += 1
            if self._port.send(build_frame(self._mac, self._beat)):
                self._beats_sent[self._beat] = time.monotonic()
            while len(self._beats_sent) > BEATS_KEPT:
                del self._beats_sent[next(iter(self._beats_sent))]
            await asyncio.sleep(BEAT_SECONDS)

    async def _keep_publishing(self) -> None:
        while True:
            self._publish(alive=True)
            await asyncio.sleep(STATE_SECONDS)

    def _publish(self, *, alive: bool) -> None:
        worker = self._worker
        progressed = worker.progressed if worker else None
        state = ObserverState(
            pid=os.getpid(),
            device=self._config.device,
            started=self._started,
            updated=time.time(),
            alive=alive,
            heartbeat_age=None if progressed is None else time.monotonic() - progressed,
            record_lag=self._lag,
            restarts=self._restarts,
            last_restart=self._last_restart,
            totals=watch.build_totals(
                self._ended, worker, self._port.count_packets(), self._flows, self._unwritten
            ),
            isolation=self._config.isolation,
        )
        try:
            write_state(self._config.state, state)
        except OSError as fault:
            log.error("the state can't be published", reason=fault.strerror)

    async def run(self) -> None:
        """Observe until SIGTERM or SIGINT. Raises HairpinError when the device goes away."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop.set)
        tasks = [
            asyncio.create_task(work)
            for work in (
                self._stop.wait(),
                self._keep_metering(),
                self._keep_beating(),
                self._keep_publishing(),
            )
        ]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            self._publish(alive=False)
            self._spool.close()
            self._port.close()


def _has_children(pid: int) -> bool:
    """Whether a process has a child that lives; one that died is not waited for by nfstream."""
    try:
        children = psutil.Process(pid).children()
        return any(child.status() != psutil.STATUS_ZOMBIE for child in children)
    except psutil.NoSuchProcess:
        return False


async def _open_reader(fd: int) -> asyncio.StreamReader:
    reader = asyncio.StreamReader(limit=2 * LINE_LIMIT)
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(reader), os.fdopen(fd, "rb", buffering=0)
    )
    return reader


async def _read_lines(reader: asyncio.StreamReader, take: Callable[[bytes], None]) -> None:
    while True:
        try:
            line = await reader.readline()
        except ValueError:
            # Longer than the reader's limit: no line of ours. The reader has dropped it.
            log.warning("an overlong line from nfstream's process was dropped")
            continue
        if not line:
            return
        if line.endswith(b"\n"):
            take(line)


def lock_spool(directory: Path) -> int:
    """Be the only observer of a directory; the lock ends with the process. Raises HairpinError."""
    fd = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as fault:
        os.close(fd)
        raise HairpinError(f"another observer writes to {directory}", "stop that one") from fault
    return fd


def check_access(config: ObserverConfig) -> None:
    """Whether this user may do all that is needed. Raises HairpinError."""
    # setpriv starts what its user alone could not: the metering process would then fail.
    if not os.access(sys.executable, os.X_OK):
        raise HairpinError(f"may not run {os.path.realpath(sys.executable)}")
    MirrorPort(config.device).close()
    directory = config.spool.parent
    if not os.access(directory, os.W_OK | os.X_OK):
        raise HairpinError(f"no write access to {directory}")
    for file in (config.spool, directory / "lock"):
        if file.exists() and not os.access(file, os.R_OK | os.W_OK):
            raise HairpinError(f"no write access to {file}")


def main() -> int:
    arguments = sys.argv[1:]
    probing = arguments[0] == "--check"
    try:
        config = ObserverConfig.model_validate_json(arguments[-1])
        if probing:
            check_access(config)
            return 0
        lock_spool(config.spool.parent)
        try:
            asyncio.run(Observer(config).run())
        finally:
            if config.group is not None:
                remove_group(Group(*config.group))
    except (HairpinError, ValidationError) as fault:
        print(fault, file=sys.stderr)
        return fault.exit_status if isinstance(fault, HairpinError) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
