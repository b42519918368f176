"""Runs the coverage ledger after every change and now and then, and tells what it found.

`steering.prove` traces, `steering.ledger` judges. A violation counts when a second run finds one too:
while ports and policies change, what is wanted and what stands may honestly differ for a moment.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass

import structlog

from appliance.alerts.history import end_event, find_open_events, record_event, update_event
from appliance.alerts.store import Store, StoreError
from steering.errors import HairpinError
from steering.ledger import Ledger
from steering.model import Lane, Machine, PolicySet
from steering.prove import Prover
from steering.tasks import wait_at_most

log = structlog.get_logger("ledger")

EVERY_SECONDS = 300.0
AGAIN_SECONDS = 1.5
SETTLE_SECONDS = 1.0
SETTLE_MOST_SECONDS = 20.0
APART_SECONDS = 5.0
"""A run costs the switch up to some hundred milliseconds: changes that follow closely share one."""
CHANGE_BUDGET = 4_000
SCHEDULE_BUDGET = 20_000
"""Traces a run: after a change it should be over soon, now and then it may take its time."""
CHANGED_MOST = 5
EVENT = "ledger.violated"


@dataclass(frozen=True, slots=True)
class Inputs:
    """What the switch should do right now. ``forwarding`` by lane name."""

    policies: PolicySet
    revision: int
    machines: tuple[Machine, ...]
    lanes: tuple[Lane, ...]
    forwarding: Mapping[str, bool]


@dataclass(frozen=True, slots=True)
class LedgerRun:
    """``ledger`` is None where none could be made; ``fault`` says why."""

    revision: int
    cause: str
    ledger: Ledger | None
    fault: str = ""

    @property
    def violated(self) -> bool:
        return self.ledger is not None and self.ledger.violation_count > 0


class LedgerWatch:
    """``on_run`` is called with each run that counts. ``prover`` None: nothing to trace with."""

    def __init__(
        self,
        prover: Prover | None,
        read_inputs: Callable[[], Inputs],
        store: Store,
        on_run: Callable[[LedgerRun], Awaitable[None]],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._prover = prover
        self._read_inputs = read_inputs
        self._store = store
        self._on_run = on_run
        self._clock = clock
        self._causes: list[str] = ["start"]
        self._wake = asyncio.Event()
        self._wake.set()
        self._number = 0
        self._event: int | None = None
        self.last: LedgerRun | None = None

    def request(self, cause: str) -> None:
        """Something changed: run soon."""
        if cause not in self._causes:
            self._causes.append(cause)
        self._wake.set()

    async def close(self) -> None:
        """End what runs for the traces; after `run` was cancelled."""
        if self._prover is not None:
            await self._prover.close()

    async def run(self) -> None:
        rows = await self._store.read(lambda db: find_open_events(db, EVENT))
        self._event = int(rows[-1]["id"]) if rows else None
        while True:
            with contextlib.suppress(TimeoutError):
                await wait_at_most(self._wake.wait(), EVERY_SECONDS)
            await self._settle()
            causes, self._causes = self._causes, []
            run = await self._prove(causes)
            if run.violated:
                await asyncio.sleep(AGAIN_SECONDS)
                run = await self._prove(causes)
            self.last = run
            try:
                await self._tell(run)
                await self._on_run(run)
            except StoreError as fault:
                log.error("ledger not stored", reason=fault.reason)
            await asyncio.sleep(APART_SECONDS)

    async def _settle(self) -> None:
        """Wait until changes pause: each run takes the switch's main thread for a while."""
        deadline = time.monotonic() + SETTLE_MOST_SECONDS
        while self._wake.is_set() and time.monotonic() < deadline:
            self._wake.clear()
            with contextlib.suppress(TimeoutError):
                await wait_at_most(self._wake.wait(), SETTLE_SECONDS)
        self._wake.clear()

    async def _prove(self, causes: Sequence[str]) -> LedgerRun:
        """A run over which policies or VMs changed shows two states at once: it is made again."""
        for _ in range(CHANGED_MOST):
            inputs = self._read_inputs()
            run = await self._prove_once(inputs, causes)
            after = self._read_inputs()
            same = (inputs.policies, inputs.machines) == (after.policies, after.machines)
            if same or not run.violated:
                break
        return run

    async def _prove_once(self, inputs: Inputs, causes: Sequence[str]) -> LedgerRun:
        cause = ", ".join(causes) or "schedule"
        if self._prover is None:
            reason = "nothing can be traced: switch.vswitchd is not set in the settings"
            return LedgerRun(inputs.revision, cause, None, reason)
        self._number += 1
        try:
            ledger = await self._prover.prove(
                inputs.policies,
                inputs.machines,
                inputs.lanes,
                inputs.forwarding,
                self._number,
                CHANGE_BUDGET if causes else SCHEDULE_BUDGET,
            )
        except HairpinError as fault:
            log.warning("no ledger", reason=fault.reason)
            return LedgerRun(inputs.revision, cause, None, fault.reason)
        log.info(
            "ledger",
            cause=cause,
            traced=ledger.traced,
            violations=ledger.violation_count,
            seconds=round(ledger.seconds, 3),
        )
        return LedgerRun(inputs.revision, cause, ledger)

    async def _tell(self, run: LedgerRun) -> None:
        now, event, ledger = self._clock(), self._event, run.ledger
        if ledger is None:
            return
        if not run.violated:
            if event is not None:
                await self._store.write(lambda db: end_event(db, event, now))
                self._event = None
            return
        first = ledger.violations[0]
        text = (
            f"{ledger.violation_count} of {ledger.traced} traced packets go another way than the "
            f"policies say, the first {first.family} {first.service} {first.source} -> "
            f"{first.destination} ({first.direction}, {first.state}): {first.reason}"
        )
        detail = {"cause": run.cause, "violations": ledger.violation_count, "traced": first.traced}
        if event is not None:
            await self._store.write(lambda db: update_event(db, event, text, detail))
        else:
            self._event = await self._store.write(
                lambda db: record_event(db, now, EVENT, "error", text, detail=detail)
            )
