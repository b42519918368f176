"""Filters, pages and the records beside the alerts, on a real database."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlite_utils import Database

from appliance.alerts.attribute import Attributed
from appliance.alerts.eve import parse_event
from appliance.alerts.history import (
    end_event,
    end_holdings,
    load_cursor,
    load_holdings,
    load_revision,
    record_applied,
    record_cursor,
    record_event,
    record_flow_counters,
    record_flows,
    record_holding,
    record_repeated,
    record_revision,
)
from appliance.alerts.model import Alert, Endpoint, EveAlert, FlowRecord, Opener, Verdict
from appliance.alerts.partitions import Limits
from appliance.alerts.query import (
    AlertFilter,
    EventFilter,
    FlowFilter,
    alerts_sql,
    find_alert,
    find_alerts,
    find_events,
    find_flows,
    find_latest_alert_id,
    summarise_flows,
)
from appliance.alerts.schema import open_tables
from appliance.alerts.store import Store
from steering.errors import WrongInput
from steering.model import Holding, Lane
from tests.support.alerts import fill_table, store_alerts
from tests.support.eve import render_eve
from tests.support.worlds import LANES

WEB = Endpoint("10.9.0.1", 40000, "vm-1", "web1", ("web", "edge"))
APP = Endpoint("10.9.0.2", 80, "vm-2", "app1", ("app",))
STRANGER = Endpoint("fd00::9", 9)
PLAIN = Attributed(WEB, APP, Opener.SOURCE, "web-to-app", 7, ())


def parse(**changes: object) -> EveAlert:
    event = parse_event(render_eve(**changes))
    assert isinstance(event, EveAlert)
    return event


ALERT = parse()
STORED: tuple[tuple[EveAlert, Attributed, Lane], ...] = (
    (ALERT, PLAIN, LANES[0]),
    (replace(ALERT, at=ALERT.at + 10, verdict=Verdict.ALLOWED), PLAIN, LANES[1]),
    (
        replace(
            ALERT,
            at=ALERT.at + 20,
            source_address=APP.address,
            source_port=APP.port,
            destination_address=WEB.address,
            destination_port=WEB.port,
        ),
        replace(PLAIN, source=APP, destination=WEB),
        LANES[0],
    ),
    (
        replace(
            ALERT,
            at=ALERT.at + 30,
            source_address=STRANGER.address,
            source_port=STRANGER.port,
            cves=(),
            http=None,
            signature=replace(ALERT.signature, sid=2, text="Shellshock"),
        ),
        replace(PLAIN, source=STRANGER, policy=None, revision=None, reasons=("why",)),
        LANES[0],
    ),
)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store(tmp_path / "hairpin.db")
    yield store
    store.close()


@pytest.fixture(params=["one partition", "a partition each", "the table of before", "half in each"])
async def filled(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Store]:
    """The four alerts, wherever they stand."""
    path = tmp_path / "hairpin.db"
    before = {"the table of before": 4, "half in each": 2}.get(request.param, 0)
    fill_table(path, STORED[:before])
    store = Store(path, Limits(alerts=1) if request.param == "a partition each" else Limits())
    for one in STORED[before:]:
        await store.write_alerts(partial(store_alerts, stored=[one]))
    yield store
    store.close()


async def find_ids(store: Store, wanted: AlertFilter) -> list[int]:
    return [alert.id for alert in (await find_alerts(store, wanted)).items]


@pytest.mark.parametrize(
    ("wanted", "expected"),
    [
        (AlertFilter(), [4, 3, 2, 1]),
        (AlertFilter(vm="web1"), [3, 2, 1]),
        (AlertFilter(vm="vm-2"), [4, 3, 2, 1]),
        (AlertFilter(source_vm="web1"), [2, 1]),
        (AlertFilter(destination_vm="vm-1"), [3]),
        (AlertFilter(source_vm="web1", destination_vm="web1"), []),
        (AlertFilter(address="fd00:0::9"), [4]),
        (AlertFilter(zone="edge"), [3, 2, 1]),
        (AlertFilter(zone="edg"), []),
        (AlertFilter(verdict=Verdict.ALLOWED), [2]),
        (AlertFilter(signature=2), [4]),
        (AlertFilter(cve="cve-2021-44228"), [3, 2, 1]),
        (AlertFilter(cve="CVE-2021-4422"), []),
        (AlertFilter(policy="web-to-app"), [3, 2, 1]),
        (AlertFilter(lane="detect"), [2]),
        (AlertFilter(since=ALERT.at + 10, until=ALERT.at + 30), [3, 2]),
        (AlertFilter(text="SHELL"), [4]),
        (AlertFilter(text="jndi:"), [4, 3, 2, 1]),
        (AlertFilter(text="%"), []),
        (AlertFilter(vm="web1' OR 1=1 --"), []),
    ],
)
async def test_filters(filled: Store, wanted: AlertFilter, expected: list[int]) -> None:
    assert await find_ids(filled, wanted) == expected


async def test_what_is_read_is_what_was_stored(filled: Store) -> None:
    alert = await find_alert(filled, 1)
    assert isinstance(alert, Alert)
    assert (alert.source, alert.destination) == (WEB, APP)
    for name in ("at", "signature", "cves", "affected_products", "http", "payload", "flow_id"):
        assert getattr(alert, name) == getattr(ALERT, name), name
    assert json.loads(alert.raw)["alert"]["signature_id"] == 1
    other = await find_alert(filled, 4)
    assert other is not None
    assert (other.source, other.http, other.policy, other.reasons) == (
        STRANGER,
        None,
        None,
        ("why",),
    )
    assert await find_alert(filled, 99) is None
    assert await find_latest_alert_id(filled) == 4


@pytest.mark.parametrize("ascending", [True, False])
async def test_pages_give_each_alert_once(filled: Store, ascending: bool) -> None:
    seen: list[int] = []
    cursor: str | None = None
    while True:
        page = await find_alerts(filled, AlertFilter(), cursor, limit=3, ascending=ascending)
        seen += [alert.id for alert in page.items]
        if page.next_cursor is None:
            break
        cursor = page.next_cursor
    assert seen == ([1, 2, 3, 4] if ascending else [4, 3, 2, 1])


@pytest.mark.parametrize("cursor", ["", "x", "-1", "01", "1 OR 1", "9" * 19, "\uff11"])
async def test_a_cursor_that_no_page_gave_is_refused(store: Store, cursor: str) -> None:
    with pytest.raises(WrongInput, match="cursor"):
        await find_alerts(store, AlertFilter(), cursor)


@pytest.mark.parametrize("limit", [0, -1, 1001])
async def test_a_limit_out_of_bounds_is_refused(store: Store, limit: int) -> None:
    with pytest.raises(WrongInput, match="limit"):
        await find_alerts(store, AlertFilter(), limit=limit)


@given(st.text(max_size=30))
def test_values_are_bound_never_written_into_the_sql(text: str) -> None:
    sql, values = alerts_sql(AlertFilter(vm=text, policy=text, text=text), None, 10, False)
    plain, _ = alerts_sql(AlertFilter(vm="a", policy="a", text="a"), None, 10, False)
    assert sql == plain
    assert values["vm"] == text


async def test_an_address_that_changes_hands_ends_the_former_interval(store: Store) -> None:
    def see(db: Database) -> list[bool]:
        return [
            record_holding(db, "FD00::0:5", "vm-1", 10.0),
            record_holding(db, "fd00::5", "vm-1", 20.0),
            record_holding(db, "fd00::5", "vm-2", 30.0),
            record_holding(db, "fd00::5", "vm-1", 25.0),  # late news of the past
            record_holding(db, "10.0.0.1", "vm-2", 31.0),
        ]

    assert await store.write(see) == [True, False, True, False, True]
    await store.write(lambda db: end_holdings(db, "vm-2", 40.0))
    holdings = await store.read(load_holdings)
    assert holdings["fd00::5"] == (
        Holding("fd00::5", "vm-1", 10.0, 30.0),
        Holding("fd00::5", "vm-2", 30.0, 40.0),
    )
    assert holdings["10.0.0.1"] == (Holding("10.0.0.1", "vm-2", 31.0, 40.0),)
    recent = await store.read(lambda db: load_holdings(db, until_after=35.0))
    assert [holding.vm_id for holding in recent["fd00::5"]] == ["vm-2"]
    with pytest.raises(ValueError, match="address"):
        await store.write(lambda db: record_holding(db, "nowhere", "vm-1", 1.0))


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 50)), max_size=12))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_intervals_of_one_address_never_overlap(sightings: list[tuple[str, int]]) -> None:
    db = Database(memory=True)
    open_tables(db, 0.0)
    for vm_id, at in sightings:
        record_holding(db, "10.0.0.1", vm_id, float(at))
    held = load_holdings(db).get("10.0.0.1", ())
    for earlier, later in pairwise(held):
        assert earlier.until is not None
        assert earlier.until <= later.since
    assert sum(holding.until is None for holding in held) == bool(sightings)


async def test_events_are_found_by_kind_and_what_repeats_is_one_event(store: Store) -> None:
    def record(db: Database) -> None:
        first = record_event(db, 1.0, "lane.down", "error", "gone", subject="prevent")
        end_event(db, first, 3.0)
        for at in (10.0, 20.0, 9000.0):
            record_repeated(db, at, "eve.malformed", "warning", "bad", subject="prevent", count=2)
        record_repeated(db, 21.0, "eve.malformed", "warning", "bad", subject="detect")

    await store.write(record)
    everything = (await find_events(store, EventFilter())).items
    assert [(e.kind, e.subject, e.detail.get("count")) for e in everything] == [
        ("eve.malformed", "detect", 1),
        ("eve.malformed", "prevent", 2),
        ("eve.malformed", "prevent", 4),
        ("lane.down", "prevent", None),
    ]
    assert everything[-1].ended_at == 3.0
    assert len((await find_events(store, EventFilter(kind="eve."))).items) == 3
    assert len((await find_events(store, EventFilter(kind="eve"))).items) == 0
    assert len((await find_events(store, EventFilter(severity="error"))).items) == 1
    page = await find_events(store, EventFilter(), limit=3)
    assert len((await find_events(store, EventFilter(), page.next_cursor)).items) == 1


async def test_flows_are_listed_and_added_up(store: Store) -> None:
    flow = FlowRecord(1.0, 2.0, WEB, APP, "tcp", "HTTP", "Web", 3, 300, 2, 900, "inspect", "p")
    others = [
        replace(flow, first_seen=0.5, source=replace(WEB, port=40001)),
        replace(flow, source=STRANGER, bytes_sent=10_000, application="DNS", treatment=None),
    ]
    await store.write(lambda db: record_flows(db, [flow, *others]))
    await store.write(lambda db: record_flow_counters(db, 0.0, 2.0, 100, 90))
    listed = (await find_flows(store, FlowFilter(vm="web1"))).items
    assert [found.id for found in listed] == [2, 1]
    assert replace(listed[1], id=0) == flow
    assert len((await find_flows(store, FlowFilter(treatment="inspect", port=80))).items) == 2
    biggest, pair = await summarise_flows(store, FlowFilter())
    assert (biggest.application, biggest.connections, biggest.source_vm) == ("DNS", 1, None)
    assert (pair.source_vm, pair.connections, pair.bytes_sent, pair.bytes_received) == (
        "web1",
        2,
        600,
        1800,
    )
    assert (pair.first_seen, pair.last_seen, pair.destination_port) == (0.5, 2.0, 80)


async def test_revisions_grow_by_one_and_carry_their_report(store: Store) -> None:
    assert await store.read(load_revision) is None
    numbers = [
        await store.write(lambda db, n=n: record_revision(db, 1.0, "me", [{"kind": n}]))
        for n in "ab"
    ]
    await store.write(lambda db: record_applied(db, 1, 2.0, {"changed": 3}))
    assert numbers == [1, 2]
    newest, first = await store.read(load_revision), await store.read(lambda d: load_revision(d, 1))
    assert newest is not None
    assert first is not None
    assert (newest.number, newest.documents, newest.applied_at) == (2, [{"kind": "b"}], None)
    assert (first.applied_at, first.report) == (2.0, {"changed": 3})


async def test_cursors_are_kept_by_name(store: Store) -> None:
    await store.write(lambda db: record_cursor(db, "siem", 5, 1.0))
    await store.write(lambda db: record_cursor(db, "siem", 9, 2.0))
    assert await store.read(lambda db: load_cursor(db, "siem")) == 9
    assert await store.read(lambda db: load_cursor(db, "other")) == 0
