"""What of the database is configuration: kept twice, with a digest, and compared before it is used.

The rows stand in their own tables. The table `configuration` has, for each part of it, the digest of its rows and
a copy of them, written in the transaction that changes the rows. Of rows, copy and digest any two that agree are
right: one flipped byte is mended and told. Where no two agree nothing is used. A digest tells damage, not
somebody who can write to the disk.

A version of before knows nothing of this, and runs again when a newer one is sent back (docs/update.md). So triggers
note each change of the rows, and who keeps the configuration takes the note away in the same transaction.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

import structlog
from sqlite_utils import Database

from appliance.alerts.packing import Damaged, is_damage
from appliance.alerts.rows import insert_sql

log = structlog.get_logger("store")

Verdict = Literal["whole", "changed", "rows damaged", "copy damaged", "damaged"]

CHANGED = "changed by a version that keeps no copy"
"""In the place of a digest, as no flipped byte makes it of one."""


class Part(StrEnum):
    """Of the configuration; the value is the name of its table."""

    POLICIES = "revisions"
    QUARANTINES = "quarantines"
    CURSORS = "export_cursors"


TABLES = (
    """CREATE TABLE configuration (
        name TEXT PRIMARY KEY,
        sha256 TEXT NOT NULL,
        copy TEXT NOT NULL
    ) STRICT""",
    *(
        f"CREATE TRIGGER {part}_{change.lower()} AFTER {change} ON {part} BEGIN "  # noqa: S608
        f"UPDATE configuration SET sha256 = '{CHANGED}', copy = '' WHERE name = '{part}'; END"
        for part in Part
        for change in ("INSERT", "UPDATE", "DELETE")
        if (part, change) != (Part.POLICIES, "INSERT")  # not in force yet
    ),
)

# By no index: it has the keys once more, and tells them as they were where those of the table are damaged.
_ROWS: Mapping[Part, str] = {
    # The revision in force. Those before it are not used again.
    Part.POLICIES: "SELECT * FROM revisions NOT INDEXED WHERE number = "
    "(SELECT max(number) FROM revisions WHERE applied_at IS NOT NULL)",
    Part.QUARANTINES: "SELECT * FROM quarantines NOT INDEXED ORDER BY vm_id",
    Part.CURSORS: "SELECT * FROM export_cursors NOT INDEXED ORDER BY name",
}
_INDEXED = (str(Part.QUARANTINES), str(Part.CURSORS), "configuration")
_TOLD: Mapping[Part, str] = {
    Part.POLICIES: "the policies in force",
    Part.QUARANTINES: "the quarantines",
    Part.CURSORS: "how far exporters got",
}


@dataclass(frozen=True, slots=True)
class Witness:
    """What the database has of one part; None: it can't be read, or is not there."""

    rows: str | None
    copy: str | None
    sha256: str | None


def judge(part: Part, found: Witness) -> Verdict:
    """What of a part may be used. Pure."""
    if found.sha256 == CHANGED and found.rows is not None:
        return "changed"
    rows, copy = (
        None if one is None else compute_digest(part, one) for one in (found.rows, found.copy)
    )
    if rows is not None and rows in (copy, found.sha256):
        return "whole" if rows == copy == found.sha256 else "copy damaged"
    if copy is not None and copy == found.sha256:
        return "rows damaged"
    return "damaged"


def compute_digest(part: Part, text: str) -> str:
    return hashlib.sha256(f"{part}\n{text}".encode()).hexdigest()


def keep_configuration(db: Database, part: Part) -> None:
    """Its rows were changed in this transaction."""
    text = _render(db, part)
    db.execute(
        "INSERT INTO configuration (name, sha256, copy) VALUES (?, ?, ?)"
        " ON CONFLICT (name) DO UPDATE SET sha256 = excluded.sha256, copy = excluded.copy",
        (str(part), compute_digest(part, text), text),
    )


def mend_configuration(db: Database) -> tuple[str, ...]:
    """Leave it as it was written, in one transaction; sentences on what was mended.

    Raises Damaged where nothing tells what it was, or sqlite3.Error: then it is as it was found.
    """
    told = [*(_mend_index(db, table) for table in _INDEXED), *(_mend(db, part) for part in Part)]
    return tuple(filter(None, told))


def _mend_index(db: Database, table: str) -> str:
    """Made anew of the table, where it is not the table's: its rows are looked at afterwards."""
    if not _find_fault(db, table):
        return ""
    db.execute(f"REINDEX {table}")
    if fault := _find_fault(db, table):
        raise Damaged(f"table {table} is broken: {fault}")
    return f"the index of table {table}: damaged on disk, and made anew"


def _find_fault(db: Database, table: str) -> str:
    """The first that SQLite finds in a table and its index; empty where there is none."""
    found = str(db.execute(f"PRAGMA integrity_check({table})").fetchone()[0])
    return "" if found == "ok" else found[:200]


def _mend(db: Database, part: Part) -> str:
    found = _find_witness(db, part)
    verdict = judge(part, found)
    if verdict == "whole":
        return ""
    if verdict == "changed":
        log.warning("configuration was changed by another version", part=str(part))
        keep_configuration(db, part)
        return ""
    if verdict == "damaged":
        raise Damaged(f"{_TOLD[part]} are not what was written, nor is the copy of them")
    # What is written into a tree that is broken may destroy more. The others were looked at.
    if part is Part.POLICIES and (fault := _find_fault(db, part)):
        raise Damaged(f"{_TOLD[part]}: table {part} is broken: {fault}")
    if verdict == "rows damaged":
        _restore(db, part, json.loads(str(found.copy)))
    keep_configuration(db, part)
    if judge(part, _find_witness(db, part)) != "whole":
        raise Damaged(f"{_TOLD[part]} can't be put back from the copy of them")
    what = _TOLD[part] if verdict == "rows damaged" else f"the copy of {_TOLD[part]}"
    return f"{what}: damaged on disk, and put back as written"


def _render(db: Database, part: Part) -> str:
    """The part's rows, each value exactly."""
    return json.dumps(list(db.query(_ROWS[part])), ensure_ascii=False, separators=(",", ":"))


def _find_witness(db: Database, part: Part) -> Witness:
    rows = copy = sha256 = None
    with _passing_damage():
        rows = _render(db, part)
    with _passing_damage():
        sql = "SELECT sha256, copy FROM configuration NOT INDEXED WHERE name = ?"
        kept = list(db.query(sql, (part,)))
        if len(kept) == 1:
            sha256, copy = str(kept[0]["sha256"]), str(kept[0]["copy"])
    return Witness(rows, copy, sha256)


@contextlib.contextmanager
def _passing_damage() -> Iterator[None]:
    """What can't be read is no witness. A disk that fails is no damage, and raised."""
    try:
        yield
    except (TypeError, ValueError):
        pass  # a value of a type that we never write
    except sqlite3.Error as fault:
        if not is_damage(fault, opening=True):
            raise


def _restore(db: Database, part: Part, rows: list[dict[str, Any]]) -> None:
    if part is Part.POLICIES:
        # Others stay, but none that came later may say of itself that it is in force.
        last = max((int(row["number"]) for row in rows), default=0)
        db.execute("UPDATE revisions SET applied_at = NULL WHERE number >= ?", (last,))
        db.execute("DELETE FROM revisions WHERE number = ?", (last,))
    else:
        db.execute(f"DELETE FROM {part}")  # noqa: S608 - the program's own words
    for row in rows:
        db.execute(insert_sql(part, row), row)
