"""Flow monitor: the switch tells what changes in our tables, at once (ovs-ofctl(8), `monitor`)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import structlog

from steering.errors import SwitchError
from steering.pipeline import COOKIE_PREFIX, LEARNED_TABLES, Table
from steering.run import end_process
from steering.switch.openflow import LearnedAddress, parse_learned
from steering.switch.secure import check_openflow
from steering.tasks import wait_at_most
from steering.tls import TlsFiles, find_options

log = structlog.get_logger("monitor")

_PAUSE, _LONGEST_PAUSE = 0.2, 2.0
_NO_NEWS = ("FLOW_MONITOR", "OFPT_ECHO_REQUEST")
PREFIX = f"cookie={COOKIE_PREFIX << 48:#x}"[:-12]


class FlowMonitor:
    """Runs `ovs-ofctl monitor` for as long as the switch answers, and again when it comes back.

    ``on_address`` gets each address as it is learned or changes hands; ``on_change`` is called when a
    flow of ours came, went or changed, whoever did it; ``on_lost`` when the connection ended.

    By TLS it is asked first whose certificate the switch shows, which ovs-ofctl does not look at: one that is
    another's is not followed. ``fault`` says so, and is empty while nothing is wrong.
    """

    def __init__(
        self,
        target: str,
        on_address: Callable[[LearnedAddress], Awaitable[None]],
        on_change: Callable[[], None],
        on_lost: Callable[[], None],
        tls: TlsFiles | None = None,
    ) -> None:
        self._target = target
        self._options = find_options(target, tls)
        self._tls = tls if self._options else None
        self.fault = ""
        self._process: asyncio.subprocess.Process | None = None
        self._on_address = on_address
        self._on_change = on_change
        self._on_lost = on_lost

    async def run(self) -> None:
        """Until cancelled."""
        pause = _PAUSE
        while True:
            try:
                await self._check_peer()
                pause = _PAUSE
                await self._watch()
            except SwitchError as fault:
                pause = min(2 * pause, _LONGEST_PAUSE)
                if fault.reason != self.fault:
                    log.warning("the switch is not followed", reason=fault.reason)
                self.fault = fault.reason
            except OSError as fault:
                log.warning("flow monitor ended", reason=str(fault))
            except Exception:
                # What it told before may be wrong: all is read anew, and it is followed again.
                log.exception("flow monitor failed")
            self._on_lost()
            await asyncio.sleep(pause)

    def restart(self) -> None:
        """Connect anew, where it is over the network.

        ovs-ofctl never asks whether the other end of a connection is still there.
        """
        if self._options and self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    async def _check_peer(self) -> None:
        """Raises SwitchError."""
        if self._tls is not None:
            await asyncio.to_thread(check_openflow, self._target, self._tls)
            self.fault = ""

    async def _watch(self) -> None:
        process = await asyncio.create_subprocess_exec(
            "ovs-ofctl",
            "--no-names",
            *self._options,
            "--unixctl=none",  # a control socket would stay where we are killed
            "monitor",
            self._target,
            "watch:",
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        self._process = process
        try:
            # ovs-ofctl writes what is there at first to standard output, and what happens to error.
            assert process.stdout is not None  # noqa: S101 - asked for above
            async for raw in process.stdout:
                await self._take(raw.decode(errors="replace"))
            # It closed its output, so it is ending; a kill now would race with its reaping.
            with contextlib.suppress(TimeoutError):
                await wait_at_most(process.wait(), 1.0)
        finally:
            if process.returncode is None:
                await end_process(process)

    async def _take(self, line: str) -> None:
        if " event=" not in line:
            # By TLS the switch asks whether ovs-ofctl is there, which it answers, and tells.
            if not any(word in line for word in _NO_NEWS) and line.strip():
                log.warning("flow monitor", said=line.strip())
            return
        if PREFIX not in line:
            return
        if any(f"table={table} " in line for table in LEARNED_TABLES):
            if " event=DELETED" not in line:
                learned = parse_learned(line.strip())
                if learned is not None:
                    await self._on_address(learned)
            return
        # Connections come to take shortcuts, and end, by themselves.
        if f"table={Table.SHORTCUTS.number} " not in line:
            self._on_change()
