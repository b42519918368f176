"""What steering tells, taken at once and kept in the store, in order; and who is to act on it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from appliance.alerts.history import (
    end_event,
    end_holdings,
    find_open_events,
    record_event,
    record_holding,
)
from appliance.alerts.store import Store, StoreError
from appliance.assurance.failures import FailureWatch
from appliance.management.knowledge import Knowledge
from steering.events import (
    AddressContested,
    AddressSeen,
    DriftMended,
    LaneChanged,
    PortsChanged,
    SteeringEvent,
    SwitchChanged,
)

log = structlog.get_logger("serve")

QUEUE_LENGTH = 10_000
SWITCH_LOST = "switch.lost"


def _ignore() -> None:
    return None


def _ignore_change(cause: str, lane: str | None) -> None:
    return None


class EventKeeper:
    """``on_ports`` is called when VMs came or went, ``on_change`` with what must be proved anew,

    and the lane if it concerns only one.
    """

    def __init__(self, store: Store, knowledge: Knowledge) -> None:
        self._store = store
        self._knowledge = knowledge
        self._queue: asyncio.Queue[SteeringEvent] = asyncio.Queue(maxsize=QUEUE_LENGTH)
        self._switch_lost: int | None = None
        self.on_ports: Callable[[], None] = _ignore
        self.on_change: Callable[[str, str | None], None] = _ignore_change
        self.failures: FailureWatch | None = None

    def take(self, event: SteeringEvent) -> None:
        """Called on the event loop; never blocks."""
        match event:
            case AddressSeen(at=at, address=address, vm_id=vm_id, claimed=claimed):
                if not self._knowledge.take_address(address, vm_id, at, claimed=claimed):
                    return
            case PortsChanged():
                self.on_ports()
                self.on_change("ports changed", None)
            case DriftMended():
                self.on_change("drift mended", None)
            case SwitchChanged(reachable=True):
                self.on_change("switch back", None)
            case LaneChanged(forwarding=True, lane=lane):
                self.on_change("lane up", lane)
        try:
            self._queue.put_nowait(event)
        except asyncio.QueueFull:
            log.error("an event was lost: the store does not keep up", steering_event=str(event))

    async def run(self) -> None:
        """Until cancelled; an event that the store does not take is tried again."""
        left = await self._store.read(lambda db: find_open_events(db, SWITCH_LOST))
        self._switch_lost = int(left[-1]["id"]) if left else None
        while True:
            event = await self._queue.get()
            while True:
                try:
                    await self._keep(event)
                    break
                except StoreError as fault:
                    log.error("event not stored", reason=fault.reason)
                    await asyncio.sleep(1)

    async def _keep(self, event: SteeringEvent) -> None:
        match event:
            case AddressSeen(at=at, address=address, vm_id=vm_id):
                await self._store.write(lambda db: record_holding(db, address, vm_id, at))
            case AddressContested(at=at, address=address):
                names = {one.vm_id: one.name for one in self._knowledge.now.machines}
                holder, claimant = (names.get(vm, vm) for vm in (event.holder, event.claimant))
                text = (
                    f"{claimant} claims {address}, which {holder} holds: a move, or one VM poses as "
                    "the other; `addresses` in the VirtualMachine document forbids it"
                )
                await self._record(at, "address.contested", "warning", text, claimant)
            case PortsChanged(at=at):
                gone = event.vanished
                known = {machine.vm_id for machine in self._knowledge.now.machines}
                await self._store.write(
                    lambda db: [end_holdings(db, vm, at) for vm in gone if vm not in known]
                )
                text = (
                    f"{len(event.appeared)} ports appeared, {len(gone)} vanished; "
                    f"the flows followed in {event.seconds:.3f} s"
                )
                await self._record(at, "ports.changed", "info", text, ", ".join(event.appeared))
            case DriftMended(at=at):
                text = (
                    f"the switch had drifted and was mended in {event.seconds:.3f} s: "
                    f"{event.added} added, {event.modified} modified, {event.deleted} deleted"
                )
                await self._record(at, "drift.mended", "warning", text)
            case SwitchChanged():
                await self._keep_switch(event)
            case LaneChanged() if self.failures is not None:
                await self.failures.take(event)

    async def _keep_switch(self, event: SwitchChanged) -> None:
        """Losing the switch begins an event, having it again ends it."""
        lost = self._switch_lost
        if not event.reachable:
            if lost is None:
                text = f"the switch is lost: {event.reason}"
                self._switch_lost = await self._record(
                    event.at, SWITCH_LOST, "error", text, "switch"
                )
        elif lost is not None:
            await self._store.write(lambda db: end_event(db, lost, event.at))
            self._switch_lost = None

    async def _record(
        self, at: float, kind: str, severity: str, text: str, subject: str = ""
    ) -> int:
        return await self._store.write(
            lambda db: record_event(db, at, kind, severity, text, subject=subject)
        )
