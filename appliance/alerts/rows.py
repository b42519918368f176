"""Between values and rows of the database, and the SQL that both directions need. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from appliance.alerts.model import (
    Alert,
    Endpoint,
    Event,
    FlowRecord,
    Http,
    Opener,
    Signature,
    Verdict,
)
from appliance.alerts.packing import expecting_damage
from appliance.alerts.tail import Bookmark, Fingerprint
from steering.model import Family

Row = dict[str, Any]


def insert_sql(table: str, row: Mapping[str, Any]) -> str:
    """`INSERT` with named parameters; table and columns are the program's own words."""
    names = ", ".join(f'"{name}"' for name in row)
    values = ", ".join(f":{name}" for name in row)
    return f'INSERT INTO "{table}" ({names}) VALUES ({values})'  # noqa: S608


def parse_alert_row(row: Mapping[str, Any]) -> Alert:
    """A row of the table that held alerts before they stood in partitions."""
    return Alert(
        id=row["id"],
        at=row["at"],
        stored_at=row["stored_at"],
        lane=row["lane"],
        profile=row["profile"],
        verdict=Verdict(row["verdict"]),
        source=_parse_endpoint("source", row),
        destination=_parse_endpoint("destination", row),
        protocol=row["protocol"],
        family=Family(row["family"]) if row["family"] else None,
        direction=row["direction"],
        opener=Opener(row["opener"]) if row["opener"] else None,
        signature=Signature(
            row["sid"], row["gid"], row["rev"], row["signature"], row["category"], row["severity"]
        ),
        cves=_parse_texts(row["cves"]),
        affected_products=_parse_texts(row["affected_products"]),
        policy=row["policy"],
        revision=row["revision"],
        app_proto=row["app_proto"],
        payload=row["payload"],
        payload_printable=row["payload_printable"],
        http=(
            None
            if row["http_method"] is None
            else Http(row["http_hostname"], row["http_url"], row["http_method"])
        ),
        community_id=row["community_id"],
        flow_id=row["flow_id"],
        reasons=_parse_texts(row["reasons"]),
        raw=row["raw"],
    )


def build_flow_row(flow: FlowRecord) -> Row:
    return {
        "first_seen": flow.first_seen,
        "last_seen": flow.last_seen,
        **build_endpoint("source", flow.source),
        **build_endpoint("destination", flow.destination),
        "protocol": flow.protocol,
        "application": flow.application,
        "category": flow.category,
        "packets_sent": flow.packets_sent,
        "bytes_sent": flow.bytes_sent,
        "packets_received": flow.packets_received,
        "bytes_received": flow.bytes_received,
        "treatment": flow.treatment,
        "policy": flow.policy,
    }


def parse_flow_row(row: Mapping[str, Any]) -> FlowRecord:
    return FlowRecord(
        first_seen=row["first_seen"],
        last_seen=row["last_seen"],
        source=_parse_endpoint("source", row),
        destination=_parse_endpoint("destination", row),
        protocol=row["protocol"],
        application=row["application"],
        category=row["category"],
        packets_sent=row["packets_sent"],
        bytes_sent=row["bytes_sent"],
        packets_received=row["packets_received"],
        bytes_received=row["bytes_received"],
        treatment=row["treatment"],
        policy=row["policy"],
        id=row["id"],
    )


def parse_event_row(row: Mapping[str, Any]) -> Event:
    return Event(
        id=row["id"],
        at=row["at"],
        ended_at=row["ended_at"],
        kind=row["kind"],
        severity=row["severity"],
        subject=row["subject"],
        message=row["message"],
        detail=json.loads(row["detail"]),
    )


def build_bookmark_row(bookmark: Bookmark) -> Row:
    return {
        "lane": bookmark.lane,
        "generation": bookmark.generation,
        "device": str(bookmark.device),
        "inode": str(bookmark.inode),
        "offset": bookmark.offset,
        "fingerprint_length": bookmark.fingerprint.length,
        "fingerprint": bookmark.fingerprint.digest,
    }


def parse_bookmark_row(row: Mapping[str, Any]) -> Bookmark:
    """Raises Damaged."""
    with expecting_damage():
        return Bookmark(
            lane=row["lane"],
            generation=row["generation"],
            device=int(row["device"]),
            inode=int(row["inode"]),
            offset=row["offset"],
            fingerprint=Fingerprint(row["fingerprint_length"], row["fingerprint"]),
        )


def build_endpoint(side: str, endpoint: Endpoint) -> Row:
    return {
        f"{side}_address": endpoint.address,
        f"{side}_port": endpoint.port,
        f"{side}_vm_id": endpoint.vm_id,
        f"{side}_vm": endpoint.vm,
        f"{side}_zones": json.dumps(endpoint.zones),
    }


def _parse_endpoint(side: str, row: Mapping[str, Any]) -> Endpoint:
    return Endpoint(
        address=row[f"{side}_address"],
        port=row[f"{side}_port"],
        vm_id=row[f"{side}_vm_id"],
        vm=row[f"{side}_vm"],
        zones=_parse_texts(row[f"{side}_zones"]),
    )


def _parse_texts(text: str) -> tuple[str, ...]:
    values: Sequence[str] = json.loads(text)
    return tuple(values)
