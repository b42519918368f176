"""An alert -> one syslog message. Pure.

RFC 5424 for the message, RFC 6587 section 3.4.1 and RFC 5425 section 4.3 for octet counting.

Facility 10 (security/authorization, `authpriv`), not 4 (`auth`): both mean the same in RFC 5424,
and receivers keep `authpriv` in files that only administrators read; alerts hold excerpts of
traffic. Severity: Suricata's 1 is `crit`, 2 `warning`, 3 `notice`, anything else `info`.
"""

from __future__ import annotations

import json
from typing import Any

from appliance.alerts.eve import load_event, shrink_event
from appliance.alerts.model import Alert, Endpoint, render_time

FACILITY = 10
_SEVERITIES = {1: 2, 2: 4, 3: 5}
_INFORMATIONAL = 6

MESSAGE_LIMIT = 8000
"""Bytes of a message. RFC 5425 says that receivers should take 8192; rsyslog cuts at 8096."""


def render_message(alert: Alert, hostname: str, limit: int = MESSAGE_LIMIT) -> bytes:
    """The alert as an RFC 5424 message without framing, ASCII, at most ``limit`` bytes.

    The JSON is the engine's event with a `hairpin` object. Members of the event that would make
    the message too long are left out and named in `hairpin.omitted`; ``*`` there says that only
    the event's core was kept.
    """
    priority = FACILITY * 8 + _SEVERITIES.get(alert.signature.severity, _INFORMATIONAL)
    header = (
        f"<{priority}>1 {render_time(alert.at)} {hostname} hairpin - alert"
        ' [origin software="hairpin"] '
    )
    return (header + render_json(alert, limit - len(header))).encode("ascii")


def render_json(alert: Alert, limit: int) -> str:
    """The EVE event and its `hairpin` object as ASCII JSON of at most ``limit`` bytes."""
    hairpin = build_hairpin(alert)
    # Room for the object itself, for the key before it, and for the names of what is left out.
    room = limit - len(_render(hairpin)) - 400
    event = {key: value for key, value in load_event(alert.raw).items() if key != "hairpin"}
    text, omitted = shrink_event(event, room)
    if omitted == ("*",):
        text = _render(_build_core(alert))
    if omitted:
        hairpin["omitted"] = list(omitted)
    return f'{text[:-1]},"hairpin":{_render(hairpin)}}}'


def build_hairpin(alert: Alert) -> dict[str, Any]:
    """What the engine can't know; part of the export's contract, as `docs/export.md` lists it."""
    return {
        "id": alert.id,
        "source": _build_end(alert.source),
        "destination": _build_end(alert.destination),
        "opener": None if alert.opener is None else str(alert.opener),
        "policy": alert.policy,
        "revision": alert.revision,
        "lane": alert.lane,
        "profile": alert.profile,
        "verdict": str(alert.verdict),
        "cves": list(alert.cves),
    }


def frame_message(message: bytes) -> bytes:
    """Octet counting: the length in ASCII digits, a space, the message."""
    return b"%d %s" % (len(message), message)


def _build_core(alert: Alert) -> dict[str, Any]:
    """For an event that can't be made to fit: what names it, from what was stored of it."""
    return {
        "timestamp": render_time(alert.at),
        "event_type": "alert",
        "src_ip": alert.source.address,
        "src_port": alert.source.port,
        "dest_ip": alert.destination.address,
        "dest_port": alert.destination.port,
        "proto": alert.protocol,
        "alert": {
            "gid": alert.signature.gid,
            "signature_id": alert.signature.sid,
            "rev": alert.signature.rev,
            "signature": alert.signature.text[:128],
            "severity": alert.signature.severity,
        },
    }


def _build_end(end: Endpoint) -> dict[str, Any] | None:
    if end.vm_id is None:
        return None
    return {"name": end.vm, "vmId": end.vm_id, "zones": list(end.zones[:16])}


def _render(value: dict[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"))
