"""Cursors, times and filters of queries. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TypeVar

from appliance.alerts import query as stored
from appliance.alerts.model import Verdict
from appliance.api import queries as ask
from steering.errors import FieldError, WrongInput

T = TypeVar("T")


def read_seconds(moment: datetime | None) -> float | None:
    """Seconds since the epoch."""
    return None if moment is None else moment.timestamp()


def parse_cursor(cursor: str | None) -> int:
    """0 for none. Raises WrongInput for a cursor that no list of ours has given."""
    if cursor is None:
        return 0
    if not cursor.isdecimal() or len(cursor) > 15:
        raise WrongInput([FieldError("cursor", "not a cursor of this list")])
    return int(cursor)


def cut_page(items: Sequence[T], cursor: str | None, limit: int) -> tuple[Sequence[T], str | None]:
    """One page and the cursor of the next; a cursor is a position in the list."""
    start = parse_cursor(cursor)
    end = start + limit
    return items[start:end], str(end) if end < len(items) else None


def build_alert_filter(query: ask.AlertFilter) -> stored.AlertFilter:
    """What the API asks for, as the store is asked."""
    return stored.AlertFilter(
        vm=query.vm,
        address=query.address,
        zone=query.zone,
        policy=query.policy,
        lane=str(query.lane) if query.lane else None,
        verdict=Verdict(query.verdict) if query.verdict else None,
        signature=query.sid,
        cve=query.cve,
        text=query.text,
        since=read_seconds(query.since),
        until=read_seconds(query.until),
    )
