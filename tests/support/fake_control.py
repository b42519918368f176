"""A fake Control for the contract tests of the API and the command line: all in memory.

Shapes, statuses and faults that real parts can't be made to show; what the appliance does is tested with those.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import yaml
from pydantic import ValidationError

from appliance.api.control import AlertBatch, IfMatch, NotFound, PolicyRevision, check_match
from appliance.api.coverage import (
    CanaryPage,
    CanaryProof,
    Coverage,
    CoverageHistory,
    LaneProof,
    LaneProofs,
)
from appliance.api.documents import (
    Alert,
    AlertDetail,
    AlertPage,
    EventPage,
    Explanation,
    FlowPage,
    Health,
    HealthStatus,
    HealthSummary,
    PlanReport,
    PolicyDocuments,
    RulePage,
    RulesStatus,
    SignatureCounts,
    UpdateJob,
    VmEdit,
    VmList,
)
from appliance.api.problems import find_faults
from appliance.api.quarantine import (
    QuarantinedVm,
    QuarantineList,
    QuarantineOrder,
    QuarantineReport,
)
from appliance.api.queries import (
    AlertFilter,
    AlertQuery,
    CanaryQuery,
    CoverageQuery,
    EventQuery,
    ExplainQuery,
    FlowQuery,
    HistoryQuery,
    RuleQuery,
    ShortcutFilter,
    ShortcutQuery,
    SignatureQuery,
)
from appliance.api.shortcuts import (
    ShortcutConnection,
    ShortcutList,
    ShortcutReport,
)
from appliance.api.shuns import ShunList, ShunReport
from steering.errors import FieldError, WrongInput
from tests.support import api_samples as sample
from tests.support.api_samples import APP, WEB


class FakeControl:
    """``fault`` is raised by every method while it is set."""

    def __init__(self, *, alerts: int = 5, status: HealthStatus = "ok") -> None:
        self.fault: Exception | None = None
        self.status: HealthStatus = status
        self.alerts = [sample.build_alert(number) for number in range(1, alerts + 1)]
        self.more = asyncio.Event()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.revision = 1
        self.documents = PolicyDocuments(api_version="hairpin/v1", kind="List", items=())
        self.job = UpdateJob(state="idle")
        self.job_reads_left = 0
        self.shunned = [sample.SHUNNED]
        self.shortcuts = [sample.SHORTCUT]
        self.quarantined: dict[str, QuarantinedVm] = {}

    @property
    def etag(self) -> str:
        return f"{self.revision}-fake"

    def add_alert(self) -> None:
        self.alerts.append(sample.build_alert(len(self.alerts) + 1))
        self.more.set()
        self.more = asyncio.Event()

    def add_alert_from_outside(self) -> None:
        """As `add_alert`, from another thread than the server's, once somebody follows them."""
        deadline = time.monotonic() + 10
        while self.loop is None:
            if time.monotonic() > deadline:
                raise RuntimeError("nobody follows the alerts")
            time.sleep(0.02)
        self.loop.call_soon_threadsafe(self.add_alert)

    def _check(self) -> None:
        if self.fault is not None:
            raise self.fault

    async def read_health(self) -> Health:
        self._check()
        return sample.build_health(self.status, self.revision)

    async def read_status(self) -> HealthSummary:
        self._check()
        return HealthSummary(status=self.status)

    async def find_vms(self) -> VmList:
        self._check()
        return sample.build_vms()

    async def edit_vm(
        self, vm_id: str, edit: VmEdit, if_match: IfMatch, *, dry_run: bool
    ) -> PlanReport:
        self._check()
        if vm_id not in (WEB.vm_id, APP.vm_id):
            raise NotFound(f"there is no VM {vm_id}", "`hairpin vms` lists them")
        check_match(if_match, self.etag)
        return self._apply(self.documents, dry_run)

    async def find_quarantines(self) -> QuarantineList:
        self._check()
        return QuarantineList(items=tuple(self.quarantined.values()))

    async def add_quarantine(self, order: QuarantineOrder) -> QuarantineReport:
        self._check()
        vm = next((vm for vm in (WEB, APP) if order.vm in (vm.name, vm.vm_id)), None)
        if vm is None:
            raise NotFound(f"no VM {order.vm}", "`hairpin vms` lists those that are known")
        one = sample.build_quarantined(vm, order)
        self.quarantined[vm.name] = one
        return QuarantineReport(quarantine=one, seconds=0.011)

    async def remove_quarantine(self, vm: str) -> QuarantineReport:
        self._check()
        one = next((o for o in self.quarantined.values() if vm in (o.vm, o.vm_id)), None)
        if one is None:
            raise NotFound(f"{vm} is not in quarantine", "`hairpin quarantine list` shows them")
        del self.quarantined[one.vm]
        return QuarantineReport(quarantine=one, seconds=0.01)

    async def find_shuns(self) -> ShunList:
        self._check()
        return ShunList(items=tuple(self.shunned), limit=4000, refused=0)

    async def remove_shuns(self, shun_id: str | None) -> ShunReport:
        self._check()
        gone = [one for one in self.shunned if shun_id in (None, one.id)]
        if shun_id is not None and not gone:
            raise NotFound(f"no flow {shun_id} is shunned", "`hairpin shun list` shows them")
        self.shunned = [one for one in self.shunned if one not in gone]
        return ShunReport(removed=len(gone))

    def _find_shortcuts(self, wanted: ShortcutFilter) -> list[ShortcutConnection]:
        return [
            one
            for one in self.shortcuts
            if wanted.policy in (None, one.policy) and wanted.vm in (None, WEB.name, APP.name)
        ]

    async def find_shortcuts(self, query: ShortcutQuery) -> ShortcutList:
        self._check()
        account = sample.build_shortcut_account(len(self.shortcuts))
        return ShortcutList(items=tuple(self._find_shortcuts(query)), accounts=(account,))

    async def return_shortcuts(self, wanted: ShortcutFilter) -> ShortcutReport:
        self._check()
        if wanted.policy not in (None, "web-to-app"):
            raise NotFound(f"no policy {wanted.policy}", "`hairpin policy show` lists them")
        gone = self._find_shortcuts(wanted)
        self.shortcuts = [one for one in self.shortcuts if one not in gone]
        return ShortcutReport(returned=len(gone), seconds=0.012)

    async def return_shortcut(self, shortcut_id: str) -> ShortcutReport:
        self._check()
        gone = [one for one in self.shortcuts if one.id == shortcut_id]
        if not gone:
            raise NotFound(
                f"no connection {shortcut_id} takes a shortcut", "`hairpin shortcut list`"
            )
        self.shortcuts = [one for one in self.shortcuts if one not in gone]
        return ShortcutReport(returned=1, seconds=0.012)

    async def read_policies(self) -> PolicyRevision:
        self._check()
        return PolicyRevision(self.documents, self.revision, self.etag)

    async def put_policies(self, text: str, if_match: IfMatch, *, dry_run: bool) -> PlanReport:
        self._check()
        check_match(if_match, self.etag)
        try:
            documents = PolicyDocuments.model_validate(yaml.safe_load(text))
        except yaml.YAMLError as fault:
            raise WrongInput([FieldError("(body)", f"not YAML: {fault}")]) from fault
        except ValidationError as fault:
            raise WrongInput(find_faults(fault), "mend them and send it again") from fault
        return self._apply(documents, dry_run)

    def _apply(self, documents: PolicyDocuments, dry_run: bool) -> PlanReport:
        if not dry_run:
            self.documents = documents
            self.revision += 1
        return sample.build_plan_report(self.revision, self.etag, applied=not dry_run)

    async def read_coverage(self, query: CoverageQuery) -> Coverage:
        self._check()
        pairs = tuple(
            pair
            for pair in sample.PAIRS
            if query.status in (None, pair.status)
            and query.vm in (None, pair.source.name, pair.destination.name)
        )
        return sample.build_coverage(pairs)

    async def read_coverage_history(self, query: HistoryQuery) -> CoverageHistory:
        return CoverageHistory(items=(sample.MOMENT,))

    async def find_canaries(self, query: CanaryQuery) -> CanaryPage:
        return CanaryPage(items=(sample.CANARY,) if query.lane in (None, "prevent") else ())

    async def prove_lanes(self) -> LaneProofs:
        lane = LaneProof(
            lane="prevent", inspecting=True, canary=CanaryProof(at=sample.START, passed=True)
        )
        return LaneProofs(lanes=(lane,))

    async def render_metrics(self) -> bytes:
        return b"# TYPE hairpin_up gauge\nhairpin_up 1.0\n"

    async def explain(self, query: ExplainQuery) -> Explanation:
        self._check()
        known = {name: vm for vm in (WEB, APP) for name in (vm.name, vm.vm_id)}
        for name in (query.source, query.destination):
            if name not in known:
                raise NotFound(f"there is no VM {name}", "`hairpin vms` lists them")
        return sample.build_explanation(query, known[query.source], known[query.destination])

    async def read_rules(self) -> RulesStatus:
        self._check()
        return RulesStatus(lanes=sample.LANE_RULES)

    async def find_rules(self, query: RuleQuery) -> RulePage:
        self._check()
        rule = sample.RULE
        wanted = query.sid in (None, rule.sid) and query.cve in (None, *rule.cves)
        return RulePage(items=(rule,) if wanted else ())

    async def start_rules_update(self) -> UpdateJob:
        self._check()
        self.job = UpdateJob(state="running", step="fetching", started_at=sample.START)
        self.job_reads_left = 1
        return self.job

    async def read_rules_update(self) -> UpdateJob:
        self._check()
        if self.job.state == "running":
            self.job_reads_left -= 1
            if self.job_reads_left < 0:
                self.job = self.job.model_copy(
                    update={
                        "state": "succeeded",
                        "ended_at": sample.START,
                        "changed": True,
                        "lanes": sample.LANE_RULES,
                    }
                )
        return self.job

    async def find_alerts(self, query: AlertQuery) -> AlertPage:
        self._check()
        below = int(query.cursor) if query.cursor and query.cursor.isdigit() else None
        if query.cursor and below is None:
            raise WrongInput([FieldError("cursor", "not one that this service gave")])
        found = [
            alert
            for alert in reversed(self.alerts)
            if matches(alert, query) and (below is None or alert.id < below)
        ]
        page = found[: query.limit]
        return AlertPage(
            items=tuple(page), next=str(page[-1].id) if len(found) > len(page) else None
        )

    async def count_signatures(self, query: SignatureQuery) -> SignatureCounts:
        self._check()
        return SignatureCounts(
            since=sample.START, until=sample.START, items=(sample.COUNT,)[: query.limit]
        )

    async def find_alert(self, alert_id: int) -> AlertDetail:
        self._check()
        if not 1 <= alert_id <= len(self.alerts):
            raise NotFound(f"there is no alert {alert_id}")
        values: dict[str, Any] = dict(self.alerts[alert_id - 1])
        return AlertDetail(**values, event={"event_type": "alert"})

    async def read_alerts_after(
        self, after: int | None, wanted: AlertFilter, limit: int
    ) -> AlertBatch:
        self._check()
        self.loop = asyncio.get_running_loop()
        if after is None:
            return AlertBatch((), len(self.alerts))
        looked_at = self.alerts[after : after + limit]
        return AlertBatch(
            tuple(alert for alert in looked_at if matches(alert, wanted)), after + len(looked_at)
        )

    async def wait_for_alerts(self, after: int) -> None:
        while len(self.alerts) <= after:
            await self.more.wait()

    async def find_flows(self, query: FlowQuery) -> FlowPage:
        self._check()
        return sample.build_flows(self.alerts[0])

    async def find_events(self, query: EventQuery) -> EventPage:
        self._check()
        return EventPage(items=(sample.EVENT,))


def matches(alert: Alert, wanted: AlertFilter) -> bool:
    return (
        wanted.verdict in (None, alert.verdict)
        and wanted.sid in (None, alert.signature.sid)
        and (wanted.cve is None or wanted.cve in alert.signature.cves)
        and (wanted.vm is None or wanted.vm in ("web1", "vm-1", "app1", "vm-2"))
        and (wanted.since is None or alert.time >= wanted.since)
        and (wanted.until is None or alert.time < wanted.until)
    )
