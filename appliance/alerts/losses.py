"""Which partitions were ever begun, in the main database, and the telling of those that are gone.

Ids must never come back, since cursors of exporters and clients are ids. So what was begun is known apart
from the files: whoever removes files by hand takes alerts away, but not the knowledge of their ids.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import zip_longest

from sqlite_utils import Database

from appliance.alerts.history import find_rows, record_event, record_repeated

SKIP_IDS = 20_000_000
"""More than a partition that is gone can have had (`partitionAlerts`, and a batch)."""


@dataclass(frozen=True, slots=True)
class Loss:
    """Alerts after the id ``base`` up to at most ``last``, which is None where nobody knows."""

    base: int
    last: int | None


def record_begun(db: Database, base: int) -> None:
    """Before the partition's first alert is committed, and after its file was made."""
    db.execute("INSERT OR REPLACE INTO begun (base, gone) VALUES (?, 0)", (base,))


def record_gone(db: Database, base: int) -> None:
    """Its file is no longer expected."""
    db.execute("UPDATE begun SET gone = 1 WHERE base = ?", (base,))


def adopt(db: Database, bases: Collection[int]) -> None:
    """Files that are there, begun by an older version or right before a kill."""
    db.conn.executemany(
        "INSERT INTO begun (base, gone) VALUES (?, 0) ON CONFLICT DO UPDATE SET gone = 0",
        [(base,) for base in bases],
    )


def find_highest(db: Database) -> int | None:
    """The base of the youngest partition that was ever begun."""
    rows = find_rows(db, "SELECT max(base) AS base FROM begun", ())
    return None if rows[0]["base"] is None else int(rows[0]["base"])


def find_losses(db: Database, present: Collection[int]) -> tuple[Loss, ...]:
    """Of partitions that were begun, and are not ``present`` though nobody recorded that they go."""
    rows = find_rows(db, "SELECT base, gone FROM begun ORDER BY base", ())
    return tuple(
        Loss(int(row["base"]), int(following["base"]) if following else None)
        for row, following in zip_longest(rows, rows[1:])
        if not row["gone"] and row["base"] not in present
    )


def load_cursors(db: Database) -> dict[str, int]:
    """How far each exporter got that ever delivered anything."""
    rows = find_rows(db, "SELECT name, last_id FROM export_cursors", ())
    return {row["name"]: int(row["last_id"]) for row in rows}


def record_loss(db: Database, loss: Loss, name: str, at: float) -> None:
    """Tell that partition ``name`` is gone, and which exporters had not delivered all of it. Once."""
    record_gone(db, loss.base)
    first = loss.base + 1
    upto = "an unknown id" if loss.last is None else f"at most {loss.last}"
    detail = {"first": first, "last": loss.last}
    message = f"{name}.db is gone, by none of ours: alerts {first} to {upto} are lost"
    record_event(db, at, "store.lost", "error", message, subject=name, detail=detail)
    for exporter, cursor in load_cursors(db).items():
        if loss.last is not None and cursor >= loss.last:
            continue
        begin = max(cursor + 1, first)
        message = f"{name}.db is gone: exporter {exporter} can't deliver alerts {begin} to {upto}"
        detail = {"first": begin, "last": loss.last}
        record_event(db, at, "store.lost", "error", message, subject=exporter, detail=detail)


def record_damage(db: Database, name: str, path: str, reason: str, at: float) -> None:
    record_repeated(
        db,
        at,
        "store.damaged",
        "error",
        f"{path} is damaged and left out, its alerts are not found: {reason}; restore it from a"
        " backup and restart, or move it away",
        subject=name,
        detail={"path": path},
    )


def count_lost(before: int, last: int, cursors: Mapping[str, int]) -> dict[str, int]:
    """Of the alerts after ``before`` up to ``last``, how many each exporter has not delivered."""
    missing = {name: last - max(cursor, before) for name, cursor in cursors.items()}
    return {name: count for name, count in missing.items() if count > 0}
