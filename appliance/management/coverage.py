"""The coverage as the API asks for it: what policies say, and the proof that it is so, now and over time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import structlog
from sqlite_utils import Database

from appliance.alerts.canary import find_probes
from appliance.alerts.history import find_rows
from appliance.alerts.store import Store
from appliance.api import coverage as cover
from appliance.api import queries as ask
from appliance.api.documents import build_time
from appliance.api.shortcuts import ShortcutAccount
from appliance.assurance.accounts import BalanceWatch
from appliance.assurance.canary import CanaryWatch
from appliance.assurance.disk import DiskWatch
from appliance.assurance.failures import FailureWatch
from appliance.assurance.ledger import LedgerRun, LedgerWatch
from appliance.assurance.metrics import Snapshot, render_metrics
from appliance.assurance.shortcuts import ShortcutWatch
from appliance.management import render
from appliance.management.health import Facts, build_health, is_inspecting
from appliance.management.pages import cut_page, parse_cursor, read_seconds
from appliance.management.proof import (
    build_balance,
    build_canary,
    build_canary_proof,
    build_ledger,
    build_shares,
)
from appliance.management.shortcut import build_accounts
from steering.coverage import build_coverage
from steering.errors import SwitchError
from steering.reconcile import Reconciler

log = structlog.get_logger("coverage")

MOMENT_SECONDS = 3600.0
KEPT_SECONDS = 400 * 86400.0


@dataclass(frozen=True, slots=True)
class Watches:
    """Who proves what."""

    canary: CanaryWatch
    failures: FailureWatch
    ledger: LedgerWatch
    balance: BalanceWatch
    disk: DiskWatch
    shortcuts: ShortcutWatch

    def build_balances(self) -> dict[str, cover.Balance]:
        """By lane name."""
        return {name: build_balance(one) for name, one in self.balance.balances.items()}


class CoverageWork:
    """``build_facts`` gives what health is judged by."""

    def __init__(
        self,
        store: Store,
        reconciler: Reconciler,
        watches: Watches,
        build_facts: Callable[[], Facts],
    ) -> None:
        self._store = store
        self._reconciler = reconciler
        self._watches = watches
        self._build_facts = build_facts
        self._kept_at = 0.0

    def build_proofs(self, facts: Facts) -> tuple[cover.LaneProof, ...]:
        canaries = {one.lane: one for one in self._watches.canary.status()}
        balances = self._watches.build_balances()
        configured = self._watches.canary.configured
        return tuple(
            cover.LaneProof(
                lane=lane.name,
                inspecting=is_inspecting(facts, lane),
                canary=build_canary_proof(canaries[lane.name]) if configured else None,
                balance=balances.get(lane.name),
            )
            for lane in facts.lanes
        )

    async def read_coverage(self, query: ask.CoverageQuery) -> cover.Coverage:
        facts = self._build_facts()
        machines = self._reconciler.machines()
        coverage = await asyncio.to_thread(build_coverage, facts.policies, machines)
        pairs = [
            pair
            for pair in coverage.pairs
            if query.status in (None, pair.status)
            and (query.vm is None or query.vm in _names(pair))
        ]
        page, following = cut_page(pairs, query.cursor, query.limit)
        health = build_health(facts)
        shortcuts = self._build_accounts(facts)
        return cover.Coverage(
            summary=render.build_coverage_summary(coverage),
            gaps=(
                *(
                    cover.CoverageGap(reason=problem.reason, mend=problem.mend)
                    for problem in health.problems
                ),
                *await self._count_gaps(),
            ),
            lanes=self.build_proofs(facts),
            ledger=build_ledger(self._watches.ledger.last, shortcuts),
            shortcuts=shortcuts,
            items=tuple(render.build_pair(pair) for pair in page),
            next=following,
        )

    def _build_accounts(self, facts: Facts) -> tuple[ShortcutAccount, ...]:
        watch = self._watches.shortcuts
        return build_accounts(watch.book.accounts, watch.connections, facts.policies)

    async def _count_gaps(self) -> tuple[cover.CoverageGap, ...]:
        try:
            counters = await self._reconciler.read_counters()
        except SwitchError:
            return ()  # health already tells that the switch is out of reach
        return render.build_counter_gaps(counters, self._reconciler.machines())

    async def read_history(self, query: ask.HistoryQuery) -> cover.CoverageHistory:
        before = parse_cursor(query.cursor)
        wanted = {
            "before": before or None,
            "since": read_seconds(query.since),
            "until": read_seconds(query.until),
            "limit": query.limit + 1,
        }
        rows = await self._store.read(
            lambda db: find_rows(
                db,
                "SELECT * FROM coverage WHERE (:before IS NULL OR id < :before)"
                " AND (:since IS NULL OR at >= :since) AND (:until IS NULL OR at < :until)"
                " ORDER BY id DESC LIMIT :limit",
                wanted,
            )
        )
        page = rows[: query.limit]
        following = str(page[-1]["id"]) if len(rows) > query.limit else None
        return cover.CoverageHistory(items=tuple(map(_build_moment, page)), next=following)

    async def find_canaries(self, query: ask.CanaryQuery) -> cover.CanaryPage:
        before = parse_cursor(query.cursor)
        probes = await self._store.read(
            lambda db: find_probes(
                db, lane=query.lane, before_id=before or None, limit=query.limit + 1
            )
        )
        page = probes[: query.limit]
        following = str(page[-1].id) if len(probes) > query.limit else None
        return cover.CanaryPage(items=tuple(map(build_canary, page)), next=following)

    async def render_metrics(self) -> bytes:
        facts = self._build_facts()
        machines = self._reconciler.machines()
        coverage = await asyncio.to_thread(build_coverage, facts.policies, machines)
        try:
            counters = await self._reconciler.read_counters()
        except SwitchError:
            counters = None
        shortcuts = self._build_accounts(facts)
        return render_metrics(
            Snapshot(
                health=build_health(facts),
                summary=render.build_coverage_summary(coverage),
                proofs=self.build_proofs(facts),
                ledger=build_ledger(self._watches.ledger.last, shortcuts),
                shortcuts=shortcuts,
                uninspected=self._watches.failures.total,
                down_since=self._watches.failures.down,
                counters=counters,
                policies=facts.policies,
                ingest=facts.ingest,
                inspection=facts.inspection,
            )
        )

    async def keep_moment(self, run: LedgerRun) -> None:
        """After each run of the ledger: a row of the coverage over time, if anything is new in it."""
        facts = self._build_facts()
        machines = self._reconciler.machines()
        coverage = await asyncio.to_thread(build_coverage, facts.policies, machines)
        proved = {one.lane: one.passed is True for one in self._watches.canary.status()}
        shares = build_shares(render.build_coverage_summary(coverage), proved)
        ledger = build_ledger(run, self._build_accounts(facts))
        counts = {} if ledger is None else _count_ledger(ledger)
        if run.cause == "schedule" and facts.now - self._kept_at < MOMENT_SECONDS:
            return
        self._kept_at = facts.now

        def keep(db: Database) -> None:
            db.execute(
                "INSERT INTO coverage (at, revision, cause, shares, ledger) VALUES (?, ?, ?, ?, ?)",
                (facts.now, run.revision, run.cause, json.dumps(shares), json.dumps(counts)),
            )
            db.execute("DELETE FROM coverage WHERE at < ?", (facts.now - KEPT_SECONDS,))

        await self._store.write(keep)


def _names(pair: Any) -> Sequence[str]:
    ends = (pair.source, pair.destination)
    return tuple(name for end in ends for name in (end.name, end.vm_id))


def _count_ledger(ledger: cover.LedgerSummary) -> dict[str, Any]:
    kept = {"classes", "traced", "inspected", "direct", "denied", "bypassed", "violation_count"}
    taken = {"shortcut_packets", "shortcut_bytes"}
    return ledger.model_dump(by_alias=False, include={*kept, *taken, "fault", "seconds"})


def _build_moment(row: Mapping[str, Any]) -> cover.CoverageMoment:
    shares, ledger = json.loads(row["shares"]), json.loads(row["ledger"])
    return cover.CoverageMoment(
        at=build_time(row["at"]),
        revision=row["revision"],
        cause=row["cause"],
        pairs=shares["pairs"],
        inspected_percent=shares["inspected_percent"],
        partial_percent=shares["partial_percent"],
        direct_percent=shares["direct_percent"],
        denied_percent=shares["denied_percent"],
        blind_percent=shares["blind_percent"],
        lanes_proved=shares["lanes_proved"],
        lanes=shares["lanes"],
        traced=ledger.get("traced", 0),
        violations=ledger.get("violation_count", 0),
        shortcut_packets=ledger.get("shortcut_packets", 0),
    )
