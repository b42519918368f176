"""An EVE line -> a checked, bounded alert. Pure; every byte of the line is hostile.

Suricata 7 user guide, "Eve JSON Output" and "Eve JSON Format".
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from ipaddress import ip_address
from typing import Any

from appliance.alerts.excerpt import append_segment, find_segment
from appliance.alerts.model import EveAlert, Http, Malformed, Opener, Rule, Signature, Verdict
from steering.model import Family

LINE_LIMIT = 2**20
"""Bytes of a line, its newline included; a longer one is no event."""

RAW_LIMIT = 32 * 1024
PAYLOAD_LIMIT = 1024
_TEXT_LIMIT = 512
URL_LIMIT = 2048
_LIST_LIMIT = 16

# Dropped first to last until an event fits: what is bulky, and worth least beside the rest.
BULKY = (
    "packet",
    "http.http_response_body",
    "http.http_response_body_printable",
    "http.http_request_body",
    "http.http_request_body_printable",
    "payload",
    "http.response_headers",
    "http.request_headers",
    "files",
    "smb",
    "dns",
    "tls",
    "email",
    "payload_printable",
    "http",
    "alert.metadata",
)

_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_UNSTORABLE = re.compile(r"[\x00\ud800-\udfff]")
_CVE = re.compile(r"(?<![0-9])((?:19|20)[0-9]{2})[-_]([0-9]{4,7})(?![0-9])")
_EVENT_START = b'{"timestamp":'
_PROTOCOLS = {"ipv6-icmp": "icmp", "icmpv6": "icmp"}
_WORD = re.compile(r"[^a-z0-9._-]")


class _Wrong(Exception):
    pass


@dataclass(frozen=True, slots=True)
class _Packet:
    source: str | None
    destination: str | None
    source_port: int | None
    destination_port: int | None


def parse_event(line: bytes) -> EveAlert | Malformed | None:
    """The alert that ``line`` (without its newline) holds; None for any other kind of event."""
    if len(line) >= LINE_LIMIT:
        return Malformed(f"longer than {LINE_LIMIT} bytes", _find_excerpt(line))
    try:
        text = line.decode(errors="replace")
        event = load_event(text)
    except ValueError as fault:
        return Malformed(f"not JSON: {bound_text(str(fault), 120)}", _find_excerpt(line))
    kind = event.get("event_type")
    if not isinstance(kind, str):
        return Malformed("no event_type", _find_excerpt(line))
    if kind != "alert":
        return None
    try:
        return _parse_alert(event, text)
    except _Wrong as fault:
        return Malformed(str(fault), _find_excerpt(line))


def load_event(text: str) -> dict[str, Any]:
    """A JSON object, strictly: no NaN, no infinity. Raises ValueError for anything else."""
    try:
        event = json.loads(text, parse_constant=_refuse_number, parse_float=_read_float)
    except RecursionError as fault:
        raise ValueError("nested too deep") from fault
    if not isinstance(event, dict):
        raise ValueError("not an object")
    return event


def split_torn(line: bytes) -> tuple[bytes, bytes] | None:
    """What a line holds before and from the event that begins last in it; None when it is one.

    A full disk (or a killed engine) tears a line; the next event is then written right behind it.
    Inside a JSON string every quote is escaped, so the start that is looked for can't come from
    traffic.
    """
    start = line.rfind(_EVENT_START)
    return (line[:start], line[start:]) if start > 0 else None


def shrink_event(event: Mapping[str, Any], limit: int) -> tuple[str, tuple[str, ...]]:
    """``event`` as ASCII JSON of at most ``limit`` bytes, and what was left out (`BULKY`) for it.

    When even without all of those it is too long, only `event_type` is left, and ``*`` is told.
    """
    kept: dict[str, Any] = dict(event)
    omitted: list[str] = []
    text = _render_json(kept)
    for path in BULKY:
        if len(text) <= limit:
            return text, tuple(omitted)
        head, _, tail = path.partition(".")
        if tail and isinstance(kept.get(head), dict) and tail in kept[head]:
            kept[head] = {key: value for key, value in kept[head].items() if key != tail}
        elif not tail and head in kept:
            del kept[head]
        else:
            continue
        omitted.append(path)
        text = _render_json(kept)
    if len(text) <= limit:
        return text, tuple(omitted)
    return _render_json({"event_type": str(event.get("event_type"))[:32]}), ("*",)


def normalise_address(text: str) -> str:
    """The shortest text of an IPv4 or IPv6 address. Raises ValueError when it is none."""
    address = ip_address(text)
    if getattr(address, "scope_id", None) is not None:
        raise ValueError(f"{text!r} has a scope")
    return str(address)


def find_cves(texts: object) -> tuple[str, ...]:
    """`CVE-2021-44228` from any spelling in use: `CVE_2021_44228`, `cve-2021-44228`, `2021-44228`."""
    found: dict[str, None] = {}
    for text in _find_texts(texts):
        for year, number in _CVE.findall(text):
            found.setdefault(f"CVE-{year}-{number}")
    return tuple(found)[:_LIST_LIMIT]


def _parse_alert(event: dict[str, Any], text: str) -> EveAlert:
    alert = event.get("alert")
    if not isinstance(alert, dict):
        raise _Wrong("no alert object")
    sid = _read_int(alert, "signature_id", 0, 2**32 - 1)
    if sid is None:
        raise _Wrong("no signature_id")
    rule = _read_rule(alert, sid)
    packet = _Packet(
        _read_address(event, "src_ip"),
        _read_address(event, "dest_ip"),
        _read_int(event, "src_port", 0, 65535),
        _read_int(event, "dest_port", 0, 65535),
    )
    direction = event.get("direction")
    payload, printable = _read_payload(event)
    return EveAlert(
        at=_read_time(event),
        source_address=packet.source,
        destination_address=packet.destination,
        source_port=packet.source_port,
        destination_port=packet.destination_port,
        protocol=normalise_protocol(_read_text(event, "proto", 32)),
        family=_find_family(packet),
        direction=direction if direction in ("to_server", "to_client") else None,
        opener=_find_opener(event, packet),
        verdict=_find_verdict(event, alert),
        signature=rule.signature,
        cves=rule.cves,
        affected_products=rule.affected_products,
        app_proto=_read_text(event, "app_proto", 32) or None,
        payload=payload,
        payload_printable=store_text(printable),
        http=_read_http(event.get("http")),
        community_id=_read_text(event, "community_id", 64) or None,
        flow_id=_read_int(event, "flow_id", 0, 2**63 - 1),
        raw=text if len(text) <= RAW_LIMIT else shrink_event(event, RAW_LIMIT)[0],
    )


def read_rule(alert: Mapping[str, Any]) -> Rule | None:
    """The rule that an event's `alert` object names; None when it names none."""
    sid = _read_int(alert, "signature_id", 0, 2**32 - 1)
    return None if sid is None else _read_rule(alert, sid)


def _read_rule(alert: Mapping[str, Any], sid: int) -> Rule:
    metadata = alert.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    references = [r for r in _find_texts(alert.get("references")) if "cve" in r.lower()]
    return Rule(
        signature=Signature(
            sid=sid,
            gid=_read_int(alert, "gid", 0, 2**32 - 1) or 1,
            rev=_read_int(alert, "rev", 0, 2**32 - 1) or 0,
            text=_read_text(alert, "signature"),
            category=_read_text(alert, "category"),
            severity=_read_int(alert, "severity", 0, 255) or 3,
        ),
        cves=find_cves([*_find_texts(metadata.get("cve")), *references]),
        affected_products=tuple(
            bound_text(text, 128) for text in _find_texts(metadata.get("affected_product"))
        ),
    )


def normalise_protocol(name: str) -> str:
    """In small letters, ICMPv6 as `icmp`."""
    protocol = _WORD.sub("", name.lower())
    return _PROTOCOLS.get(protocol, protocol)


def read_time(value: object) -> float | None:
    """Seconds since the epoch of an event's `timestamp`; None when it is none with a zone."""
    try:
        moment = datetime.fromisoformat(str(value)[:40])
        at = moment.timestamp()
    except (ValueError, OverflowError):
        return None
    return at if moment.tzinfo is not None and 0 <= at < 2**33 else None


def bound_text(text: str, limit: int) -> str:
    """At most ``limit`` characters, what is no text in them replaced."""
    text = text[:limit]
    return text if text.isascii() and text.isprintable() else _UNPRINTABLE.sub("\ufffd", text)


def store_text(text: str) -> str:
    """What SQLite can't keep in a text replaced."""
    return text if text.isascii() and "\0" not in text else _UNSTORABLE.sub("\ufffd", text)


def _find_verdict(event: Mapping[str, Any], alert: Mapping[str, Any]) -> Verdict:
    # `alert.action` is the rule's own; the packet may have been dropped by another rule, and then
    # `verdict.action` (from 7.0) is what became of it.
    verdict = event.get("verdict")
    action = verdict.get("action") if isinstance(verdict, dict) else None
    if action == "drop" or alert.get("action") == "blocked":
        return Verdict.BLOCKED
    return Verdict.ALLOWED


def _find_opener(event: Mapping[str, Any], packet: _Packet) -> Opener | None:
    flow = event.get("flow")
    if isinstance(flow, dict) and "src_ip" in flow:
        opener = (_read_address(flow, "src_ip"), _read_int(flow, "src_port", 0, 65535))
        if opener == (packet.source, packet.source_port):
            return Opener.SOURCE
        if opener == (packet.destination, packet.destination_port):
            return Opener.DESTINATION
    direction = event.get("direction")
    if direction == "to_server":
        return Opener.SOURCE
    return Opener.DESTINATION if direction == "to_client" else None


def _find_family(packet: _Packet) -> Family | None:
    address = packet.source or packet.destination
    if address is None:
        return None
    return Family.IPV6 if ":" in address else Family.IPV4


def _read_time(event: Mapping[str, Any]) -> float:
    at = read_time(event.get("timestamp"))
    if at is None:
        raise _Wrong("no timestamp, or one without a zone or out of range")
    return at


def _read_address(values: Mapping[str, Any], key: str) -> str | None:
    value = values.get(key)
    if value is None or value == "":
        return None
    try:
        if not isinstance(value, str):
            raise ValueError(key)
        return normalise_address(value)
    except ValueError as fault:
        raise _Wrong(f"{key} is no address") from fault


def _read_int(values: Mapping[str, Any], key: str, least: int, most: int) -> int | None:
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
        return None
    return value


def _read_text(values: Mapping[str, Any], key: str, limit: int = _TEXT_LIMIT) -> str:
    value = values.get(key)
    return bound_text(value, limit) if isinstance(value, str) else ""


def _read_payload(event: Mapping[str, Any]) -> tuple[str, str]:
    printable = str(event.get("payload_printable") or "")
    segment = find_segment(event)
    if segment:
        return append_segment(event.get("payload"), printable, segment, PAYLOAD_LIMIT)
    return _read_base64(event.get("payload")), printable[:PAYLOAD_LIMIT]


def _read_base64(value: object) -> str:
    # Cut at a whole quantum of four characters, so that what is kept still decodes.
    limit = (PAYLOAD_LIMIT // 3) * 4
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9+/=]*", value[:limit]):
        return ""
    return value[:limit]


def _read_http(value: object) -> Http | None:
    if not isinstance(value, dict):
        return None
    return Http(
        hostname=_read_text(value, "hostname", 255),
        url=_read_text(value, "url", URL_LIMIT),
        method=_read_text(value, "http_method", 32),
    )


def _find_texts(value: object) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value[:_TEXT_LIMIT],)
    if not isinstance(value, list):
        return ()
    return tuple(text[:_TEXT_LIMIT] for text in value[:_LIST_LIMIT] if isinstance(text, str))


def _find_excerpt(line: bytes) -> str:
    return bound_text(line[:120].decode(errors="replace"), 120)


def _render_json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"))


def _read_float(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _refuse_number(text)


def _refuse_number(text: str) -> float:
    raise ValueError(f"{text} is no number of JSON")
