"""The metrics page: every metric declared once, and built from one frozen snapshot. Pure.

`docs/metrics.md` is made from `SPECS`. The format is Prometheus' text format 0.0.4, written by its own
client library; names follow its guide (https://prometheus.io/docs/practices/naming/).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from appliance.alerts.ingest import LaneStatus
from appliance.api.coverage import CoverageSummary, LaneProof, LedgerSummary
from appliance.api.documents import Health
from appliance.api.shortcuts import ShortcutAccount
from appliance.assurance.failures import Uninspected
from appliance.inspection.publish import InspectionState
from steering.counters import Counters
from steering.model import PolicySet


@dataclass(frozen=True, slots=True)
class Spec:
    """``kind`` as Prometheus has it; a counter's name ends in ``_total``."""

    kind: Literal["gauge", "counter"]
    labels: tuple[str, ...]
    text: str


SPECS: Mapping[str, Spec] = {
    "hairpin_info": Spec("gauge", ("name", "version"), "1; which appliance this is."),
    "hairpin_status": Spec(
        "gauge", ("status",), "1 for what health says: ok, degraded or failing."
    ),
    "hairpin_policy_revision": Spec("gauge", (), "The policy revision in force."),
    "hairpin_start_time_seconds": Spec("gauge", (), "When the management service started (epoch)."),
    "hairpin_lane_inspecting": Spec("gauge", ("lane",), "1 while what is steered in is inspected."),
    "hairpin_lane_bfd_up": Spec(
        "gauge", ("lane",), "1 while BFD passes through the lane's engine."
    ),
    "hairpin_inspection_dialect": Spec(
        "gauge", ("dialect",), "1 for what sends frames to the engines: nftables or iptables."
    ),
    "hairpin_lane_packet_threads": Spec(
        "gauge",
        ("lane", "placed"),
        "Packet threads of the engine, as seen: pinned (each on a core of its own) or shared.",
    ),
    "hairpin_lane_rules_loaded": Spec("gauge", ("lane",), "Rules that the engine has loaded."),
    "hairpin_rules_time_seconds": Spec(
        "gauge",
        (),
        "When the oldest source of the rules in force was last read (epoch); with the starter rules alone, "
        "when these were made.",
    ),
    "hairpin_lane_engine_restarts_total": Spec(
        "counter", ("lane",), "Restarts of the engine after an exit or a hang."
    ),
    "hairpin_lane_super_packets": Spec(
        "gauge",
        ("lane", "state"),
        "1 for how the engine takes super-packets: on (seen), ready (none came yet) or off.",
    ),
    "hairpin_lane_largest_packet_bytes": Spec(
        "gauge", ("lane",), "The largest packet that the engine took, from its IP header on."
    ),
    "hairpin_lane_shortcut": Spec(
        "gauge",
        ("lane", "state"),
        "1 for whether the engine lets connections go: on (some went), ready (none went yet) or off.",
    ),
    "hairpin_lane_shortcut_connections": Spec(
        "gauge",
        ("lane",),
        "Connections that the engine let go, or that returned, and are remembered.",
    ),
    "hairpin_lane_shortcut_events_total": Spec(
        "counter",
        ("lane", "event"),
        "What the engine's library did with connections: entered (let go), returned (inspected again, from "
        "then on always), renewed (a new connection on the same ports), refused_full and refused_mixed (not "
        "let go), too_long (packets of returned ones that could not be wrapped).",
    ),
    "hairpin_lane_packets_total": Spec(
        "counter",
        ("lane", "fate"),
        "Packets steered to the lane by what became of them: inspected (and delivered), dropped (by the "
        "engine), lost (in the queue), refused (by the service host), lost_with_engine, vanished (by a "
        "fault that is over), bypassed (let through uninspected by a failure policy), blocked (held back "
        "by one).",
    ),
    "hairpin_lane_uninspected_packets_total": Spec(
        "counter",
        ("lane",),
        "Packets that passed uninspected by a failure policy, seen by this service.",
    ),
    "hairpin_lane_uninspected_bytes_total": Spec(
        "counter",
        ("lane",),
        "Bytes that passed uninspected by a failure policy, seen by this service.",
    ),
    "hairpin_lane_down_since_seconds": Spec(
        "gauge", ("lane",), "Since when the lane is down (epoch); absent while it is up."
    ),
    "hairpin_balance_closes": Spec(
        "gauge", ("lane",), "1 while the lane's packets are accounted for."
    ),
    "hairpin_balance_unexplained_packets": Spec(
        "gauge", ("lane",), "Packets into the lane that nothing accounts for; near 0 either way."
    ),
    "hairpin_canary_passed": Spec(
        "gauge", ("lane",), "1 when the last canary passed, 0 when it did not."
    ),
    "hairpin_canary_passed_time_seconds": Spec(
        "gauge", ("lane",), "When a canary of the lane last passed (epoch)."
    ),
    "hairpin_canary_arrival_seconds": Spec(
        "gauge", ("lane",), "From sending the last canary to its alerts in the store."
    ),
    "hairpin_canary_probes_total": Spec("counter", ("lane",), "Canaries sent."),
    "hairpin_canary_failures_total": Spec(
        "counter", ("lane",), "Canaries that were lost on their way."
    ),
    "hairpin_coverage_pairs": Spec("gauge", ("status",), "Ordered pairs of VMs by status."),
    "hairpin_ledger_traces": Spec("gauge", (), "Packets traced in the last run of the ledger."),
    "hairpin_ledger_violations": Spec(
        "gauge", (), "Traces that went another way than policies say."
    ),
    "hairpin_ledger_time_seconds": Spec("gauge", (), "When the ledger last ran (epoch)."),
    "hairpin_policy_packets_total": Spec(
        "counter",
        ("policy", "action"),
        "Packets that a policy decided, since its flows stand; not those that took a shortcut.",
    ),
    "hairpin_policy_bytes_total": Spec(
        "counter", ("policy", "action"), "Bytes that a policy decided, since its flows stand."
    ),
    "hairpin_quarantined_vms": Spec("gauge", (), "VMs that are shut off."),
    "hairpin_quarantine_dropped_packets_total": Spec(
        "counter", (), "Packets from and to quarantined VMs, dropped since their flows stand."
    ),
    "hairpin_shun_dropped_packets": Spec(
        "gauge",
        ("policy",),
        "Packets that the switch dropped of flows that are shunned now: the engine had blocked them.",
    ),
    "hairpin_shortcut_open_connections": Spec(
        "gauge",
        ("policy", "reason"),
        "Connections that take a shortcut now: the switch passes them by itself, uninspected.",
    ),
    "hairpin_shortcut_connections_total": Spec(
        "counter", ("policy", "reason"), "Connections that took a shortcut."
    ),
    "hairpin_shortcut_packets_total": Spec(
        "counter", ("policy", "reason"), "Packets that went uninspected by a shortcut."
    ),
    "hairpin_shortcut_bytes_total": Spec(
        "counter", ("policy", "reason"), "Bytes that went uninspected by a shortcut."
    ),
    "hairpin_shortcut_returns_total": Spec(
        "counter", ("policy", "reason"), "Connections that were sent back to inspection."
    ),
    "hairpin_guard_dropped_packets_total": Spec(
        "counter", ("reason",), "Packets dropped before any policy: spoofed, tagged, stray."
    ),
    "hairpin_queue_waiting_packets": Spec(
        "gauge", ("lane", "queue"), "Packets waiting for the engine."
    ),
    "hairpin_queue_dropped_packets_total": Spec(
        "counter", ("lane", "queue"), "Packets dropped because the queue was full."
    ),
    "hairpin_alerts_stored_total": Spec("counter", ("lane",), "Alerts stored by this service."),
    "hairpin_eve_behind_bytes": Spec(
        "gauge", ("lane",), "Written by the engine and not yet stored."
    ),
    "hairpin_eve_malformed_total": Spec("counter", ("lane",), "EVE lines that are no events."),
    "hairpin_export_pending": Spec("gauge", ("receiver",), "Alerts that wait for a receiver."),
    "hairpin_export_delivered_total": Spec("counter", ("receiver",), "Alerts given to a receiver."),
    "hairpin_export_skipped_total": Spec(
        "counter", ("receiver",), "Alerts that a damaged piece of the store kept from a receiver."
    ),
}


FATES = (
    "inspected", "dropped", "lost", "refused", "lost_with_engine", "vanished", "bypassed", "blocked",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All that the page is made from, at one moment."""

    health: Health
    summary: CoverageSummary
    proofs: tuple[LaneProof, ...]
    ledger: LedgerSummary | None
    shortcuts: tuple[ShortcutAccount, ...]
    uninspected: Mapping[str, Uninspected]
    down_since: Mapping[str, float]
    counters: Counters | None
    policies: PolicySet
    ingest: tuple[LaneStatus, ...]
    inspection: InspectionState | None


Sample = tuple[str, tuple[str, ...], float]
"""Metric, label values in the order of its spec, value."""


def find_samples(snapshot: Snapshot) -> Iterable[Sample]:
    yield from _find_health(snapshot.health)
    yield from _find_proofs(snapshot)
    yield from _find_counts(snapshot)
    yield from _find_engines(snapshot)
    for taken in snapshot.shortcuts:
        labels = (taken.policy, taken.reason.value)
        yield "hairpin_shortcut_open_connections", labels, taken.open
        yield "hairpin_shortcut_connections_total", labels, taken.connections
        yield "hairpin_shortcut_packets_total", labels, taken.packets
        yield "hairpin_shortcut_bytes_total", labels, taken.bytes
        yield "hairpin_shortcut_returns_total", labels, taken.returned
    for one in snapshot.ingest:
        yield "hairpin_alerts_stored_total", (one.lane,), one.alerts
        yield "hairpin_eve_behind_bytes", (one.lane,), one.behind_bytes
        yield "hairpin_eve_malformed_total", (one.lane,), one.malformed


def _find_health(health: Health) -> Iterable[Sample]:
    yield "hairpin_info", (health.name, health.version), 1
    for status in ("ok", "degraded", "failing"):
        yield "hairpin_status", (status,), float(health.status == status)
    yield "hairpin_policy_revision", (), health.revision
    yield "hairpin_start_time_seconds", (), health.started_at.timestamp()
    if health.components.rules.updated_at is not None:
        yield "hairpin_rules_time_seconds", (), health.components.rules.updated_at.timestamp()
    for lane in health.components.lanes:
        yield "hairpin_lane_inspecting", (lane.name,), float(lane.inspecting)
        yield "hairpin_lane_bfd_up", (lane.name,), float(lane.bfd == "up")
        yield "hairpin_lane_rules_loaded", (lane.name,), lane.rules_loaded
    for exporter in health.components.exporters:
        yield "hairpin_export_pending", (exporter.name,), exporter.pending
        yield "hairpin_export_delivered_total", (exporter.name,), exporter.delivered
        yield "hairpin_export_skipped_total", (exporter.name,), exporter.skipped


def _find_proofs(snapshot: Snapshot) -> Iterable[Sample]:
    for proof in snapshot.proofs:
        name, canary, balance = proof.lane, proof.canary, proof.balance
        if canary is not None:
            if canary.passed is not None:
                yield "hairpin_canary_passed", (name,), float(canary.passed)
            if canary.passed_at is not None:
                yield "hairpin_canary_passed_time_seconds", (name,), canary.passed_at.timestamp()
            if canary.arrival_seconds is not None:
                yield "hairpin_canary_arrival_seconds", (name,), canary.arrival_seconds
            yield "hairpin_canary_probes_total", (name,), canary.probes
            yield "hairpin_canary_failures_total", (name,), canary.failures
        if balance is not None:
            for fate in FATES:
                yield "hairpin_lane_packets_total", (name, fate), getattr(balance, fate)
            yield "hairpin_balance_closes", (name,), float(balance.closes)
            yield "hairpin_balance_unexplained_packets", (name,), balance.unexplained
    for name, counted in snapshot.uninspected.items():
        yield "hairpin_lane_uninspected_packets_total", (name,), counted.packets
        yield "hairpin_lane_uninspected_bytes_total", (name,), counted.bytes
    for name, since in snapshot.down_since.items():
        yield "hairpin_lane_down_since_seconds", (name,), since
    for status in ("inspected", "partial", "direct", "denied", "blind"):
        yield "hairpin_coverage_pairs", (status,), getattr(snapshot.summary, status)
    ledger = snapshot.ledger
    if ledger is not None and ledger.at is not None:
        yield "hairpin_ledger_traces", (), ledger.traced
        yield "hairpin_ledger_violations", (), ledger.violation_count
        yield "hairpin_ledger_time_seconds", (), ledger.at.timestamp()


def _find_counts(snapshot: Snapshot) -> Iterable[Sample]:
    counters = snapshot.counters
    yield "hairpin_quarantined_vms", (), len(snapshot.policies.quarantined)
    if counters is None:
        return
    actions = {policy.name: str(policy.action) for policy in snapshot.policies.policies}
    for name, count in counters.policies.items():
        labels = (name, actions.get(name, "").partition(" ")[0])
        yield "hairpin_policy_packets_total", labels, count.packets
        yield "hairpin_policy_bytes_total", labels, count.bytes
    for reason, counts in (("spoofed", counters.spoofed), ("tagged", counters.tagged)):
        total = sum(count.packets for count in counts.values())
        yield "hairpin_guard_dropped_packets_total", (reason,), total
    yield "hairpin_guard_dropped_packets_total", ("stray",), counters.strays.packets
    for name, count in counters.shunned.items():
        yield "hairpin_shun_dropped_packets", (name,), count.packets
    shut_off = sum(count.packets for count in counters.quarantined.values())
    yield "hairpin_quarantine_dropped_packets_total", (), shut_off


SHORTCUT_EVENTS = (
    "entered", "returned", "renewed", "refused_full", "refused_mixed", "too_long",
)  # fmt: skip
"""Fields of `publish.Shortcut`."""


def _find_engines(snapshot: Snapshot) -> Iterable[Sample]:
    if snapshot.inspection and snapshot.inspection.dialect:
        yield "hairpin_inspection_dialect", (snapshot.inspection.dialect,), 1
    for lane in snapshot.inspection.lanes if snapshot.inspection else ():
        placed = "pinned" if lane.placement.pinned else "shared"
        yield "hairpin_lane_packet_threads", (lane.name, placed), lane.placement.threads
        yield "hairpin_lane_engine_restarts_total", (lane.name,), lane.restarts
        yield "hairpin_lane_super_packets", (lane.name, str(lane.super_packets.state)), 1
        yield "hairpin_lane_largest_packet_bytes", (lane.name,), lane.super_packets.largest
        cut = lane.shortcut
        yield "hairpin_lane_shortcut", (lane.name, str(cut.state)), 1
        yield "hairpin_lane_shortcut_connections", (lane.name,), cut.present
        for event in SHORTCUT_EVENTS:
            yield "hairpin_lane_shortcut_events_total", (lane.name, event), getattr(cut, event)
        for queue in lane.queues:
            labels = (lane.name, str(queue.number))
            yield "hairpin_queue_waiting_packets", labels, queue.waiting
            yield "hairpin_queue_dropped_packets_total", labels, queue.dropped + queue.user_dropped


class _Page(Collector):
    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def render_metrics(snapshot: Snapshot) -> bytes:
    """The page. Raises KeyError for a sample that is not declared: a fault of the program."""
    families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
    for name, labels, value in find_samples(snapshot):
        spec = SPECS[name]
        if name not in families:
            kind = CounterMetricFamily if spec.kind == "counter" else GaugeMetricFamily
            families[name] = kind(name, spec.text, labels=spec.labels)
        families[name].add_metric(labels, value)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Page([families[name] for name in SPECS if name in families]))
    return generate_latest(registry)
