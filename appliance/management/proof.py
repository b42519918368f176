"""Proofs as the API shows them: canary, balance and ledger, as documents. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from appliance.alerts.canary import StoredProbe
from appliance.api import coverage as cover
from appliance.api.documents import build_time
from appliance.api.shortcuts import ShortcutAccount
from appliance.assurance.balance import Balance
from appliance.assurance.canary import CanaryStatus
from appliance.assurance.ledger import LedgerRun
from steering.ledger import Violation


def build_canary_proof(status: CanaryStatus) -> cover.CanaryProof:
    return cover.CanaryProof(
        at=None if status.at is None else build_time(status.at),
        cause=status.cause,
        passed=status.passed,
        stage=status.stage,
        detail=status.detail,
        passed_at=None if status.passed_at is None else build_time(status.passed_at),
        failed_since=None if status.failed_since is None else build_time(status.failed_since),
        arrival_seconds=status.arrival_seconds,
        probes=status.probes,
        failures=status.failures,
    )


def build_balance(balance: Balance) -> cover.Balance:
    since = balance.unclosed_since
    return cover.Balance(
        since=build_time(balance.since),
        until=build_time(balance.until),
        into=balance.into,
        inspected=balance.inspected,
        dropped=balance.dropped,
        lost=balance.lost,
        refused=balance.refused,
        lost_with_engine=balance.lost_with_engine,
        vanished=balance.vanished,
        bypassed=balance.bypassed,
        blocked=balance.blocked,
        unexplained=balance.unexplained,
        closes=balance.closes,
        unclosed_since=None if since is None else build_time(since),
        reason=balance.reason,
    )


def build_canary(probe: StoredProbe) -> cover.Canary:
    done = probe.arrived_at is not None and probe.result == "passed"
    return cover.Canary.model_validate(
        {
            "id": probe.id,
            "at": build_time(probe.at),
            "lane": probe.lane,
            "cause": probe.cause,
            "result": probe.result or "open",
            "stage": probe.stage,
            "detail": probe.detail,
            "seconds": max(0.0, (probe.arrived_at or 0.0) - probe.at) if done else None,
        }
    )


def build_ledger(
    run: LedgerRun | None, shortcuts: Sequence[ShortcutAccount]
) -> cover.LedgerSummary | None:
    """``shortcuts``: what the traces, which are of connections that begin, can't tell."""
    if run is None:
        return None
    ledger = run.ledger
    taken: dict[str, Any] = {
        "shortcut_policies": sum(one.limit is not None for one in shortcuts),
        "shortcut_connections": sum(one.connections for one in shortcuts),
        "shortcut_packets": sum(one.packets for one in shortcuts),
        "shortcut_bytes": sum(one.bytes for one in shortcuts),
    }
    if ledger is None:
        return cover.LedgerSummary(revision=run.revision, fault=run.fault, **taken)
    return cover.LedgerSummary(
        at=build_time(ledger.at),
        revision=run.revision,
        classes=ledger.classes,
        classes_traced=ledger.classes_traced,
        pairs=ledger.pairs,
        pairs_traced=ledger.pairs_traced,
        traced=ledger.traced,
        by_copy=ledger.by_copy,
        inspected=ledger.inspected,
        direct=ledger.direct,
        denied=ledger.denied,
        bypassed=ledger.bypassed,
        blocked=ledger.blocked,
        violation_count=ledger.violation_count,
        violations=tuple(map(_build_violation, ledger.violations)),
        findings=tuple(f"{one.flow}: {one.reason}" for one in ledger.foreign),
        seconds=ledger.seconds,
        **taken,
    )


def _build_violation(one: Violation) -> cover.Violation:
    return cover.Violation(
        source=one.source,
        destination=one.destination,
        family=one.family,
        service=one.service,
        direction=one.direction,
        state=one.state,
        expected=one.expected,
        seen=one.seen,
        flow=one.traced,
        reason=one.reason,
    )


def build_shares(summary: cover.CoverageSummary, proofs: Mapping[str, bool]) -> dict[str, object]:
    """What one row of the coverage over time keeps, as JSON values; ``proofs``: lane -> proved."""
    return {
        **summary.model_dump(by_alias=False),
        "lanes": len(proofs),
        "lanes_proved": sum(proofs.values()),
    }
