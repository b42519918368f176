"""The door by which first boot writes: each file whole or not at all, with its owner and mode from the start."""

from __future__ import annotations

import contextlib
import os
import pwd
import secrets
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

import structlog

from appliance.firstboot.places import Places
from appliance.firstboot.plan import STATE_DIR, PlannedFile
from steering.errors import HairpinError

log = structlog.get_logger("firstboot")

USER = "hairpin"
Owner = tuple[int, int]
FindOwner = Callable[[str], Owner]


def find_owner(name: str) -> Owner:
    """User and group id. Raises HairpinError when there is no such user."""
    try:
        entry = pwd.getpwnam(name)
    except KeyError as fault:
        raise HairpinError(f"there is no user `{name}`", "use an image with its users") from fault
    return entry.pw_uid, entry.pw_gid


def write_files(places: Places, files: Sequence[PlannedFile], find: FindOwner = find_owner) -> None:
    """All of them, in their order. Raises HairpinError: some may be written then, the last one is not."""
    for file in files:
        path = places.put(file.path)
        try:
            make_directory(path.parent)
            if path.parent == places.put(STATE_DIR):
                os.chown(path.parent, *find(USER))
            write_file(path, file.text, file.mode, find(file.owner))
        except OSError as fault:
            raise HairpinError(
                f"{path} can't be written: {fault.strerror}", "check that the disk has room"
            ) from fault
        log.info("written", path=str(path), mode=f"{file.mode:o}", owner=file.owner)


def make_directory(directory: Path) -> None:
    """With those above it, for all to look into whatever the umask says; one that is there stays as it is.

    Raises OSError.
    """
    if directory.is_dir():
        return
    make_directory(directory.parent)
    directory.mkdir()
    directory.chmod(0o755)


def write_file(path: Path, text: str, mode: int, owner: Owner) -> None:
    """Replace a file in one step. Raises OSError.

    The directory may be another user's, who could put a link in the way: what is written to was made by
    us, and is moved to its name, which a link there does not divert.
    """
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    fresh = f".{path.name}.{secrets.token_hex(8)}"
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        handle = os.open(fresh, flags, 0o600, dir_fd=directory)
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fchown(file.fileno(), *owner)
                os.fchmod(file.fileno(), mode)
                os.fsync(file.fileno())
            os.rename(fresh, path.name, src_dir_fd=directory, dst_dir_fd=directory)
            os.fsync(directory)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(fresh, dir_fd=directory)
            raise
    finally:
        os.close(directory)


def remove_config(places: Places) -> None:
    """Nothing of an earlier run in this boot is in force any more: the settings go first. Raises OSError."""
    places.settings.unlink(missing_ok=True)
    for path in (
        *places.config_dir.glob("*"),
        *places.put("/run/systemd/network").glob("*-hairpin-*"),
    ):
        path.unlink()


def set_host_name(name: str) -> None:
    """Raises OSError."""
    socket.sethostname(name)
