"""A fake Control for the contract tests of the API and the command line: all in memory.

Shapes, statuses and faults that real parts can't be made to show; what the appliance does is tested with those.
"""

from __future__ import annotations

import asyncio
import time
from datetime import timedelta
from typing import Any

import yaml
from pydantic import ValidationError

from appliance.api.control import AlertBatch, IfMatch, NotFound, PolicyRevision, check_match
from appliance.api.coverage import (
    Canary,
    CanaryPage,
    CanaryProof,
    Coverage,
    CoverageGap,
    CoverageHistory,
    CoverageMoment,
    CoveragePart,
    CoverageSummary,
    LaneProof,
    LaneProofs,
    PairCoverage,
)
from appliance.api.documents import (
    Alert,
    AlertDetail,
    AlertPage,
    ComponentHealth,
    Endpoint,
    Event,
    EventPage,
    ExplainLane,
    ExplainStep,
    Explanation,
    ExporterHealth,
    Flow,
    FlowAccounting,
    FlowPage,
    Health,
    HealthComponents,
    HealthProblem,
    HealthStatus,
    HealthSummary,
    LaneHealth,
    LaneRules,
    PairChange,
    PlanChange,
    PlanReport,
    PlanSummary,
    PolicyDocuments,
    Rule,
    RuleFailure,
    RulePage,
    RulesHealth,
    RulesStatus,
    Signature,
    SignatureCount,
    SignatureCounts,
    UpdateJob,
    Vm,
    VmAddress,
    VmEdit,
    VmList,
    VmName,
    VmPort,
    build_time,
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
    ShortcutAccount,
    ShortcutConnection,
    ShortcutEnd,
    ShortcutList,
    ShortcutReport,
)
from appliance.api.shuns import ShunList, ShunnedFlow, ShunReport
from steering.errors import FieldError, WrongInput
from steering.model import Family, OnFailure, Profile, Trigger

START = build_time(1_700_000_000.0)
WEB = VmName(vm_id="vm-1", name="web1")
APP = VmName(vm_id="vm-2", name="app1")
RULE = (
    'alert http any any -> any any (msg:"Shellshock"; content:"() {"; '
    "reference:cve,2014-6271; sid:9000001; rev:2;)"
)


def build_alert(number: int) -> Alert:
    """Alert ``number``, one second after the one before."""
    return Alert(
        id=number,
        time=START + timedelta(seconds=number),
        verdict="blocked" if number % 2 else "allowed",
        lane="prevent",
        policy="web-to-app",
        signature=Signature(
            sid=9_000_001, revision=2, message="Shellshock", severity=1, cves=("CVE-2014-6271",)
        ),
        source=Endpoint(address="10.77.0.1", port=40000 + number, vm=WEB, zones=("web",)),
        destination=Endpoint(address="10.77.0.2", port=80, vm=APP, zones=("app",)),
        protocol="tcp",
        application="http",
        flow_id="1234567890123456",
        payload="GET / HTTP/1.1..User-Agent: () { :; };",
    )


class FakeControl:
    """``fault`` is raised by every method while it is set."""

    def __init__(self, *, alerts: int = 5, status: HealthStatus = "ok") -> None:
        self.fault: Exception | None = None
        self.status: HealthStatus = status
        self.alerts = [build_alert(number) for number in range(1, alerts + 1)]
        self.more = asyncio.Event()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.revision = 1
        self.documents = PolicyDocuments(api_version="hairpin/v1", kind="List", items=())
        self.job = UpdateJob(state="idle")
        self.job_reads_left = 0
        self.shunned = [
            ShunnedFlow(
                id="0123abcd",
                flow="tcp,in_port=1,nw_src=10.77.0.1,nw_dst=10.77.0.2,tp_src=40005,tp_dst=80",
                policy="web-to-app",
                seconds_left=41.5,
                dropped_packets=3,
                dropped_bytes=300,
            )
        ]
        self.shortcuts = [
            ShortcutConnection(
                id="4567cdef",
                policy="web-to-app",
                reason=Trigger.ONE_MEGABYTE,
                family=Family.IPV4,
                source=ShortcutEnd(vm=WEB, address="10.77.0.1", port=40009, packets=40, bytes=4000),
                destination=ShortcutEnd(vm=APP, address="10.77.0.2", port=80, packets=2, bytes=200),
                age_seconds=12.5,
                idle_seconds=0.5,
                packets=42,
                bytes=4200,
            )
        ]
        self.quarantined: dict[str, QuarantinedVm] = {}

    @property
    def etag(self) -> str:
        return f"{self.revision}-fake"

    def add_alert(self) -> None:
        self.alerts.append(build_alert(len(self.alerts) + 1))
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
        lane = LaneHealth(
            name="prevent",
            profile=Profile.PREVENT,
            inspecting=self.status == "ok",
            engine="running" if self.status == "ok" else "failed",
            since=START,
            rules_loaded=12,
            bfd="up",
        )
        fine = ComponentHealth(status="ok", since=START)
        return Health(
            status=self.status,
            version="0.1.0",
            revision=self.revision,
            started_at=START,
            components=HealthComponents(
                switch=fine,
                lanes=(lane,),
                store=fine,
                exporters=(ExporterHealth(name="siem", status="ok", delivered=3),),
                rules=RulesHealth(status="ok", since=START, updated_at=START),
            ),
            problems=()
            if self.status == "ok"
            else (HealthProblem(reason="an engine is down", mend="see its log", since=START),),
        )

    async def read_status(self) -> HealthSummary:
        self._check()
        return HealthSummary(status=self.status)

    async def find_vms(self) -> VmList:
        self._check()
        return VmList(
            items=tuple(
                Vm(
                    vm_id=vm.vm_id,
                    name=vm.name,
                    tags={"tier": vm.name[:3]},
                    zones=(vm.name[:3],),
                    ports=(
                        VmPort(
                            interface=f"tap{number}",
                            mac=f"02:00:00:00:00:0{number}",
                            bridge="br-int",
                            ofport=number,
                            link_up=True,
                        ),
                    ),
                    addresses=(VmAddress(address=f"10.77.0.{number}", since=START),),
                    in_scope=True,
                )
                for number, vm in enumerate((WEB, APP), start=1)
            )
        )

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
        until = None if order.seconds is None else START + timedelta(seconds=order.seconds)
        one = QuarantinedVm(
            vm_id=vm.vm_id or "",
            vm=vm.name,
            since=START,
            until=until,
            reason=order.reason,
            on_switch=True,
            dropped_packets=7,
            dropped_bytes=700,
        )
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
        account = ShortcutAccount(
            policy="web-to-app", reason=Trigger.ONE_MEGABYTE, limit=50, return_on_alert=True,
            open=len(self.shortcuts), connections=12, returned=3, packets=345, bytes=67_890,
        )  # fmt: skip
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
        return PlanReport(
            revision=self.revision,
            etag=self.etag,
            applied=not dry_run,
            seconds=0.012,
            summary=PlanSummary(added=1, deleted=1),
            changes=(
                PlanChange(kind="add", text="table=POLICY,priority=100,ip actions=..."),
                PlanChange(kind="delete", text="table=POLICY,priority=90,ip actions=..."),
            ),
            pairs=(PairChange(source=WEB, destination=APP, before="blind", after="inspected"),),
        )

    async def read_coverage(self, query: CoverageQuery) -> Coverage:
        self._check()
        pairs = (
            PairCoverage(
                source=WEB,
                destination=APP,
                status="inspected",
                parts=(
                    CoveragePart(
                        what="tcp/80 ipv4",
                        treatment="inspect",
                        policy="web-to-app",
                        profile=Profile.PREVENT,
                        on_failure=OnFailure.CLOSED,
                    ),
                ),
            ),
            PairCoverage(
                source=APP, destination=WEB, status="blind", reason="no policy names this pair"
            ),
        )
        return Coverage(
            summary=CoverageSummary(
                machines=2, pairs=2, inspected=1, blind=1, inspected_percent=50, blind_percent=50
            ),
            gaps=(CoverageGap(reason="app1 has no address yet", vms=(APP,)),),
            items=tuple(
                pair
                for pair in pairs
                if query.status in (None, pair.status)
                and query.vm in (None, pair.source.name, pair.destination.name)
            ),
        )

    async def read_coverage_history(self, query: HistoryQuery) -> CoverageHistory:
        moment = CoverageMoment(
            at=START, revision=1, cause="policy", pairs=2, inspected_percent=50.0, partial_percent=0.0,
            direct_percent=0.0, denied_percent=0.0, blind_percent=50.0, lanes_proved=1, lanes=1,
        )  # fmt: skip
        return CoverageHistory(items=(moment,))

    async def find_canaries(self, query: CanaryQuery) -> CanaryPage:
        canary = Canary(
            id=1, at=START, lane="prevent", cause="schedule", result="passed", seconds=0.4
        )
        return CanaryPage(items=(canary,) if query.lane in (None, "prevent") else ())

    async def prove_lanes(self) -> LaneProofs:
        lane = LaneProof(lane="prevent", inspecting=True, canary=CanaryProof(at=START, passed=True))
        return LaneProofs(lanes=(lane,))

    async def render_metrics(self) -> bytes:
        return b"# TYPE hairpin_up gauge\nhairpin_up 1.0\n"

    async def explain(self, query: ExplainQuery) -> Explanation:
        self._check()
        known = {name: vm for vm in (WEB, APP) for name in (vm.name, vm.vm_id)}
        for name in (query.source, query.destination):
            if name not in known:
                raise NotFound(f"there is no VM {name}", "`hairpin vms` lists them")
        return Explanation(
            source=known[query.source],
            destination=known[query.destination],
            protocol=query.protocol,
            port=query.port,
            family=query.family,
            inspected=True,
            treatment="inspect",
            policy="web-to-app",
            profile=Profile.PREVENT,
            on_failure=OnFailure.CLOSED,
            reason="policy web-to-app names it",
            lane=ExplainLane(name="prevent", profile=Profile.PREVENT, vlan=100, inspecting=True),
            tables=(ExplainStep(table="CLASSIFY", text="from tap1"),),
        )

    def _lanes(self) -> tuple[LaneRules, ...]:
        return (
            LaneRules(
                lane="prevent",
                profile=Profile.PREVENT,
                revision="1c0ffee",
                loaded=12,
                failed=1,
                failures=(RuleFailure(sid=7, rule="alert x", reason="unknown protocol x"),),
                updated_at=START,
                last_good=True,
            ),
        )

    async def read_rules(self) -> RulesStatus:
        self._check()
        return RulesStatus(lanes=self._lanes())

    async def find_rules(self, query: RuleQuery) -> RulePage:
        self._check()
        rule = Rule(
            sid=9_000_001,
            revision=2,
            lane="prevent",
            action="drop",
            message="Shellshock",
            cves=("CVE-2014-6271",),
            text=RULE,
        )
        wanted = query.sid in (None, rule.sid) and query.cve in (None, *rule.cves)
        return RulePage(items=(rule,) if wanted else ())

    async def start_rules_update(self) -> UpdateJob:
        self._check()
        self.job = UpdateJob(state="running", step="fetching", started_at=START)
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
                        "ended_at": START,
                        "changed": True,
                        "lanes": self._lanes(),
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
        counted = SignatureCount(sid=1, message="jndi", severity=1, alerts=2, blocked=2)
        return SignatureCounts(since=START, until=START, items=(counted,)[: query.limit])

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
        alert = self.alerts[0]
        return FlowPage(
            items=(
                Flow(
                    id=1,
                    started_at=START,
                    ended_at=START + timedelta(seconds=2),
                    source=alert.source,
                    destination=alert.destination,
                    protocol="tcp",
                    application="HTTP",
                    packets_sent=6,
                    bytes_sent=480,
                    packets_received=5,
                    bytes_received=1200,
                    treatment="inspect",
                    policy="web-to-app",
                ),
            ),
            accounting=FlowAccounting(
                since=START,
                until=START + timedelta(seconds=60),
                switch_packets=100,
                recorded_packets=98,
                missed_packets=2,
                missed_percent=2.0,
            ),
        )

    async def find_events(self, query: EventQuery) -> EventPage:
        self._check()
        return EventPage(
            items=(
                Event(
                    id=1,
                    time=START,
                    level="info",
                    kind="policy.applied",
                    subject="revision 1",
                    text="Revision 1 is in force",
                    details={"revision": 1},
                ),
            )
        )


def matches(alert: Alert, wanted: AlertFilter) -> bool:
    return (
        wanted.verdict in (None, alert.verdict)
        and wanted.sid in (None, alert.signature.sid)
        and (wanted.cve is None or wanted.cve in alert.signature.cves)
        and (wanted.vm is None or wanted.vm in ("web1", "vm-1", "app1", "vm-2"))
        and (wanted.since is None or alert.time >= wanted.since)
        and (wanted.until is None or alert.time < wanted.until)
    )
