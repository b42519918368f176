"""Every endpoint, declared once: what it takes, what it answers, which method of Control it calls.

The server and the OpenAPI description are both made from `ROUTES`, so neither can say more than the
other. A handler takes a checked `Call` and returns a `Reply`; it does no I/O of its own.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from appliance.api.control import Control, IfMatch
from appliance.api.coverage import CanaryPage, Coverage, CoverageHistory, LaneProofs
from appliance.api.documents import (
    AlertDetail,
    AlertPage,
    ApiDocument,
    EventPage,
    Explanation,
    FlowPage,
    Health,
    HealthSummary,
    Live,
    PlanReport,
    PolicyDocuments,
    RulePage,
    RulesStatus,
    SignatureCounts,
    UpdateJob,
    VmEdit,
    VmList,
)
from appliance.api.quarantine import QuarantineList, QuarantineOrder, QuarantineReport
from appliance.api.queries import (
    AlertQuery,
    AlertStreamQuery,
    CanaryQuery,
    CoverageQuery,
    DryRun,
    EventQuery,
    ExplainQuery,
    FlowQuery,
    HistoryQuery,
    NoQuery,
    Query,
    RuleQuery,
    ShortcutFilter,
    ShortcutQuery,
    SignatureQuery,
)
from appliance.api.shortcuts import ShortcutList, ShortcutReport
from appliance.api.shuns import ShunList, ShunReport

BASE = "/api/v1"
JSON = "application/json"
YAML = "application/yaml"
EVENT_STREAM = "text/event-stream"
METRICS = "text/plain"
EVERY_PROBLEM = (400, 500, 503)
"""What any endpoint may answer beside its own: a request that is not HTTP, a failure, not now."""


@dataclass(frozen=True, slots=True)
class Call:
    """A request after all checks: its query model, path values and body model (or text)."""

    query: Any
    path: Mapping[str, str]
    body: Any
    if_match: IfMatch
    if_none_match: IfMatch


@dataclass(frozen=True, slots=True)
class Reply:
    status: int
    document: ApiDocument | None
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class PathParameter:
    """``pattern`` is matched against the whole segment; what does not match is not found (404)."""

    name: str
    pattern: str
    description: str
    schema: Mapping[str, Any]


Handler = Callable[[Control, Call], Awaitable[Reply]]


@dataclass(frozen=True, slots=True)
class Route:
    """One endpoint. ``handler`` is None for those that the server answers itself (the live
    stream, the metrics page, the OpenAPI description); ``raw_body`` passes the text of the body on, checked by
    nothing but its syntax, so that one parser reports all its faults."""

    method: Literal["GET", "PUT", "POST", "DELETE"]
    path: str
    operation: str
    summary: str
    handler: Handler | None
    responses: Mapping[int, type[ApiDocument] | None]
    problems: tuple[int, ...] = ()
    query: type[Query] = NoQuery
    body: type[ApiDocument] | None = None
    body_types: tuple[str, ...] = (JSON,)
    raw_body: bool = False
    needs_match: bool = False
    path_parameter: PathParameter | None = None
    public: bool = False
    media_type: str = JSON
    response_headers: Mapping[str, str] = field(default_factory=dict)


async def _live(control: Control, call: Call) -> Reply:
    return Reply(200, Live())


async def _health(control: Control, call: Call) -> Reply:
    health = await control.read_health()
    return Reply(503 if health.status == "failing" else 200, health)


async def _status(control: Control, call: Call) -> Reply:
    summary = await control.read_status()
    return Reply(503 if summary.status == "failing" else 200, summary)


async def _vms(control: Control, call: Call) -> Reply:
    return Reply(200, await control.find_vms())


async def _edit_vm(control: Control, call: Call) -> Reply:
    return _plan_reply(
        await control.edit_vm(
            call.path["vmId"], call.body, call.if_match, dry_run=call.query.dry_run
        )
    )


async def _policies(control: Control, call: Call) -> Reply:
    present = await control.read_policies()
    headers = {"ETag": f'"{present.etag}"', "Hairpin-Revision": str(present.revision)}
    if call.if_none_match and ({"*", present.etag} & call.if_none_match):
        return Reply(304, None, headers)
    return Reply(200, present.documents, headers)


async def _put_policies(control: Control, call: Call) -> Reply:
    return _plan_reply(
        await control.put_policies(call.body, call.if_match, dry_run=call.query.dry_run)
    )


def _plan_reply(report: PlanReport) -> Reply:
    return Reply(
        200, report, {"ETag": f'"{report.etag}"', "Hairpin-Revision": str(report.revision)}
    )


async def _coverage(control: Control, call: Call) -> Reply:
    return Reply(200, await control.read_coverage(call.query))


async def _coverage_history(control: Control, call: Call) -> Reply:
    return Reply(200, await control.read_coverage_history(call.query))


async def _canaries(control: Control, call: Call) -> Reply:
    return Reply(200, await control.find_canaries(call.query))


async def _prove(control: Control, call: Call) -> Reply:
    return Reply(200, await control.prove_lanes())


async def _explain(control: Control, call: Call) -> Reply:
    return Reply(200, await control.explain(call.query))


async def _rules(control: Control, call: Call) -> Reply:
    return Reply(200, await control.read_rules())


async def _signatures(control: Control, call: Call) -> Reply:
    return Reply(200, await control.find_rules(call.query))


async def _start_update(control: Control, call: Call) -> Reply:
    return Reply(202, await control.start_rules_update(), {"Location": f"{BASE}/rules/update"})


async def _update(control: Control, call: Call) -> Reply:
    return Reply(200, await control.read_rules_update())


async def _alerts(control: Control, call: Call) -> Reply:
    return Reply(200, await control.find_alerts(call.query))


async def _alert(control: Control, call: Call) -> Reply:
    return Reply(200, await control.find_alert(int(call.path["alertId"])))


async def _count_signatures(control: Control, call: Call) -> Reply:
    return Reply(200, await control.count_signatures(call.query))


async def _quarantines(control: Control, call: Call) -> Reply:
    return Reply(200, await control.find_quarantines())


async def _add_quarantine(control: Control, call: Call) -> Reply:
    return Reply(200, await control.add_quarantine(call.body))


async def _remove_quarantine(control: Control, call: Call) -> Reply:
    return Reply(200, await control.remove_quarantine(call.path["vmId"]))


async def _shuns(control: Control, call: Call) -> Reply:
    return Reply(200, await control.find_shuns())


async def _remove_shuns(control: Control, call: Call) -> Reply:
    return Reply(200, await control.remove_shuns(call.path.get("shunId")))


async def _shortcuts(control: Control, call: Call) -> Reply:
    return Reply(200, await control.find_shortcuts(call.query))


async def _return_shortcuts(control: Control, call: Call) -> Reply:
    return Reply(200, await control.return_shortcuts(call.query))


async def _return_shortcut(control: Control, call: Call) -> Reply:
    return Reply(200, await control.return_shortcut(call.path["shortcutId"]))


async def _flows(control: Control, call: Call) -> Reply:
    return Reply(200, await control.find_flows(call.query))


async def _events(control: Control, call: Call) -> Reply:
    return Reply(200, await control.find_events(call.query))


_VM_ID = PathParameter(
    "vmId",
    r"[A-Za-z0-9][A-Za-z0-9._:-]{0,252}",
    "The vm-id, as libvirt writes it to the port's external_ids.",
    {"type": "string", "pattern": r"^[A-Za-z0-9][A-Za-z0-9._:-]{0,252}$"},
)
_ALERT_ID = PathParameter(
    "alertId",
    r"0|[1-9][0-9]{0,17}",
    "An alert's id.",
    {"type": "integer", "minimum": 0, "maximum": 10**18 - 1},
)
_SHUN_ID = PathParameter(
    "shunId",
    r"[0-9a-f]{8}",
    "A shunned flow's id.",
    {"type": "string", "pattern": r"^[0-9a-f]{8}$"},
)
_SHORTCUT_ID = PathParameter(
    "shortcutId",
    r"[0-9a-f]{8}",
    "The id of a connection that takes a shortcut.",
    {"type": "string", "pattern": r"^[0-9a-f]{8}$"},
)
_REVISION_HEADERS = {
    "ETag": "Entity tag of the revision in force, in quotes.",
    "Hairpin-Revision": "The number of the revision in force.",
}

ROUTES: tuple[Route, ...] = (
    Route(
        "GET",
        f"{BASE}/live",
        "readLive",
        "Does the process answer? Needs no token and says nothing else.",
        _live,
        {200: Live},
        public=True,
    ),
    Route(
        "GET",
        f"{BASE}/openapi.json",
        "readOpenapi",
        "This description. Needs no token.",
        None,
        {200: None},
        public=True,
    ),
    Route(
        "GET",
        "/health",
        "readStatus",
        "Health in a word: ok, degraded or failing.",
        _status,
        {200: HealthSummary, 503: HealthSummary},
        public=True,
    ),
    Route(
        "GET",
        f"{BASE}/health",
        "readHealth",
        "The state of every part: 200 while ok or degraded, 503 (same document) while failing.",
        _health,
        {200: Health, 503: Health},
    ),
    Route("GET", f"{BASE}/vms", "findVms", "Every VM that was found.", _vms, {200: VmList}),
    Route(
        "PUT",
        f"{BASE}/vms/{{vmId}}",
        "editVm",
        "Set the name and tags of one VM, as a new revision of the policies.",
        _edit_vm,
        {200: PlanReport},
        (404, 412, 413, 415, 422, 428),
        query=DryRun,
        body=VmEdit,
        needs_match=True,
        path_parameter=_VM_ID,
        response_headers=_REVISION_HEADERS,
    ),
    Route(
        "GET",
        f"{BASE}/policies",
        "readPolicies",
        "The documents in force.",
        _policies,
        {200: PolicyDocuments, 304: None},
        response_headers=_REVISION_HEADERS,
    ),
    Route(
        "PUT",
        f"{BASE}/policies",
        "putPolicies",
        "Replace all documents; with dry_run only plan it.",
        _put_policies,
        {200: PlanReport},
        (412, 413, 415, 422, 428),
        query=DryRun,
        body=PolicyDocuments,
        body_types=(JSON, YAML),
        raw_body=True,
        needs_match=True,
        response_headers=_REVISION_HEADERS,
    ),
    Route(
        "GET",
        f"{BASE}/coverage",
        "readCoverage",
        "Which pairs of VMs are inspected, direct, denied or blind.",
        _coverage,
        {200: Coverage},
        (404,),
        query=CoverageQuery,
    ),
    Route(
        "GET",
        f"{BASE}/coverage/history",
        "readCoverageHistory",
        "The coverage over time, newest first.",
        _coverage_history,
        {200: CoverageHistory},
        query=HistoryQuery,
    ),
    Route(
        "GET",
        f"{BASE}/canaries",
        "findCanaries",
        "The canaries that were sent through the lanes, newest first.",
        _canaries,
        {200: CanaryPage},
        query=CanaryQuery,
    ),
    Route(
        "POST",
        f"{BASE}/canaries",
        "proveLanes",
        "Send a canary through every lane now, and answer when each has passed or was lost.",
        _prove,
        {200: LaneProofs},
    ),
    Route(
        "GET",
        f"{BASE}/metrics",
        "readMetrics",
        "What is counted, for Prometheus (text format 0.0.4).",
        None,
        {200: None},
        media_type=METRICS,
    ),
    Route(
        "GET",
        f"{BASE}/explain",
        "explain",
        "Would a connection be inspected, by which policy, through which tables, and why.",
        _explain,
        {200: Explanation},
        (404,),
        query=ExplainQuery,
    ),
    Route(
        "GET",
        f"{BASE}/rules",
        "readRules",
        "The ruleset in force on each lane.",
        _rules,
        {200: RulesStatus},
    ),
    Route(
        "GET",
        f"{BASE}/rules/signatures",
        "findRules",
        "The rules in force, by sid, CVE or lane.",
        _signatures,
        {200: RulePage},
        query=RuleQuery,
    ),
    Route(
        "GET",
        f"{BASE}/rules/update",
        "readRulesUpdate",
        "The update that runs, or the last one.",
        _update,
        {200: UpdateJob},
    ),
    Route(
        "POST",
        f"{BASE}/rules/update",
        "startRulesUpdate",
        "Fetch, test and load the rules, unless that runs already; watch it by GET.",
        _start_update,
        {202: UpdateJob},
        response_headers={"Location": "Where its progress is read."},
    ),
    Route(
        "GET",
        f"{BASE}/alerts",
        "findAlerts",
        "Alerts, newest first.",
        _alerts,
        {200: AlertPage},
        query=AlertQuery,
    ),
    Route(
        "GET",
        f"{BASE}/alerts/stream",
        "streamAlerts",
        "Alerts as they come (server-sent events); resumes after Last-Event-ID.",
        None,
        {200: None},
        query=AlertStreamQuery,
        media_type=EVENT_STREAM,
    ),
    Route(
        "GET",
        f"{BASE}/alerts/signatures",
        "countSignatures",
        "Which rules fired most often, the most frequent first; of the last day unless asked otherwise.",
        _count_signatures,
        {200: SignatureCounts},
        query=SignatureQuery,
    ),
    Route(
        "GET",
        f"{BASE}/alerts/{{alertId}}",
        "readAlert",
        "One alert with the engine's own event.",
        _alert,
        {200: AlertDetail},
        (404,),
        path_parameter=_ALERT_ID,
    ),
    Route(
        "GET",
        f"{BASE}/quarantines",
        "findQuarantines",
        "The VMs that are shut off.",
        _quarantines,
        {200: QuarantineList},
    ),
    Route(
        "POST",
        f"{BASE}/quarantines",
        "addQuarantine",
        "Shut a VM off, or give its quarantine another end.",
        _add_quarantine,
        {200: QuarantineReport},
        (404, 413, 415, 422),
        body=QuarantineOrder,
    ),
    Route(
        "DELETE",
        f"{BASE}/quarantines/{{vmId}}",
        "removeQuarantine",
        "End a VM's quarantine.",
        _remove_quarantine,
        {200: QuarantineReport},
        (404,),
        path_parameter=_VM_ID,
    ),
    Route(
        "GET",
        f"{BASE}/shuns",
        "findShuns",
        "The blocked flows that the switch drops by itself.",
        _shuns,
        {200: ShunList},
    ),
    Route(
        "DELETE",
        f"{BASE}/shuns",
        "removeShuns",
        "Give all of them back to the engine.",
        _remove_shuns,
        {200: ShunReport},
    ),
    Route(
        "DELETE",
        f"{BASE}/shuns/{{shunId}}",
        "removeShun",
        "Give one of them back to the engine.",
        _remove_shuns,
        {200: ShunReport},
        (404,),
        path_parameter=_SHUN_ID,
    ),
    Route(
        "GET",
        f"{BASE}/shortcuts",
        "findShortcuts",
        "The connections that the switch passes by itself, uninspected, and what passed so.",
        _shortcuts,
        {200: ShortcutList},
        query=ShortcutQuery,
    ),
    Route(
        "DELETE",
        f"{BASE}/shortcuts",
        "returnShortcuts",
        "Have those that the query names inspected again; without a query all.",
        _return_shortcuts,
        {200: ShortcutReport},
        (404,),
        query=ShortcutFilter,
    ),
    Route(
        "DELETE",
        f"{BASE}/shortcuts/{{shortcutId}}",
        "returnShortcut",
        "Have one of them inspected again.",
        _return_shortcut,
        {200: ShortcutReport},
        (404,),
        path_parameter=_SHORTCUT_ID,
    ),
    Route(
        "GET",
        f"{BASE}/flows",
        "findFlows",
        "Flow records, newest first, and how many were missed.",
        _flows,
        {200: FlowPage},
        query=FlowQuery,
    ),
    Route(
        "GET",
        f"{BASE}/events",
        "findEvents",
        "What the appliance did and met, newest first.",
        _events,
        {200: EventPage},
        query=EventQuery,
    ),
)
"""In the order in which they are matched: `alerts/stream` before `alerts/{alertId}`."""
