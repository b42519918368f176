"""What is recorded beside the alerts: address holdings, events, policy revisions, flow records.

Each function takes the database, so that several fit into one transaction:
`await store.write(lambda db: record_holding(db, "10.0.0.5", "vm-1", now))`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from sqlite_utils import Database

from appliance.alerts.configuration import Part, keep_configuration
from appliance.alerts.eve import normalise_address
from appliance.alerts.model import FlowRecord, Revision
from appliance.alerts.rows import build_flow_row, insert_sql, parse_bookmark_row
from appliance.alerts.tail import Bookmark
from steering.model import Holding

REPEAT_SECONDS = 3600.0


def record_holding(db: Database, address: str, vm_id: str, at: float) -> bool:
    """``vm_id`` was seen with ``address``; ends the interval of who held it before.

    False when it was known already. A sighting older than what is recorded changes nothing. Raises
    ValueError when ``address`` is none.
    """
    address = normalise_address(address)
    current = find_rows(
        db, "SELECT * FROM holdings WHERE address = ? AND until IS NULL", (address,)
    )
    if current and (current[0]["vm_id"] == vm_id or at <= current[0]["since"]):
        return False
    if current:
        db.execute("UPDATE holdings SET until = ? WHERE id = ?", (at, current[0]["id"]))
    row = {"address": address, "vm_id": vm_id, "since": at}
    db.execute(insert_sql("holdings", row), row)
    return True


def end_holdings(db: Database, vm_id: str, at: float) -> int:
    """``vm_id`` has left the switch: it holds nothing from ``at`` on. How many it held."""
    return db.execute(
        "UPDATE holdings SET until = max(?, since) WHERE vm_id = ? AND until IS NULL", (at, vm_id)
    ).rowcount


def load_holdings(
    db: Database, *, until_after: float | None = None
) -> dict[str, tuple[Holding, ...]]:
    """By address, oldest first; with ``until_after`` only those that lasted beyond that time."""
    found: dict[str, list[Holding]] = {}
    for row in db.query(
        "SELECT address, vm_id, since, until FROM holdings"
        " WHERE until IS NULL OR :after IS NULL OR until > :after ORDER BY since, id",
        {"after": until_after},
    ):
        found.setdefault(str(row["address"]), []).append(Holding(**row))
    return {address: tuple(holdings) for address, holdings in found.items()}


def record_event(
    db: Database,
    at: float,
    kind: str,
    severity: str,
    message: str,
    *,
    subject: str = "",
    detail: Mapping[str, Any] | None = None,
    ended_at: float | None = None,
) -> int:
    """A new event; its id. ``severity`` is info, warning or error, ``kind`` stable and dotted."""
    row = {
        "at": at,
        "ended_at": ended_at,
        "kind": kind,
        "severity": severity,
        "subject": subject,
        "message": message,
        "detail": json.dumps(dict(detail or {})),
    }
    return int(db.execute(insert_sql("events", row), row).lastrowid or 0)


def end_event(db: Database, event_id: int, at: float) -> None:
    db.execute("UPDATE events SET ended_at = ? WHERE id = ?", (at, event_id))


def update_event(db: Database, event_id: int, message: str, detail: Mapping[str, Any]) -> None:
    """What is known of an event by now: of one that goes on, or whose counts come late."""
    db.execute(
        "UPDATE events SET message = ?, detail = ? WHERE id = ?",
        (message, json.dumps(dict(detail)), event_id),
    )


def find_open_events(db: Database, kind: str) -> list[dict[str, Any]]:
    """Events that began and did not end, oldest first: what a killed service left open."""
    rows = find_rows(
        db, "SELECT * FROM events WHERE kind = ? AND ended_at IS NULL ORDER BY id", (kind,)
    )
    return [{**row, "detail": _read_detail(row["detail"])} for row in rows]


def _read_detail(text: str) -> dict[str, Any]:
    """Of an event; empty where it was damaged: what goes on from it must go on."""
    try:
        detail = json.loads(text)
    except ValueError:
        return {}
    return detail if isinstance(detail, dict) else {}


def record_repeated(
    db: Database,
    at: float,
    kind: str,
    severity: str,
    message: str,
    *,
    subject: str = "",
    count: int = 1,
    detail: Mapping[str, Any] | None = None,
) -> int:
    """As `record_event`, but what repeats within an hour is one event whose `count` grows.

    Its `ended_at` is when it was last met, its detail that of the last time.
    """
    last = find_rows(
        db,
        "SELECT id, detail FROM events WHERE kind = ? AND subject = ? AND at > ?"
        " ORDER BY id DESC LIMIT 1",
        (kind, subject, at - REPEAT_SECONDS),
    )
    before = int(_read_detail(last[0]["detail"]).get("count", 1)) if last else 0
    counted = {**(detail or {}), "count": before + count}
    if not last:
        return record_event(
            db, at, kind, severity, message, subject=subject, detail=counted, ended_at=at
        )
    db.execute(
        "UPDATE events SET ended_at = ?, message = ?, detail = ? WHERE id = ?",
        (at, message, json.dumps(counted), last[0]["id"]),
    )
    return int(last[0]["id"])


def record_revision(db: Database, at: float, author: str, documents: object) -> int:
    """A new policy revision; its number, which grows by one with each."""
    row = {"at": at, "author": author, "documents": json.dumps(documents)}
    return int(db.execute(insert_sql("revisions", row), row).lastrowid or 0)


def record_applied(db: Database, number: int, at: float, report: object) -> None:
    """Revision ``number`` is on the switch since ``at``."""
    db.execute(
        "UPDATE revisions SET applied_at = ?, report = ? WHERE number = ?",
        (at, json.dumps(report), number),
    )
    keep_configuration(db, Part.POLICIES)


def load_revision(db: Database, number: int | None = None) -> Revision | None:
    """The revision of that number, or the newest; None when there is none."""
    rows = find_rows(
        db,
        "SELECT * FROM revisions WHERE number = coalesce(?, (SELECT max(number) FROM revisions))",
        (number,),
    )
    if not rows:
        return None
    row = rows[0]
    return Revision(
        number=row["number"],
        at=row["at"],
        author=row["author"],
        documents=json.loads(row["documents"]),
        applied_at=row["applied_at"],
        report=None if row["report"] is None else json.loads(row["report"]),
    )


def record_flows(db: Database, flows: Iterable[FlowRecord]) -> None:
    """Each as a new row; ids are given by the database."""
    for flow in flows:
        row = build_flow_row(flow)
        db.execute(insert_sql("flow_records", row), row)


def record_flow_counters(
    db: Database, since: float, until: float, switch_packets: int, recorded_packets: int
) -> None:
    """What the switch counted at the mirror and what the records tell of, over the same time."""
    row = {
        "since": since,
        "until": until,
        "switch_packets": switch_packets,
        "recorded_packets": recorded_packets,
    }
    db.execute(insert_sql("flow_counters", row), row)


def load_cursor(db: Database, name: str) -> int:
    """The id of the last alert that exporter ``name`` delivered; 0 when it delivered none."""
    rows = find_rows(db, "SELECT last_id FROM export_cursors WHERE name = ?", (name,))
    return int(rows[0]["last_id"]) if rows else 0


def load_bookmarks(db: Database, lane: str) -> tuple[list[dict[str, Any]], list[Bookmark]]:
    """The rows of a lane's EVE files (or of the spool of flow records), and what they say. Raises Damaged."""
    rows = find_rows(db, "SELECT * FROM bookmarks WHERE lane = ?", (lane,))
    return rows, list(map(parse_bookmark_row, rows))


def record_cursor(db: Database, name: str, last_id: int, at: float) -> None:
    db.execute(
        "INSERT INTO export_cursors (name, last_id, updated_at) VALUES (?, ?, ?)"
        " ON CONFLICT (name) DO UPDATE SET last_id = excluded.last_id,"
        " updated_at = excluded.updated_at",
        (name, last_id, at),
    )
    keep_configuration(db, Part.CURSORS)


def find_rows(
    db: Database, sql: str, values: tuple[Any, ...] | dict[str, Any]
) -> list[dict[str, Any]]:
    return [dict(row) for row in db.query(sql, values)]
