"""The lab's state file, its lock, and where both are."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from appliance.lab.plan import ROOT, LabLane, LabState, LabVm, ProcessRecord, check_lab_name
from steering.errors import HairpinError

FORMAT = 1


def render_state(state: LabState) -> str:
    document = asdict(state)
    document["directory"] = str(state.directory)
    return json.dumps({"format": FORMAT, **document}, indent=1)


def parse_state(text: str) -> LabState:
    """A state file's text as a value. Raises HairpinError when it's none of this version's."""
    try:
        document: dict[str, Any] = json.loads(text)
        if document.pop("format") != FORMAT:
            raise ValueError("another format")
        document["directory"] = Path(document["directory"])
        document["vms"] = tuple(LabVm(**vm) for vm in document["vms"])
        document["lanes"] = tuple(
            LabLane(**{**lane, "queues": tuple(lane["queues"])}) for lane in document["lanes"]
        )
        document["processes"] = tuple(ProcessRecord(**record) for record in document["processes"])
        return LabState(**document)
    except (ValueError, TypeError, KeyError, AttributeError) as fault:
        raise HairpinError(
            f"the lab's state file can't be read: {fault}", "run `hairpin lab down`"
        ) from fault


def find_state_file(name: str) -> Path:
    check_lab_name(name)
    return ROOT / name / "lab.json"


def read_state(name: str) -> LabState | None:
    """The lab of that name, None when there's no trace of one."""
    try:
        text = find_state_file(name).read_text()
    except FileNotFoundError:
        return None
    return parse_state(text)


def write_state(state: LabState) -> LabState:
    """Put the state on disk, whole or not at all; returns it."""
    target = state.directory / "lab.json"
    scratch = state.directory / "lab.json.new"
    with os.fdopen(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(render_state(state))
    scratch.rename(target)
    return state


@contextlib.contextmanager
def hold_lock(name: str, seconds: float = 5.0) -> Iterator[None]:
    """Keep every other command off this lab meanwhile; the kernel lets go when the process dies.

    Raises HairpinError when another command still works on the lab after ``seconds``.
    """
    check_lab_name(name)
    path = ROOT / f"{name}.lock"
    deadline = time.monotonic() + seconds
    while True:
        ROOT.mkdir(mode=0o711, parents=True, exist_ok=True)
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        except FileNotFoundError:
            continue  # the last lab went away between the two lines
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The holder before us removes the file: a lock on a removed file locks nobody out.
            with contextlib.suppress(FileNotFoundError):
                if os.stat(path).st_ino == os.fstat(handle).st_ino:
                    break
        except BlockingIOError:
            pass
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)
        if time.monotonic() >= deadline:
            raise HairpinError(
                f"another command is working on the lab {name!r}", "wait until it has ended"
            )
        time.sleep(0.05)
    try:
        yield
    finally:
        if not (ROOT / name).exists():
            path.unlink(missing_ok=True)
        os.close(handle)
        with contextlib.suppress(OSError):
            ROOT.rmdir()
