"""The one door to what is compressed in a partition. A file may be damaged, or made by somebody else."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import zstandard

CHUNK_BYTES = 8 * 2**20
"""32 raw events of 32 Ki characters are at most half of it."""
TEXT_BYTES = 16 * 2**20
"""512 URLs of 2 Ki and payloads of 1 Ki characters are less than half of it."""

_ODD = (
    sqlite3.SQLITE_ERROR,
    sqlite3.SQLITE_CONSTRAINT,
    sqlite3.SQLITE_MISMATCH,
    sqlite3.SQLITE_TOOBIG,
)


class Damaged(sqlite3.DatabaseError):
    """What a database holds is not what was written. ``path`` is the partition's file, where it is one's."""

    def __init__(self, reason: str, path: Path | None = None) -> None:
        super().__init__(reason)
        self.path = path


def is_damage(fault: sqlite3.Error, *, opening: bool = False) -> bool:
    """Whether the file is at fault, not the disk or another process. No such table: it was emptied.

    ``opening``: only what the program always asks is asked, so that a question which can't be answered is
    the file's fault, too.
    """
    if isinstance(fault, Damaged):
        return True
    code = getattr(fault, "sqlite_errorcode", None)
    if code is None:
        return "decode to UTF-8" in str(fault)  # told by Python, not by SQLite
    if code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return True
    if opening and code & 0xFF in _ODD:
        return True
    return bool(code == sqlite3.SQLITE_ERROR and "no such" in str(fault))


@contextlib.contextmanager
def expecting_damage() -> Iterator[None]:
    """Rows that are missing or not of the form that was written raise `Damaged`."""
    try:
        yield
    except (TypeError, LookupError, ValueError, zstandard.ZstdError) as fault:
        raise Damaged(f"{type(fault).__name__}: {fault}") from fault


def unpack(data: bytes, most: int) -> bytes:
    """At most ``most`` bytes; the size is looked at before any of them is made. Raises Damaged."""
    try:
        size = zstandard.frame_content_size(data)
        if not 0 <= size <= most:
            raise Damaged(f"a compressed piece tells a size of {size} bytes, not 0 to {most}")
        return zstandard.ZstdDecompressor().decompress(data, max_output_size=most)
    except (zstandard.ZstdError, TypeError, ValueError) as fault:
        raise Damaged(f"a compressed piece can't be read: {fault}") from fault
