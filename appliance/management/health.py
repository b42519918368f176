"""Is everything that should be inspected inspected right now? The answer, from parts. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from appliance.alerts.ingest import LaneStatus
from appliance.api import documents as doc
from appliance.export.exporter import ExporterStatus, State
from appliance.inspection.publish import EngineState, InspectionState, LaneState
from appliance.rules.model import RulesState
from steering.model import Inspect, Lane, PolicySet
from steering.reconcile import SwitchStatus

FRESH_SECONDS = 5.0

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
    """All that health is judged by. ``forwarding`` by lane name; times in seconds since the epoch."""

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


def build_health(facts: Facts) -> doc.Health:
    """`failing`: a lane that a policy needs does not inspect, or the switch is out of reach."""
    problems: list[doc.HealthProblem] = []
    lanes = tuple(_judge_lane(facts, lane, problems) for lane in facts.lanes)
    switch = _judge_switch(facts, problems)
    store = _judge_store(facts, problems)
    exporters = tuple(_judge_exporter(facts, one, problems) for one in facts.exporters)
    rules = _judge_rules(facts, problems)
    needed = find_needed_lanes(facts.policies)
    blind = any(not lane.inspecting and lane.name in needed for lane in lanes)
    failing = blind or switch.status == "failing" or store.status == "failing"
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
    """Engine up, supervised lately, rules loaded, and BFD passes through it."""
    engine = _find_engine(facts, lane)
    return (
        engine is not None
        and engine.inspecting
        and engine.rules_loaded > 0
        and facts.forwarding.get(lane.name, False)
    )


def _find_engine(facts: Facts, lane: Lane) -> LaneState | None:
    state = facts.inspection
    if state is None or facts.now - state.updated > FRESH_SECONDS:
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
    detail = f"Open vSwitch {switch.ovs_version}".strip()
    detail += f", {switch.datapath_type or 'system'} datapath"
    return doc.ComponentHealth(status="degraded" if switch.problems else "ok", detail=detail)


def _judge_store(facts: Facts, problems: list[doc.HealthProblem]) -> doc.ComponentHealth:
    faults = [f"{lane.lane}: {lane.fault}" for lane in facts.ingest if lane.fault]
    if facts.flows_fault:
        faults.append(f"flow records: {facts.flows_fault}")
    for fault in faults:
        mend = "nothing is lost while the engine can write; free disk space or mend access"
        _problem(problems, f"not stored: {fault}", mend, facts.now)
    behind = sum(lane.behind_bytes for lane in facts.ingest)
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
    )


def _judge_rules(facts: Facts, problems: list[doc.HealthProblem]) -> doc.ComponentHealth:
    details: list[str] = []
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
        stale = [
            source.name for source in (one.report.sources if one.report else ()) if source.stale
        ]
        if stale:
            details.append(f"{one.profile}: stale sources {', '.join(stale)}")
            _problem(problems, details[-1], "`hairpin rules update` when they answer", facts.now)
    return doc.ComponentHealth(status="degraded" if details else "ok", detail="; ".join(details))


def _missing(rules: RulesState) -> Sequence[str]:
    return [str(one.profile) for one in rules.profiles if one.revision is None]
