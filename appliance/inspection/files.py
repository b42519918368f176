"""The door to a lane's directory: who owns what, and logs that never grow without bound."""

from __future__ import annotations

import contextlib
import errno
import grp
import os
import pwd
import shutil
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from steering.errors import HairpinError

MANAGEMENT_GROUP = "hairpin"
"""Group of the management service: reads EVE files, speaks to the command sockets."""
LOG_LIMIT = 4 * 2**20
EVE_KEPT = 8
"""Rotated EVE files that are kept. The reader deletes what it has read: one more is lost unread."""


@dataclass(frozen=True, slots=True)
class Owner:
    """Who a lane's directory belongs to: the engine's user, the management service's group."""

    uid: int
    gid: int


def find_owner(user: str) -> Owner:
    """Raises HairpinError when the engine's user or the management group does not exist."""
    try:
        uid = pwd.getpwnam(user).pw_uid
    except KeyError as fault:
        raise HairpinError(
            f"there is no user `{user}` for the engines",
            f"useradd --system --no-create-home --shell /usr/sbin/nologin {user}",
        ) from fault
    try:
        return Owner(uid, grp.getgrnam(MANAGEMENT_GROUP).gr_gid)
    except KeyError as fault:
        raise HairpinError(
            f"there is no group `{MANAGEMENT_GROUP}`", f"groupadd --system {MANAGEMENT_GROUP}"
        ) from fault


def write_lane_directory(directory: Path, owner: Owner) -> None:
    """Make a lane's directory, where the engine and the management group write and nobody else looks.

    The management service deletes the rotated EVE files that it has read.

    Set-group-id, so that every file and socket the engine makes belongs to the group. Raises OSError.
    """
    directory.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
    directory.mkdir(exist_ok=True, mode=0o770)
    _write_owner(directory, owner, 0o2770)
    scratch = directory / "test"
    scratch.mkdir(exist_ok=True, mode=0o750)
    _write_owner(scratch, owner, 0o2750)


def _write_owner(directory: Path, owner: Owner, mode: int) -> None:
    # By descriptor: the engine's user owns the parent and could swap a name for a link.
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        os.fchown(descriptor, owner.uid, owner.gid)
        # In the image nobody may set the set-group-id; there it is inherited (RestrictSUIDSGID).
        if stat.S_IMODE(os.fstat(descriptor).st_mode) != mode:
            os.fchmod(descriptor, mode)
    finally:
        os.close(descriptor)


def read_fingerprint(path: Path) -> tuple[int, int, int, int] | None:
    """What tells one version of a file from another without reading it; None when there is none."""
    try:
        seen = path.stat()
    except OSError:
        return None
    if not stat.S_ISREG(seen.st_mode) or seen.st_size == 0:
        return None
    return (seen.st_dev, seen.st_ino, seen.st_mtime_ns, seen.st_size)


def rotate_eve(eve: Path, limit: int) -> bool:
    """Rename an EVE file that reached `limit` bytes; True when it was renamed.

    The engine keeps writing to the renamed file until it is told to reopen, so nothing is lost.
    The new name is eve.json.NANOSECONDS.
    """
    try:
        if eve.lstat().st_size < limit:
            return False
        os.rename(eve, eve.with_name(f"{eve.name}.{time.time_ns()}"))
    except FileNotFoundError:
        return False
    return True


def remove_unread(eve: Path, kept: int = EVE_KEPT) -> tuple[Path, ...]:
    """Delete the oldest rotated EVE files beyond `kept`, so that the disk does not fill; those deleted."""
    removed = find_rotated(eve)[:-kept]
    for path in removed:
        path.unlink(missing_ok=True)
    return removed


def find_rotated(eve: Path) -> tuple[Path, ...]:
    """The rotated EVE files of a lane, oldest first."""
    return tuple(
        sorted(
            (path for path in eve.parent.glob(f"{eve.name}.*") if path.suffix[1:].isdigit()),
            key=lambda path: int(path.suffix[1:]),
        )
    )


def trim_log(log_file: Path, limit: int = LOG_LIMIT) -> None:
    """Keep an engine's log below `limit` bytes: its content moves to NAME.1 and it starts afresh.

    The engine appends through a descriptor of its own, so the file is emptied, not replaced.
    """
    try:
        descriptor = os.open(log_file, os.O_RDWR | os.O_NOFOLLOW)
    except OSError:
        return
    with os.fdopen(descriptor, "r+b") as stream:
        if os.fstat(stream.fileno()).st_size <= limit:
            return
        kept = log_file.with_name(f"{log_file.name}.1")
        with contextlib.suppress(OSError):
            kept.unlink()
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with os.fdopen(os.open(kept, flags, 0o640), "wb") as copy:
            shutil.copyfileobj(stream, copy)
        stream.truncate(0)


def read_size(path: Path) -> int:
    """In bytes; 0 when there is no such file."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def read_log(log_file: Path, start: int, size: int = 65536) -> str:
    """What an engine logged from byte `start` on, at most its first `size` bytes, as text."""
    try:
        with log_file.open("rb") as stream:
            # Trimmed since: what is there now is all there is.
            stream.seek(start if start <= os.fstat(stream.fileno()).st_size else 0)
            return stream.read(size).decode(errors="replace")
    except OSError:
        return ""


def read_end(path: Path, size: int = 16384) -> str:
    """The last ``size`` bytes of a file as text; empty when there is none."""
    try:
        with path.open("rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - size))
            return stream.read(size).decode(errors="replace")
    except OSError:
        return ""


def write_state_file(path: Path, content: bytes, owner: Owner) -> None:
    """Put the file that an engine's library shares with us in its place, unless it is there already.

    An engine that is adopted goes on with the one it has. Raises OSError.
    """
    with contextlib.suppress(OSError), _open_state(path, owner) as stream:
        if os.fstat(stream.fileno()).st_size == len(content) and stream.read(8) == content[:8]:
            return
    path.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    with os.fdopen(os.open(path, flags, 0o600), "wb") as stream:
        stream.write(content)
        os.fchown(stream.fileno(), owner.uid, owner.gid)


def write_state_part(path: Path, at: int, part: bytes, owner: Owner) -> None:
    """Raises OSError when there is no such file, or it is not what `write_state_file` made."""
    with _open_state(path, owner) as stream:
        os.pwrite(stream.fileno(), part, at)


def read_state_file(path: Path, size: int, owner: Owner) -> bytes:
    """Its first ``size`` bytes; empty when there is none."""
    try:
        with _open_state(path, owner) as stream:
            return os.pread(stream.fileno(), size, 0)
    except OSError:
        return b""


def _open_state(path: Path, owner: Owner) -> BinaryIO:
    # The directory is the engine's: what it put there instead must not be written to as root.
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK)
    seen = os.fstat(descriptor)
    if not stat.S_ISREG(seen.st_mode) or seen.st_nlink != 1 or seen.st_uid != owner.uid:
        os.close(descriptor)
        raise OSError(errno.EPERM, "is not the file that was made", str(path))
    return cast(BinaryIO, os.fdopen(descriptor, "r+b", buffering=0))
