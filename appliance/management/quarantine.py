"""Who is in quarantine: kept in the store, put on the switch, ended in time.

Told to the switch first, then to the store: what is shut off at once matters more than what is remembered.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import structlog
from sqlite_utils import Database

from appliance.alerts.configuration import Part, keep_configuration
from appliance.alerts.history import find_rows, record_event
from appliance.alerts.rows import insert_sql
from appliance.alerts.store import Store, StoreError
from appliance.api.control import NotFound
from appliance.api.documents import build_time
from appliance.api.quarantine import QuarantinedVm
from steering.counters import Count, Counters
from steering.errors import SwitchError
from steering.model import Machine
from steering.reconcile import Reconciler
from steering.tasks import wait_at_most

log = structlog.get_logger("quarantine")

RETRY_SECONDS = 1.0
FOR_EVER = 86_400.0


@dataclass(frozen=True, slots=True)
class Quarantine:
    """A VM that is shut off, from ``since`` until ``until`` (epoch; None: until somebody ends it)."""

    vm_id: str
    vm: str
    since: float
    until: float | None
    reason: str


def load_quarantines(db: Database) -> dict[str, Quarantine]:
    """By vm-id; those too that ended while nobody ran: the watch ends them, and tells."""
    rows = find_rows(db, "SELECT * FROM quarantines ORDER BY since", ())
    return {row["vm_id"]: Quarantine(**row) for row in rows}


def store_quarantine(db: Database, one: Quarantine) -> None:
    db.execute("DELETE FROM quarantines WHERE vm_id = ?", (one.vm_id,))
    row = {
        "vm_id": one.vm_id,
        "vm": one.vm,
        "since": one.since,
        "until": one.until,
        "reason": one.reason,
    }
    db.execute(insert_sql("quarantines", row), row)
    keep_configuration(db, Part.QUARANTINES)


def remove_quarantine(db: Database, vm_id: str) -> None:
    db.execute("DELETE FROM quarantines WHERE vm_id = ?", (vm_id,))
    keep_configuration(db, Part.QUARANTINES)


def find_ended(quarantines: Mapping[str, Quarantine], now: float) -> tuple[Quarantine, ...]:
    return tuple(one for one in quarantines.values() if one.until is not None and one.until <= now)


def build_quarantined(
    one: Quarantine, machines: Sequence[Machine], counters: Counters | None
) -> QuarantinedVm:
    """As the API tells it; ``counters`` None: the switch can't be asked."""
    ports = next((machine.ports for machine in machines if machine.vm_id == one.vm_id), ())
    dropped = Count()
    for port in ports:
        dropped += counters.quarantined.get(port.ofport, Count()) if counters else Count()
    return QuarantinedVm(
        vm_id=one.vm_id,
        vm=one.vm,
        since=build_time(one.since),
        until=None if one.until is None else build_time(one.until),
        reason=one.reason,
        on_switch=bool(ports),
        dropped_packets=dropped.packets,
        dropped_bytes=dropped.bytes,
    )


class QuarantineWork:
    """``on_change`` is called when the switch was told. While this process is down a quarantine holds,

    also beyond its end: whoever is shut off stays so rather than being let out by nobody.
    """

    def __init__(
        self,
        store: Store,
        reconciler: Reconciler,
        quarantines: Mapping[str, Quarantine],
        on_change: Callable[[str], None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._store = store
        self._reconciler = reconciler
        self._quarantines = dict(quarantines)
        self._on_change = on_change
        self._clock = clock
        self._wake = asyncio.Event()
        self._lock = asyncio.Lock()

    @property
    def vm_ids(self) -> frozenset[str]:
        return frozenset(self._quarantines)

    def find(self) -> tuple[Quarantine, ...]:
        """Oldest first."""
        return tuple(sorted(self._quarantines.values(), key=lambda one: (one.since, one.vm_id)))

    async def add(
        self, machine: Machine, seconds: float | None, reason: str
    ) -> tuple[Quarantine, float]:
        """Shut a VM off, or give its quarantine another end; with the seconds until the switch had it.

        Raises SwitchError and StoreError; after both the VM is shut off as soon as the switch can be told.
        """
        async with self._lock:
            now = self._clock()
            former = self._quarantines.get(machine.vm_id)
            one = Quarantine(
                machine.vm_id,
                machine.name,
                now if former is None else former.since,
                None if seconds is None else now + seconds,
                reason,
            )
            self._quarantines[machine.vm_id] = one
            self._wake.set()
            try:
                took = await self._reconciler.shut_off(self.vm_ids)
            finally:
                await self._note(one, now, began=True)
            self._on_change(f"quarantine of {one.vm} began")
            return one, took

    async def remove(self, said: str) -> tuple[Quarantine, float]:
        """End the quarantine of a VM, by its vm-id or name. Raises NotFound, SwitchError, StoreError."""
        async with self._lock:
            one = self._quarantines.get(said) or next(
                (one for one in self._quarantines.values() if one.vm == said), None
            )
            if one is None:
                raise NotFound(
                    f"{said} is not in quarantine", "`hairpin quarantine list` shows those that are"
                )
            return await self._end(one)

    async def run(self) -> None:
        """End each in its time, until cancelled."""
        while True:
            self._wake.clear()
            now = self._clock()
            try:
                async with self._lock:
                    for one in find_ended(self._quarantines, now):
                        await self._end(one)
            except (SwitchError, StoreError) as fault:
                log.warning("quarantine not ended", reason=fault.reason)
                await asyncio.sleep(RETRY_SECONDS)
                continue
            ends = [one.until for one in self._quarantines.values() if one.until is not None]
            wait = min((end - now for end in ends), default=FOR_EVER)
            with contextlib.suppress(TimeoutError):
                # The clock may be set meanwhile: looked at now and then.
                await wait_at_most(self._wake.wait(), min(max(wait, 0.01), 60.0))

    async def _end(self, one: Quarantine) -> tuple[Quarantine, float]:
        left = self.vm_ids - {one.vm_id}
        took = await self._reconciler.shut_off(left)
        del self._quarantines[one.vm_id]
        await self._note(one, self._clock(), began=False)
        self._on_change(f"quarantine of {one.vm} ended")
        return one, took

    async def _note(self, one: Quarantine, now: float, *, began: bool) -> None:
        detail: dict[str, Any] = {"vmId": one.vm_id, "until": one.until, "reason": one.reason}
        why = f": {one.reason}" if one.reason else ""
        kind = "quarantine.began" if began else "quarantine.ended"
        text = f"VM {one.vm} is shut off{why}" if began else f"VM {one.vm} is no longer shut off"

        def write(db: Database) -> None:
            if began:
                store_quarantine(db, one)
            else:
                remove_quarantine(db, one.vm_id)
            severity = "warning" if began else "info"
            record_event(db, now, kind, severity, text, subject=one.vm_id, detail=detail)

        await self._store.write_lasting(write)
