"""The metrics page: declared, documented, and readable by Prometheus' own parser."""

from __future__ import annotations

from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

from appliance.alerts.ingest import LaneStatus
from appliance.api.coverage import Balance, CanaryProof, CoverageSummary, LaneProof, LedgerSummary
from appliance.api.documents import (
    ComponentHealth,
    ExporterHealth,
    Health,
    HealthComponents,
    LaneHealth,
    RulesHealth,
    build_time,
)
from appliance.api.shortcuts import ShortcutAccount
from appliance.assurance.failures import Uninspected
from appliance.assurance.metrics import SPECS, Snapshot, render_metrics
from appliance.commands.metrics_reference import render_reference
from appliance.inspection.publish import EngineState, InspectionState, LaneState, QueueState
from steering.counters import Count, Counters
from steering.model import PolicySet, Profile, Trigger

NOW = build_time(1_700_000_000.0)


def build_snapshot() -> Snapshot:
    fine = ComponentHealth(status="ok")
    lane = LaneHealth(
        name="prevent", profile=Profile.PREVENT, inspecting=True, engine="running", rules_loaded=18,
        bfd="up",
    )  # fmt: skip
    receiver = ExporterHealth(name="siem", status="ok", pending=3, delivered=4)
    parts = HealthComponents(
        switch=fine,
        lanes=(lane,),
        store=fine,
        exporters=(receiver,),
        rules=RulesHealth(status="ok", updated_at=NOW),
    )
    balance = Balance(
        since=NOW, until=NOW, into=10, inspected=7, dropped=1, lost=1, refused=0, lost_with_engine=0,
        bypassed=2, blocked=3, unexplained=1, closes=False, unclosed_since=NOW, reason="in the queue",
    )  # fmt: skip
    canary = CanaryProof(at=NOW, passed=True, passed_at=NOW, arrival_seconds=0.25, probes=9)
    return Snapshot(
        health=Health(
            status="ok",
            name="rack-12",
            version="0.1.0",
            revision=3,
            started_at=NOW,
            components=parts,
        ),
        summary=CoverageSummary(machines=2, pairs=2, inspected=1, blind=1),
        proofs=(LaneProof(lane="prevent", inspecting=True, canary=canary, balance=balance),),
        ledger=LedgerSummary(at=NOW, traced=120, violation_count=0),
        shortcuts=(
            ShortcutAccount(
                policy="backup",
                reason=Trigger.ONE_MEGABYTE,
                limit=5,
                return_on_alert=True,
                open=2,
                connections=7,
                returned=3,
                packets=900,
                bytes=90_000,
            ),
        ),
        uninspected={"prevent": Uninspected(2, 200, 3)},
        down_since={"prevent": 1.0},
        counters=Counters({}, {}, {1: Count(5, 500)}, {}, Count(1, 60)),
        policies=PolicySet(),
        ingest=(LaneStatus("prevent", alerts=4),),
        inspection=InspectionState(
            updated=1.0,
            pid=1,
            dialect="nftables",
            lanes=(
                LaneState(
                    number=1,
                    name="prevent",
                    state=EngineState.RUNNING,
                    restarts=2,
                    queues=(QueueState(number=0, waiting=1, dropped=2, user_dropped=3, packets=4),),
                ),
            ),
        ),
    )


def test_prometheus_reads_the_page() -> None:
    page = render_metrics(build_snapshot()).decode()
    found = {
        (sample.name, tuple(sample.labels[one] for one in SPECS[sample.name].labels)): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }
    assert found["hairpin_lane_packets_total", ("prevent", "inspected")] == 7
    assert found["hairpin_lane_packets_total", ("prevent", "bypassed")] == 2
    assert found["hairpin_lane_uninspected_bytes_total", ("prevent",)] == 200
    assert found["hairpin_queue_dropped_packets_total", ("prevent", "0")] == 5
    assert found["hairpin_balance_closes", ("prevent",)] == 0
    assert found["hairpin_canary_passed", ("prevent",)] == 1
    assert found["hairpin_guard_dropped_packets_total", ("spoofed",)] == 5
    assert found["hairpin_status", ("ok",)] == 1
    assert found["hairpin_inspection_dialect", ("nftables",)] == 1
    for name, value in (
        ("open_connections", 2), ("connections_total", 7), ("returns_total", 3),
        ("packets_total", 900), ("bytes_total", 90_000),
    ):  # fmt: skip
        assert found[f"hairpin_shortcut_{name}", ("backup", "1MB")] == value
    # Of a policy there is none in this snapshot; all else that is declared is on the page.
    missing = {name for name in SPECS if not any(name == sample for sample, _ in found)}
    by_policy = ("policy_packets_total", "policy_bytes_total", "shun_dropped_packets")
    assert missing == {f"hairpin_{name}" for name in by_policy}


def test_names_follow_the_guide() -> None:
    for name, spec in SPECS.items():
        assert name.startswith("hairpin_")
        assert name.endswith("_total") is (spec.kind == "counter"), name
        assert spec.text.endswith("."), name


def test_the_page_of_the_documentation_is_made_from_the_declarations() -> None:
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    assert text == render_reference()
