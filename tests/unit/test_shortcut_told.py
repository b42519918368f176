"""Nothing that may leave inspection is told as inspected and no more: explain, ledger, health, coverage's lines."""

from __future__ import annotations

from dataclasses import replace

import pytest

from appliance.api.shortcuts import ShortcutAccount
from appliance.assurance.ledger import LedgerRun
from appliance.commands.proof import _describe_ledger
from appliance.management.health import Facts, build_health
from appliance.management.proof import build_ledger
from appliance.management.render import build_explanation, build_pair
from appliance.rules.model import RulesState
from steering.change import SwitchStatus
from steering.coverage import build_coverage
from steering.decide import Connection, resolve_machines
from steering.explain import explain
from steering.ledger import Ledger
from steering.model import Family, Lane, PolicySet, Protocol, Trigger
from tests.support.shortcut_world import build_policies
from tests.support.worlds import LANES, THREE_LEGGED, build_port

POLICIES = build_policies()
MACHINES = resolve_machines(POLICIES, [build_port(number) for number in (1, 2, 3)])
ACCOUNTS = tuple(
    ShortcutAccount(
        policy=policy,
        reason=Trigger.ONE_MEGABYTE,
        limit=limit,
        open=1,
        connections=4,
        returned=2,
        packets=300,
        bytes=40_000,
    )
    for policy, limit in (("backup", 20), ("withdrawn", None))
)


@pytest.mark.parametrize(
    ("protocol", "lanes", "until"),
    [
        (Protocol.TCP, THREE_LEGGED, Trigger.ONE_MEGABYTE),
        (Protocol.UDP, THREE_LEGGED, None),
        (Protocol.TCP, LANES, None),  # without a third leg nothing takes one
    ],
)
def test_explain_says_until_when(
    protocol: Protocol, lanes: tuple[Lane, ...], until: Trigger | None
) -> None:
    connection = Connection(Family.IPV4, protocol, 873)
    found = explain(POLICIES, MACHINES, lanes, "vm-1", "vm-2", connection)
    told = build_explanation(found, inspecting=True)
    assert told.inspected
    assert told.inspected_until == until
    sentence = "once the engine lets it go (after 1MB), the switch passes the rest uninspected"
    assert (sentence in told.reason) is (until is not None)


def test_coverage_says_until_when_and_is_partial() -> None:
    coverage = build_coverage(POLICIES, MACHINES)
    pair = next(
        build_pair(one)
        for one in coverage.pairs
        if (one.source.vm_id, one.destination.vm_id) == ("vm-1", "vm-2")
    )
    assert (pair.status, pair.parts[0].inspected_until) == ("partial", "1MB")
    assert "TCP by policy backup leaves inspection after 1MB" in pair.reason
    assert coverage.summary.inspected.count == 0


def build_run() -> LedgerRun:
    ledger = Ledger(
        at=1.0, classes=4, classes_traced=4, pairs=2, pairs_traced=2, traced=9, inspected=9,
        direct=0, denied=0, bypassed=0, blocked=0, violation_count=0, seconds=0.1, run=1,
        violations=(), gap_count=0, gaps=(), foreign_count=0, foreign=(),
    )  # fmt: skip
    return LedgerRun(3, "schedule", ledger)


def test_the_ledger_tells_what_its_traces_can_not_show() -> None:
    summary = build_ledger(build_run(), ACCOUNTS)
    assert summary is not None
    assert (summary.inspected, summary.shortcut_policies) == (9, 1)
    assert (summary.shortcut_connections, summary.shortcut_packets) == (8, 600)
    line = _describe_ledger(summary)
    assert (
        "not traced: 8 connections that took a shortcut (600 packets, 80000 bytes uninspected)"
        in line
    )
    plain = build_ledger(build_run(), ())
    assert plain is not None
    assert "shortcut" not in _describe_ledger(plain)
    assert "9 traces of 4 of 4 classes" in _describe_ledger(plain)
    assert not plain.by_copy
    run = build_run()
    assert run.ledger is not None
    copied = build_ledger(replace(run, ledger=replace(run.ledger, by_copy=True)), ())
    assert copied is not None
    assert copied.model_dump(by_alias=True)["byCopy"] is True
    assert "9 traces in a copy of the switch of 4 of 4 classes" in _describe_ledger(copied)
    untraced = build_ledger(LedgerRun(3, "schedule", None, "no socket"), ACCOUNTS)
    assert untraced is not None
    assert untraced.shortcut_bytes == 80_000


def test_what_could_not_be_sent_back_yet_degrades_health() -> None:
    switch = SwitchStatus(True, "", 0.0, "secure", "3.5.0", "netdev", ())
    facts = Facts(
        name="hairpin", version="1", now=10.0, started_at=1.0, revision=1, policies=PolicySet(),
        switch=switch, lanes=(), forwarding={}, inspection=None, rules=RulesState((), None), ingest=(),
        exporters=(), shortcut_faults=("connections are still to be sent back: lost",),
    )  # fmt: skip
    health = build_health(facts)
    assert health.status == "degraded"
    (problem,) = health.problems
    assert problem.reason == "connections are still to be sent back: lost"
    assert problem.mend
