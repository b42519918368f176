"""Alerts put into a store without an EVE file: into its partitions, or into the table of before."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import zstandard
from sqlite_utils import Database

from appliance.alerts.attribute import Attributed
from appliance.alerts.attributor import shorten
from appliance.alerts.eve import parse_event
from appliance.alerts.model import EveAlert
from appliance.alerts.partitions import AlertWrite
from appliance.alerts.quick import sight
from appliance.alerts.rows import Row, build_endpoint, insert_sql
from appliance.alerts.schema import open_tables
from appliance.alerts.store import find_directory
from appliance.alerts.writing import Origin
from steering.model import Lane

Stored = tuple[EveAlert, Attributed, Lane]


def store_alerts(write: AlertWrite, stored: Iterable[Stored], stored_at: float = 5.0) -> int:
    """One batch each; the newest id."""
    for alert, attributed, lane in stored:
        origin = Origin(lane, 1, write.base + write.writer.last, stored_at)
        write.writer.write([(sight(alert), shorten(attributed))], origin)
    return write.base + write.writer.last


def fill_table(path: Path, stored: Iterable[Stored]) -> None:
    """A database as it was before there were partitions, with these alerts in it."""
    db = Database(path)
    open_tables(db, 0.0)
    with db.atomic():
        for number, (alert, attributed, lane) in enumerate(stored):
            row = build_table_row(alert, attributed, lane, 5.0, (1, number, 0))
            db.execute(insert_sql("alerts", row), row)
    db.close()


def read_stored(database: Path) -> list[EveAlert]:
    """Every alert of the partitions beside ``database``, oldest first, by a program of its own."""
    found = []
    for path in sorted(find_directory(database).glob("alerts-*.db")):
        db = Database(path)
        try:
            for (data,) in db.execute("SELECT data FROM chunks ORDER BY first").fetchall():
                for line in zstandard.ZstdDecompressor().decompress(data).split(b"\n"):
                    event = parse_event(line)
                    assert isinstance(event, EveAlert)
                    found.append(event)
        finally:
            db.close()
    return found


def check_stores(database: Path) -> str:
    """What `PRAGMA integrity_check` says of all the files, `ok` if all is well."""
    said = {}
    for path in (database, *sorted(find_directory(database).glob("alerts-*.db"))):
        db = Database(path)
        try:
            said[path.name] = "; ".join(
                str(row[0]) for row in db.execute("PRAGMA integrity_check").fetchall()
            )
        finally:
            db.close()
    wrong = [f"{name}: {text}" for name, text in said.items() if text != "ok"]
    return "; ".join(wrong) or "ok"


def build_table_row(
    alert: EveAlert,
    attributed: Attributed,
    lane: Lane,
    stored_at: float,
    origin: tuple[int, int, int],
) -> Row:
    """As it was written before. ``origin``: the file's generation, the line's offset, the part of it."""
    generation, offset, part = origin
    return {
        "at": alert.at,
        "stored_at": stored_at,
        "lane": lane.name,
        "profile": str(lane.profile),
        "verdict": str(alert.verdict),
        **build_endpoint("source", attributed.source),
        **build_endpoint("destination", attributed.destination),
        "protocol": alert.protocol,
        "family": None if alert.family is None else str(alert.family),
        "direction": alert.direction,
        "opener": None if attributed.opener is None else str(attributed.opener),
        "sid": alert.signature.sid,
        "gid": alert.signature.gid,
        "rev": alert.signature.rev,
        "signature": alert.signature.text,
        "category": alert.signature.category,
        "severity": alert.signature.severity,
        "cves": json.dumps(alert.cves),
        "affected_products": json.dumps(alert.affected_products),
        "policy": attributed.policy,
        "revision": attributed.revision,
        "app_proto": alert.app_proto,
        "payload": alert.payload,
        "payload_printable": alert.payload_printable,
        "http_hostname": alert.http.hostname if alert.http else None,
        "http_url": alert.http.url if alert.http else None,
        "http_method": alert.http.method if alert.http else None,
        "community_id": alert.community_id,
        "flow_id": alert.flow_id,
        "reasons": json.dumps(attributed.reasons),
        "raw": alert.raw,
        "file_generation": generation,
        "file_offset": offset,
        "file_part": part,
    }
