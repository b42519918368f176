"""Reading an engine's EVE file: which files there are, and the next whole lines of one of them.

Names. The engine writes `eve.json`; whoever rotates renames it to `eve.json.<utc-nanoseconds>`
(digits only, so that the number sorts by age) and then tells the engine to reopen. A file is known
by device, inode and a fingerprint of its first bytes, never by its name, so a rename changes
nothing for the reader, and a file that was truncated or whose inode was used again is seen as new.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from appliance.alerts.eve import LINE_LIMIT

FINGERPRINT_BYTES = 256
_READ_BYTES = 8 * 2**20
_ROTATED = re.compile(r"\.([0-9]{1,20})")

# LINE_LIMIT must fit into one read, or a long line would never be seen to be too long.
assert _READ_BYTES > LINE_LIMIT  # noqa: S101


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """SHA-256 (hexadecimal) of a file's first ``length`` bytes, at most `FINGERPRINT_BYTES`."""

    length: int = 0
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Bookmark:
    """How far one file was read: ``offset`` is the end of the last whole line that was stored.

    ``generation`` numbers the files of a lane in the order in which they were met, from 1.
    """

    lane: str
    generation: int
    device: int
    inode: int
    offset: int = 0
    fingerprint: Fingerprint = Fingerprint()

    @property
    def identity(self) -> tuple[int, int]:
        return self.device, self.inode


class Line(msgspec.Struct, frozen=True, gc=False):
    """One line without its newline, and where in the file it begins."""

    offset: int
    raw: bytes


@dataclass(frozen=True, slots=True)
class Batch:
    """Whole lines of one file in order, and the bookmark to store with what they say.

    ``behind`` is the bytes after the new bookmark, ``torn`` those of them that are the unfinished
    last line (0 unless the end was reached). ``changed_at`` is the file's modification time.
    ``replaced`` says that the bookmark given no longer fits its file (truncated, or another file).
    """

    path: Path
    lines: tuple[Line, ...]
    bookmark: Bookmark
    behind: int
    torn: int
    changed_at: float
    replaced: bool

    @property
    def at_end(self) -> bool:
        return self.behind == self.torn


def find_files(live: Path) -> tuple[Path, ...]:
    """The rotated files of ``live``, oldest first, then ``live`` itself where it exists.

    An absent directory is no files. Raises OSError for one that may not be read.
    """
    rotated: list[tuple[int, Path]] = []
    present = False
    try:
        with os.scandir(live.parent) as entries:
            for entry in entries:
                if entry.name == live.name:
                    present = True
                elif is_rotated(live, entry.name):
                    rotated.append((int(entry.name[len(live.name) + 1 :]), Path(entry.path)))
    except FileNotFoundError:
        return ()
    ordered = tuple(path for _, path in sorted(rotated))
    return (*ordered, live) if present else ordered


def is_rotated(live: Path, name: str) -> bool:
    """Whether ``name`` is ``live``'s after a rotation."""
    return name.startswith(live.name) and bool(_ROTATED.fullmatch(name[len(live.name) :]))


def read_batch(
    path: Path,
    lane: str,
    known: Mapping[tuple[int, int], Bookmark],
    next_generation: int,
    limit: int,
) -> Batch | None:
    """At most ``limit`` whole lines of ``path`` from its bookmark on; None when it is gone.

    ``known`` are the lane's bookmarks by `Bookmark.identity`; a file without one is begun with
    ``next_generation``. A line longer than `LINE_LIMIT` comes in pieces of that length. Raises
    OSError when the file can't be read or is no regular file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(f"{path} is no regular file")
        found = known.get((status.st_dev, status.st_ino))
        if found is None:
            found = _find_moved(descriptor, known.values(), status)
        fits = found is not None and _check_fits(descriptor, found, status.st_size)
        start = (
            replace(found, device=status.st_dev)
            if found is not None and fits
            else Bookmark(lane, next_generation, status.st_dev, status.st_ino)
        )
        data = os.pread(descriptor, _READ_BYTES, start.offset)
        lines, consumed = split_lines(data, start.offset, limit)
        offset = start.offset + consumed
        # The size is taken again: what was written since the first look counts as behind, too.
        behind = max(os.fstat(descriptor).st_size - offset, 0)
        return Batch(
            path=path,
            lines=lines,
            bookmark=replace(
                start,
                offset=offset,
                fingerprint=_extend_fingerprint(descriptor, start.fingerprint, offset),
            ),
            behind=behind,
            torn=_find_torn(data, consumed, behind),
            changed_at=status.st_mtime,
            replaced=found is not None and not fits,
        )
    finally:
        os.close(descriptor)


def split_lines(data: bytes, offset: int, limit: int) -> tuple[tuple[Line, ...], int]:
    """The first ``limit`` whole lines of ``data``, which begins at ``offset``, and their length."""
    lines: list[Line] = []
    begin = 0
    while len(lines) < limit:
        end = data.find(b"\n", begin)
        if (end if end >= 0 else len(data)) - begin >= LINE_LIMIT:
            lines.append(Line(offset + begin, data[begin : begin + LINE_LIMIT]))
            begin += LINE_LIMIT
        elif end < 0:
            break
        else:
            lines.append(Line(offset + begin, data[begin:end]))
            begin = end + 1
    return tuple(lines), begin


def remove_rotated(path: Path, live: Path, bookmark: Bookmark, size: int | None = None) -> bool:
    """Delete ``path`` when it is a rotated file of ``live`` and still the bookmark's; whether it was.

    With ``size`` only while it has so many bytes: what was written since is not given up.
    Raises OSError when it may not be deleted.
    """
    if not is_rotated(live, path.name):
        return False
    try:
        status = os.stat(path, follow_symlinks=False)
        if (status.st_dev, status.st_ino) != bookmark.identity:
            return False
        if size is not None and status.st_size != size:
            return False
        os.unlink(path)
    except FileNotFoundError:
        return False
    return True


def index_bookmarks(bookmarks: Iterable[Bookmark]) -> dict[tuple[int, int], Bookmark]:
    """By identity; of two for one inode (it was used again) the younger."""
    ordered = sorted(bookmarks, key=lambda bookmark: bookmark.generation)
    return {bookmark.identity: bookmark for bookmark in ordered}


def _find_moved(
    descriptor: int, known: Iterable[Bookmark], status: os.stat_result
) -> Bookmark | None:
    """The one whose file this is, on a disk that has got another number (a reboot); None if not sure."""
    fitting = [
        one
        for one in known
        if one.inode == status.st_ino
        and one.fingerprint.length > 0
        and _check_fits(descriptor, one, status.st_size)
    ]
    return fitting[0] if len(fitting) == 1 else None


def _check_fits(descriptor: int, bookmark: Bookmark, size: int) -> bool:
    if size < bookmark.offset:
        return False
    length = bookmark.fingerprint.length
    return find_fingerprint(os.pread(descriptor, length, 0)) == bookmark.fingerprint


def _extend_fingerprint(descriptor: int, present: Fingerprint, offset: int) -> Fingerprint:
    # Only of what was read as whole lines: nothing after that is certain to stay.
    length = min(offset, FINGERPRINT_BYTES)
    if length == present.length:
        return present
    return find_fingerprint(os.pread(descriptor, length, 0))


def find_fingerprint(data: bytes) -> Fingerprint:
    """Of the first bytes given; of none of them, the empty one."""
    return Fingerprint(len(data), hashlib.sha256(data).hexdigest()) if data else Fingerprint()


def _find_torn(data: bytes, consumed: int, behind: int) -> int:
    rest = len(data) - consumed
    return rest if rest == behind and b"\n" not in data[consumed:] else 0
