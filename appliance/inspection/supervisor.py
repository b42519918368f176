"""Keeps one engine running on one lane: test, start, watch, replace, adopt, stop.

What a supervisor decides (`heartbeat`, `engine`) is pure; here it is done. While the engine does not
run the lane is closed: its queue has no listener, and the kernel drops what is queued.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence

import structlog

from appliance.inspection import engine, files, heartbeat
from appliance.inspection.counters import build_lane_counters, build_queue_states
from appliance.inspection.faults import FaultBook
from appliance.inspection.launch import EngineLaunch
from appliance.inspection.netfilter import FrameSample, QueueCounters
from appliance.inspection.placement import LanePlacement
from appliance.inspection.process import (
    EngineProcess,
    adopt_engine,
    start_engine,
    write_record,
)
from appliance.inspection.publish import (
    EngineCounters,
    EngineState,
    LaneState,
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
from appliance.inspection.upkeep import EngineUpkeep
from appliance.settings import Settings
from steering.errors import HairpinError
from steering.model import Lane
from steering.tasks import wait_at_most

START_LIMIT = 300.0
"""Seconds an engine may take to load its rules and answer."""
STOP_GRACE = 8.0
BEAT = 1.0


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
        self.lane = lane
        self.facts = facts
        self.faults = FaultBook()
        self.shortcut = LaneShortcut(settings, lane, owner)
        self._launch = EngineLaunch(settings, lane, facts, owner, placement, self.shortcut)
        self.paths = self._launch.paths
        self._upkeep = EngineUpkeep(
            self.paths,
            settings.inspection.eve_limit_bytes,
            placement,
            self.faults,
            self._note,
        )
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
        self._matcher_fault: str | None = None
        self._refused = ""
        self._judged: tuple[object, ...] = ()
        self._log_start = 0
        self._counters: EngineCounters | None = None
        self._start_log = ""

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
            placement=self._upkeep.placed,
            hyperscan=self.facts.hyperscan and self._matcher_fault is None,
            super_packets=find_super_packets(
                wanted=self.settings.inspection.super_packets,
                built=self._launch.library is not None,
                log=self._start_log,
                counters=self._counters,
            ),
            shortcut=self.shortcut.find(
                None if record is None else record.pid, built=self._launch.library is not None
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
        self._launch.write()
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
        if self._tested != self._launch.digest or not found.wanted:
            self._change(EngineState.STARTING)
            await self._test()
        await self._start(found)

    def _take_ruleset(self, found: Ruleset) -> None:
        """Have the next engine load this one."""
        self._ruleset = found
        self._short = 0
        # Until it is seen to load.
        self._unloaded = True
        self._launch.write(found.path)
        if found.fault:
            self._note("ruleset", found.fault, "run `hairpin rules update`")
        else:
            self.faults.mend("ruleset", time.time())

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
        await self._launch.test()
        self._tested = self._launch.digest

    async def _start(self, ruleset: Ruleset) -> None:
        self._change(EngineState.STARTING)
        # A socket left by a killed engine would answer for the new one: with a refusal.
        self.paths.socket.unlink(missing_ok=True)
        files.trim_log(self.paths.log)
        self._log_start = files.read_size(self.paths.log)
        argv = self._launch.render_start()
        self._engine = start_engine(argv, self.paths.log, self._launch.digest, time.time())
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
        self._launch.write()
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
            await self._look_for_rules()
            await self._upkeep.tend(process, running=self._state is EngineState.RUNNING)
            with contextlib.suppress(TimeoutError):
                await wait_at_most(process.gone.wait(), BEAT)
        self._note_exit(process)

    async def _is_outdated(self, process: EngineProcess) -> bool:
        """Whether an adopted engine runs another configuration, and the new one is known to work."""
        if process.record.config == self._launch.digest:
            self.faults.mend("configuration", time.time())
            return False
        if self._refused == self._launch.digest:
            return False
        try:
            await self._test()
        except HairpinError as fault:
            # An engine that inspects by the old configuration is worth more than none.
            self._refused = self._launch.digest
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
        if self._launch.library is not None and ACCEPTED not in self._start_log:
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
