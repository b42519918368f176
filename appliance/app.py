"""The one place that wires the management service: what `hairpin serve` runs."""

from __future__ import annotations

import asyncio
import gc
import signal
import sys
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import structlog

from appliance.alerts.history import (
    load_holdings,
    record_event,
    record_repeated,
)
from appliance.alerts.ingest import Ingest
from appliance.alerts.partitions import Limits
from appliance.alerts.retention import Keep, Retention
from appliance.alerts.store import Store, StoreError
from appliance.api.auth import ensure_token
from appliance.api.control import Control
from appliance.api.server import open_server
from appliance.assurance.accounts import BalanceWatch
from appliance.assurance.canary import CanaryWatch, Sources
from appliance.assurance.disk import DiskWatch
from appliance.assurance.failures import FailureWatch
from appliance.assurance.ledger import LedgerWatch
from appliance.assurance.revive import ReviveWatch
from appliance.assurance.shortcuts import ShortcutWatch
from appliance.export.exporter import Exporter
from appliance.inspection import canary_client
from appliance.inspection.config import build_engine_config, render_engine_config
from appliance.inspection.publish import InspectionState, read_inspection_state
from appliance.management.coverage import Watches
from appliance.management.damaged import DamagedManagement
from appliance.management.events import EventKeeper
from appliance.management.flows import FlowIngest
from appliance.management.knowledge import Knowledge
from appliance.management.policies import InForce, load_in_force
from appliance.management.quarantine import load_quarantines
from appliance.management.rulework import RuleWork
from appliance.management.service import Management
from appliance.paths import find_engine_data
from appliance.rules.pipeline import RulePipeline
from appliance.settings import Settings
from steering.decide import decide
from steering.errors import HairpinError
from steering.model import Holding, Profile
from steering.prove import build_prover
from steering.reconcile import Reconciler
from steering.revive import Reviver
from steering.tasks import cancel_all

log = structlog.get_logger("serve")

SWITCH_SECONDS = 0.0005
"""For which a thread keeps the interpreter while others wait: a change of policies is one of them. Python's 5 ms
are as long as the change itself takes."""
GARBAGE_AFTER = (20_000, 20, 100)
"""`gc.set_threshold`: a whole collection stops everything for 0.1 s where there are many VMs, and finds little."""

HOLDINGS_SECONDS = 7 * 86400.0  # how far back attribution remembers who held an address


def run_serve(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status. Raises HairpinError."""
    sys.setswitchinterval(SWITCH_SECONDS)
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
    keep = settings.store
    limits = Limits(keep.partition_alerts, keep.partition_hours * 3600.0, keep.keep_bytes // 8)
    try:
        store = Store(settings.database, limits)
        try:
            await _run(settings, token, store, stop)
        finally:
            store.close()
    except StoreError as fault:
        if not fault.damaged:
            raise
        await _serve_damage(settings, token, fault, stop)
    log.info("serve ended")
    return 0


async def _serve_damage(
    settings: Settings, token: str, fault: StoreError, stop: asyncio.Event
) -> None:
    """Tell it, and do nothing else, until ``stop``: who ends here is started again and again, and tells nobody."""
    log.error("the store is damaged", reason=fault.reason, mend=fault.mend)
    # It answers to every method of Control, which a checker of types can't see.
    control = cast(Control, DamagedManagement(settings.name, fault, time.time()))
    async with open_server(control, settings.api, token):
        await stop.wait()


async def _run(settings: Settings, token: str, store: Store, stop: asyncio.Event) -> None:
    lanes = settings.build_lanes()
    began = time.time()
    knowledge = Knowledge(await _load_holdings(store, began))
    keeper = EventKeeper(store, knowledge)
    reconciler = Reconciler(
        ovsdb=settings.switch.ovsdb,
        openflow=settings.switch.openflow,
        bridge=settings.switch.bridge,
        lanes=lanes,
        canary=settings.canary.interface,
        on_event=keeper.take,
        tls=settings.switch.tls_files,
    )
    in_force = await load_in_force(store)
    quarantines = await store.read(load_quarantines)
    shut_off = replace(in_force.policies, quarantined=frozenset(quarantines))
    in_force = InForce(in_force.number, shut_off)
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
    # The watches prove what the management says, and the management tells what they prove.
    watches = _build_watches(
        settings, store, reconciler, pipeline, read_inspection, lambda: management
    )
    rules = RuleWork(settings, pipeline, read_inspection, record, watches.canary)
    watches.canary.mend_rules = rules.reload_lane
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
        quarantines=quarantines,
        read_inspection=read_inspection,
        watches=watches,
    )
    keeper.on_ports, keeper.on_change = management.note_machines, management.prove
    keeper.failures = watches.failures
    rules.on_reload = management.shortcut.return_lane
    await watches.shortcuts.load()
    await reconciler.start(in_force.policies)
    management.note_machines()
    # What is there now is there to stay: the collector need not look at it each time.
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GARBAGE_AFTER)
    revival = ReviveWatch(
        lanes,
        settings.engine_socket,
        reconciler.is_down,
        reconciler.has_links,
        read_inspection,
        Reviver(settings.switch.ovsdb, settings.switch.tls_files).revive,
    )
    retention = Retention(
        store,
        Keep(settings.store.keep_days, settings.store.keep_bytes, settings.store.keep_flow_records),
        [one.name for one in settings.export],
    )
    parts: dict[str, Coroutine[Any, Any, None]] = {
        "events": keeper.run(),
        "ingest": ingest.run(),
        "flow records": flows.run(),
        "accounting": management.accounting.watch(),
        "rules": rules.keep(),
        "canary": watches.canary.run(),
        "failures": watches.failures.run(),
        "ledger": watches.ledger.run(),
        "balance": watches.balance.run(),
        "disk": watches.disk.run(),
        "retention": retention.run(),
        "revival": revival.run(),
        "quarantine": management.quarantine.run(),
        "shun": management.shun.run(),
        "shortcuts": watches.shortcuts.run(),
        "shortcut returns": management.shortcut.run_returns(),
        "shortcut alerts": management.shortcut.run_alerts(),
        "shortcut engines": management.shortcut.run_engines(),
    }
    tasks = [asyncio.create_task(part, name=name) for name, part in parts.items()]
    tasks += [asyncio.create_task(one.run(), name="export") for one in exporters]
    try:
        async with open_server(management, settings.api, token) as url:
            log.info("serving", url=url, revision=in_force.number)
            await _wait(stop, tasks)
    finally:
        await rules.close()
        await cancel_all(tasks)
        await watches.ledger.close()
        await reconciler.close()


async def _load_holdings(store: Store, now: float) -> dict[str, tuple[Holding, ...]]:
    """By them alerts get their VMs. Damaged ones are data, for which nothing else is given up: told, and left out."""
    try:
        return await store.read(lambda db: load_holdings(db, until_after=now - HOLDINGS_SECONDS))
    except StoreError as fault:
        if not fault.damaged:
            raise
        text = f"who held which address is not known any more: {fault.reason}"
        log.error("holdings are damaged", reason=fault.reason)
        await store.write(
            lambda db: record_repeated(db, now, "store.damaged", "error", text, subject="holdings")
        )
        return {}


def _build_watches(
    settings: Settings,
    store: Store,
    reconciler: Reconciler,
    pipeline: RulePipeline,
    read_inspection: Callable[[], InspectionState | None],
    find_management: Callable[[], Management],
) -> Watches:
    sources = Sources(
        read_inspection=read_inspection,
        is_forwarding=reconciler.is_forwarding,
        read_counters=reconciler.read_canary_counters,
        find_token=lambda lane: pipeline.find_token(lane.profile),
        eve_file=settings.eve_file,
    )
    switch = settings.switch
    return Watches(
        canary=CanaryWatch(
            settings.build_lanes(),
            settings.canary_socket if settings.canary.interface else None,
            store,
            sources,
            canary_client.probe,
            every_seconds=settings.canary.every_seconds,
        ),
        failures=FailureWatch(
            store,
            reconciler.read_lane_counters,
            lambda lane: find_management().find_concerned(lane),
        ),
        ledger=LedgerWatch(
            build_prover(
                switch.vswitchd,
                switch.ovsdb,
                switch.openflow,
                switch.bridge,
                settings.replica_dir,
                tls=switch.tls_files,
                rush=reconciler.rush,
            ),
            lambda: find_management().read_inputs(),
            store,
            lambda run: find_management().coverage.keep_moment(run),
        ),
        disk=DiskWatch(
            {
                "the store": settings.state_dir,
                **{
                    f"EVE of lane {lane.name}": settings.lane_dir(lane)
                    for lane in settings.build_lanes()
                },
            },
            store,
        ),
        balance=BalanceWatch(
            settings.build_lanes(), store, reconciler.read_lane_counters, read_inspection
        ),
        shortcuts=ShortcutWatch(
            store,
            reconciler.read_shortcuts,
            lambda: reconciler.shortcuts.read_counters(reconciler.policies, reconciler.lanes),
            lambda: find_management().policies,
            reconciler.machines,
        ),
    )


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
