"""The door to a host: carries out what a plan says, on this machine. Everything by `steering.run`."""

from __future__ import annotations

import grp
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from appliance.hosting.ops import (
    TAKEN_MEND,
    Await,
    Drop,
    Each,
    Folder,
    Look,
    Op,
    Put,
    Refuse,
    Run,
    Say,
    When,
    find_taken_reason,
)
from steering.errors import HairpinError
from steering.run import run

SECONDS = 30.0
LINE_LIMIT = 4096


def carry_out(ops: Iterable[Op], say: Callable[[str], None]) -> tuple[str, ...]:
    """The commands that were run and the files that were written, in order.

    Raises HairpinError at the first refusal or failure; what was done until then stays, and the same
    plan goes on from there.
    """
    done: list[str] = []
    _do(ops, say, done)
    return tuple(done)


def _do(ops: Iterable[Op], say: Callable[[str], None], done: list[str]) -> None:
    for op in ops:
        match op:
            case Say(text):
                say(text)
            case Run(argv):
                _run(argv, done)
            case Each(look, argv):
                for word in _look(look).split():
                    _run(tuple(part.replace("{}", word) for part in argv), done)
            case Refuse(reason, mend):
                raise HairpinError(reason, mend)
            case When(look, equals, then, otherwise):
                _do(then if _look(look) == equals else otherwise, say, done)
            case Await(look, seconds, reason, mend):
                _await(look, seconds, reason, mend)
            case Folder(path, like):
                _make_folder(Path(path), like)
            case Put():
                _put(op, done)
            case Drop(paths, folder, sign):
                _drop(paths, Path(folder), sign, done)


def _run(argv: tuple[str, ...], done: list[str]) -> None:
    run(argv, timeout=SECONDS)
    done.append(" ".join(argv))


def _look(look: Look) -> str:
    text = run(look.argv, timeout=SECONDS).stdout
    if look.awk:
        text = run(["awk", look.awk], stdin=text, timeout=SECONDS).stdout
    return text.replace('"', "").rstrip("\n")


def _await(look: Look, seconds: int, reason: str, mend: str) -> None:
    deadline = time.monotonic() + seconds
    while not _look(look):
        if time.monotonic() >= deadline:
            raise HairpinError(reason, mend)
        time.sleep(0.2)


def _give(path: Path, like: str, group: str) -> None:
    if like:
        owner = Path(like).stat()
        os.chown(path, owner.st_uid, owner.st_gid)
    if group:
        os.chown(path, -1, grp.getgrnam(group).gr_gid)


def _make_folder(path: Path, like: str) -> None:
    try:
        missing = [one for one in (path, *path.parents) if not one.is_dir()]
        for one in reversed(missing):
            one.mkdir()
            one.chmod(0o755)
        if missing:
            _give(path, like, "")
    except OSError as fault:
        raise HairpinError(f"{path}: {fault.strerror}", "run it as root") from fault


def _put(put: Put, done: list[str]) -> None:
    path, temporary = Path(put.path), Path(f"{put.path}.new")
    text = put.text.rstrip("\n") + "\n"
    try:
        if path.exists() and path.read_bytes() != text.encode():
            if put.ours is None or _look(put.ours) != put.equals:
                raise HairpinError(find_taken_reason(put), TAKEN_MEND)
        elif path.exists():
            _give(path, put.like, put.group)
            path.chmod(put.mode)
            return
        temporary.unlink(missing_ok=True)
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(text)
        _give(temporary, put.like, put.group)
        temporary.chmod(put.mode)
        temporary.replace(path)
    except KeyError as fault:
        raise HairpinError(
            f"there is no group {put.group}", "set vm.qemuGroup to the one that QEMU runs as"
        ) from fault
    except OSError as fault:
        raise HairpinError(f"{put.path}: {fault.strerror}", "run it as root") from fault
    done.append(f"wrote {put.path}")


def _drop(paths: tuple[str, ...], folder: Path, sign: str, done: list[str]) -> None:
    try:
        for path in map(Path, paths):
            beside = Path(f"{path}.new")
            if path.is_file() and _is_signed(path, sign):
                path.unlink()
                done.append(f"removed {path}")
            if beside.is_file() and (not beside.stat().st_size or _is_signed(beside, sign)):
                beside.unlink()
        if folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
    except OSError as fault:
        raise HairpinError(f"{fault.filename}: {fault.strerror}", "run it as root") from fault


def _is_signed(path: Path, sign: str) -> bool:
    with path.open("rb") as file:
        return sign.encode() in file.readline(LINE_LIMIT)
