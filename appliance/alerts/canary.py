"""Canaries in the store: kept apart from alerts, known by a nonce that no VM can know.

A probe is recorded before it is sent. An alert of the canary's rule belongs to it only if it carries
that nonce, in the lane that it was sent into; any other is an alert like all others, for then some VM
has sent such a packet.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from sqlite_utils import Database

from appliance.alerts.history import find_rows
from appliance.alerts.model import EveAlert, Verdict
from steering.canary import HOSTILE, SID

FAILED_KEPT = 100_000
"""Probes; of the older ones those that failed are forgotten, too: six days of failing each 5 s."""

_PAYLOAD = re.compile(
    rf"{HOSTILE} [0-9a-f]{{16}} (?P<nonce>[0-9a-f]{{32}}) (?P<part>[a-z0-9-]{{4,32}})"
)


@dataclass(frozen=True, slots=True)
class Arrival:
    """What an alert says of the canary that it is about. ``part`` as `steering.canary.Part.name`."""

    nonce: str
    part: str
    blocked: bool


@dataclass(frozen=True, slots=True)
class StoredProbe:
    """A probe of a lane. ``result`` is ``passed`` or ``failed``, None while it goes on; ``arrived``
    are the parts that were blocked and stored. Times in seconds since the epoch."""

    id: int
    at: float
    lane: str
    cause: str
    arrived: tuple[str, ...]
    arrived_at: float | None
    ended_at: float | None
    result: str | None
    stage: str
    detail: str


def find_arrival(alert: EveAlert) -> Arrival | None:
    """The canary that an alert claims to be about; None for every other alert."""
    if (alert.signature.gid, alert.signature.sid) != (1, SID):
        return None
    found = _PAYLOAD.match(alert.payload_printable)
    if found is None:
        return None
    return Arrival(found["nonce"], found["part"], alert.verdict is Verdict.BLOCKED)


def record_probe(db: Database, at: float, lane: str, cause: str, nonce: str) -> int:
    """Before it is sent; its id."""
    done = db.execute(
        "INSERT INTO canaries (at, lane, cause, nonce) VALUES (?, ?, ?, ?)",
        (at, lane, cause, nonce),
    )
    return int(done.lastrowid or 0)


def record_arrival(db: Database, lane: str, arrival: Arrival, at: float) -> bool:
    """False when no probe of this lane has that nonce: then it is no canary of ours."""
    rows = find_rows(
        db, "SELECT id, arrived FROM canaries WHERE nonce = ? AND lane = ?", (arrival.nonce, lane)
    )
    if not rows:
        return False
    arrived = set(json.loads(rows[0]["arrived"]))
    if arrival.blocked:
        arrived.add(arrival.part)
    db.execute(
        "UPDATE canaries SET arrived = ?, arrived_at = ? WHERE id = ?",
        (json.dumps(sorted(arrived)), at, rows[0]["id"]),
    )
    return True


def record_result(
    db: Database, probe_id: int, at: float, *, passed: bool, stage: str = "", detail: str = ""
) -> None:
    result = "passed" if passed else "failed"
    db.execute(
        "UPDATE canaries SET ended_at = ?, result = ?, stage = ?, detail = ? WHERE id = ?",
        (at, result, stage, detail[:500], probe_id),
    )


def load_probe(db: Database, probe_id: int) -> StoredProbe | None:
    rows = find_rows(db, f"{_SELECT} WHERE id = ?", (probe_id,))
    return _build_probe(rows[0]) if rows else None


def find_probes(
    db: Database, *, lane: str | None = None, before_id: int | None = None, limit: int = 100
) -> tuple[StoredProbe, ...]:
    """Newest first."""
    rows = find_rows(
        db,
        f"{_SELECT} WHERE (:lane IS NULL OR lane = :lane) AND (:before IS NULL OR id < :before)"
        " ORDER BY id DESC LIMIT :limit",
        {"lane": lane, "before": before_id, "limit": limit},
    )
    return tuple(map(_build_probe, rows))


def remove_probes(db: Database, before: float) -> int:
    """Forget probes older than ``before``; those that failed are history, of which so many are kept."""
    return db.execute(
        "DELETE FROM canaries WHERE at < ? AND (result = 'passed' OR id <= "
        "(SELECT max(id) FROM canaries) - ?)",
        (before, FAILED_KEPT),
    ).rowcount


_SELECT = (
    "SELECT id, at, lane, cause, arrived, arrived_at, ended_at, result, stage, detail FROM canaries"
)


def _build_probe(row: dict[str, object]) -> StoredProbe:
    return StoredProbe(**{**row, "arrived": tuple(json.loads(str(row["arrived"])))})  # type: ignore[arg-type]
