"""Proves each lane with canaries: every 30 s, after every change, and when asked.

A probe is recorded, sent by `hairpin inspect`, and waited for in the store; `stages` judges what was
seen. A failure counts when a second probe a second later fails too: during a change a packet may be
lost honestly.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import structlog
from sqlite_utils import Database

from appliance.alerts.canary import load_probe, record_probe, record_result, remove_probes
from appliance.alerts.history import end_event, find_open_events, record_event
from appliance.alerts.store import Store, StoreError
from appliance.assurance.stages import Judgement, Stage, Surroundings, judge_probe
from appliance.inspection.canary_client import ProbeReport
from appliance.inspection.publish import EngineState, Fault, InspectionState, LaneState
from steering.canary import PARTS
from steering.counters import Counters
from steering.errors import HairpinError
from steering.model import Lane
from steering.tasks import wait_at_most

log = structlog.get_logger("canary")

ARRIVAL_SECONDS = 5.0
"""Within which a canary's alerts must stand in the store."""
PROBE_SECONDS = 1.0
STORE_SECONDS = 3.0
START_SECONDS = 20.0
AGAIN_SECONDS = 1.0
FAILING_EVERY_SECONDS = 5.0
APART_SECONDS = 2.0
FAULT_SECONDS = 2.3  # `inspect` looks at bridges and rules every 2 s
COUNTER_LAG_SECONDS = 1.2  # the userspace datapath tells its counts that late
KEPT_SECONDS = 7 * 86400.0
EVE_TAIL_BYTES = 4 * 2**20
EVENT = "canary.failed"

Send = Callable[[Path, str, str, str, float], Awaitable[ProbeReport]]


@dataclass(frozen=True, slots=True)
class CanaryStatus:
    """How a lane's proof stands. Times in seconds since the epoch; ``passed`` is None before the first.

    ``arrival_seconds``: from sending to the last alert in the store.
    """

    lane: str
    at: float | None = None
    cause: str = ""
    passed: bool | None = None
    stage: str = ""
    detail: str = ""
    passed_at: float | None = None
    failed_since: float | None = None
    arrival_seconds: float | None = None
    probes: int = 0
    failures: int = 0


@dataclass(frozen=True, slots=True)
class Sources:
    """What a probe's judgement is made from, beside the store."""

    read_inspection: Callable[[], InspectionState | None]
    is_forwarding: Callable[[Lane], bool]
    read_counters: Callable[[], Awaitable[Counters]]
    find_token: Callable[[Lane], str | None]
    eve_file: Callable[[Lane], Path]


class CanaryWatch:
    """``lanes`` are proved through the socket at ``socket``; None: no canary port is configured."""

    def __init__(
        self,
        lanes: Sequence[Lane],
        socket: Path | None,
        store: Store,
        sources: Sources,
        send: Send,
        *,
        every_seconds: float = 30.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._lanes = tuple(lanes)
        self._socket = socket
        self._store = store
        self._sources = sources
        self._send = send
        self._every = every_seconds
        self._clock = clock
        self._status = {lane.name: CanaryStatus(lane.name) for lane in lanes}
        self._locks = {lane.name: asyncio.Lock() for lane in lanes}
        self._causes: dict[str, list[str]] = {lane.name: ["start"] for lane in lanes}
        self._wake = {lane.name: asyncio.Event() for lane in lanes}
        self._events: dict[str, int] = {}
        self.mend_rules: Callable[[Lane], Awaitable[None]] = _mend_nothing
        """Has an engine that does not run the ruleset in force load it."""

    @property
    def configured(self) -> bool:
        return self._socket is not None

    def status(self) -> tuple[CanaryStatus, ...]:
        return tuple(self._status.values())

    def request(self, cause: str, lane: str | None = None) -> None:
        """Prove a lane (None: every one) soon; ``cause`` is what changed."""
        for name, causes in self._causes.items():
            if lane in (None, name):
                if cause not in causes:
                    causes.append(cause)
                self._wake[name].set()

    async def run(self) -> None:
        if self._socket is None:
            return
        await self._load_open_events()
        async with asyncio.TaskGroup() as group:
            for lane in self._lanes:
                group.create_task(self._keep(lane), name=f"canary {lane.name}")

    @contextlib.asynccontextmanager
    async def hold(self, lane: Lane) -> AsyncIterator[Callable[[str], Awaitable[Judgement]]]:
        """Let nobody else prove this lane meanwhile, as while its rules change. Gives what proves it:

        one probe now, a second one if it fails; passed where there is no canary port at all.
        """
        async with self._locks[lane.name]:
            yield lambda cause: self._prove(lane, cause)

    def is_forwarding(self, lane: Lane) -> bool:
        return self._sources.is_forwarding(lane)

    async def prove(self, lane: Lane, cause: str) -> Judgement:
        """As what `hold` gives, at once."""
        async with self.hold(lane) as prove:
            return await prove(cause)

    async def prove_asked(self, lane: Lane) -> Judgement:
        """As `prove`, for somebody who asked; what fails is looked after as on schedule."""
        judgement = await self.prove(lane, "asked")
        if not judgement.passed:
            self.request("failed when asked", lane.name)
        return judgement

    async def _prove(self, lane: Lane, cause: str) -> Judgement:
        if self._socket is None:
            return Judgement()
        judgement = await self._try_probe(lane, cause)
        if not judgement.passed and judgement.stage is not Stage.STORE:
            await asyncio.sleep(AGAIN_SECONDS)
            again = await self._try_probe(lane, f"{cause}, again")
            # While the switch fails over, the second knows less than the first.
            judgement = replace(judgement, guessed=False) if again.guessed else again
        await self._tell(lane, judgement, cause)
        return judgement

    async def _try_probe(self, lane: Lane, cause: str) -> Judgement:
        try:
            return await self._probe(lane, cause)
        except StoreError as fault:
            return Judgement(Stage.STORE, fault.reason)
        except TimeoutError:
            return Judgement(Stage.STORE, f"the store took no canary within {STORE_SECONDS:g} s")

    # The inside

    async def _keep(self, lane: Lane) -> None:
        wake = self._wake[lane.name]
        engine: object = None
        due = soonest = time.monotonic()
        # At the host's start engines load their rules first; a canary then would only tell that.
        begin = due + START_SECONDS
        while True:
            now = time.monotonic()
            if now < begin and not self._is_ready(lane):
                await asyncio.sleep(0.2)
                continue
            begin = now
            present = self._find_engine(lane)
            running = (present.pid, present.started) if present and present.inspecting else None
            if running is not None and running != engine:
                if engine is not None:
                    self.request("another engine", lane.name)
                engine = running
            if (wake.is_set() and now >= soonest) or now >= due:
                wake.clear()
                causes, self._causes[lane.name] = self._causes[lane.name], []
                try:
                    judgement = await self.prove(lane, ", ".join(causes) or "schedule")
                    if judgement.stage is Stage.RULESET:
                        await self.mend_rules(lane)
                except (HairpinError, OSError) as fault:
                    log.error("canary not judged", lane=lane.name, reason=str(fault))
                failing = self._status[lane.name].passed is False
                due = time.monotonic() + (FAILING_EVERY_SECONDS if failing else self._every)
                soonest = time.monotonic() + APART_SECONDS  # changes come in bursts
            if wake.is_set():
                await asyncio.sleep(max(0.3, soonest - time.monotonic()))
                continue
            with contextlib.suppress(TimeoutError):
                await wait_at_most(wake.wait(), 1.0)

    def _is_ready(self, lane: Lane) -> bool:
        engine = self._find_engine(lane)
        return engine is not None and engine.inspecting and self._sources.is_forwarding(lane)

    async def _probe(self, lane: Lane, cause: str) -> Judgement:
        began, nonce = self._clock(), secrets.token_hex(16)
        name = lane.name
        recording = self._store.write(lambda db: record_probe(db, began, name, cause, nonce))
        # Not longer: a store that is held by somebody makes each write wait.
        probe_id = await wait_at_most(recording, STORE_SECONDS)
        started = time.monotonic()
        judgement, arrival = await self._send_and_judge(lane, nonce, probe_id, began)
        ended = self._clock()

        def end(db: Database) -> None:
            record_result(
                db,
                probe_id,
                ended,
                passed=judgement.passed,
                stage=judgement.stage or "",
                detail=judgement.detail,
            )
            remove_probes(db, ended - KEPT_SECONDS)

        await self._store.write(end)
        log.info(
            "canary",
            lane=name,
            cause=cause,
            passed=judgement.passed,
            stage=judgement.stage,
            detail=judgement.detail,
            seconds=round(time.monotonic() - started, 3),
        )
        before = self._status[name]
        self._status[name] = replace(
            before,
            at=began,
            cause=cause,
            arrival_seconds=arrival if judgement.passed else before.arrival_seconds,
            passed_at=ended if judgement.passed else before.passed_at,
            probes=before.probes + 1,
            failures=before.failures + (not judgement.passed),
        )
        return judgement

    async def _send_and_judge(
        self, lane: Lane, nonce: str, probe_id: int, began: float
    ) -> tuple[Judgement, float | None]:
        try:
            token = self._sources.find_token(lane)
        except HairpinError as fault:
            return Judgement(Stage.RULESET, fault.reason), None
        if token is None:
            reason = "the ruleset in force has no canary's rule; `hairpin rules update`"
            return Judgement(Stage.RULESET, reason), None
        before = await self._read_counts(lane)
        forwarding = self._sources.is_forwarding(lane)
        started = time.monotonic()
        try:
            if self._socket is None:
                raise HairpinError("no canary port is configured")
            report = await self._send(self._socket, lane.name, token, nonce, PROBE_SECONDS)
        except HairpinError as fault:
            return Judgement(Stage.SENDER, fault.reason), None
        hostile = {part.name for part in PARTS if part.hostile}
        arrived: set[str] = set()
        # Where one was lost or came through on its way, the alerts of all will not come.
        worth = all(one.entered and one.left is not one.hostile for one in report.parts)
        while worth and not report.fault:
            stored = await self._store.read(lambda db: load_probe(db, probe_id))
            arrived = set(stored.arrived) if stored else set()
            if hostile <= arrived or time.monotonic() - started > ARRIVAL_SECONDS:
                break
            await asyncio.sleep(0.1)
        arrival = time.monotonic() - started
        around = await self._look_around(lane, report, nonce, before, began, hostile - arrived)
        # It may have come back while the probe was on its way.
        around = replace(around, forwarding=around.forwarding and forwarding)
        return judge_probe(report, arrived, lane.vlan, around), arrival

    async def _look_around(
        self,
        lane: Lane,
        report: ProbeReport,
        nonce: str,
        before: tuple[int, int] | None,
        began: float,
        missing: set[str],
    ) -> Surroundings:
        """Only what a failure needs is looked up, so that a canary that passes costs little."""
        ended_there = any(one.entered and not one.left for one in report.parts if not one.hostile)
        if ended_there and self._sources.is_forwarding(lane):
            await asyncio.sleep(FAULT_SECONDS)  # until `inspect` has looked at bridge and rules
        state = self._sources.read_inspection()
        engine = self._find_engine(lane)
        faults = (*(state.faults if state else ()), *(engine.faults if engine else ()))
        around = Surroundings(
            forwarding=self._sources.is_forwarding(lane),
            engine_runs=engine is not None and engine.state is EngineState.RUNNING,
            bridge_fault=_find_fault(faults, began, ("bridge", "no device", "legs differ")),
            rules_fault=_find_fault(faults, began, ("queue rules",)),
            packets_wait=engine is not None and any(queue.waiting for queue in engine.queues),
        )
        if before is not None and any(not one.entered for one in report.parts):
            await asyncio.sleep(COUNTER_LAG_SECONDS)
            after = await self._read_counts(lane)
            if after is not None:
                around = replace(
                    around, entered_switch=after[0] > before[0], steered=after[1] > before[1]
                )
        if missing:
            path = self._sources.eve_file(lane)
            around = replace(around, in_eve=await asyncio.to_thread(_is_in_tail, path, nonce))
        return around

    async def _read_counts(self, lane: Lane) -> tuple[int, int] | None:
        try:
            counters = await self._sources.read_counters()
        except HairpinError:
            return None
        steered = counters.canary.get(lane.name)
        return counters.canary_port.packets, steered.packets if steered else 0

    def _find_engine(self, lane: Lane) -> LaneState | None:
        state = self._sources.read_inspection()
        if state is None or abs(self._clock() - state.updated) > 5.0:
            return None
        return next((one for one in state.lanes if one.number == lane.number), None)

    async def _load_open_events(self) -> None:
        """Failures that a service before this one had told of and did not see the end of."""
        rows = await self._store.read(lambda db: find_open_events(db, EVENT))
        self._events = {str(row["subject"]): int(row["id"]) for row in rows}

    async def _tell(self, lane: Lane, judgement: Judgement, cause: str) -> None:
        name, now = lane.name, self._clock()
        before = self._status[name]
        self._status[name] = replace(
            before,
            passed=judgement.passed,
            stage=judgement.stage or "",
            detail=judgement.detail,
            failed_since=None if judgement.passed else before.failed_since or now,
        )
        text = f"the canary of lane {name} was lost at: {judgement.stage}; {judgement.detail}"
        detail = {"stage": str(judgement.stage), "cause": cause}
        held = judgement.stage is not Stage.STORE
        unheld = before.failed_since is not None and name not in self._events
        try:
            if judgement.passed and unheld:
                # The store did not take the failure while it lasted: told now, beginning and end.
                stage, why = before.stage, before.detail
                text = f"the canary of lane {name} was lost at: {stage}; {why}"
                await self._record(name, text, {"stage": stage}, before.failed_since or now, now)
            elif judgement.passed and name in self._events:
                event = self._events.pop(name)
                await self._store.write(lambda db: end_event(db, event, now))
            elif not judgement.passed and name not in self._events and held:
                self._events[name] = await self._record(name, text, detail, now, None)
        except StoreError as fault:
            log.error("canary's result not stored", lane=name, reason=fault.reason)

    async def _record(
        self, lane: str, text: str, detail: Mapping[str, str], at: float, ended: float | None
    ) -> int:
        return await self._store.write(
            lambda db: record_event(
                db, at, EVENT, "error", text, subject=lane, detail=detail, ended_at=ended
            )
        )


async def _mend_nothing(lane: Lane) -> None:
    return None


def _find_fault(faults: Sequence[Fault], since: float, words: Sequence[str]) -> str:
    """A fault that stands, or was mended since; by its reason's words."""
    for fault in faults:
        if fault.mended is not None and fault.mended < since - 3.0:
            continue
        if any(word in fault.reason for word in words):
            return fault.reason[:200]
    return ""


def _is_in_tail(path: Path, nonce: str) -> bool:
    try:
        with path.open("rb") as stream:
            stream.seek(0, 2)
            stream.seek(max(0, stream.tell() - EVE_TAIL_BYTES))
            return nonce.encode() in stream.read(EVE_TAIL_BYTES)
    except OSError:
        return False
