"""Is everything that should be inspected inspected right now? The answer, from parts. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from appliance.alerts.ingest import LaneStatus
from appliance.api import documents as doc
from appliance.api.coverage import Balance
from appliance.assurance.canary import CanaryStatus
from appliance.assurance.disk import DiskState
from appliance.assurance.ledger import LedgerRun
from appliance.assurance.stages import Stage
from appliance.export.exporter import ExporterStatus, State
from appliance.image.boots import BootVersion, render_failed
from appliance.inspection.publish import EngineState, InspectionState, LaneState
from appliance.rules.age import find_age, judge_age, render_age
from appliance.rules.model import BUNDLE, RulesState, SourceReport
from steering.change import SwitchStatus
from steering.model import Inspect, Lane, PolicySet

FRESH_SECONDS = 5.0
UNDECIDED_STAGES = (Stage.SENDER, Stage.RETURN, Stage.EVE, Stage.STORE)
_MENDS: dict[str, str] = {
    Stage.SENDER: "check that `hairpin inspect` runs and the canary's device is there",
    Stage.FLOW_TABLE: "look for another controller; `hairpin doctor`",
    Stage.VLAN: "look for who changes the lane's groups",
    Stage.BRIDGE: "check the lane's bridge and legs in the service host: `hairpin doctor`",
    Stage.QUEUE_RULE: "look for another program that changes the service host's firewall",
    Stage.ENGINE: "see the engine's log; it is replaced when it hangs",
    Stage.RULESET: "`hairpin rules update`",
    Stage.EVE: "free disk space under runDir",
    Stage.STORE: "free disk space under stateDir",
}

EngineWord = Literal["starting", "running", "reloading", "failed", "stopped", "unknown"]
_WORDS: dict[EngineState, EngineWord] = {
    EngineState.STARTING: "starting",
    EngineState.RUNNING: "running",
    EngineState.NO_RULES: "failed",
    EngineState.HUNG: "failed",
    EngineState.FAILED: "failed",
    EngineState.STOPPED: "stopped",
}


@dataclass(frozen=True, slots=True)
class Facts:
    """All that health is judged by. ``forwarding`` by lane name; times in seconds since the epoch.

    ``canaries`` None: no canary port is configured. ``stale_after``: seconds for which rules are fresh.
    ``mended``: configuration that was found damaged at the start, and was put back.
    """

    name: str
    version: str
    now: float
    started_at: float
    revision: int
    policies: PolicySet
    switch: SwitchStatus
    lanes: tuple[Lane, ...]
    forwarding: dict[str, bool]
    inspection: InspectionState | None
    rules: RulesState
    ingest: tuple[LaneStatus, ...]
    exporters: tuple[ExporterStatus, ...]
    flows_fault: str = ""
    canaries: tuple[CanaryStatus, ...] | None = ()
    balances: Mapping[str, Balance] = field(default_factory=dict)
    ledger: LedgerRun | None = None
    disks: tuple[DiskState, ...] = ()
    mended: tuple[str, ...] = ()
    shortcut_faults: tuple[str, ...] = ()
    stale_after: float | None = None
    boots: tuple[BootVersion, ...] = ()


def build_health(facts: Facts) -> doc.Health:
    """`failing`: a lane that a policy needs does not inspect, or the switch is out of reach."""
    problems: list[doc.HealthProblem] = []
    lanes = tuple(_judge_lane(facts, lane, problems) for lane in facts.lanes)
    switch = _judge_switch(facts, problems)
    store = _judge_store(facts, problems)
    exporters = tuple(_judge_exporter(facts, one, problems) for one in facts.exporters)
    rules = _judge_rules(facts, problems)
    _judge_proof(facts, problems)
    _judge_boots(facts, problems)
    needed = find_needed_lanes(facts.policies)
    blind = any(not lane.inspecting and lane.name in needed for lane in lanes)
    violated = facts.ledger is not None and facts.ledger.violated
    failing = blind or violated or switch.status == "failing" or store.status == "failing"
    status: doc.HealthStatus = "failing" if failing else "degraded" if problems else "ok"
    return doc.Health(
        status=status,
        name=facts.name,
        version=facts.version,
        revision=facts.revision,
        started_at=doc.build_time(facts.started_at),
        components=doc.HealthComponents(
            switch=switch, lanes=lanes, store=store, exporters=exporters, rules=rules
        ),
        problems=tuple(problems),
    )


def find_needed_lanes(policies: PolicySet) -> frozenset[str]:
    """The names of the lanes that some policy inspects by."""
    return frozenset(
        str(policy.action.profile)
        for policy in policies.policies
        if isinstance(policy.action, Inspect)
    )


def is_inspecting(facts: Facts, lane: Lane) -> bool:
    """Engine up, supervised lately, rules loaded, BFD passes through it, and no canary was passed."""
    engine = _find_engine(facts, lane)
    return (
        engine is not None
        and engine.inspecting
        and engine.rules_loaded > 0
        and facts.forwarding.get(lane.name, False)
        and not _is_disproved(facts, lane)
    )


def _is_disproved(facts: Facts, lane: Lane) -> bool:
    """Whether the last canary shows that packets are not inspected; one that only was not sent or

    not recorded does not.
    """
    canary = next((one for one in facts.canaries or () if one.lane == lane.name), None)
    return canary is not None and canary.passed is False and canary.stage not in UNDECIDED_STAGES


def _find_engine(facts: Facts, lane: Lane) -> LaneState | None:
    state = facts.inspection
    if state is None or abs(facts.now - state.updated) > FRESH_SECONDS:
        return None
    return next((one for one in state.lanes if one.number == lane.number), None)


def _problem(problems: list[doc.HealthProblem], reason: str, mend: str, since: float) -> None:
    problems.append(doc.HealthProblem(reason=reason, mend=mend, since=doc.build_time(since)))


def _judge_lane(facts: Facts, lane: Lane, problems: list[doc.HealthProblem]) -> doc.LaneHealth:
    engine = _find_engine(facts, lane)
    up = facts.forwarding.get(lane.name)
    inspecting = is_inspecting(facts, lane)
    detail = ""
    if engine is None:
        detail = "nobody supervises its engine"
        mend = "start `hairpin inspect` in the service host"
        _problem(problems, f"lane {lane.name}: {detail}", mend, facts.now)
    elif not engine.inspecting:
        detail = f"its engine is {engine.state}"
        _problem(problems, f"lane {lane.name}: {detail}", "see `hairpin events`", facts.now)
    elif not engine.rules_loaded:
        detail = "its engine has no rules"
        _problem(problems, f"lane {lane.name}: {detail}", "`hairpin rules update`", facts.now)
    elif not up:
        detail = "BFD does not pass through it"
        mend = "check legs, bridge and queue rules: `hairpin doctor`"
        _problem(problems, f"lane {lane.name}: {detail}", mend, facts.now)
    for fault in engine.faults if engine else ():
        if fault.mended is None:
            _problem(problems, f"lane {lane.name}: {fault.reason}", fault.mend, fault.since)
    return doc.LaneHealth(
        name=lane.name,
        profile=lane.profile,
        inspecting=inspecting,
        engine=_WORDS[engine.state] if engine else "unknown",
        since=doc.build_time(engine.started) if engine and engine.started else None,
        rules_loaded=engine.rules_loaded if engine else 0,
        bfd="unknown" if up is None else "up" if up else "down",
        detail=detail,
    )


def _judge_proof(facts: Facts, problems: list[doc.HealthProblem]) -> None:
    """What the proofs say: canaries, balance, ledger."""
    if facts.canaries is None:
        reason = "no canary port is configured: that lanes inspect is not proved"
        mend = "add a port for it and name it in canary.interface (docs/proof.md)"
        _problem(problems, reason, mend, facts.started_at)
    for canary in facts.canaries or ():
        if canary.passed is False:
            reason = f"lane {canary.lane}: its canary was lost at: {canary.stage}; {canary.detail}"
            mend = _MENDS.get(canary.stage, "see `hairpin coverage` and `hairpin doctor`")
            _problem(problems, reason, mend, canary.failed_since or facts.now)
    for name, balance in sorted(facts.balances.items()):
        if not balance.closes and balance.unclosed_since is not None:
            reason = f"lane {name}: its packets are not accounted for: {balance.reason}"
            since = balance.unclosed_since.timestamp()
            _problem(problems, reason, "see `hairpin coverage`", since)
    run = facts.ledger
    if run is None:
        return
    if run.ledger is None:
        reason = f"the ways through the tables are not proved: {run.fault}"
        mend = "give `hairpin serve` ovs-vswitchd's control socket, or what a copy of it needs (docs/coverage.md)"
        _problem(problems, reason, mend, facts.now)
        return
    if run.ledger.violation_count:
        first = run.ledger.violations[0]
        reason = (
            f"{run.ledger.violation_count} traced packets go another way than the policies say, the "
            f"first {first.family} {first.service} {first.source} -> {first.destination}: {first.reason}"
        )
        mend = f"ovs-appctl ofproto/trace {first.traced}"
        _problem(problems, reason, mend, run.ledger.at)
    for foreign in run.ledger.foreign[:5]:
        reason = f"a flow that is not Hairpin's goes before its own: {foreign.flow}"
        _problem(problems, reason, foreign.reason, run.ledger.at)


def _judge_boots(facts: Facts, problems: list[doc.HealthProblem]) -> None:
    """A version that was tried and failed: who updated the appliance believes that it runs."""
    running = next((one.version for one in facts.boots if one.running), "the one before")
    mend = "update to a version that is mended (docs/update.md); until then the one before works"
    for one in facts.boots:
        if one.failed:
            _problem(problems, render_failed(one, running), mend, one.at or facts.started_at)


def _judge_switch(facts: Facts, problems: list[doc.HealthProblem]) -> doc.ComponentHealth:
    switch = facts.switch
    if not switch.reachable:
        reason = f"the switch can't be kept right: {switch.reason}"
        mend = "what it has goes on working; check Open vSwitch"
        _problem(problems, reason, mend, switch.since)
        return doc.ComponentHealth(
            status="failing", detail=switch.reason, since=doc.build_time(switch.since)
        )
    for problem in switch.problems:
        _problem(problems, problem, "", facts.now)
    for problem in facts.shortcut_faults:
        _problem(problems, problem, "it is tried again; check Open vSwitch", facts.now)
    detail = f"Open vSwitch {switch.ovs_version}".strip()
    detail += f", {switch.datapath_type or 'system'} datapath"
    return doc.ComponentHealth(status="degraded" if switch.problems else "ok", detail=detail)


def _judge_store(facts: Facts, problems: list[doc.HealthProblem]) -> doc.ComponentHealth:
    for disk in facts.disks:
        _problem(problems, disk.reason, "free space there, or give it more", disk.since)
    for mended in facts.mended:
        mend = (
            "it is mended; check the disk, of which more may be damaged, then restart the service"
        )
        _problem(problems, mended, mend, facts.started_at)
    faults = [f"{lane.lane}: {lane.fault}" for lane in facts.ingest if lane.fault]
    if facts.flows_fault:
        faults.append(f"flow records: {facts.flows_fault}")
    for fault in faults:
        mend = "nothing is lost while the engine can write; free disk space or mend access"
        _problem(problems, f"not stored: {fault}", mend, facts.now)
    faults += facts.mended
    behind = sum(lane.behind_bytes for lane in facts.ingest)
    faults += [disk.reason for disk in facts.disks if disk.full]
    return doc.ComponentHealth(
        status="degraded" if faults else "ok",
        detail="; ".join(faults) or f"{behind} bytes of EVE not yet stored",
    )


def _judge_exporter(
    facts: Facts, status: ExporterStatus, problems: list[doc.HealthProblem]
) -> doc.ExporterHealth:
    connected = status.state is State.CONNECTED
    if not connected and status.last_error:
        reason = f"export {status.name} to {status.receiver}: {status.last_error}"
        mend = "alerts wait and are sent when the receiver is back"
        _problem(problems, reason, mend, status.last_error_at or facts.now)
    return doc.ExporterHealth(
        name=status.name,
        status="ok" if connected or not status.last_error else "degraded",
        detail=status.last_error or str(status.state),
        pending=status.backlog,
        delivered=status.sent,
        skipped=status.skipped,
    )


def _judge_rules(facts: Facts, problems: list[doc.HealthProblem]) -> doc.RulesHealth:
    details: list[str] = []
    age = find_age(facts.rules)
    if age is not None and (old := judge_age(age, facts.now, facts.stale_after)):
        details.append(old)
        mend = (
            "use a newer image, or name sources in rules.sources"
            if age.starter_only
            else "`hairpin rules update`; lanes inspect with what they have until then"
        )
        _problem(problems, old, mend, min(facts.now, age.since + (facts.stale_after or 0)))
    attempt = facts.rules.attempt
    if attempt is not None and attempt.fault:
        details.append(f"the last update failed: {attempt.fault}")
        _problem(problems, details[-1], attempt.mend, attempt.at)
    for state in _missing(facts.rules):
        details.append(f"profile {state} has no ruleset")
        _problem(problems, details[-1], "`hairpin rules update`", facts.now)
    for one in facts.rules.profiles:
        if one.refused is not None:
            details.append(f"{one.profile}: the engine refused {one.refused.revision}")
            mend = "the last good ruleset is in force; see `hairpin rules show`"
            _problem(problems, f"{details[-1]}: {one.refused.reason}", mend, one.refused.at)
        sources = one.report.sources if one.report else ()
        if stale := [source for source in sources if source.stale]:
            details.append(f"{one.profile}: stale sources {', '.join(_describe(stale))}")
            _problem(problems, details[-1], "`hairpin rules update` when they answer", facts.now)
    status: doc.HealthStatus = "degraded" if details else "ok"
    if age is not None and facts.now >= age.since:
        kind = "starter rules made" if age.starter_only else f"{age.source} read"
        details.append(f"{kind} {render_age(facts.now - age.since)} ago")
    return doc.RulesHealth(
        status=status,
        detail="; ".join(details),
        updated_at=None if age is None else doc.build_time(age.since),
    )


def _describe(stale: Sequence[SourceReport]) -> Sequence[str]:
    """By name; of the bundle also why: nobody is asked for it."""
    return [
        f"{one.name} ({one.fault})" if one.name == BUNDLE and one.fault else one.name
        for one in stale
    ]


def _missing(rules: RulesState) -> Sequence[str]:
    return [str(one.profile) for one in rules.profiles if one.revision is None]
