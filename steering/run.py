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
from steering.tasks import wait_at_most

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
    return await _communicate(argv, process, stdin, timeout, check=check)


async def end_process(process: asyncio.subprocess.Process) -> None:
    """Kill a process and wait for its end, however much it had printed.

    asyncio tells of an end only once it saw the ends of the outputs, and it stops reading one when much
    of it waits to be taken: `wait` alone would never return, and hold whatever lock its caller has.
    """
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.communicate()


async def _communicate(
    argv: Sequence[str],
    process: asyncio.subprocess.Process,
    stdin: str | None,
    timeout: float,  # noqa: ASYNC109 - the limit belongs to the command, not to the caller
    *,
    check: bool,
) -> Finished:
    try:
        stdout, stderr = await wait_at_most(
            process.communicate(None if stdin is None else stdin.encode()), timeout
        )
    except (TimeoutError, asyncio.CancelledError) as stopped:
        await end_process(process)
        if isinstance(stopped, asyncio.CancelledError):
            raise
        raise CommandFailed(shlex.join(argv), None, "") from stopped
    return _finish(argv, process.returncode or 0, stdout, stderr, check)


class SpareCommand:
    """A command that is begun before its input is known: it waits for it, and so what is asked next does not

    wait for the process to be started (5 ms). Once it was asked, another one is begun.
    """

    def __init__(self, argv: Sequence[str], *, timeout: float = 30.0) -> None:
        self._argv = tuple(argv)
        self._timeout = timeout
        self._spare: asyncio.subprocess.Process | None = None
        self._beginning: asyncio.Task[None] | None = None

    async def begin(self) -> None:
        """Have one waiting. One that can't be started is told by `run`."""
        if self._spare is not None and self._spare.returncode is None:
            return
        with contextlib.suppress(OSError):
            self._spare = await asyncio.create_subprocess_exec(
                *self._argv,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
            )

    async def run(self, stdin: str) -> Finished:
        """As `run_async`, by the one that waits; without one, by one of its own."""
        process, self._spare = self._spare, None
        if process is None or process.returncode is not None:
            return await run_async(self._argv, stdin=stdin, timeout=self._timeout)
        log.debug("run", command=shlex.join(self._argv))
        if process.stdin is not None:
            # Before anything else has its turn on the event loop; a pipe takes most of it at once.
            with contextlib.suppress(OSError):
                process.stdin.write(stdin.encode())
        try:
            return await _communicate(self._argv, process, "", self._timeout, check=True)
        finally:
            self._beginning = asyncio.create_task(self.begin(), name="spare command")

    async def close(self) -> None:
        if self._beginning is not None:
            await self._beginning
        process, self._spare = self._spare, None
        if process is None:
            return
        if process.stdin is not None:
            process.stdin.close()
        await end_process(process)
