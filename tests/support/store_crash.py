"""A process that stores alerts and kills itself (SIGKILL) at a named moment.

`python -m tests.support.store_crash MOMENT DATABASE`. Before and at each moment the real code has run on
the real files; only the kill is put in.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from appliance.alerts import partitions
from appliance.alerts.attribute import Attributed
from appliance.alerts.eve import parse_event
from appliance.alerts.history import record_event
from appliance.alerts.model import Endpoint, EveAlert, Opener
from appliance.alerts.partitions import AlertWrite, Limits
from appliance.alerts.store import Store
from tests.support.alerts import store_alerts
from tests.support.eve import render_eve
from tests.support.worlds import LANES

MOMENTS = (
    "notes wait",
    "notes are recorded",
    "partition has ended",
    "successor is made beside its place",
    "successor is in its place",
    "removal is recorded",
    "removal is done",
    "transaction is open",
)
LIMIT = 4


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before(place: Any, name: str) -> None:
    def call(*_: Any, **__: Any) -> None:
        die()

    setattr(place, name, call)


def after(place: Any, name: str) -> None:
    real: Callable[..., Any] = getattr(place, name)

    def call(*given: Any, **named: Any) -> None:
        real(*given, **named)
        die()

    setattr(place, name, call)


def write(tx: AlertWrite, count: int, offset: int) -> None:
    event = parse_event(render_eve())
    assert isinstance(event, EveAlert)
    ends = Endpoint("10.9.0.1", 40000), Endpoint("10.9.0.2", 80)
    store_alerts(tx, [(event, Attributed(*ends, Opener.SOURCE, None, None, ()), LANES[0])] * count)
    tx.note_event(1.0, "a.note", "info", f"up to {tx.writer.last + tx.base}")
    tx.db.execute(
        "INSERT OR REPLACE INTO bookmarks VALUES ('prevent', 1, '1', '2', ?, 0, '', NULL)",
        (offset,),
    )


async def run(moment: str, database: Path) -> None:
    store = Store(database, Limits(alerts=LIMIT))
    await store.write_alerts(lambda tx: write(tx, LIMIT, 4))
    await store.write_alerts(lambda tx: write(tx, LIMIT, 8))
    match moment:
        case "notes wait":
            before(partitions.Partitions, "_deliver")
        case "notes are recorded":
            after(partitions, "take_notes")
        case "partition has ended":
            before(partitions.Partitions, "_begin_next")
        case "successor is made beside its place":
            before(partitions.os, "rename")
        case "successor is in its place":
            after(partitions.os, "rename")
        case "removal is recorded":
            before(partitions, "_unlink")
        case "removal is done":
            after(partitions, "_unlink")
        case _:
            await store.write_alerts(lambda tx: (write(tx, 1, 9), die()))
    if moment.startswith("removal"):
        first = store.partitions[0]
        await store.drop(first, lambda db: record_event(db, 1.0, "a.drop", "info", "x") and None)
    if moment == "notes wait":
        store._partitions._writer = None
        store._partitions._limits = Limits()
    await store.write_alerts(lambda tx: write(tx, 1, 9))


if __name__ == "__main__":
    asyncio.run(run(sys.argv[1], Path(sys.argv[2])))
