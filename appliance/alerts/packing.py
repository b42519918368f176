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


class Damaged(sqlite3.DatabaseError):
    """What a partition holds is not what was written. ``path`` is its file, where that is known."""

    def __init__(self, reason: str, path: Path | None = None) -> None:
        super().__init__(reason)
        self.path = path


def is_damage(fault: sqlite3.Error) -> bool:
    """Whether the file is at fault, not the disk or another process. No such table: it was emptied."""
    if isinstance(fault, Damaged):
        return True
    code = getattr(fault, "sqlite_errorcode", None)
    return code is not None and (
        code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
        or (code == sqlite3.SQLITE_ERROR and "no such" in str(fault))
    )


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
