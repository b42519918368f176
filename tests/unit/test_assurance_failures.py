"""Each packet that a failure policy let through is told once: in its failure's event, or in one of its own."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from appliance.alerts.history import find_rows
from appliance.alerts.store import Store
from appliance.assurance import failures
from appliance.assurance.failures import (
    Concerned,
    FailureWatch,
    Uninspected,
    build_detail,
    render_failure,
)
from steering.counters import Count, Counters, Tally, add_tallies
from steering.events import LaneChanged

CONCERNED = Concerned(open=("web-to-app",), closed=("app-to-db",), vms=("app-1", "web-1"))


@dataclass
class Switch:
    """What a switch would count; a real one can't be made to count at a moment's notice."""

    bypassed: int = 0
    blocked: int = 0
    fails: bool = False
    readings: list[tuple[int, int]] = field(default_factory=list)

    async def read(self) -> Counters:
        self.readings.append((self.bypassed, self.blocked))
        return add_tallies(
            (
                Tally("group/1", "bypassed", "prevent", Count(self.bypassed, self.bypassed * 100)),
                Tally("group/2", "blocked", "prevent", Count(self.blocked, self.blocked * 100)),
            ),
            (),
            ("prevent",),
        )


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[Store]:
    store = Store(tmp_path / "hairpin.db")
    yield store
    store.close()


async def read_events(store: Store) -> list[dict[str, Any]]:
    rows = await store.read(lambda db: find_rows(db, "SELECT * FROM events ORDER BY id", ()))
    return [{**row, "detail": json.loads(row["detail"])} for row in rows]


def build_watch(store: Store, switch: Switch) -> FailureWatch:
    return FailureWatch(store, switch.read, lambda _: CONCERNED, lambda: 1000.0)


async def begin(watch: FailureWatch) -> None:
    """As `run` does, without its loop."""
    await watch._load()
    watch._ready.set()
    await watch._look()


async def test_a_failure_has_its_counts_when_it_is_over(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "SETTLE_SECONDS", 0.0)
    switch = Switch()
    watch = build_watch(store, switch)
    await begin(watch)
    await watch.take(LaneChanged(1001.0, "prevent", False))
    switch.bypassed, switch.blocked = 40, 3
    await watch._look()
    (event,) = await read_events(store)
    assert (event["kind"], event["at"], event["ended_at"]) == ("lane.down", 1001.0, None)
    await watch.take(LaneChanged(1002.5, "prevent", True))
    switch.bypassed = 57
    await watch._look()
    (event,) = await read_events(store)
    assert event["ended_at"] == 1002.5
    assert event["detail"] == {
        "lane": "prevent",
        "packets": 57,
        "bytes": 5700,
        "blockedPackets": 3,
        "policies": {"open": ["web-to-app"], "closed": ["app-to-db"]},
        "vms": ["app-1", "web-1"],
    }
    assert event["message"] == (
        "lane prevent was down: its policies fail as onFailure says; 57 packets (5700 bytes) passed "
        "uninspected; 3 were held back"
    )
    assert watch.total["prevent"] == Uninspected(57, 5700, 3)
    assert dict(watch.down) == {}


async def test_what_passed_while_nobody_watched_is_told_afterwards_and_once(store: Store) -> None:
    switch = Switch(bypassed=5)
    await begin(build_watch(store, switch))
    (first,) = await read_events(store)
    assert (first["kind"], first["detail"]["packets"]) == ("lane.bypassed", 5)
    switch.bypassed = 30
    for _ in range(3):  # each is the watch of a service that was started anew
        await begin(build_watch(store, switch))
    events = await read_events(store)
    assert [event["detail"]["packets"] for event in events] == [5, 25]
    assert events[1]["ended_at"] is not None


async def test_a_switch_that_counts_anew_is_no_growth_less_than_nothing(store: Store) -> None:
    switch = Switch()
    watch = build_watch(store, switch)
    await begin(watch)
    for bypassed in (10, 10, 4, 6):
        switch.bypassed = bypassed
        await watch._look()
    events = await read_events(store)
    assert [event["detail"]["packets"] for event in events] == [10, 4, 2]
    assert watch.total["prevent"].packets == 16


async def test_a_failure_that_outlives_the_service_goes_on_in_its_event(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(failures, "SETTLE_SECONDS", 0.0)
    switch = Switch()
    watch = build_watch(store, switch)
    await begin(watch)
    await watch.take(LaneChanged(1001.0, "prevent", False))
    switch.bypassed = 10
    await watch._look()
    switch.bypassed = 25
    after = build_watch(store, switch)
    await begin(after)
    await after.take(LaneChanged(1010.0, "prevent", True))
    await after._look()
    (event,) = await read_events(store)
    assert (event["detail"]["packets"], event["ended_at"]) == (25, 1010.0)


def test_the_sentence_says_when_nothing_passed() -> None:
    closed = Concerned(closed=("p",))
    assert render_failure("prevent", closed, Uninspected(blocked=9), over=True) == (
        "lane prevent was down: its policies fail as onFailure says; 9 were held back"
    )
    assert render_failure("prevent", CONCERNED, Uninspected(), over=False) == (
        "lane prevent is down: its policies fail as onFailure says; nothing passed uninspected"
    )
    assert build_detail("prevent", closed, Uninspected())["policies"] == {
        "open": [],
        "closed": ["p"],
    }
