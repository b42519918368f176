"""The one place that wires the management service: what `hairpin serve` runs."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import structlog

from appliance.alerts.history import (
    end_event,
    end_holdings,
    load_holdings,
    record_event,
    record_holding,
)
from appliance.alerts.ingest import Ingest
from appliance.alerts.store import Store, StoreError
from appliance.api.auth import ensure_token
from appliance.api.server import open_server
from appliance.export.exporter import Exporter
from appliance.inspection.config import build_engine_config, render_engine_config
from appliance.inspection.publish import InspectionState, read_inspection_state
from appliance.management.flows import FlowIngest
from appliance.management.knowledge import Knowledge
from appliance.management.rulework import RuleWork
from appliance.management.service import Management, load_in_force
from appliance.paths import find_engine_data
from appliance.rules.pipeline import RulePipeline
from appliance.settings import Settings
from steering.decide import decide
from steering.errors import HairpinError
from steering.events import (
    AddressSeen,
    DriftMended,
    LaneChanged,
    PortsChanged,
    SteeringEvent,
    SwitchChanged,
)
from steering.model import Profile
from steering.reconcile import Reconciler
from steering.tasks import cancel_all

log = structlog.get_logger("serve")

HOLDINGS_SECONDS = 7 * 86400.0  # how far back attribution remembers who held an address


def run_serve(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status. Raises HairpinError."""
    return asyncio.run(_serve(settings))


def write_trial_config(settings: Settings, profile: Profile) -> Path:
    """The configuration that a profile's engine runs on, for testing its rules. Raises HairpinError."""
    lane = next(lane for lane in settings.build_lanes() if lane.profile is profile)
    path = settings.state_dir / "trial" / f"{profile}.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(render_engine_config(build_engine_config(settings, lane), find_engine_data()))
    return path


async def _serve(settings: Settings) -> int:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    settings.state_dir.mkdir(parents=True, exist_ok=True)
    token = ensure_token(settings.token_file)
    store = Store(settings.database)
    try:
        await _run(settings, token, store, stop)
    finally:
        store.close()
    log.info("serve ended")
    return 0


async def _run(settings: Settings, token: str, store: Store, stop: asyncio.Event) -> None:
    lanes = settings.build_lanes()
    began = time.time()
    holdings = await store.read(lambda db: load_holdings(db, until_after=began - HOLDINGS_SECONDS))
    knowledge = Knowledge(holdings)
    keeper = EventKeeper(store, knowledge)
    reconciler = Reconciler(
        ovsdb=settings.switch.ovsdb,
        openflow=settings.switch.openflow,
        bridge=settings.switch.bridge,
        lanes=lanes,
        on_event=keeper.take,
    )
    in_force = await load_in_force(store)
    ingest = Ingest(
        store, {lane: settings.eve_file(lane) for lane in lanes}, knowledge.find_context, decide
    )
    flows = FlowIngest(
        store, settings.flow_spool, lambda: knowledge.now, lambda: knowledge.holdings
    )

    def read_inspection() -> InspectionState | None:
        return read_inspection_state(settings.inspection_state)

    async def record(kind: str, severity: str, message: str) -> None:
        at = time.time()
        await store.write(lambda db: record_event(db, at, kind, severity, message))

    pipeline = RulePipeline(
        settings,
        find_engine_data(),
        lambda profile: write_trial_config(settings, profile),
        settings.inspection.suricata,
    )
    rules = RuleWork(settings, pipeline, read_inspection, record)
    exporters = [Exporter(one, store, settings.name, ingest.wait_newer) for one in settings.export]
    management = Management(
        settings,
        store=store,
        reconciler=reconciler,
        knowledge=knowledge,
        ingest=ingest,
        flows=flows,
        exporters=exporters,
        rules=rules,
        in_force=in_force,
        read_inspection=read_inspection,
    )
    keeper.on_ports = management.note_machines
    await reconciler.start(in_force.policies)
    management.note_machines()
    tasks = [
        asyncio.create_task(keeper.run(), name="events"),
        asyncio.create_task(ingest.run(), name="ingest"),
        asyncio.create_task(flows.run(), name="flow records"),
        asyncio.create_task(management.watch_accounting(), name="accounting"),
        asyncio.create_task(_ensure_rules(pipeline, record), name="rules"),
        *(asyncio.create_task(one.run(), name="export") for one in exporters),
    ]
    try:
        async with open_server(management, settings.api, token) as url:
            log.info("serving", url=url, revision=in_force.number)
            await _wait(stop, tasks)
    finally:
        await rules.close()
        await cancel_all(tasks)
        await reconciler.close()


async def _wait(stop: asyncio.Event, tasks: list[asyncio.Task[None]]) -> None:
    """Until ``stop``; a part that ends by a failure of its own ends the service, loudly."""
    waiting = asyncio.create_task(stop.wait(), name="stop")
    watched: set[asyncio.Task[object]] = {waiting, *tasks}
    try:
        while not stop.is_set():
            done, watched = await asyncio.wait(watched, return_when=asyncio.FIRST_COMPLETED)
            for task in done - {waiting}:
                if task.exception() is not None:
                    log.error("a part failed", part=task.get_name(), exc_info=task.exception())
                    raise HairpinError(
                        f"{task.get_name()} failed: {task.exception()}",
                        "the switch goes on as it is; restart the service and report this",
                    )
    finally:
        waiting.cancel()


async def _ensure_rules(
    pipeline: RulePipeline, record: Callable[[str, str, str], Awaitable[None]]
) -> None:
    """A ruleset for every profile, from what is on this machine, so that engines can start."""
    while True:
        try:
            await pipeline.ensure()
            return
        except HairpinError as fault:
            log.error("no ruleset", reason=fault.reason, mend=fault.mend)
            await record("rules.failed", "error", f"no ruleset could be made: {fault.reason}")
            await asyncio.sleep(10)


def _ignore() -> None:
    return None


class EventKeeper:
    """Takes what steering tells, at once, and keeps it in the store, in order."""

    def __init__(self, store: Store, knowledge: Knowledge) -> None:
        self._store = store
        self._knowledge = knowledge
        self._queue: asyncio.Queue[SteeringEvent] = asyncio.Queue(maxsize=10_000)
        self._down: dict[str, int] = {}
        self.on_ports: Callable[[], None] = _ignore

    def take(self, event: SteeringEvent) -> None:
        """Called on the event loop; never blocks."""
        if isinstance(event, AddressSeen):
            if not self._knowledge.take_address(
                event.address, event.vm_id, event.at, claimed=event.claimed
            ):
                return
        elif isinstance(event, PortsChanged):
            self.on_ports()
        try:
            self._queue.put_nowait(event)
        except asyncio.QueueFull:
            log.error("an event was lost: the store does not keep up", steering_event=str(event))

    async def run(self) -> None:
        """Until cancelled; an event that the store does not take is tried again."""
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
            case SwitchChanged(at=at, reachable=reachable, reason=reason):
                text = "the switch is back" if reachable else f"the switch is lost: {reason}"
                await self._change(at, "switch", reachable, "switch.lost", "error", text)
            case LaneChanged(at=at, lane=lane, forwarding=forwarding):
                text = (
                    f"lane {lane} carries traffic through its engine"
                    if forwarding
                    else f"lane {lane} is down: its policies fail as onFailure says"
                )
                await self._change(at, f"lane {lane}", forwarding, "lane.down", "error", text)

    async def _change(
        self, at: float, subject: str, up: bool, kind: str, severity: str, text: str
    ) -> None:
        """Going down begins an event, coming up ends it."""
        if not up:
            self._down[subject] = await self._record(at, kind, severity, text, subject)
        elif (begun := self._down.pop(subject, None)) is not None:
            await self._store.write(lambda db: end_event(db, begun, at))

    async def _record(
        self, at: float, kind: str, severity: str, text: str, subject: str = ""
    ) -> int:
        return await self._store.write(
            lambda db: record_event(db, at, kind, severity, text, subject=subject)
        )
