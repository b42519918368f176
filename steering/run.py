"""The one door to processes: argument lists only, a time limit always, the exact command logged."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import structlog

from steering.errors import CommandFailed

log = structlog.get_logger("run")


@dataclass(frozen=True, slots=True)
class Finished:
    """How a command ended. ``stdout`` and ``stderr`` are text (UTF-8, undecodable bytes replaced)."""

    status: int
    stdout: str
    stderr: str


def _finish(
    argv: Sequence[str], status: int, stdout: bytes, stderr: bytes, check: bool
) -> Finished:
    ended = Finished(status, stdout.decode(errors="replace"), stderr.decode(errors="replace"))
    if check and status != 0:
        raise CommandFailed(shlex.join(argv), status, ended.stderr or ended.stdout)
    return ended


def run(
    argv: Sequence[str],
    *,
    stdin: str | None = None,
    timeout: float = 30.0,
    check: bool = True,
    env: Mapping[str, str] | None = None,
) -> Finished:
    """Run ``argv`` and wait, at most ``timeout`` seconds.

    ``env`` is added to this process's environment. Raises CommandFailed when the command can't be
    started, takes too long, or (with ``check``) exits with a status other than 0.
    """
    log.debug("run", command=shlex.join(argv))
    try:
        done = subprocess.run(
            list(argv),
            input=None if stdin is None else stdin.encode(),
            stdin=subprocess.DEVNULL if stdin is None else None,
            capture_output=True,
            timeout=timeout,
            check=False,
            env=None if env is None else {**os.environ, **env},
        )
    except subprocess.TimeoutExpired as expired:
        raise CommandFailed(
            shlex.join(argv), None, (expired.stderr or b"").decode(errors="replace")
        ) from expired
    except OSError as fault:
        raise CommandFailed(shlex.join(argv), 127, str(fault)) from fault
    return _finish(argv, done.returncode, done.stdout, done.stderr, check)


async def run_async(
    argv: Sequence[str],
    *,
    stdin: str | None = None,
    timeout: float = 30.0,  # noqa: ASYNC109 - the limit belongs to the command, not to the caller
    check: bool = True,
    env: Mapping[str, str] | None = None,
) -> Finished:
    """As `run`, without blocking the event loop."""
    log.debug("run", command=shlex.join(argv))
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.DEVNULL if stdin is None else asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env=None if env is None else {**os.environ, **env},
        )
    except OSError as fault:
        raise CommandFailed(shlex.join(argv), 127, str(fault)) from fault
    try:
        stdout, stderr = await asyncio.wait_for(
            process.communicate(None if stdin is None else stdin.encode()), timeout
        )
    except (TimeoutError, asyncio.CancelledError) as stopped:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        await process.wait()
        if isinstance(stopped, asyncio.CancelledError):
            raise
        raise CommandFailed(shlex.join(argv), None, "") from stopped
    return _finish(argv, process.returncode or 0, stdout, stderr, check)
