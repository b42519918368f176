"""The management service: what the API asks, answered from steering, store, rules and inspection."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence

from appliance.alerts import query as stored
from appliance.alerts.ingest import Ingest
from appliance.alerts.store import Store
from appliance.api import coverage as cover
from appliance.api import documents as doc
from appliance.api import queries as ask
from appliance.api.control import (
    AlertBatch,
    IfMatch,
    NotFound,
    PolicyRevision,
    Unavailable,
)
from appliance.api.quarantine import (
    QuarantinedVm,
    QuarantineList,
    QuarantineOrder,
    QuarantineReport,
)
from appliance.api.shortcuts import ShortcutList, ShortcutReport
from appliance.api.shuns import ShunList, ShunReport
from appliance.assurance.failures import Concerned
from appliance.assurance.ledger import Inputs
from appliance.export.exporter import Exporter
from appliance.image.boots import read_versions
from appliance.inspection.publish import InspectionState
from appliance.management import render
from appliance.management.concerned import Forwarding, find_concerned
from appliance.management.coverage import CoverageWork, Watches
from appliance.management.flow_accounts import FlowAccounts
from appliance.management.flows import FlowIngest
from appliance.management.health import Facts, build_health, is_inspecting
from appliance.management.knowledge import Knowledge, Snapshot
from appliance.management.pages import build_alert_filter, cut_page, parse_cursor, read_seconds
from appliance.management.policies import InForce, PolicyWork
from appliance.management.quarantine import Quarantine, QuarantineWork, build_quarantined
from appliance.management.rulework import RuleWork
from appliance.management.shortcut import ShortcutWork
from appliance.management.shun import ShunWork
from appliance.management.status import StatusCache
from appliance.paths import BOOT_REPORT
from appliance.settings import Settings
from appliance.version import find_version
from steering.decide import Connection
from steering.errors import SwitchError
from steering.explain import explain, find_machine
from steering.model import Lane, Machine, PolicySet
from steering.reconcile import Reconciler


class Management:
    """Implements `appliance.api.control.Control`; its parts are made and run by `appliance.app`."""

    def __init__(
        self,
        settings: Settings,
        *,
        store: Store,
        reconciler: Reconciler,
        knowledge: Knowledge,
        ingest: Ingest,
        flows: FlowIngest,
        exporters: Sequence[Exporter],
        rules: RuleWork,
        in_force: InForce,
        quarantines: Mapping[str, Quarantine],
        read_inspection: Callable[[], InspectionState | None],
        watches: Watches,
    ) -> None:
        self._settings = settings
        self._store = store
        self._reconciler = reconciler
        self._knowledge = knowledge
        self._ingest = ingest
        self._flows = flows
        self._exporters = tuple(exporters)
        self._rules = rules
        self._read_inspection = read_inspection
        self._watches = watches
        self._coverage = CoverageWork(store, reconciler, watches, self.build_facts)
        self._started = time.time()
        self._status = StatusCache(lambda: build_health(self.build_facts()))
        self.shun = ShunWork(store, ingest, reconciler, lambda: self.policies)
        self.shortcut = ShortcutWork(
            store,
            ingest,
            reconciler,
            watches.shortcuts,
            lambda: self.policies,
            read_inspection,
            rules.read_revision,
        )
        self.quarantine = QuarantineWork(
            store, reconciler, quarantines, self._take_quarantine, time.time
        )
        self._policy = PolicyWork(
            store,
            reconciler,
            in_force,
            self.quarantine,
            self.shortcut,
            self._take_policies,
            self.build_facts,
        )
        self.accounting = FlowAccounts(
            settings.flow_spool.parent / "state.json", lambda: reconciler.mirrored_packets
        )

    # Health

    def build_facts(self) -> Facts:
        return Facts(
            name=self._settings.name,
            version=find_version(),
            now=time.time(),
            started_at=self._started,
            revision=self._policy.in_force.number,
            policies=self.policies,
            switch=self._reconciler.status,
            lanes=self._reconciler.lanes,
            forwarding={
                lane.name: self._reconciler.is_forwarding(lane) for lane in self._reconciler.lanes
            },
            inspection=self._read_inspection(),
            rules=self._rules.pipeline.read_state(),
            ingest=self._ingest.status(),
            exporters=tuple(exporter.status() for exporter in self._exporters),
            flows_fault=self._flows.fault,
            canaries=self._watches.canary.status() if self._watches.canary.configured else None,
            balances=self._watches.build_balances(),
            ledger=self._watches.ledger.last,
            stale_after=self._settings.rules.stale_seconds,
            disks=self._watches.disk.states,
            mended=self._store.mended,
            boots=read_versions(BOOT_REPORT),
            shortcut_faults=tuple(
                filter(None, (self.shortcut.fault, self._watches.shortcuts.fault))
            ),
        )

    async def read_health(self) -> doc.Health:
        return build_health(self.build_facts())

    async def read_status(self) -> doc.HealthSummary:
        return self._status.read()

    # VMs

    async def find_vms(self) -> doc.VmList:
        machines = self._reconciler.machines()
        found = {machine.vm_id for machine in machines}
        return doc.VmList(
            items=(
                *(
                    render.build_vm(
                        machine, self._knowledge.find_addresses(machine.vm_id), in_scope=True
                    )
                    for machine in machines
                ),
                *(
                    render.build_absent_vm(record)
                    for record in self.policies.machines
                    if record.vm_id not in found
                ),
            )
        )

    async def edit_vm(
        self, vm_id: str, edit: doc.VmEdit, if_match: IfMatch, *, dry_run: bool
    ) -> doc.PlanReport:
        return await self._policy.edit_vm(vm_id, edit, if_match, dry_run=dry_run)

    # Policies

    async def read_policies(self) -> PolicyRevision:
        return self._policy.read()

    async def put_policies(self, text: str, if_match: IfMatch, *, dry_run: bool) -> doc.PlanReport:
        return await self._policy.put(text, if_match, dry_run=dry_run)

    @property
    def policies(self) -> PolicySet:
        """Those in force."""
        return self._policy.in_force.policies

    def _take_policies(self, cause: str) -> None:
        self._note_snapshot()
        self.prove(cause)

    # Quarantine

    async def find_quarantines(self) -> QuarantineList:
        return QuarantineList(items=await self._build_quarantined(self.quarantine.find()))

    async def add_quarantine(self, order: QuarantineOrder) -> QuarantineReport:
        machine = find_machine(self._reconciler.machines(), order.vm) or next(
            (
                Machine(record.vm_id, record.name, record.tags, (), ())
                for record in self.policies.machines
                if order.vm in (record.vm_id, record.name)
            ),
            None,
        )
        if machine is None:
            raise NotFound(f"no VM {order.vm}", "`hairpin vms` lists those that are known")
        try:
            one, took = await self.quarantine.add(machine, order.seconds, order.reason)
        finally:
            # Also where the switch or the store failed: the VM is shut off as soon as it can be.
            self.shortcut.return_vm(machine.vm_id, machine.name)
        return QuarantineReport(quarantine=(await self._build_quarantined([one]))[0], seconds=took)

    async def remove_quarantine(self, vm: str) -> QuarantineReport:
        one, took = await self.quarantine.remove(vm)
        return QuarantineReport(quarantine=(await self._build_quarantined([one]))[0], seconds=took)

    async def _build_quarantined(self, found: Sequence[Quarantine]) -> tuple[QuarantinedVm, ...]:
        try:
            counters = await self._reconciler.read_counters() if found else None
        except SwitchError:
            counters = None
        machines = self._reconciler.machines()
        return tuple(build_quarantined(one, machines, counters) for one in found)

    async def find_shuns(self) -> ShunList:
        return await self.shun.find()

    async def remove_shuns(self, shun_id: str | None) -> ShunReport:
        return await self.shun.remove(shun_id)

    async def find_shortcuts(self, query: ask.ShortcutQuery) -> ShortcutList:
        return await self.shortcut.find(query)

    async def return_shortcuts(self, wanted: ask.ShortcutFilter) -> ShortcutReport:
        return await self.shortcut.return_filtered(wanted)

    async def return_shortcut(self, shortcut_id: str) -> ShortcutReport:
        return await self.shortcut.return_one(shortcut_id)

    def _take_quarantine(self, cause: str) -> None:
        self._policy.take_quarantine()
        self._note_snapshot()
        self._watches.ledger.request(cause)

    def prove(self, cause: str, lane: str | None = None) -> None:
        """Something changed: prove a lane (None: all) and the ways through the tables again."""
        self._watches.canary.request(cause, lane)
        self._watches.ledger.request(cause)

    @property
    def coverage(self) -> CoverageWork:
        return self._coverage

    def read_inputs(self) -> Inputs:
        """What the ledger is held against."""
        reconciler = self._reconciler
        return Inputs(
            policies=self.policies,
            revision=self._policy.in_force.number,
            machines=reconciler.machines(),
            lanes=reconciler.lanes,
            forwarding=Forwarding(reconciler),
        )

    def find_concerned(self, lane_name: str) -> Concerned:
        """Whom a lane serves, by the policies in force."""
        return find_concerned(self.policies, self._reconciler.machines(), lane_name)

    def _note_snapshot(self) -> None:
        self._knowledge.add(
            Snapshot(
                time.time(),
                self._reconciler.machines(),
                self.policies,
                self._policy.in_force.number,
            )
        )

    def note_machines(self) -> None:
        """VMs came, went or moved: what is known from now on. Ends the holdings of those that went."""
        before = {machine.vm_id for machine in self._knowledge.now.machines}
        self._note_snapshot()
        for vm_id in before - {machine.vm_id for machine in self._knowledge.now.machines}:
            self._knowledge.drop_machine(vm_id, time.time())

    # Coverage and explain

    async def read_coverage(self, query: ask.CoverageQuery) -> cover.Coverage:
        return await self._coverage.read_coverage(query)

    async def read_coverage_history(self, query: ask.HistoryQuery) -> cover.CoverageHistory:
        return await self._coverage.read_history(query)

    async def find_canaries(self, query: ask.CanaryQuery) -> cover.CanaryPage:
        return await self._coverage.find_canaries(query)

    async def prove_lanes(self) -> cover.LaneProofs:
        canary = self._watches.canary
        if not canary.configured:
            raise Unavailable(
                "no canary port is configured", "name one in canary.interface (docs/proof.md)"
            )
        lanes = self._reconciler.lanes
        await asyncio.gather(*(canary.prove_asked(lane) for lane in lanes))
        return cover.LaneProofs(lanes=self._coverage.build_proofs(self.build_facts()))

    async def render_metrics(self) -> bytes:
        return await self._coverage.render_metrics()

    async def explain(self, query: ask.ExplainQuery) -> doc.Explanation:
        connection = Connection(query.family, query.protocol, query.port)
        found = explain(
            self.policies,
            self._reconciler.machines(),
            self._reconciler.lanes,
            query.source,
            query.destination,
            connection,
        )
        facts = self.build_facts()
        return render.build_explanation(
            found, inspecting=found.lane is not None and is_inspecting(facts, found.lane)
        )

    # Rules

    async def read_rules(self) -> doc.RulesStatus:
        return doc.RulesStatus(lanes=self._rules.build_status())

    async def find_rules(self, query: ask.RuleQuery) -> doc.RulePage:
        lanes = [
            lane for lane in self._settings.build_lanes() if query.lane in (None, lane.profile)
        ]
        start = parse_cursor(query.cursor)
        wanted = start + query.limit + 1

        def find(lane: Lane) -> list[doc.Rule]:
            found = self._rules.pipeline.find_rules(
                lane.profile, sid=query.sid, cve=query.cve, limit=wanted
            )
            return [render.build_rule(lane, info) for info in found]

        rules = [rule for lane in lanes for rule in await asyncio.to_thread(find, lane)]
        page, following = cut_page(rules, query.cursor, query.limit)
        return doc.RulePage(items=tuple(page), next=following)

    async def start_rules_update(self) -> doc.UpdateJob:
        return self._rules.start()

    async def read_rules_update(self) -> doc.UpdateJob:
        return self._rules.job

    # Alerts, flows, events

    async def find_alerts(self, query: ask.AlertQuery) -> doc.AlertPage:
        page = await stored.find_alerts(
            self._store, build_alert_filter(query), query.cursor, limit=query.limit
        )
        return doc.AlertPage(
            items=tuple(map(render.build_alert, page.items)), next=page.next_cursor
        )

    async def find_alert(self, alert_id: int) -> doc.AlertDetail:
        alert = await stored.find_alert(self._store, alert_id)
        if alert is None:
            raise NotFound(f"no alert {alert_id}", "`hairpin alerts` lists those that are stored")
        return render.build_alert_detail(alert)

    async def count_signatures(self, query: ask.SignatureQuery) -> doc.SignatureCounts:
        now = time.time()
        until = read_seconds(query.until) or now
        since = read_seconds(query.since)
        since = until - 86_400 if since is None else since
        counted = await stored.find_top_signatures(self._store, since, until, limit=query.limit)
        first, end = stored.find_hours(since, until)
        return render.build_signature_counts(first * 3600, end * 3600, counted)

    async def read_alerts_after(
        self, after: int | None, wanted: ask.AlertFilter, limit: int
    ) -> AlertBatch:
        if after is None:
            return AlertBatch((), await stored.find_latest_alert_id(self._store))
        alerts, last = await stored.find_alerts_after(
            self._store, after, build_alert_filter(wanted), limit=limit
        )
        return AlertBatch(tuple(map(render.build_alert, alerts)), last)

    async def wait_for_alerts(self, after: int) -> None:
        await self._ingest.wait_newer(after)

    async def find_flows(self, query: ask.FlowQuery) -> doc.FlowPage:
        wanted = stored.FlowFilter(
            vm=query.vm,
            address=query.address,
            port=query.port,
            application=query.application,
            treatment=query.treatment,
            since=read_seconds(query.since),
            until=read_seconds(query.until),
        )
        page = await stored.find_flows(self._store, wanted, query.cursor, limit=query.limit)
        return doc.FlowPage(
            items=tuple(map(render.build_flow, page.items)),
            next=page.next_cursor,
            accounting=self.accounting.build(),
        )

    async def find_events(self, query: ask.EventQuery) -> doc.EventPage:
        wanted = stored.EventFilter(
            kind=query.kind, since=read_seconds(query.since), until=read_seconds(query.until)
        )
        page = await stored.find_events(self._store, wanted, query.cursor, limit=query.limit)
        return doc.EventPage(
            items=tuple(map(render.build_event, page.items)), next=page.next_cursor
        )
