"""The flow spool: a regular file of whole lines, rotated by rename; the reader deletes old ones."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import structlog

log = structlog.get_logger("spool")

SIZE_LIMIT = 64 * 2**20
ROTATED_LIMIT = 8
_TAIL = 65536


def find_rotated(path: Path) -> list[Path]:
    """Rotated files of ``path`` (``NAME.<nanoseconds since the epoch>``), the oldest first."""
    found = [
        (int(suffix), file)
        for file in path.parent.glob(f"{path.name}.*")
        if (suffix := file.name.removeprefix(f"{path.name}.")).isdecimal()
    ]
    return [file for _, file in sorted(found)]


class Spool:
    """Appends lines; a line is in the file whole or not at all.

    The run directory is memory: when no reader takes the rotated files away, all but the newest
    ``rotated_limit`` are deleted.
    """

    def __init__(
        self,
        path: Path,
        size_limit: int = SIZE_LIMIT,
        rotated_limit: int = ROTATED_LIMIT,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._path = path
        self._size_limit = size_limit
        self._rotated_limit = rotated_limit
        self._clock_ns = clock_ns
        self._fd, self._size = self._open()

    def _open(self) -> tuple[int, int]:
        fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)
        size = os.fstat(fd).st_size
        # A writer that died in the middle of a line left a tail that no reader has taken.
        start = max(0, size - _TAIL)
        tail = os.pread(fd, size - start, start)
        if tail and not tail.endswith(b"\n"):
            size = start + tail.rfind(b"\n") + 1
            os.ftruncate(fd, size)
        return fd, size

    def write_line(self, line: bytes) -> None:
        """Append ``line`` (with its newline). Raises OSError with the file as it was before."""
        if self._size and self._size + len(line) > self._size_limit:
            self.rotate()
        written = 0
        try:
            while written < len(line):
                written += os.write(self._fd, line[written:])
        except OSError:
            os.ftruncate(self._fd, self._size)
            raise
        self._size += len(line)

    def rotate(self) -> None:
        """Put the present file aside and start another."""
        self._path.rename(self._path.with_name(f"{self._path.name}.{self._clock_ns()}"))
        os.close(self._fd)
        self._fd, self._size = self._open()
        for file in find_rotated(self._path)[: -self._rotated_limit]:
            log.warning("flow records discarded: nothing reads them", file=str(file))
            file.unlink(missing_ok=True)

    def close(self) -> None:
        os.close(self._fd)
