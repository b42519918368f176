"""Every document of the management API, as frozen pydantic models: the one source of its OpenAPI.

On the wire keys are camelCase, in Python snake_case; unknown keys are refused in both directions.
Times are RFC 3339 in UTC; sizes are bytes. `hairpin ... --json` prints these same documents.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue
from pydantic.alias_generators import to_camel

from steering.model import Family, OnFailure, Profile, Protocol, Trigger

Count = Annotated[int, Field(ge=0)]
Percent = Annotated[float, Field(ge=0, le=100)]
Address = Annotated[str, Field(description="IPv4 or IPv6 address.", max_length=45)]
PortNumber = Annotated[int, Field(ge=0, le=65535)]

Treatment = Literal["inspect", "direct", "deny", "unnamed"]
"""What is done with a connection; `unnamed`: no policy names it, so it goes direct, uninspected."""

Verdict = Literal["blocked", "allowed"]

PairStatus = Literal["inspected", "partial", "direct", "denied", "blind"]
"""Of all that may pass between two VMs: all inspected; some of it; direct by a policy; denied;
nothing named by any policy (a blind spot)."""


def build_time(seconds: float) -> datetime:
    """The moment ``seconds`` after the epoch, in UTC, as the documents carry it."""
    return datetime.fromtimestamp(seconds, UTC)


class ApiDocument(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=to_camel,
        populate_by_name=True,
        serialize_by_alias=True,
        ser_json_inf_nan="null",
    )


# Problems (RFC 9457)


class ProblemFault(ApiDocument):
    """One thing wrong in what was sent."""

    path: str = Field(description="Its place, as in `items[2].spec.priority`.")
    reason: str


class ProblemDocument(ApiDocument):
    """Why a request was refused or failed, and what to do next (RFC 9457)."""

    type: str = Field(default="about:blank", description="`urn:hairpin:problem:...`, stable.")
    title: str
    status: int = Field(ge=400, le=599)
    detail: str = ""
    instance: str = Field(default="", description="`urn:hairpin:request:` and the request's id.")
    mend: str = Field(default="", description="What to do next; empty when there is nothing to do.")
    errors: tuple[ProblemFault, ...] = Field(
        default=(), description="All faults of the input at once."
    )


# Health

HealthStatus = Literal["ok", "degraded", "failing"]


class HealthProblem(ApiDocument):
    reason: str
    mend: str = ""
    since: datetime


class ComponentHealth(ApiDocument):
    """One part of the service. ``detail`` is a short sentence for people."""

    status: HealthStatus
    detail: str = ""
    since: datetime | None = None


class LaneHealth(ApiDocument):
    """One lane: whether packets that are steered into it are inspected right now."""

    name: str
    profile: Profile
    inspecting: bool = Field(description="The engine runs, its rules are loaded, BFD passes.")
    engine: Literal["starting", "running", "reloading", "failed", "stopped", "unknown"]
    since: datetime | None = Field(default=None, description="In this state since.")
    rules_loaded: Count = 0
    bfd: Literal["up", "down", "unknown"] = "unknown"
    detail: str = ""


class ExporterHealth(ApiDocument):
    name: str
    status: HealthStatus
    detail: str = ""
    pending: Count = Field(default=0, description="Alerts stored and not yet delivered.")
    delivered: Count = 0
    skipped: Count = Field(
        default=0, description="Alerts that a damaged piece of the store kept from the receiver."
    )


class RulesHealth(ComponentHealth):
    """The rules in force."""

    updated_at: datetime | None = Field(
        default=None,
        description="Since when they may be outdated: when the oldest of their sources was last read; "
        "with the starter rules alone, when these were made. Null without rules.",
    )


class HealthComponents(ApiDocument):
    switch: ComponentHealth
    lanes: tuple[LaneHealth, ...] = ()
    store: ComponentHealth
    exporters: tuple[ExporterHealth, ...] = ()
    rules: RulesHealth


class Health(ApiDocument):
    """`ok`: all works. `degraded`: works, with `problems`. `failing`: does not do its task."""

    status: HealthStatus
    name: str = Field(default="hairpin", description="The appliance's name, from its settings.")
    version: str
    revision: Count = Field(default=0, description="Policy revision in force on the switch.")
    started_at: datetime
    components: HealthComponents
    problems: tuple[HealthProblem, ...] = ()


class HealthSummary(ApiDocument):
    """Health in a word, for who has no token: a load balancer, a watchdog."""

    status: HealthStatus


class Live(ApiDocument):
    """The process answers; nothing more is said to a client without the token."""

    live: Literal[True] = True


# VMs


class VmName(ApiDocument):
    """How other documents name a VM."""

    vm_id: str
    name: str


class VmPort(ApiDocument):
    interface: str
    mac: str
    bridge: str
    tag: int | None = Field(default=None, description="Access VLAN, null for none.")
    ofport: int
    link_up: bool


class VmAddress(ApiDocument):
    """An address that a VM holds now, as ARP or ND showed."""

    address: Address
    since: datetime


class Vm(ApiDocument):
    vm_id: str
    name: str
    tags: dict[str, str] = {}
    zones: tuple[str, ...] = ()
    ports: tuple[VmPort, ...] = ()
    addresses: tuple[VmAddress, ...] = ()
    in_scope: bool = Field(description="It has a port on the steered bridge: policies reach it.")


class VmList(ApiDocument):
    items: tuple[Vm, ...] = ()


class VmEdit(ApiDocument):
    """The name and tags of one VM, as its VirtualMachine document will say afterwards."""

    name: str | None = Field(
        default=None, min_length=1, max_length=253, description="Null: unchanged."
    )
    tags: dict[str, str] | None = Field(default=None, description="All tags; null: unchanged.")


# Policies


class PolicyItem(ApiDocument):
    """One document: a VirtualMachine, a Zone or a SteeringPolicy; `docs/policy.md` tells all."""

    api_version: Literal["hairpin/v1"]
    kind: Literal["VirtualMachine", "Zone", "SteeringPolicy"]
    metadata: dict[str, JsonValue]
    spec: dict[str, JsonValue] = {}


class PolicyDocuments(ApiDocument):
    """Everything the operator declared; what GET gives can be changed and PUT again."""

    api_version: Literal["hairpin/v1"]
    kind: Literal["List"]
    items: tuple[PolicyItem, ...]


class PlanChange(ApiDocument):
    """One change on the switch. ``text`` is one readable line: a flow, a group."""

    kind: Literal["add", "modify", "delete"]
    text: str


class PlanSummary(ApiDocument):
    added: Count = 0
    modified: Count = 0
    deleted: Count = 0


class PairChange(ApiDocument):
    """A pair of VMs whose coverage a plan changes. Null: the pair does not exist then."""

    source: VmName
    destination: VmName
    before: PairStatus | None
    after: PairStatus | None


class PlanReport(ApiDocument):
    """What a change of the policies does, or did (``applied``), to the switch and to coverage."""

    revision: Count = Field(description="In force now; after a dry run, still the former one.")
    etag: str = Field(description="Entity tag of that revision, without quotes.")
    applied: bool
    seconds: float = Field(ge=0, description="How long planning, applying and verifying took.")
    summary: PlanSummary
    changes: tuple[PlanChange, ...] = ()
    pairs: tuple[PairChange, ...] = ()
    warnings: tuple[str, ...] = ()


# Coverage and explain


class ExplainStep(ApiDocument):
    """One table that a packet passes, as in `docs/pipeline.md`."""

    table: str
    text: str


class ConsideredPolicy(ApiDocument):
    name: str
    priority: int
    matches: bool
    reason: str


class ExplainLane(ApiDocument):
    name: str
    profile: Profile
    vlan: int
    inspecting: bool


class Explanation(ApiDocument):
    """Would a connection be inspected, by which policy, through which tables, and why."""

    source: VmName
    destination: VmName
    protocol: Protocol
    port: PortNumber | None
    family: Family
    inspected: bool
    treatment: Treatment
    policy: str | None = None
    profile: Profile | None = None
    on_failure: OnFailure | None = None
    inspected_until: Trigger | None = Field(
        default=None,
        description="After that the connection may take a shortcut, uninspected; null: never.",
    )
    reason: str
    lane: ExplainLane | None = None
    considered: tuple[ConsideredPolicy, ...] = ()
    tables: tuple[ExplainStep, ...] = ()


# Rules


class RuleFailure(ApiDocument):
    sid: int | None = None
    rule: str = Field(default="", description="Its text, shortened.")
    reason: str


class RuleSourceState(ApiDocument):
    name: str
    url: str | None = None
    rules: Count = 0
    updated_at: datetime | None = None
    problem: str | None = Field(
        default=None, description="Why its last fetch failed, null if it did not."
    )


class LaneRules(ApiDocument):
    """The ruleset in force on one lane."""

    lane: str
    profile: Profile
    revision: str = Field(description="Digest of the rules; empty before the first load.")
    loaded: Count
    failed: Count
    failures: tuple[RuleFailure, ...] = Field(default=(), description="At most 200 of them.")
    sources: tuple[RuleSourceState, ...] = ()
    updated_at: datetime | None = None
    last_good: bool = Field(
        description="False while the newest ruleset was refused and the one before is in force."
    )


class RulesStatus(ApiDocument):
    lanes: tuple[LaneRules, ...] = ()


class Rule(ApiDocument):
    """One rule of the ruleset in force."""

    sid: int
    revision: int = 1
    lane: str
    action: Literal["alert", "drop", "reject", "pass"]
    message: str
    cves: tuple[str, ...] = ()
    affected_products: tuple[str, ...] = ()
    source: str = ""
    text: str


class RulePage(ApiDocument):
    items: tuple[Rule, ...] = ()
    next: str | None = None


class UpdateJob(ApiDocument):
    """The last update of the rules, or the one that runs."""

    state: Literal["idle", "running", "succeeded", "failed"]
    step: str = Field(default="", description="What it does now, or last did.")
    started_at: datetime | None = None
    ended_at: datetime | None = None
    changed: bool = Field(
        default=False, description="The rulesets in force are others than before."
    )
    reason: str = Field(default="", description="Why it failed.")
    mend: str = ""
    lanes: tuple[LaneRules, ...] = Field(default=(), description="As it left them.")


# Flows, alerts, events


class Endpoint(ApiDocument):
    """One end of a connection; ``vm`` is null where no VM held the address at the time."""

    address: Address
    port: PortNumber | None = None
    vm: VmName | None = None
    zones: tuple[str, ...] = ()


class Flow(ApiDocument):
    """One connection as the mirror port showed it; the source opened it."""

    id: int
    started_at: datetime
    ended_at: datetime
    source: Endpoint
    destination: Endpoint
    protocol: str
    application: str = ""
    category: str = ""
    packets_sent: Count = Field(default=0, description="By the source.")
    bytes_sent: Count = 0
    packets_received: Count = 0
    bytes_received: Count = 0
    treatment: Treatment | None = None
    policy: str | None = None


class FlowAccounting(ApiDocument):
    """How much of the traffic the records tell of, by comparison with the switch's counters."""

    since: datetime
    until: datetime
    switch_packets: Count
    recorded_packets: Count
    missed_packets: Count
    missed_percent: Percent


class FlowPage(ApiDocument):
    items: tuple[Flow, ...] = ()
    next: str | None = None
    accounting: FlowAccounting | None = None


class Signature(ApiDocument):
    sid: int
    revision: int = 1
    message: str
    category: str = ""
    severity: Annotated[int, Field(ge=0, le=255, description="1 is the gravest.")] = 3
    cves: tuple[str, ...] = ()
    affected_products: tuple[str, ...] = ()


class Alert(ApiDocument):
    """A rule fired. Source and destination are those of the packet that made it fire."""

    id: int
    time: datetime
    verdict: Verdict
    lane: str
    policy: str | None = None
    signature: Signature
    source: Endpoint
    destination: Endpoint
    protocol: str
    application: str = ""
    flow_id: str | None = Field(
        default=None, description="The engine's number of the flow, as text."
    )
    payload: str = Field(default="", description="Excerpt, printable; other bytes as dots.")


class AlertDetail(Alert):
    """As an alert, with the engine's own event."""

    event: dict[str, Any] = Field(description="The EVE event as the engine wrote it.")


class AlertPage(ApiDocument):
    """Newest first."""

    items: tuple[Alert, ...] = ()
    next: str | None = None


class SignatureCount(ApiDocument):
    """How often a rule fired. Text, revision and severity are those of its newest revision."""

    sid: int
    gid: int = 1
    revision: int = 1
    message: str
    severity: int
    alerts: int
    blocked: int


class SignatureCounts(ApiDocument):
    """The most frequent first. Whole hours are counted: from ``since`` to before ``until``."""

    since: datetime
    until: datetime
    items: tuple[SignatureCount, ...] = ()


class Event(ApiDocument):
    """Something the appliance itself did or met: an apply, drift mended, an engine lost."""

    id: int
    time: datetime
    ended: datetime | None = Field(
        default=None, description="Of a state that lasted; null while it does."
    )
    level: Literal["info", "warning", "error"]
    kind: str = Field(description="Stable, as in `policy.applied`, `drift.mended`.")
    subject: str = ""
    text: str
    details: dict[str, Any] = {}


class EventPage(ApiDocument):
    """Newest first."""

    items: tuple[Event, ...] = ()
    next: str | None = None
