"""Frozen values of this room: an alert as the engine told it, and as it is stored.

Times are seconds since the epoch (float); addresses are text in the shortest form that Python's
`ipaddress` writes, so that equal addresses are equal text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from types import MappingProxyType

from steering.model import Family


class Verdict(StrEnum):
    """What became of the packet that made the rule fire."""

    BLOCKED = "blocked"
    ALLOWED = "allowed"


class Opener(StrEnum):
    """Which end of the alert's packet opened the connection."""

    SOURCE = "source"
    DESTINATION = "destination"


@dataclass(frozen=True, slots=True)
class Signature:
    """The rule that fired. ``severity`` is Suricata's: 1 is the worst, 3 or 4 the least."""

    sid: int
    gid: int = 1
    rev: int = 0
    text: str = ""
    category: str = ""
    severity: int = 3


@dataclass(frozen=True, slots=True)
class Rule:
    """What an event's `alert` object says of the rule, the same each time that it fires."""

    signature: Signature
    cves: tuple[str, ...] = ()
    affected_products: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Http:
    """The request as the engine parsed it; each field is bounded, empty where it was not seen."""

    hostname: str = ""
    url: str = ""
    method: str = ""


@dataclass(frozen=True, slots=True)
class EveAlert:
    """An `alert` event, checked and bounded; nothing in it names a VM yet.

    Source and destination are those of the packet that made the rule fire. ``opener`` is None where
    the event does not tell it. ``raw`` is the event as JSON, without its bulkiest members where it
    was too long. Suricata 7 user guide, "Eve JSON Format".
    """

    at: float
    source_address: str | None
    destination_address: str | None
    source_port: int | None
    destination_port: int | None
    protocol: str
    family: Family | None
    direction: str | None
    opener: Opener | None
    verdict: Verdict
    signature: Signature
    cves: tuple[str, ...] = ()
    affected_products: tuple[str, ...] = ()
    app_proto: str | None = None
    payload: str = ""
    payload_printable: str = ""
    http: Http | None = None
    community_id: str | None = None
    flow_id: int | None = None
    raw: str = "{}"


@dataclass(frozen=True, slots=True)
class Malformed:
    """A line that is no event. ``excerpt`` is its start, printable, at most 120 characters."""

    reason: str
    excerpt: str = ""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One end of an alert. ``vm_id`` is None where no VM was known to hold the address."""

    address: str | None
    port: int | None = None
    vm_id: str | None = None
    vm: str | None = None
    zones: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Alert:
    """An alert as it is stored. ``id`` grows by one with each and is never used again.

    ``policy`` is the policy that steered the connection to the lane, ``revision`` the policy
    revision it belonged to; ``reasons`` say what could not be attributed, or how it was.
    ``payload`` is base64, ``raw`` the engine's event as JSON.
    """

    id: int
    at: float
    stored_at: float
    lane: str
    profile: str
    verdict: Verdict
    source: Endpoint
    destination: Endpoint
    protocol: str
    family: Family | None
    direction: str | None
    opener: Opener | None
    signature: Signature
    cves: tuple[str, ...]
    affected_products: tuple[str, ...]
    policy: str | None
    revision: int | None
    app_proto: str | None
    payload: str
    payload_printable: str
    http: Http | None
    community_id: str | None
    flow_id: int | None
    reasons: tuple[str, ...]
    raw: str


@dataclass(frozen=True, slots=True)
class SignatureCount:
    """How often a rule fired, and how often it blocked."""

    gid: int
    sid: int
    rev: int
    text: str
    severity: int
    alerts: int
    blocked: int


@dataclass(frozen=True, slots=True)
class Event:
    """Something the appliance itself did or met. ``severity`` is info, warning or error.

    ``kind`` is stable and dotted, as in `eve.malformed`; ``ended_at`` is None while it lasts or
    where it has no length.
    """

    id: int
    at: float
    ended_at: float | None
    kind: str
    severity: str
    subject: str
    message: str
    detail: Mapping[str, object] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class FlowRecord:
    """One connection as the mirror port showed it; the source opened it. ``id`` is 0 before storing."""

    first_seen: float
    last_seen: float
    source: Endpoint
    destination: Endpoint
    protocol: str
    application: str = ""
    category: str = ""
    packets_sent: int = 0
    bytes_sent: int = 0
    packets_received: int = 0
    bytes_received: int = 0
    treatment: str | None = None
    policy: str | None = None
    id: int = 0


@dataclass(frozen=True, slots=True)
class FlowSummary:
    """All connections of one VM pair, protocol, destination port and application, added up."""

    first_seen: float
    last_seen: float
    source_vm_id: str | None
    source_vm: str | None
    destination_vm_id: str | None
    destination_vm: str | None
    protocol: str
    destination_port: int | None
    application: str
    connections: int
    packets_sent: int
    bytes_sent: int
    packets_received: int
    bytes_received: int


@dataclass(frozen=True, slots=True)
class Revision:
    """One policy revision: the documents as given, who gave them, and what applying them reported."""

    number: int
    at: float
    author: str
    documents: object
    applied_at: float | None = None
    report: object = None


def render_time(at: float) -> str:
    """RFC 3339 in UTC with microseconds, as in `2025-01-31T12:00:00.000000Z`."""
    return datetime.fromtimestamp(at, UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
