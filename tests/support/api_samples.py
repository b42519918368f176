"""Documents as the API gives them, one of each kind: for the fake Control, and for whom it answers."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta

from appliance.api.coverage import (
    Canary,
    Coverage,
    CoverageGap,
    CoverageMoment,
    CoveragePart,
    CoverageSummary,
    PairCoverage,
)
from appliance.api.documents import (
    Alert,
    ComponentHealth,
    Endpoint,
    Event,
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
    LaneHealth,
    LaneRules,
    PairChange,
    PlanChange,
    PlanReport,
    PlanSummary,
    Rule,
    RuleFailure,
    RulesHealth,
    Signature,
    SignatureCount,
    Vm,
    VmAddress,
    VmList,
    VmName,
    VmPort,
    build_time,
)
from appliance.api.quarantine import QuarantinedVm, QuarantineOrder
from appliance.api.queries import ExplainQuery
from appliance.api.shortcuts import ShortcutAccount, ShortcutConnection, ShortcutEnd
from appliance.api.shuns import ShunnedFlow
from steering.model import Family, OnFailure, Profile, Trigger

START = build_time(1_700_000_000.0)
WEB = VmName(vm_id="vm-1", name="web1")
APP = VmName(vm_id="vm-2", name="app1")
RULE = Rule(
    sid=9_000_001,
    revision=2,
    lane="prevent",
    action="drop",
    message="Shellshock",
    cves=("CVE-2014-6271",),
    text=(
        'alert http any any -> any any (msg:"Shellshock"; content:"() {"; '
        "reference:cve,2014-6271; sid:9000001; rev:2;)"
    ),
)
COUNT = SignatureCount(sid=1, message="jndi", severity=1, alerts=2, blocked=2)
LANE_RULES = (
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
SHUNNED = ShunnedFlow(
    id="0123abcd",
    flow="tcp,in_port=1,nw_src=10.77.0.1,nw_dst=10.77.0.2,tp_src=40005,tp_dst=80",
    policy="web-to-app",
    seconds_left=41.5,
    dropped_packets=3,
    dropped_bytes=300,
)
SHORTCUT = ShortcutConnection(
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
PAIRS = (
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
    PairCoverage(source=APP, destination=WEB, status="blind", reason="no policy names this pair"),
)
MOMENT = CoverageMoment(
    at=START, revision=1, cause="policy", pairs=2, inspected_percent=50.0, partial_percent=0.0,
    direct_percent=0.0, denied_percent=0.0, blind_percent=50.0, lanes_proved=1, lanes=1,
)  # fmt: skip
CANARY = Canary(id=1, at=START, lane="prevent", cause="schedule", result="passed", seconds=0.4)
EVENT = Event(
    id=1,
    time=START,
    level="info",
    kind="policy.applied",
    subject="revision 1",
    text="Revision 1 is in force",
    details={"revision": 1},
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


def build_health(status: HealthStatus, revision: int) -> Health:
    lane = LaneHealth(
        name="prevent",
        profile=Profile.PREVENT,
        inspecting=status == "ok",
        engine="running" if status == "ok" else "failed",
        since=START,
        rules_loaded=12,
        bfd="up",
    )
    fine = ComponentHealth(status="ok", since=START)
    return Health(
        status=status,
        version="0.1.0",
        revision=revision,
        started_at=START,
        components=HealthComponents(
            switch=fine,
            lanes=(lane,),
            store=fine,
            exporters=(ExporterHealth(name="siem", status="ok", delivered=3),),
            rules=RulesHealth(status="ok", since=START, updated_at=START),
        ),
        problems=()
        if status == "ok"
        else (HealthProblem(reason="an engine is down", mend="see its log", since=START),),
    )


def build_vms() -> VmList:
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


def build_quarantined(vm: VmName, order: QuarantineOrder) -> QuarantinedVm:
    until = None if order.seconds is None else START + timedelta(seconds=order.seconds)
    return QuarantinedVm(
        vm_id=vm.vm_id or "",
        vm=vm.name,
        since=START,
        until=until,
        reason=order.reason,
        on_switch=True,
        dropped_packets=7,
        dropped_bytes=700,
    )


def build_shortcut_account(count: int) -> ShortcutAccount:
    """``count``: connections that take a shortcut now."""
    return ShortcutAccount(
        policy="web-to-app", reason=Trigger.ONE_MEGABYTE, limit=50, return_on_alert=True,
        open=count, connections=12, returned=3, packets=345, bytes=67_890,
    )  # fmt: skip


def build_plan_report(revision: int, etag: str, *, applied: bool) -> PlanReport:
    return PlanReport(
        revision=revision,
        etag=etag,
        applied=applied,
        seconds=0.012,
        summary=PlanSummary(added=1, deleted=1),
        changes=(
            PlanChange(kind="add", text="table=POLICY,priority=100,ip actions=..."),
            PlanChange(kind="delete", text="table=POLICY,priority=90,ip actions=..."),
        ),
        pairs=(PairChange(source=WEB, destination=APP, before="blind", after="inspected"),),
    )


def build_coverage(pairs: Sequence[PairCoverage]) -> Coverage:
    """``pairs``: those of `PAIRS` that are told; the sums are of all."""
    return Coverage(
        summary=CoverageSummary(
            machines=2, pairs=2, inspected=1, blind=1, inspected_percent=50, blind_percent=50
        ),
        gaps=(CoverageGap(reason="app1 has no address yet", vms=(APP,)),),
        items=tuple(pairs),
    )


def build_explanation(query: ExplainQuery, source: VmName, destination: VmName) -> Explanation:
    return Explanation(
        source=source,
        destination=destination,
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


def build_flows(alert: Alert) -> FlowPage:
    """The flow of an alert."""
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
