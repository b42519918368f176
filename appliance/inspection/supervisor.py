"""Keeps one engine running on one lane: test, start, watch, replace, adopt, stop.

What a supervisor decides (`heartbeat`, `engine`) is pure; here it is done. While the engine does not
run the lane is closed: its queue has no listener, and the kernel drops what is queued.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from appliance.inspection import config as engine_config
from appliance.inspection import engine, files, heartbeat
from appliance.inspection.faults import FaultBook
from appliance.inspection.netfilter import QueueCounters
from appliance.inspection.process import (
    EngineProcess,
    adopt_engine,
    start_engine,
    write_record,
)
from appliance.inspection.publish import EngineState, LaneState, QueueState, write_atomically
from appliance.inspection.socket import EngineRefused, EngineSilent, EngineSocket
from appliance.settings import Settings
from steering.errors import HairpinError
from steering.model import Lane
from steering.run import run_async

START_LIMIT = 300.0
"""Seconds an engine may take to load its rules and answer."""
TEST_LIMIT = 300.0
STOP_GRACE = 8.0
BEAT = 1.0
EMPTY_BEATS = 3
"""Beats in a row with no rule loaded before the engine is taken for one that inspects nothing."""

Fingerprint = tuple[int, int, int, int] | None


@dataclass(frozen=True, slots=True)
class LanePaths:
    """Where a lane's files are."""

    directory: Path
    config: Path
    log: Path
    eve: Path
    socket: Path
    ruleset: Path
    record: Path


def find_lane_paths(settings: Settings, lane: Lane) -> LanePaths:
    """`record` is not in the engine's directory: the engine must not say who is adopted."""
    directory = settings.lane_dir(lane).absolute()
    return LanePaths(
        directory=directory,
        config=directory / "suricata.yaml",
        log=directory / "engine.log",
        eve=settings.eve_file(lane).absolute(),
        socket=settings.engine_socket(lane).absolute(),
        ruleset=settings.ruleset(lane).absolute(),
        record=settings.run_dir.absolute() / "inspect" / f"{lane.name}.json",
    )


class LaneSupervisor:
    """One lane's engine. `run` until cancelled; `build_state` is what to tell of it."""

    def __init__(
        self,
        settings: Settings,
        lane: Lane,
        facts: engine.EngineFacts,
        owner: files.Owner,
        on_change: Callable[[], None],
    ) -> None:
        self.settings = settings
        self.lane = lane
        self.facts = facts
        self.owner = owner
        self.paths = find_lane_paths(settings, lane)
        self.faults = FaultBook()
        self.log = structlog.get_logger("inspection.supervisor").bind(lane=lane.name)
        self._on_change = on_change
        self._socket = EngineSocket(self.paths.socket, limit=BEAT)
        self._engine: EngineProcess | None = None
        self._state = EngineState.STOPPED
        self._restarts = 0
        self._exits: list[float] = []
        self._rules = (0, 0)
        self._empty_beats = 0
        self._tested: tuple[str, Fingerprint] | None = None
        self._digest = ""
        self._matcher_fault: str | None = None
        self._refused = ""
        self._judged: Fingerprint = None
        self._log_start = 0

    def build_state(self, now: float, counters: dict[int, QueueCounters]) -> LaneState:
        """`now` is the epoch, `counters` the kernel's queues by number."""
        record = None if self._engine is None else self._engine.record
        return LaneState(
            number=self.lane.number,
            name=self.lane.name,
            state=self._state,
            pid=None if record is None else record.pid,
            started=None if record is None else record.started,
            adopted=self._engine is not None and self._engine.adopted,
            restarts=self._restarts,
            version=self.facts.text,
            hyperscan=self.facts.hyperscan and self._matcher_fault is None,
            rules_loaded=self._rules[0],
            rules_failed=self._rules[1],
            queues=tuple(
                QueueState(
                    number=seen.number,
                    waiting=seen.waiting,
                    dropped=seen.dropped,
                    user_dropped=seen.user_dropped,
                    packets=seen.packets,
                )
                for number in self.lane.queues
                if (seen := counters.get(number)) is not None
            ),
            faults=self.faults.build(now),
        )

    async def run(self, read_counters: Callable[[], tuple[QueueCounters, ...]]) -> None:
        """Supervise until cancelled; the engine then still runs (`stop` ends it, `leave` does not)."""
        while True:
            try:
                if self._engine is None:
                    await self._begin()
                if self._engine is not None:
                    await self._watch(self._engine, read_counters)
            except (HairpinError, OSError) as fault:
                if isinstance(fault, HairpinError):
                    self._note("engine", fault.reason, fault.mend)
                else:
                    self._note("engine", str(fault), f"see {self.paths.log}")
                self._tested = None
                self._exits = [*self._exits[-20:], time.monotonic()]
                await self._drop_engine()
                self._change(EngineState.FAILED)
            await self._wait_before_restart()

    async def stop(self) -> None:
        """End the engine in order."""
        if self._engine is not None:
            await self._engine.stop(STOP_GRACE)
            self._engine = None
        self.paths.record.unlink(missing_ok=True)
        self._change(EngineState.STOPPED)

    def leave(self) -> None:
        """Let the engine go on without a supervisor; the next one adopts it."""
        if self._engine is not None:
            self._engine.close()

    # --- beginning ---------------------------------------------------------------------------------

    async def _begin(self) -> None:
        """Adopt or start an engine; leaves `_engine` None when there is no ruleset to start on."""
        self._write_config()
        if self._adopt():
            return
        self._judged = fingerprint = files.read_fingerprint(self.paths.ruleset)
        if fingerprint is None:
            self._change(EngineState.NO_RULES)
            self._note(
                "rules",
                f"no ruleset at {self.paths.ruleset}",
                "run `hairpin rules update`; the lane is closed until then",
            )
            return
        if self._tested is None or self._tested[0] != self._digest:
            self._change(EngineState.STARTING)
            await self._test(fingerprint)
        await self._start()

    def _write_config(self) -> None:
        files.write_lane_directory(self.paths.directory, self.owner)
        self.paths.record.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        text = engine_config.render_engine_config(
            engine_config.build_engine_config(self.settings, self.lane)
        )
        argv = engine.render_start(
            self.settings.inspection.suricata,
            self.settings.inspection.user,
            self.lane,
            self.paths.config,
        )
        whole = "\0".join((text, *argv, self.facts.text))
        self._digest = hashlib.sha256(whole.encode()).hexdigest()
        write_atomically(self.paths.config, text, 0o644)

    def _adopt(self) -> bool:
        if self._tested is not None:
            return False
        found = adopt_engine(
            self.paths.record, self.settings.inspection.suricata, self.paths.config
        )
        if found is None:
            return False
        self._engine = found
        self.log.info("engine adopted", pid=found.pid)
        self._tested = (found.record.config, files.read_fingerprint(self.paths.ruleset))
        self._change(EngineState.STARTING)
        return True

    async def _test(self, fingerprint: Fingerprint) -> None:
        """`suricata -T` on configuration and rules. Raises HairpinError when they won't do."""
        ended = await run_async(
            engine.render_test(
                self.settings.inspection.suricata,
                self.settings.inspection.user,
                self.paths.config,
                self.paths.directory / "test",
            ),
            timeout=TEST_LIMIT,
            check=False,
        )
        report = engine.parse_test(ended.status, ended.stdout + ended.stderr)
        if not report.passed:
            raise HairpinError(
                f"the engine refuses its configuration or rules (status {report.status}, "
                f"{report.rules_loaded} rules): {report.complaint}",
                f"mend the ruleset, or see `suricata -T -c {self.paths.config}`",
            )
        self._tested = (self._digest, fingerprint)

    async def _start(self) -> None:
        self._change(EngineState.STARTING)
        # A socket left by a killed engine would answer for the new one: with a refusal.
        self.paths.socket.unlink(missing_ok=True)
        files.trim_log(self.paths.log)
        self._log_start = files.read_size(self.paths.log)
        argv = engine.render_start(
            self.settings.inspection.suricata,
            self.settings.inspection.user,
            self.lane,
            self.paths.config,
        )
        self._engine = start_engine(argv, self.paths.log, self._digest, time.time())
        write_record(self.paths.record, self._engine.record)
        deadline = time.monotonic() + START_LIMIT
        while not await self._answers():
            if self._engine.gone.is_set():
                return
            if time.monotonic() > deadline:
                raise HairpinError(
                    f"the engine did not answer within {START_LIMIT:.0f} s of its start",
                    f"see {self.paths.log}",
                )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._engine.gone.wait(), 0.05)

    async def _answers(self) -> bool:
        try:
            await self._socket.read_uptime()
        except (EngineSilent, EngineRefused):
            return False
        return True

    # --- watching ----------------------------------------------------------------------------------

    async def _watch(
        self,
        process: EngineProcess,
        read_counters: Callable[[], tuple[QueueCounters, ...]],
    ) -> None:
        """Until the engine is gone, hung, or must be replaced."""
        beats: tuple[heartbeat.Beat, ...] = ()
        self._empty_beats = 0
        while not process.gone.is_set():
            beats = heartbeat.prune_beats(
                (*beats, await self._take_beat(process, read_counters())), time.monotonic()
            )
            if reason := heartbeat.find_hang(beats):
                await self._replace_hung(process, reason)
                return
            if self._empty_beats >= EMPTY_BEATS:
                await self._drop_engine()
                self._tested = None
                self._judged = files.read_fingerprint(self.paths.ruleset)
                self._change(EngineState.NO_RULES)
                self._note(
                    "rules",
                    "the engine had loaded no rule, so it was stopped",
                    "publish a ruleset that loads; the lane is closed until then",
                )
                return
            if beats[-1].answered and await self._is_outdated(process):
                self.log.info("configuration changed, engine replaced", pid=process.pid)
                await self._drop_engine()
                return
            await self._tend()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.gone.wait(), BEAT)
        self._note_exit(process)

    async def _is_outdated(self, process: EngineProcess) -> bool:
        """Whether an adopted engine runs another configuration, and the new one is known to work."""
        if process.record.config == self._digest or self._refused == self._digest:
            return False
        try:
            await self._test(files.read_fingerprint(self.paths.ruleset))
        except HairpinError as fault:
            # An engine that inspects by the old configuration is worth more than none.
            self._refused = self._digest
            self._note("configuration", fault.reason, fault.mend)
            return False
        return True

    async def _take_beat(
        self, process: EngineProcess, counters: tuple[QueueCounters, ...]
    ) -> heartbeat.Beat:
        answered = True
        try:
            stats = await self._socket.read_ruleset_stats()
        except EngineSilent:
            answered = False
        except EngineRefused as fault:
            self._note("answer", fault.reason, f"see {self.paths.log}")
        else:
            self.faults.mend("answer", time.time())
            self._take_stats(stats.rules_loaded, stats.rules_failed)
        sight = process.read_sight()
        return heartbeat.Beat(
            at=time.monotonic(),
            answered=answered,
            waiting=sum(seen.waiting for seen in counters if seen.number in self.lane.queues),
            cpu=0.0 if sight is None else sight.cpu,
        )

    def _take_stats(self, loaded: int, failed: int) -> None:
        changed = (loaded, failed) != self._rules
        self._rules = (loaded, failed)
        self._empty_beats = self._empty_beats + 1 if loaded == 0 else 0
        if loaded and self._state is not EngineState.RUNNING:
            self._matcher_fault = engine.find_matcher_fault(
                files.read_log(self.paths.log, self._log_start)
            )
            if self._matcher_fault and self.settings.inspection.require_hyperscan:
                raise HairpinError(
                    f"the engine runs without Hyperscan: {self._matcher_fault}",
                    "give the VM a CPU model with SSSE3, or unset requireHyperscan",
                )
            for kind in ("rules", "engine", "hung"):
                self.faults.mend(kind, time.time())
            self._change(EngineState.RUNNING)
            self.log.info("engine runs", pid=self._engine and self._engine.pid, rules=loaded)
        elif changed:
            self._on_change()

    async def _tend(self) -> None:
        """Bound the files that grow."""
        files.trim_log(self.paths.log)
        rotated = files.rotate_eve(self.paths.eve, self.settings.inspection.eve_limit_bytes)
        if rotated or not self.paths.eve.exists():
            await self._reopen_logs()
        if lost := files.remove_unread(self.paths.eve):
            self._note(
                "events lost",
                f"{len(lost)} EVE files were deleted unread, the last {lost[-1].name}",
                "see why the management service does not read them (`hairpin doctor`)",
            )

    async def _reopen_logs(self) -> None:
        try:
            await EngineSocket(self.paths.socket).reopen_log_files()
        except (EngineSilent, EngineRefused) as fault:
            # The engine goes on writing to the renamed file: late, not lost. The next beat tries again.
            self._note("rotation", f"the EVE file could not be reopened: {fault.reason}", "")
        else:
            self.faults.mend("rotation", time.time())

    # --- ending ------------------------------------------------------------------------------------

    async def _replace_hung(self, process: EngineProcess, reason: str) -> None:
        self._change(EngineState.HUNG)
        self._note("hung", reason, "it is killed and started again; see its log")
        self.log.warning("engine hung", pid=process.pid, reason=reason)
        await process.kill()
        self._count_restart()

    def _note_exit(self, process: EngineProcess) -> None:
        end = files.read_log(self.paths.log, self._log_start)[-2000:].strip().splitlines()
        said = f"; it last said: {end[-1][:300]}" if end else ""
        self._change(EngineState.FAILED)
        self._note(
            "engine", f"the engine (pid {process.pid}) exited{said}", f"see {self.paths.log}"
        )
        self.log.warning("engine exited", pid=process.pid)
        self._count_restart()

    def _count_restart(self) -> None:
        self._engine = None
        self._rules = (0, 0)
        self._restarts += 1
        self._exits = [*self._exits[-20:], time.monotonic()]

    async def _drop_engine(self) -> None:
        if self._engine is not None:
            await self._engine.stop(STOP_GRACE)
            self._engine = None
            self._rules = (0, 0)

    async def _wait_before_restart(self) -> None:
        if self._state is EngineState.NO_RULES:
            await self._wait_for_other_rules()
            return
        delay = heartbeat.find_restart_delay(self._exits, time.monotonic())
        if delay > 2.0:
            self.log.info("engine start delayed", seconds=delay)
        await asyncio.sleep(delay)

    async def _wait_for_other_rules(self) -> None:
        while True:
            present = files.read_fingerprint(self.paths.ruleset)
            if present is not None and present != self._judged:
                return
            await asyncio.sleep(0.25)

    def _note(self, kind: str, reason: str, mend: str) -> None:
        self.faults.note(kind, reason, mend, time.time())
        self._on_change()

    def _change(self, state: EngineState) -> None:
        if state is not self._state:
            self.log.info("engine state", state=str(state))
            self._state = state
        self._on_change()
