"""Questions about alerts, flows and events, answered page by page.

Alerts are asked of one partition after the other (`reading.py`), then of the table that held them
before; the SQL for that, and for all else, is built by pure functions.

A cursor is the id of the last item of a page, as text; the page after it begins at the next id.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Generic, TypeVar

from appliance.alerts.model import Alert, Event, FlowRecord, FlowSummary, SignatureCount
from appliance.alerts.partition import Partition
from appliance.alerts.reading import (
    count_signatures,
    find_alerts_in,
    find_last,
    read_alerts,
)
from appliance.alerts.rows import parse_alert_row, parse_event_row, parse_flow_row
from appliance.alerts.store import AlertView, Store
from appliance.alerts.wanted import AlertFilter as AlertFilter
from appliance.alerts.wanted import fold_text, read_address
from appliance.alerts.writing import HOUR
from steering.errors import FieldError, WrongInput

LIMIT = 1000
_CURSOR = re.compile(r"0|[1-9][0-9]{0,18}", re.ASCII)

T = TypeVar("T")
Query = tuple[str, dict[str, Any]]


@dataclass(frozen=True, slots=True)
class FlowFilter:
    """As `AlertFilter`, of flow records. ``since`` and ``until`` bound when they were last seen."""

    vm: str | None = None
    source_vm: str | None = None
    destination_vm: str | None = None
    address: str | None = None
    protocol: str | None = None
    port: int | None = None
    application: str | None = None
    treatment: str | None = None
    since: float | None = None
    until: float | None = None


@dataclass(frozen=True, slots=True)
class EventFilter:
    """``kind`` is exact, or all kinds under it when it ends in a dot (`eve.`)."""

    kind: str | None = None
    severity: str | None = None
    subject: str | None = None
    since: float | None = None
    until: float | None = None


@dataclass(frozen=True, slots=True)
class Page(Generic[T]):
    """``next_cursor`` is None when there is nothing after this page."""

    items: tuple[T, ...]
    next_cursor: str | None


async def find_alerts(
    store: Store,
    wanted: AlertFilter,
    cursor: str | None = None,
    *,
    limit: int = 100,
    ascending: bool = False,
) -> Page[Alert]:
    """Newest first unless ``ascending``. Raises WrongInput for a bad cursor or limit."""
    after = parse_cursor(cursor)
    check_limit(limit)
    found = await store.read_alerts(
        lambda view: _collect_alerts(view, wanted, after, limit + 1, ascending)
    )
    return Page(
        items=tuple(found[:limit]),
        next_cursor=str(found[limit - 1].id) if len(found) > limit else None,
    )


async def find_alert(store: Store, alert_id: int) -> Alert | None:
    def find(view: AlertView) -> Alert | None:
        for part in reversed(view.partitions):
            if part.base < alert_id:
                row = alert_id - part.base
                found = view.ask(part, partial(read_alerts, partition=part, rows=(row,)))
                return found[0] if found else None
        rows = view.ask_main(
            lambda db: list(db.query("SELECT * FROM alerts WHERE id = ?", (alert_id,)))
        )
        return parse_alert_row(rows[0]) if rows else None

    return await store.read_alerts(find)


async def find_latest_alert_id(store: Store) -> int:
    """The highest id that an alert was given; 0 when there was none yet."""

    def find(view: AlertView) -> int:
        newest = view.partitions[-1]
        return newest.base + (view.ask(newest, find_last) or 0)

    return await store.read_alerts(find)


async def find_alerts_after(
    store: Store, after: int, wanted: AlertFilter | None = None, *, limit: int = 200
) -> tuple[tuple[Alert, ...], int]:
    """The next alerts after the id ``after``, in the order of their ids, and how far was looked.

    The second is where to go on; it passes what the filter held back, so that is not read again.
    """
    newest = await find_latest_alert_id(store)
    page = await find_alerts(
        store, wanted or AlertFilter(), str(after), limit=limit, ascending=True
    )
    last = page.items[-1].id if page.items else after
    return page.items, last if page.next_cursor is not None else max(last, newest)


async def find_top_signatures(
    store: Store, since: float, until: float, *, limit: int = 100
) -> tuple[SignatureCount, ...]:
    """Which signatures fired most often, the most frequent first.

    Counted are whole hours (UTC): from the one that ``since`` is in to before the one that begins at or
    after ``until``. Raises WrongInput for a bad limit.
    """
    check_limit(limit)
    first, end = find_hours(since, until)
    rows: list[tuple[Any, ...]] = []

    def collect(view: AlertView) -> None:
        for part in view.partitions:
            if _may_have(part, first * HOUR, end * HOUR):
                rows.extend(view.ask(part, lambda db: count_signatures(db, first, end)) or ())
        rows.extend(
            view.ask_main(
                lambda db: db.execute(
                    "SELECT gid, sid, max(rev), signature, severity, count(*),"
                    " sum(verdict = 'blocked'), 0 FROM alerts WHERE at >= ? AND at < ?"
                    " GROUP BY gid, sid",
                    (first * HOUR, end * HOUR),
                ).fetchall()
            )
        )

    await store.read_alerts(collect)
    return add_up_signatures(rows)[:limit]


def find_hours(since: float, until: float) -> tuple[int, int]:
    """The hours (since the epoch) that are counted: the first, and the one after the last."""
    return int(since // HOUR), -int(-until // HOUR)


def add_up_signatures(rows: Iterable[tuple[Any, ...]]) -> tuple[SignatureCount, ...]:
    """Of one signature's revisions the text and severity of the newest are told."""
    found: dict[tuple[int, int], SignatureCount] = {}
    for gid, sid, rev, text, severity, alerts, blocked, _last in rows:
        one = SignatureCount(gid, sid, rev, text, severity, alerts, blocked)
        known = found.get((gid, sid))
        if known is not None:
            newer = one if one.rev >= known.rev else known
            one = replace(newer, alerts=known.alerts + alerts, blocked=known.blocked + blocked)
        found[gid, sid] = one
    return tuple(sorted(found.values(), key=lambda one: (-one.alerts, one.gid, one.sid)))


def _collect_alerts(
    view: AlertView, wanted: AlertFilter, after: int | None, limit: int, ascending: bool
) -> list[Alert]:
    """From one partition after the other until ``limit`` are found; the table of before is the oldest."""
    found: list[Alert] = []

    def ask_table() -> None:
        # What it holds has lower ids than all partitions.
        if not ascending or after is None or after < view.partitions[0].base:
            sql, values = alerts_sql(wanted, after, limit - len(found) - 1, ascending)
            rows = view.ask_main(lambda db: list(db.query(sql, values)))
            found.extend(map(parse_alert_row, rows))

    if ascending:
        ask_table()
    for part in view.partitions if ascending else reversed(view.partitions):
        if len(found) >= limit:
            return found
        if after is not None and not _may_follow(part, after, ascending):
            continue
        if not _may_have(part, wanted.since, wanted.until):
            continue
        found += (
            view.ask(
                part,
                partial(
                    find_alerts_in,
                    partition=part,
                    wanted=wanted,
                    after=after,
                    limit=limit - len(found),
                    ascending=ascending,
                ),
            )
            or ()
        )
    if not ascending and len(found) < limit:
        ask_table()
    return found


def _may_follow(part: Partition, after: int, ascending: bool) -> bool:
    """Whether the partition can have ids behind ``after``."""
    if not ascending:
        return after > part.base + 1
    return part.alerts is None or after < part.base + part.alerts


def _may_have(part: Partition, since: float | None, until: float | None) -> bool:
    """Whether an ended partition has alerts of that time; of the youngest nothing is known."""
    if part.oldest is None or part.newest is None:
        return part.ended is None
    return (since is None or part.newest >= since) and (until is None or part.oldest < until)


async def find_flows(
    store: Store, wanted: FlowFilter, cursor: str | None = None, *, limit: int = 100
) -> Page[FlowRecord]:
    """Single records, newest first. Raises WrongInput for a bad cursor or limit."""
    question = flows_sql(wanted, parse_cursor(cursor), check_limit(limit))
    return await _find_page(store, question, limit, parse_flow_row)


async def summarise_flows(
    store: Store, wanted: FlowFilter, *, limit: int = 100
) -> tuple[FlowSummary, ...]:
    """Records added up by VM pair, protocol, destination port and application; most bytes first."""
    rows = await _find_rows(store, flow_summary_sql(wanted, check_limit(limit)))
    return tuple(FlowSummary(**row) for row in rows)


async def find_events(
    store: Store, wanted: EventFilter, cursor: str | None = None, *, limit: int = 100
) -> Page[Event]:
    """Newest first. Raises WrongInput for a bad cursor or limit."""
    question = events_sql(wanted, parse_cursor(cursor), check_limit(limit))
    return await _find_page(store, question, limit, parse_event_row)


def alerts_sql(wanted: AlertFilter, after: int | None, limit: int, ascending: bool) -> Query:
    """Of the table of before, and what the partitions' answers are tested against.

    One row more than ``limit`` is asked for, to know whether there is another page.
    """
    where, values = _start_where("alerts", after, ascending)
    _match_vms(wanted.vm, wanted.source_vm, wanted.destination_vm, where, values)
    _match_address(wanted.address, where, values)
    if wanted.zone is not None:
        where.append(
            ":zone IN (SELECT value FROM json_each(source_zones)"
            " UNION ALL SELECT value FROM json_each(destination_zones))"
        )
        values["zone"] = wanted.zone
    if wanted.cve is not None:
        where.append(":cve IN (SELECT value FROM json_each(cves))")
        values["cve"] = wanted.cve.upper()
    if wanted.text is not None:
        where.append(
            "(instr(lower(signature), :text) OR instr(lower(coalesce(http_url, '')), :text)"
            " OR instr(lower(payload_printable), :text))"
        )
        values["text"] = fold_text(wanted.text)
    _match_equal(
        {
            "verdict": wanted.verdict and str(wanted.verdict),
            "sid": wanted.signature,
            "policy": wanted.policy,
            "lane": wanted.lane,
        },
        where,
        values,
    )
    _match_times("at", wanted.since, wanted.until, where, values)
    return _select("alerts", where, values, limit, ascending)


def flows_sql(wanted: FlowFilter, after: int | None, limit: int) -> Query:
    where, values = _start_where("flow_records", after, False)
    _match_flows(wanted, where, values)
    return _select("flow_records", where, values, limit, False)


def flow_summary_sql(wanted: FlowFilter, limit: int) -> Query:
    where: list[str] = ["1"]
    values: dict[str, Any] = {"limit": limit}
    _match_flows(wanted, where, values)
    sql = (
        "SELECT min(first_seen) AS first_seen, max(last_seen) AS last_seen,"  # noqa: S608
        " source_vm_id, source_vm, destination_vm_id, destination_vm,"
        " protocol, destination_port, application, count(*) AS connections,"
        " sum(packets_sent) AS packets_sent, sum(bytes_sent) AS bytes_sent,"
        " sum(packets_received) AS packets_received, sum(bytes_received) AS bytes_received"
        f" FROM flow_records WHERE {' AND '.join(where)}"
        " GROUP BY source_vm_id, destination_vm_id, protocol, destination_port, application"
        " ORDER BY sum(bytes_sent + bytes_received) DESC, max(id) DESC LIMIT :limit"
    )
    return sql, values


def events_sql(wanted: EventFilter, after: int | None, limit: int) -> Query:
    where, values = _start_where("events", after, False)
    if wanted.kind is not None and wanted.kind.endswith("."):
        where.append("substr(kind, 1, length(:kind)) = :kind")
        values["kind"] = wanted.kind
    else:
        _match_equal({"kind": wanted.kind}, where, values)
    _match_equal({"severity": wanted.severity, "subject": wanted.subject}, where, values)
    _match_times("at", wanted.since, wanted.until, where, values)
    return _select("events", where, values, limit, False)


def parse_cursor(cursor: str | None) -> int | None:
    """Raises WrongInput when ``cursor`` is none that a page gave."""
    if cursor is None:
        return None
    if not _CURSOR.fullmatch(cursor) or int(cursor) >= 2**63:
        raise WrongInput([FieldError("cursor", "is not one that a page gave as its next")])
    return int(cursor)


def check_limit(limit: int) -> int:
    """Raises WrongInput unless 1 <= limit <= `LIMIT`."""
    if not 1 <= limit <= LIMIT:
        raise WrongInput([FieldError("limit", f"must be 1 to {LIMIT}")])
    return limit


async def _find_rows(store: Store, question: Query) -> list[dict[str, Any]]:
    sql, values = question
    return await store.read(lambda db: list(db.query(sql, values)))


async def _find_page(
    store: Store, question: Query, limit: int, parse: Callable[[dict[str, Any]], T]
) -> Page[T]:
    rows = await _find_rows(store, question)
    more = len(rows) > limit
    return Page(
        items=tuple(parse(row) for row in rows[:limit]),
        next_cursor=str(rows[limit - 1]["id"]) if more else None,
    )


def _start_where(
    table: str, after: int | None, ascending: bool
) -> tuple[list[str], dict[str, Any]]:
    if after is None:
        return ["1"], {}
    return [f"{table}.id {'>' if ascending else '<'} :after"], {"after": after}


def _select(
    table: str, where: list[str], values: dict[str, Any], limit: int, ascending: bool
) -> Query:
    order = "ASC" if ascending else "DESC"
    sql = (
        f"SELECT * FROM {table} WHERE {' AND '.join(where)}"  # noqa: S608
        f" ORDER BY id {order} LIMIT :limit"
    )
    return sql, {**values, "limit": limit + 1}


def _match_flows(wanted: FlowFilter, where: list[str], values: dict[str, Any]) -> None:
    _match_vms(wanted.vm, wanted.source_vm, wanted.destination_vm, where, values)
    _match_address(wanted.address, where, values)
    _match_equal(
        {
            "protocol": wanted.protocol,
            "destination_port": wanted.port,
            "application": wanted.application,
            "treatment": wanted.treatment,
        },
        where,
        values,
    )
    _match_times("last_seen", wanted.since, wanted.until, where, values)


def _match_vms(
    either: str | None,
    source: str | None,
    destination: str | None,
    where: list[str],
    values: dict[str, Any],
) -> None:
    if either is not None:
        where.append(
            "(:vm IN (source_vm_id, source_vm) OR :vm IN (destination_vm_id, destination_vm))"
        )
        values["vm"] = either
    for side, name in (("source", source), ("destination", destination)):
        if name is not None:
            where.append(f":{side}_vm IN ({side}_vm_id, {side}_vm)")
            values[f"{side}_vm"] = name


def _match_address(address: str | None, where: list[str], values: dict[str, Any]) -> None:
    if address is None:
        return
    values["address"] = read_address(address)
    where.append(":address IN (source_address, destination_address)")


def _match_equal(wanted: dict[str, Any], where: list[str], values: dict[str, Any]) -> None:
    for column, value in wanted.items():
        if value is not None:
            where.append(f"{column} = :{column}")
            values[column] = value


def _match_times(
    column: str,
    since: float | None,
    until: float | None,
    where: list[str],
    values: dict[str, Any],
) -> None:
    if since is not None:
        where.append(f"{column} >= :since")
        values["since"] = since
    if until is not None:
        where.append(f"{column} < :until")
        values["until"] = until
