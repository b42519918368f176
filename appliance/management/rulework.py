"""Rule updates as a job: one at a time, its steps visible, engines reloaded, each reload proved.

A reload counts only when the engine's reload time moved, as many rules are loaded as the revision has,
no new rule failed, and a canary made for exactly this ruleset was dropped. Else the last good ruleset
is put back (`RulePipeline`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog

from appliance.api import documents as doc
from appliance.assurance.canary import CanaryWatch
from appliance.inspection.publish import EngineState, InspectionState, LaneState
from appliance.inspection.rulesets import UNLOADABLE
from appliance.inspection.socket import check_reload, reload_rules
from appliance.management.render import build_lane_rules
from appliance.rules.model import ReloadVerdict, UpdateReport, UpdateRunning
from appliance.rules.pipeline import RulePipeline
from appliance.rules.schedule import is_update_due
from appliance.settings import Settings
from steering.errors import HairpinError
from steering.model import Lane, Profile

log = structlog.get_logger("rules")

KEEP_SECONDS = 2.0
LOOK_SECONDS = 60.0
"""So often it is asked whether an update is due."""

OnReload = Callable[[str], None]
"""lane: its engine was asked to load rules, and what it did is judged."""

Record = Callable[[str, str, str], Awaitable[None]]
"""kind, severity, message: an event for the store."""


def _ignore(lane: str) -> None:
    return None


class RuleWork:
    """The rule pipeline as the API sees it."""

    def __init__(
        self,
        settings: Settings,
        pipeline: RulePipeline,
        read_inspection: Callable[[], InspectionState | None],
        record: Record,
        canary: CanaryWatch,
    ) -> None:
        self._settings = settings
        self._canary = canary
        self._lanes = settings.build_lanes()
        self.pipeline = pipeline
        self._read_inspection = read_inspection
        self._record = record
        self._job = doc.UpdateJob(state="idle")
        self._task: asyncio.Task[None] | None = None
        self._tried: float | None = None
        self._looked = 0.0
        self.on_reload: OnReload = _ignore

    @property
    def job(self) -> doc.UpdateJob:
        return self._job

    def start(self) -> doc.UpdateJob:
        """Start an update, unless one runs."""
        if self._task is None or self._task.done():
            self._tried = time.time()
            self._job = doc.UpdateJob(
                state="running", step="starting", started_at=doc.build_time(time.time())
            )
            self._task = asyncio.create_task(self._update(), name="rules update")
        return self._job

    async def close(self) -> None:
        if self._task is not None and not self._task.done():
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def read_revision(self, lane: str) -> str:
        """Of the ruleset in force on the lane of that name; "" where there is none."""
        states = {str(one.profile): one.revision for one in self.pipeline.read_state().profiles}
        return states.get(lane) or ""

    def build_status(self) -> tuple[doc.LaneRules, ...]:
        """The ruleset in force on each lane; counts are what the running engine says."""
        state = {one.profile: one for one in self.pipeline.read_state().profiles}
        inspection = self._read_inspection()
        engines = {lane.number: lane for lane in inspection.lanes} if inspection else {}
        return tuple(
            build_lane_rules(
                lane,
                state[lane.profile],
                engines[lane.number].rules_loaded if lane.number in engines else 0,
                engines[lane.number].rules_failed if lane.number in engines else 0,
            )
            for lane in self._lanes
            if lane.profile in state
        )

    async def _update(self) -> None:
        try:
            report = await self.pipeline.update(self._note, self._reload)
        except HairpinError as fault:
            self._end("failed", reason=fault.reason, mend=fault.mend)
            await self._record("rules.failed", "error", f"rules not updated: {fault.reason}")
        except Exception as fault:
            log.exception("rules update failed")
            self._end("failed", reason=f"{type(fault).__name__}: {fault}")
            raise
        else:
            await self._finish(report)

    async def _finish(self, report: UpdateReport) -> None:
        refused = "; ".join(
            f"{one.profile}: {one.refused}" for one in report.profiles if one.refused
        )
        changed = any(one.changed.any and one.in_force for one in report.profiles)
        if refused:
            self._end(
                "failed", changed=changed, reason=refused, mend="the last good rules are in force"
            )
            await self._record("rules.refused", "error", f"an engine refused its rules: {refused}")
            return
        self._end("succeeded", changed=changed)
        counts = ", ".join(
            f"{one.profile} {one.loaded} ({one.drops} drop, {one.left_out_count} left out)"
            for one in report.profiles
        )
        await self._record("rules.updated", "info", f"rules in force: {counts}")

    def _note(self, step: str) -> None:
        self._job = self._job.model_copy(update={"step": step[:500]})

    def _end(self, state: str, *, changed: bool = False, reason: str = "", mend: str = "") -> None:
        self._job = doc.UpdateJob.model_validate(
            {
                "state": state,
                "step": self._job.step,
                "started_at": self._job.started_at,
                "ended_at": doc.build_time(time.time()),
                "changed": changed,
                "reason": reason[:2000],
                "mend": mend[:2000],
                "lanes": self.build_status(),
            }
        )

    async def _reload(self, profile: str, path: Path) -> ReloadVerdict:
        """Ask the lane's engine to load what was put in force, and judge what it did."""
        lane = next((lane for lane in self._lanes if lane.profile == profile), None)
        if lane is None:
            return ReloadVerdict(True)
        if not self._is_running(lane):
            # `hairpin inspect` starts it with the new rules, after testing them itself.
            return ReloadVerdict(True, "the engine is not running; it starts with these rules")
        try:
            return await self._reload_engine(lane)
        finally:
            # Refused too: which rules it has now is known only after the next reload, told likewise.
            self.on_reload(lane.name)

    async def _reload_engine(self, lane: Lane) -> ReloadVerdict:
        # Held, so that no other canary meets the engine between the two rulesets.
        async with self._canary.hold(lane) as prove:
            forwarding = self._canary.is_forwarding(lane)
            try:
                report = await reload_rules(self._settings.engine_socket(lane))
            except HairpinError as fault:
                return ReloadVerdict(False, fault.reason)
            faults = check_reload(report, self._find_floor(lane))
            if faults:
                return ReloadVerdict(False, "; ".join(faults))
            judgement = await prove("rules reloaded")
            forwarding = forwarding or self._canary.is_forwarding(lane)
        if judgement.passed:
            return ReloadVerdict(True)
        if judgement.shut_out and not forwarding:
            # It was down before, so these rules are not why; as it forwards again a canary tells whether it has them.
            return ReloadVerdict(True, f"not proved: {judgement.detail}")
        reason = f"its canary was lost at: {judgement.stage}; {judgement.detail}"
        return ReloadVerdict(False, reason)

    def _find_floor(self, lane: Lane) -> int:
        """No fewer rules than the revision in force has: it was tested, so all of them load."""
        states = {one.profile: one for one in self.pipeline.read_state().profiles}
        state = states.get(lane.profile)
        loaded = state.report.loaded if state and state.report else 0
        return max(loaded, self._settings.rules.floor)

    async def keep(self) -> None:
        """Until cancelled: see that every profile's ruleset is whole on disk, and put back one that is not;
        read the sources again when that is due.

        The first ruleset is made here, too, from what is on this machine, so that engines can start.
        """
        told = ""
        adopted = False
        while True:
            try:
                told = await self._keep_whole(told)
                # After the first ruleset, so that engines inspect meanwhile by what there is.
                adopted = adopted or await self._adopt_bundle()
                if adopted:
                    self._start_when_due(time.time())
            except (HairpinError, OSError) as fault:
                # A disk that is full, most likely: what is in force stays, and it is tried again.
                log.error("rulesets not looked after", reason=str(fault))
            await asyncio.sleep(KEEP_SECONDS)

    def _start_when_due(self, now: float) -> None:
        every = self._settings.rules.update_seconds
        # The reports are read from disk: not with each turn of the loop, nor at all where nothing is scheduled.
        if every is None or 0 <= now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        if is_update_due(self.pipeline.read_state(), now, every, self._tried):
            log.info("rules update is due", every=every)
            self.start()

    async def _keep_whole(self, told: str) -> str:
        """Once; ``told`` is the failure that was told of last, and the present one is given back."""
        try:
            restored = await self.pipeline.ensure()
        except UpdateRunning:
            return told
        except (HairpinError, OSError) as fault:
            reason = fault.reason if isinstance(fault, HairpinError) else str(fault)
            if told != reason:
                log.error("no ruleset", reason=reason)
                await self._record("rules.failed", "error", f"no ruleset could be made: {reason}")
            return reason
        for profile in restored:
            await self._restore(profile)
        return ""

    async def _adopt_bundle(self) -> bool:
        """What was put into the image while it did not run; False: to be tried again."""
        try:
            adopted = await self.pipeline.adopt_bundle(self._reload)
        except UpdateRunning:
            return False
        except HairpinError as fault:
            reason = f"the rules bundle is not in force: {fault.reason}"
            log.error("rules bundle not adopted", reason=fault.reason)
            await self._record("rules.failed", "error", reason)
            return True
        if adopted is not None:
            told = f"; {adopted.fault}" if adopted.fault else ""
            text = f"the rules bundle of this image: {adopted.rules} rules{told}"
            await self._record("rules.bundle", "error" if adopted.fault else "info", text)
        return True

    async def reload_lane(self, lane: Lane) -> None:
        """A canary showed that its engine does not run the ruleset in force: have it load that.

        Not one that its supervisor saw it refuse: it inspects by the one before, which is told.
        """
        if self._is_unloadable(lane):
            return
        path = self._settings.rules_dir / lane.profile / "current" / "suricata.rules"
        verdict = await self._reload(lane.profile, path)
        done = "and has it again" if verdict.accepted else f"and was not mended: {verdict.reason}"
        text = f"the engine of {lane.name} did not run the ruleset in force, {done}"
        log.warning("ruleset loaded again", lane=lane.name, accepted=verdict.accepted)
        await self._record("rules.reloaded", "error", text)

    async def _restore(self, profile: Profile) -> None:
        """The ruleset on disk was damaged and another one stands there now: have the engine run it."""
        path = self._settings.rules_dir / profile / "current" / "suricata.rules"
        verdict = await self._reload(profile, path)
        text = f"the ruleset of {profile} was damaged on disk; the last good one is in force again"
        if not verdict.accepted:
            text = f"{text}, but its engine did not take it: {verdict.reason}"
        log.warning("ruleset restored", profile=profile, accepted=verdict.accepted)
        await self._record("rules.restored", "error", text)

    def _is_running(self, lane: Lane) -> bool:
        engine = self._find_engine(lane)
        return engine is not None and engine.state is EngineState.RUNNING

    def _is_unloadable(self, lane: Lane) -> bool:
        engine = self._find_engine(lane)
        faults = engine.faults if engine else ()
        return any(one.mended is None and one.reason.startswith(UNLOADABLE) for one in faults)

    def _find_engine(self, lane: Lane) -> LaneState | None:
        inspection = self._read_inspection()
        engines = inspection.lanes if inspection else ()
        return next((one for one in engines if one.number == lane.number), None)
