"""Rows of a database changed as a flipped byte changes them: no trigger fires."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path


def damage_rows(path: Path, *statements: str) -> None:
    """Each statement must change something."""
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        triggers = db.execute(
            "SELECT name, sql FROM sqlite_schema WHERE type = 'trigger'"
        ).fetchall()
        for name, _ in triggers:
            db.execute(f"DROP TRIGGER {name}")
        for one in statements:
            assert db.execute(one).rowcount, one
        for _, sql in triggers:
            db.execute(sql)
