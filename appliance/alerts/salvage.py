"""Alerts in the order of their ids where a partition is damaged: what can be read, and what is lost."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from appliance.alerts.model import Alert
from appliance.alerts.packing import is_damage
from appliance.alerts.partition import CHUNK_ALERTS, Partition
from appliance.alerts.reading import find_last, read_alerts
from appliance.alerts.store import AlertView, Store

LOST_TIMES = 10


@dataclass(frozen=True, slots=True)
class Unreadable:
    """Alerts with the ids ``first`` to ``last`` can't be read from ``path``: ``reason``.

    ``count`` of them, at most where the partition does not even tell how many it has.
    """

    first: int
    last: int
    path: str
    reason: str

    @property
    def count(self) -> int:
        return self.last - self.first + 1


@dataclass(frozen=True, slots=True)
class Salvaged:
    """``last``: the id to go on behind."""

    alerts: tuple[Alert, ...]
    lost: tuple[Unreadable, ...]
    last: int


async def salvage_alerts(store: Store, after: int, limit: int) -> Salvaged:
    """The next alerts after the id ``after``, at least one piece of 32, about ``limit``.

    What is damaged is left out, alert by alert. Of the youngest partition nothing is: more may be written
    to it, so its damage is raised. Raises StoreError, also where no partition is damaged but the table of
    before them is.
    """
    return await store.read_alerts(lambda view: _salvage(view, after, limit))


def _salvage(view: AlertView, after: int, limit: int) -> Salvaged:
    alerts: list[Alert] = []
    lost: list[Unreadable] = []
    last = after
    for part, following in zip(view.partitions, view.partitions[1:], strict=False):
        if last >= following.base or _is_enough(alerts, lost, limit):
            continue
        last = max(last, part.base)
        end = part.base + part.alerts if part.alerts is not None else following.base
        try:
            end = part.base + (view.ask(part, find_last) or 0)
        except sqlite3.Error as fault:
            _check(fault)
            lost.append(Unreadable(last + 1, end, str(part.path), str(fault)))
            last = end
        while last < end and not _is_enough(alerts, lost, limit):
            row = last - part.base + 1
            piece = range(
                row, min(row + CHUNK_ALERTS - (row - 1) % CHUNK_ALERTS, end - part.base + 1)
            )
            _read_piece(view, part, piece, alerts, lost)
            last = part.base + piece[-1]
        if last >= end:
            last = max(last, following.base)
    return Salvaged(tuple(alerts), _join(lost), last)


def _is_enough(alerts: Sequence[Alert], lost: Sequence[Unreadable], limit: int) -> bool:
    """What is lost is looked for alert by alert, which takes its time, and told with each answer."""
    return len(alerts) >= limit or sum(one.count for one in lost) >= LOST_TIMES * limit


def _read_piece(
    view: AlertView,
    part: Partition,
    rows: Sequence[int],
    alerts: list[Alert],
    lost: list[Unreadable],
) -> None:
    """By itself each alert of a piece that can't be read as one."""
    try:
        alerts += view.ask(part, partial(read_alerts, partition=part, rows=tuple(rows))) or ()
    except sqlite3.Error as fault:
        _check(fault)
        if len(rows) == 1:
            number = part.base + rows[0]
            lost.append(Unreadable(number, number, str(part.path), str(fault)))
            return
        for row in rows:
            _read_piece(view, part, (row,), alerts, lost)


def _check(fault: sqlite3.Error) -> None:
    if not is_damage(fault):
        raise fault


def _join(lost: Sequence[Unreadable]) -> tuple[Unreadable, ...]:
    """Neighbours as one."""
    joined: list[Unreadable] = []
    for one in lost:
        before = joined[-1] if joined else None
        if before is not None and (before.last + 1, before.path) == (one.first, one.path):
            joined[-1] = Unreadable(before.first, one.last, one.path, before.reason)
        else:
            joined.append(one)
    return tuple(joined)
