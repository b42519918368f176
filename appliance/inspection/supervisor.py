"""Keeps one engine running on one lane: test, start, watch, replace, adopt, stop.

What a supervisor decides (`heartbeat`, `engine`) is pure; here it is done. While the engine does not
run the lane is closed: its queue has no listener, and the kernel drops what is queued.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from appliance.inspection import config as engine_config
from appliance.inspection import engine, files, heartbeat
from appliance.inspection.counters import build_lane_counters, build_queue_states
from appliance.inspection.faults import FaultBook
from appliance.inspection.netfilter import FrameSample, QueueCounters
from appliance.inspection.placement import LanePlacement, build_placement, find_placement_faults
from appliance.inspection.process import (
    EngineProcess,
    adopt_engine,
    read_threads,
    start_engine,
    write_group_nice,
    write_record,
)
from appliance.inspection.publish import (
    EngineCounters,
    EngineState,
    LaneState,
    Placement,
    write_atomically,
)
from appliance.inspection.rulesets import Ruleset, Rulesets
from appliance.inspection.shortcut_lane import LaneShortcut
from appliance.inspection.socket import (
    EngineRefused,
    EngineSilent,
    EngineSocket,
    parse_counters,
)
from appliance.inspection.superpackets import ACCEPTED, find_super_packets
from appliance.paths import find_queue_library
from appliance.settings import Settings
from steering.errors import HairpinError
from steering.model import Lane
from steering.run import run_async
from steering.tasks import wait_at_most

START_LIMIT = 300.0
"""Seconds an engine may take to load its rules and answer."""
TEST_LIMIT = 300.0
STOP_GRACE = 8.0
BEAT = 1.0
PLACEMENT_PERIOD = 10.0
"""Seconds between two looks at an engine's threads."""
LOST_TOLD_SECONDS = 600.0
"""Seconds after the last EVE file that was deleted unread, until that no longer is a present fault."""


@dataclass(frozen=True, slots=True)
class LanePaths:
    """Where a lane's files are."""

    directory: Path
    config: Path
    log: Path
    eve: Path
    socket: Path
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
        placement: LanePlacement,
    ) -> None:
        self.settings = settings
        self.placement = placement
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
        self._rulesets = Rulesets(settings.rules_dir, lane.profile)
        self._ruleset: Ruleset | None = None
        self._short = 0
        self._unloaded = False
        self._tested = ""
        self._digest = ""
        self._matcher_fault: str | None = None
        self._refused = ""
        self._judged: tuple[object, ...] = ()
        self._log_start = 0
        self._lost_at = 0.0
        self._counters: EngineCounters | None = None
        wanted = settings.inspection.super_packets or lane.leg_c is not None
        self._library = find_queue_library() if wanted else None
        self.shortcut = LaneShortcut(settings, lane, owner)
        self._start_log = ""
        self._placed = Placement()
        self._placed_at = -PLACEMENT_PERIOD

    def build_state(
        self, now: float, counters: Sequence[QueueCounters], frames: FrameSample | None
    ) -> LaneState:
        """`now` is the epoch, `counters` the kernel's queues, `frames` what rules counted."""
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
            placement=self._placed,
            hyperscan=self.facts.hyperscan and self._matcher_fault is None,
            super_packets=find_super_packets(
                wanted=self.settings.inspection.super_packets,
                built=self._library is not None,
                log=self._start_log,
                counters=self._counters,
            ),
            shortcut=self.shortcut.find(
                None if record is None else record.pid, built=self._library is not None
            ),
            rules_loaded=self._rules[0],
            rules_failed=self._rules[1],
            queues=build_queue_states(self.lane, counters),
            counters=build_lane_counters(self.lane, frames, self._counters),
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
                self._tested = ""
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
        present = self._rulesets.read_fingerprints()
        refused = self._ruleset if self._ruleset and present == self._judged else None
        self._judged = present
        found = await asyncio.to_thread(
            self._rulesets.find_whole, refused.revision if refused and self._unloaded else ""
        )
        if isinstance(found, str):
            self._change(EngineState.NO_RULES)
            mend = "run `hairpin rules update`; the lane is closed until then"
            self._note("rules", found, mend)
            return
        self._take_ruleset(found)
        if self._tested != self._digest or not found.wanted:
            self._change(EngineState.STARTING)
            await self._test()
        await self._start(found)

    def _take_ruleset(self, found: Ruleset) -> None:
        """Have the next engine load this one."""
        self._ruleset = found
        self._short = 0
        # Until it is seen to load.
        self._unloaded = True
        self._write_config(found.path)
        if found.fault:
            self._note("ruleset", found.fault, "run `hairpin rules update`")
        else:
            self.faults.mend("ruleset", time.time())

    def _write_config(self, ruleset: Path | None = None) -> None:
        """`ruleset`: another one than the one in force, for a start; what a reload reads is put back."""
        files.write_lane_directory(self.paths.directory, self.owner)
        self.shortcut.write()
        self.paths.record.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        config = engine_config.build_engine_config(self.settings, self.lane, self.placement)
        text = engine_config.render_engine_config(config)
        argv = self._render_start()
        whole = "\0".join((text, *argv, self.facts.text))
        self._digest = hashlib.sha256(whole.encode()).hexdigest()
        if ruleset is not None and ruleset != config.ruleset:
            text = engine_config.render_engine_config(replace(config, ruleset=ruleset))
        write_atomically(self.paths.config, text, 0o644)

    def _render_start(self) -> tuple[str, ...]:
        urgency = engine.render_urgency(self.placement.nice)
        return urgency + engine.render_start(
            self.settings.inspection.suricata,
            self.settings.inspection.user,
            self.lane,
            self.paths.config,
            self._library,
            super_packets=self.settings.inspection.super_packets,
            shortcut=self.shortcut.path,
        )

    def _adopt(self) -> bool:
        if self._tested:
            return False
        found = adopt_engine(
            self.paths.record, self.settings.inspection.suricata, self.paths.config
        )
        if found is None:
            return False
        self._engine = found
        self.log.info("engine adopted", pid=found.pid)
        self._tested = found.record.config
        self._change(EngineState.STARTING)
        return True

    async def _test(self) -> None:
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
        self._tested = self._digest

    async def _start(self, ruleset: Ruleset) -> None:
        self._change(EngineState.STARTING)
        # A socket left by a killed engine would answer for the new one: with a refusal.
        self.paths.socket.unlink(missing_ok=True)
        files.trim_log(self.paths.log)
        self._log_start = files.read_size(self.paths.log)
        argv = self._render_start()
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
                await wait_at_most(self._engine.gone.wait(), 0.05)
        await self._check_start(ruleset)

    async def _check_start(self, ruleset: Ruleset) -> None:
        """Whether the engine runs the ruleset that was verified, all of it. Raises HairpinError."""
        stats = await self._socket.read_ruleset_stats(limit=START_LIMIT)
        self._short = max(0, ruleset.wanted - stats.rules_loaded)
        if stats.rules_loaded == 0 or (
            self._short and not await asyncio.to_thread(self._rulesets.is_whole, ruleset)
        ):
            raise HairpinError(
                f"the engine loaded {stats.rules_loaded} of {ruleset.wanted} rules of {ruleset.path}",
                "it was stopped; run `hairpin rules update`",
            )
        self._unloaded = False
        # A later reload, by the management service, reads what is in force then.
        self._write_config()
        if self._short:
            # The file is whole, so it is this engine that can't: better those rules than none.
            self._note(
                "short",
                f"the engine loads {stats.rules_loaded} of the {ruleset.wanted} rules that its "
                f"ruleset {ruleset.revision} had in the trial",
                "run `hairpin rules update`: it names the rules that fail",
            )
        else:
            self.faults.mend("short", time.time())

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
        while not process.gone.is_set():
            beats = heartbeat.prune_beats(
                (*beats, await self._take_beat(process, read_counters())), time.monotonic()
            )
            if reason := heartbeat.find_hang(beats):
                await self._replace_hung(process, reason)
                return
            if beats[-1].answered and self._state is EngineState.RUNNING and self._is_below_floor():
                await self._replace_emptied(process)
                return
            if beats[-1].answered and await self._is_outdated(process):
                self.log.info("configuration changed, engine replaced", pid=process.pid)
                await self._drop_engine()
                return
            await self._tend(process)
            with contextlib.suppress(TimeoutError):
                await wait_at_most(process.gone.wait(), BEAT)
        self._note_exit(process)

    async def _is_outdated(self, process: EngineProcess) -> bool:
        """Whether an adopted engine runs another configuration, and the new one is known to work."""
        if process.record.config == self._digest:
            self.faults.mend("configuration", time.time())
            return False
        if self._refused == self._digest:
            return False
        try:
            await self._test()
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
            await self._read_counters(process)
        sight = process.read_sight()
        own = [seen for seen in counters if seen.number in self.lane.queues]
        return heartbeat.Beat(
            at=time.monotonic(),
            answered=answered,
            waiting=sum(seen.waiting for seen in own),
            cpu=0.0 if sight is None else sight.cpu,
            queues=tuple(
                heartbeat.QueueBeat(seen.number, seen.waiting, seen.packets - seen.waiting)
                for seen in own
            ),
            untaken=heartbeat.find_untaken(self.lane.queues, (seen.number for seen in own)),
            queued=sum(seen.packets + seen.dropped for seen in own),
            taken=None
            if self._counters is None or self._counters.pid != process.pid
            else self._counters.packets,
        )

    async def _read_counters(self, process: EngineProcess) -> None:
        if self._library is not None and ACCEPTED not in self._start_log:
            # It is said when the queues are opened, some time after the first answer.
            self._start_log = files.read_log(self.paths.log, self._log_start, 2**20)
        # An engine has none in its first seconds, and refuses.
        with contextlib.suppress(EngineRefused, EngineSilent):
            self._counters = parse_counters(
                await self._socket.read_counters(),
                process.pid,
                process.record.started,
                time.time(),
            )

    def _take_stats(self, loaded: int, failed: int) -> None:
        changed = (loaded, failed) != self._rules
        self._rules = (loaded, failed)
        if loaded and self._state is not EngineState.RUNNING:
            self._start_log = files.read_log(self.paths.log, self._log_start)
            self._matcher_fault = engine.find_matcher_fault(self._start_log)
            if self._matcher_fault and self.settings.inspection.require_hyperscan:
                raise HairpinError(
                    f"the engine runs without Hyperscan: {self._matcher_fault}",
                    "give the VM a CPU model with SSSE3, or unset requireHyperscan",
                )
            for kind in ("rules", "engine", "hung", "emptied"):
                self.faults.mend(kind, time.time())
            self._change(EngineState.RUNNING)
            self.log.info("engine runs", pid=self._engine and self._engine.pid, rules=loaded)
        elif changed:
            self._on_change()

    async def _look_for_rules(self) -> None:
        """A start's faults are over when what is in force is whole, and was loaded, all of it."""
        if self._ruleset is None or not (self._ruleset.fault or self._short):
            return
        wanted = self._rulesets.find_wanted_now()
        present = self._rulesets.read_fingerprints()
        if not wanted or wanted != self._rules[0] or present == self._judged:
            return
        found = await asyncio.to_thread(self._rulesets.find_whole)
        if isinstance(found, str) or found.fault:
            return
        self._ruleset, self._judged, self._short = found, present, 0
        for kind in ("ruleset", "short"):
            self.faults.mend(kind, time.time())
        self._on_change()

    async def _tend(self, process: EngineProcess) -> None:
        """Bound the files that grow, and see what is mended."""
        await self._look_for_rules()
        self._look_at_threads(process)
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
            self._lost_at = time.monotonic()
        elif time.monotonic() - self._lost_at > LOST_TOLD_SECONDS:
            self.faults.mend("events lost", time.time())

    def _look_at_threads(self, process: EngineProcess) -> None:
        """Read back where the threads run. A wrong place costs speed, not inspection: it is told, no more."""
        if (
            self._state is not EngineState.RUNNING
            or time.monotonic() - self._placed_at < PLACEMENT_PERIOD
        ):
            return
        self._placed_at = time.monotonic()
        refused = write_group_nice(process.pid, self.placement.nice)
        seen = read_threads(process.pid)
        self._placed = build_placement(self.placement, seen)
        faults = [*find_placement_faults(self.placement, seen), *filter(None, [refused])]
        if faults:
            mend = (
                "the lane inspects all the same; see what limits this process (cores, CAP_SYS_NICE), or set "
                "inspection.pinned to false or inspection.nice to 0"
            )
            self._note(
                "placement", f"the engine is not placed as it should be: {'; '.join(faults)}", mend
            )
        else:
            self.faults.mend("placement", time.time())

    async def _reopen_logs(self) -> None:
        try:
            await EngineSocket(self.paths.socket).reopen_log_files()
        except (EngineSilent, EngineRefused) as fault:
            # The engine goes on writing to the renamed file: late, not lost. The next beat tries again.
            self._note("rotation", f"the EVE file could not be reopened: {fault.reason}", "")
        else:
            self.faults.mend("rotation", time.time())

    def _is_below_floor(self) -> bool:
        """Whether the engine has fewer rules than any ruleset that may be in force gives it."""
        return self._rules[0] < max(1, self._rulesets.find_floor() - self._short)

    # --- ending ------------------------------------------------------------------------------------

    async def _replace_hung(self, process: EngineProcess, reason: str) -> None:
        self._change(EngineState.HUNG)
        self._note("hung", reason, "it is killed and started again; see its log")
        self.log.warning("engine hung", pid=process.pid, reason=reason)
        await process.kill()
        self._count_restart()

    async def _replace_emptied(self, process: EngineProcess) -> None:
        """Somebody made it load another file. At once: until then traffic passes by too few rules."""
        self._change(EngineState.FAILED)
        floor = self._rulesets.find_floor() - self._short
        self._note(
            "emptied",
            f"the engine had {self._rules[0]} rules loaded instead of {floor} or more",
            "it was killed and is started on a ruleset that is whole; who reloaded it?",
        )
        self.log.warning("engine below the floor", pid=process.pid, rules=self._rules[0])
        await process.kill()
        self._count_restart()
        # It did not fail by itself: the next one need not wait.
        self._exits = []

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
        # A directory of another user's, on any file system: looked at, not watched.
        while self._rulesets.read_fingerprints() == self._judged:  # noqa: ASYNC110
            await asyncio.sleep(0.25)

    def _note(self, kind: str, reason: str, mend: str) -> None:
        self.faults.note(kind, reason, mend, time.time())
        self._on_change()

    def _change(self, state: EngineState) -> None:
        if state is not self._state:
            self.log.info("engine state", state=str(state))
            self._state = state
        self._on_change()
