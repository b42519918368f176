"""Values of the other rooms -> documents of the API. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from appliance.alerts.model import Alert as StoredAlert
from appliance.alerts.model import Endpoint as StoredEndpoint
from appliance.alerts.model import Event as StoredEvent
from appliance.alerts.model import FlowRecord, SignatureCount
from appliance.api import coverage as cover
from appliance.api import documents as doc
from appliance.rules.model import ProfileState, RuleInfo
from steering.counters import Count, Counters
from steering.coverage import Coverage, PairCoverage, ServiceCoverage, Status, find_shortcut
from steering.diff import Bundle
from steering.explain import Considered, Explanation, Step
from steering.model import (
    Action,
    Deny,
    Direct,
    Holding,
    Inspect,
    Lane,
    Machine,
    MachineRecord,
    Protocol,
    Shortcut,
)
from steering.pipeline import Table

PAYLOAD_LIMIT = 1024
CHANGES_LIMIT = 2000


def build_name(vm_id: str, name: str) -> doc.VmName:
    return doc.VmName(vm_id=vm_id, name=name)


def build_vm(machine: Machine, holdings: Sequence[Holding], *, in_scope: bool) -> doc.Vm:
    return doc.Vm(
        vm_id=machine.vm_id,
        name=machine.name,
        tags=dict(machine.tags),
        zones=machine.zones,
        ports=tuple(
            doc.VmPort(
                interface=port.interface,
                mac=port.mac,
                bridge=port.bridge,
                tag=port.tag,
                ofport=port.ofport,
                link_up=port.link_up,
            )
            for port in machine.ports
        ),
        addresses=tuple(
            doc.VmAddress(address=held.address, since=doc.build_time(held.since))
            for held in holdings
        ),
        in_scope=in_scope,
    )


def build_absent_vm(record: MachineRecord) -> doc.Vm:
    """A VM that only a document names."""
    return doc.Vm(vm_id=record.vm_id, name=record.name, tags=dict(record.tags), in_scope=False)


def find_treatment(action: Action | None) -> doc.Treatment:
    match action:
        case Inspect():
            return "inspect"
        case Direct():
            return "direct"
        case Deny():
            return "deny"
        case None:
            return "unnamed"


def _build_part(covered: ServiceCoverage) -> cover.CoveragePart:
    families = " ".join(str(family) for family in covered.families)
    action = covered.action
    return cover.CoveragePart(
        what=f"{covered.service} {families}",
        treatment=find_treatment(action),
        policy=covered.policy,
        profile=action.profile if isinstance(action, Inspect) else None,
        on_failure=action.on_failure if isinstance(action, Inspect) else None,
        inspected_until=None if (cut := find_shortcut(covered)) is None else cut.after,
    )


def build_pair(pair: PairCoverage) -> cover.PairCoverage:
    return cover.PairCoverage(
        source=build_name(pair.source.vm_id, pair.source.name),
        destination=build_name(pair.destination.vm_id, pair.destination.name),
        status=pair.status.value,
        parts=tuple(_build_part(part) for part in pair.services),
        reason=pair.gap or "",
    )


def build_coverage_summary(coverage: Coverage) -> cover.CoverageSummary:
    found = coverage.summary
    return cover.CoverageSummary(
        machines=found.machines,
        pairs=found.pairs,
        inspected=found.inspected.count,
        partial=found.partial.count,
        direct=found.direct.count,
        denied=found.denied.count,
        blind=found.blind.count,
        inspected_percent=found.inspected.percent,
        partial_percent=found.partial.percent,
        direct_percent=found.direct.percent,
        denied_percent=found.denied.percent,
        blind_percent=found.blind.percent,
    )


def build_counter_gaps(
    counters: Counters, machines: Sequence[Machine]
) -> tuple[cover.CoverageGap, ...]:
    """What the switch counted that was neither inspected nor a policy's choice."""
    owners = {port.ofport: machine for machine in machines for port in machine.ports}
    gaps = [
        cover.CoverageGap(
            reason=f"{count.bypassed.packets} packets ({count.bypassed.bytes} bytes) passed "
            f"uninspected by open policies while lane {lane} was down",
            mend="`hairpin events` tells when; onFailure: closed lets none pass",
        )
        for lane, count in counters.lanes.items()
        if count.bypassed.packets
    ]
    for counted, text, mend in _list_port_drops(counters):
        for ofport, count in sorted(counted.items()):
            machine = owners.get(ofport)
            if count.packets and (machine is not None or counted is counters.claims):
                name = machine.name if machine is not None else "a VM that is gone"
                reason = f"{count.packets} {text.format(name)}"
                vms = () if machine is None else (build_name(machine.vm_id, machine.name),)
                gaps.append(cover.CoverageGap(reason=reason, mend=mend, vms=vms))
    for count, text, mend in (
        (
            counters.strays,
            "unicast IP packets in broadcast or multicast frames, sent by VMs that policies name, "
            "were dropped: they would have passed uninspected",
            "look for who sends them with tcpdump",
        ),
        (
            counters.ghosts,
            "frames were dropped, from or to VMs that policies name and whose ports are gone or "
            "share a MAC",
            "nothing to do if a VM moved or restarted; else give each port a MAC of its own",
        ),
    ):
        if count.packets:
            gaps.append(cover.CoverageGap(reason=f"{count.packets} {text}", mend=mend))
    return tuple(gaps)


def _list_port_drops(
    counters: Counters,
) -> tuple[tuple[Mapping[int, Count], str, str], ...]:
    """What is counted by a VM's port, what is said of it (with a place for the VM's name), and a mend."""
    return (
        (
            counters.spoofed,
            "frames of {} or in its name were dropped that lied about their sender (MAC, ARP or ND)",
            "look at the VM; a second MAC of its own (VRRP, nested VMs) is taken for a lie too",
        ),
        (
            counters.tagged,
            "frames of {} or in its name were dropped that carried a VLAN tag of the VM's own",
            "a VM that policies name must send untagged frames",
        ),
        (
            counters.unread,
            "frames of {} to VMs that policies name were dropped: they are neither IP nor ARP "
            "(MPLS, PPPoE, LLC), and nothing could inspect them",
            "VMs that policies name speak IPv4, IPv6 and ARP to each other: carry the rest over IP",
        ),
        (
            counters.claims,
            "claims (ARP, ND) of an address that the documents give to {} were dropped",
            "look for who sends them with tcpdump; a VM that may take the address needs it in its "
            "document",
        ),
    )


def build_pair_changes(before: Coverage, after: Coverage) -> tuple[doc.PairChange, ...]:
    """The pairs whose status a change of the policies changes, in the order of ``after``."""
    was: dict[tuple[str, str], Status] = {
        (pair.source.vm_id, pair.destination.vm_id): pair.status for pair in before.pairs
    }
    return tuple(
        doc.PairChange(
            source=build_name(pair.source.vm_id, pair.source.name),
            destination=build_name(pair.destination.vm_id, pair.destination.name),
            before=old.value if old is not None else None,
            after=pair.status.value,
        )
        for pair in after.pairs
        if (old := was.get((pair.source.vm_id, pair.destination.vm_id))) is not pair.status
    )


def build_changes(bundle: Bundle) -> tuple[doc.PlanChange, ...]:
    return tuple(
        doc.PlanChange(kind=change.kind, text=change.text)
        for change in bundle.changes[:CHANGES_LIMIT]
    )


def build_plan_summary(bundle: Bundle) -> doc.PlanSummary:
    return doc.PlanSummary(
        added=bundle.count("add"),
        modified=bundle.count("modify"),
        deleted=bundle.count("delete"),
    )


def _build_considered(considered: Considered, *, matches: bool) -> doc.ConsideredPolicy:
    return doc.ConsideredPolicy(
        name=considered.policy,
        priority=considered.priority,
        matches=matches,
        reason="; ".join(considered.reasons) or "named too, but a higher one decides",
    )


def build_explanation(found: Explanation, *, inspecting: bool) -> doc.Explanation:
    lane, cut = found.lane, _find_explained_shortcut(found)
    decided = (
        (
            doc.ConsideredPolicy(
                name=found.policy, priority=found.priority, matches=True, reason="it decides"
            ),
        )
        if found.policy is not None and found.priority is not None
        else ()
    )
    return doc.Explanation(
        source=build_name(found.source.vm_id, found.source.name),
        destination=build_name(found.destination.vm_id, found.destination.name),
        protocol=found.connection.protocol,
        port=found.connection.destination_port,
        family=found.connection.family,
        inspected=found.inspected,
        treatment=find_treatment(found.action),
        policy=found.policy,
        profile=found.profile,
        on_failure=found.on_failure,
        inspected_until=None if cut is None else cut.after,
        reason=found.reason if cut is None else f"{found.reason}; {_describe_shortcut(cut)}",
        lane=None if lane is None else _build_lane(lane, inspecting=inspecting),
        considered=(
            *(_build_considered(one, matches=False) for one in found.passed_over),
            *decided,
            *(_build_considered(one, matches=True) for one in found.shadowed),
        ),
        tables=(
            *(_build_step(step) for step in found.forward),
            *(_build_step(step, "answer: ") for step in found.answers),
        ),
    )


def _find_explained_shortcut(found: Explanation) -> Shortcut | None:
    """None too where the lane has no third leg: then nothing ever takes one."""
    action, lane = found.action, found.lane
    if not isinstance(action, Inspect) or lane is None or lane.leg_c is None:
        return None
    return action.shortcut if found.connection.protocol is Protocol.TCP else None


def _describe_shortcut(cut: Shortcut) -> str:
    return (
        f"once the engine lets it go (after {cut.after}), the switch passes the rest uninspected, at most "
        f"{cut.max_flows} connections of the policy at a time"
    )


def _build_step(step: Step, prefix: str = "") -> doc.ExplainStep:
    decides = Table[step.name].value.decides if step.name in Table.__members__ else ""
    return doc.ExplainStep(table=step.name, text=f"{prefix}{step.detail or decides}")


def _build_lane(lane: Lane, *, inspecting: bool) -> doc.ExplainLane:
    return doc.ExplainLane(
        name=lane.name, profile=lane.profile, vlan=lane.vlan, inspecting=inspecting
    )


def build_endpoint(end: StoredEndpoint) -> doc.Endpoint:
    return doc.Endpoint(
        address=end.address or "",
        port=end.port,
        vm=None if end.vm_id is None else build_name(end.vm_id, end.vm or end.vm_id),
        zones=end.zones,
    )


def _build_alert_fields(alert: StoredAlert) -> dict[str, Any]:
    return {
        "id": alert.id,
        "time": doc.build_time(alert.at),
        "verdict": alert.verdict.value,
        "lane": alert.lane,
        "policy": alert.policy,
        "signature": doc.Signature(
            sid=alert.signature.sid,
            revision=alert.signature.rev,
            message=alert.signature.text,
            category=alert.signature.category,
            severity=alert.signature.severity,
            cves=alert.cves,
            affected_products=alert.affected_products,
        ),
        "source": build_endpoint(alert.source),
        "destination": build_endpoint(alert.destination),
        "protocol": alert.protocol,
        "application": alert.app_proto or "",
        "flow_id": None if alert.flow_id is None else str(alert.flow_id),
        "payload": alert.payload_printable[:PAYLOAD_LIMIT],
    }


def build_alert(alert: StoredAlert) -> doc.Alert:
    return doc.Alert(**_build_alert_fields(alert))


def build_signature_counts(
    since: float, until: float, counted: Sequence[SignatureCount]
) -> doc.SignatureCounts:
    return doc.SignatureCounts(
        since=doc.build_time(since),
        until=doc.build_time(until),
        items=tuple(
            doc.SignatureCount(
                sid=one.sid,
                gid=one.gid,
                revision=one.rev,
                message=one.text,
                severity=one.severity,
                alerts=one.alerts,
                blocked=one.blocked,
            )
            for one in counted
        ),
    )


def build_alert_detail(alert: StoredAlert) -> doc.AlertDetail:
    event: Mapping[str, Any] = json.loads(alert.raw)
    return doc.AlertDetail(**_build_alert_fields(alert), event=dict(event))


def build_flow(flow: FlowRecord) -> doc.Flow:
    return doc.Flow(
        id=flow.id,
        started_at=doc.build_time(flow.first_seen),
        ended_at=doc.build_time(flow.last_seen),
        source=build_endpoint(flow.source),
        destination=build_endpoint(flow.destination),
        protocol=flow.protocol,
        application=flow.application,
        category=flow.category,
        packets_sent=flow.packets_sent,
        bytes_sent=flow.bytes_sent,
        packets_received=flow.packets_received,
        bytes_received=flow.bytes_received,
        treatment=flow.treatment,  # type: ignore[arg-type]  # checked by the model
        policy=flow.policy,
    )


def build_event(event: StoredEvent) -> doc.Event:
    level = event.severity if event.severity in ("info", "warning", "error") else "error"
    details = dict(event.detail)
    if event.ended_at is not None:
        details["endedAt"] = doc.build_time(event.ended_at).isoformat()
    return doc.Event(
        id=event.id,
        time=doc.build_time(event.at),
        ended=None if event.ended_at is None else doc.build_time(event.ended_at),
        level=level,  # type: ignore[arg-type]  # one of the three, just checked
        kind=event.kind,
        subject=event.subject,
        text=event.message,
        details=details,
    )


def build_rule(lane: Lane, info: RuleInfo) -> doc.Rule:
    return doc.Rule(
        sid=info.sid,
        revision=info.rev,
        lane=lane.name,
        action=info.action,  # type: ignore[arg-type]  # checked by the model
        message=info.msg,
        cves=info.cves,
        affected_products=info.products,
        source=info.source,
        text=info.text,
    )


def build_lane_rules(lane: Lane, state: ProfileState, loaded: int, failed: int) -> doc.LaneRules:
    """``loaded`` and ``failed`` are what the running engine says."""
    report = state.report
    return doc.LaneRules(
        lane=lane.name,
        profile=lane.profile,
        revision=state.revision or "",
        loaded=loaded,
        # What the trial left out never reached the engine, and is not inspected by either.
        failed=failed + (report.left_out_count if report else 0),
        failures=tuple(
            doc.RuleFailure(sid=one.sid, rule=one.msg[:200], reason=one.reason[:400])
            for one in (report.left_out if report else ())[:200]
        ),
        sources=tuple(
            doc.RuleSourceState(
                name=source.name,
                url=source.url or None,
                rules=source.rules,
                updated_at=doc.build_time(source.fetched) if source.fetched else None,
                problem=source.fault or None,
            )
            for source in (report.sources if report else ())
        ),
        updated_at=doc.build_time(report.created) if report else None,
        last_good=state.refused is None,
    )
