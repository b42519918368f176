"""The door to the kernel's packet rules: applies what `queueing` rendered, and reads it back."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog

from appliance.inspection import queueing
from appliance.inspection.counting import (
    FrameCounters,
    build_frame_counters,
    parse_nftables_counters,
)
from appliance.inspection.queueing import Dialect
from steering.errors import CommandFailed, HairpinError
from steering.model import Lane
from steering.run import run_async

log = structlog.get_logger("inspection.netfilter")

PROC_SYS = Path("/proc/sys")


@dataclass(frozen=True, slots=True)
class QueueCounters:
    """One NFQUEUE as the kernel counts it. `dropped`: the queue was full; `user_dropped`: no answer
    could be sent to the engine; `packets`: all that were queued since it was bound. `listener` is the
    netlink port that bound it: where that changes, the others began anew."""

    number: int
    waiting: int
    dropped: int
    user_dropped: int
    packets: int
    listener: int = 0


def parse_queue_counters(text: str) -> tuple[QueueCounters, ...]:
    """From /proc/net/netfilter/nfnetlink_queue (kernel, nfnetlink_queue.c, seq_show).

    Columns: queue, port id, waiting, copy mode, copy range, dropped, user dropped, sequence, 1.
    """
    counters = []
    for line in text.splitlines():
        columns = line.split()
        if len(columns) < 8 or not all(column.isdigit() for column in columns[:8]):
            continue
        number, listener, waiting, _, _, dropped, user_dropped, packets = map(int, columns[:8])
        counters.append(
            QueueCounters(number, waiting, dropped, user_dropped, packets, listener=listener)
        )
    return tuple(counters)


def read_queue_counters() -> tuple[QueueCounters, ...]:
    """Of this process's network namespace; none while nothing is bound."""
    try:
        return parse_queue_counters(Path("/proc/self/net/netfilter/nfnetlink_queue").read_text())
    except OSError:
        return ()


async def find_dialect(wanted: str = "auto") -> Dialect:
    """The dialect this kernel speaks, nftables where its bridge family can queue.

    The probe is checked by the kernel and never applied.
    """
    if wanted != "auto":
        return Dialect(wanted)
    try:
        probe = await run_async(
            queueing.NFT_CHECK, stdin=queueing.render_nftables_probe(), check=False
        )
    except CommandFailed:
        return Dialect.IPTABLES
    return Dialect.NFTABLES if probe.status == 0 else Dialect.IPTABLES


@dataclass(frozen=True, slots=True)
class FrameSample:
    """Every lane's frames, by its number, and the queues as they were then.

    Counted from `since`, when the rules were written, to `at` (epoch); it was read within `took` seconds.
    """

    at: float
    took: float
    since: float
    lanes: Mapping[int, FrameCounters]
    queues: tuple[QueueCounters, ...]


class Netfilter:
    """The queue rules of all lanes, in one dialect. `frames` is what they had counted at the last look."""

    def __init__(self, dialect: Dialect, lanes: Sequence[Lane]) -> None:
        self.dialect = dialect
        self.lanes = tuple(lanes)
        self.frames: FrameSample | None = None
        self._since = 0.0
        self._listing: tuple[str, ...] | None = None

    async def find_faults(self) -> tuple[str, ...]:
        """How the kernel differs from what was rendered; empty when it is right. Reads `frames`, too."""
        if self.dialect is Dialect.NFTABLES:
            drift = await self._find_nftables_faults()
            began = time.time()
            queues = read_queue_counters()
            listed = await run_async(queueing.NFT_COUNTERS, check=False)
            if counted := parse_nftables_counters(self.lanes, listed.stdout):
                self._keep_frames(began, counted, queues)
            return drift
        began = time.time()
        queues = read_queue_counters()
        # One process for both tables: what entered and what left are of the same millisecond.
        both = queueing.split_tables((await run_async(queueing.EBTABLES_SAVE)).stdout)
        entering, leaving = both.get("filter", ""), both.get("nat", "")
        self._keep_frames(began, build_frame_counters(self.lanes, entering, leaving), queues)
        saved = await self._read_tables(queueing.TABLES[2:])
        saved |= {
            kind.name: text
            for kind, text in zip(queueing.TABLES, (entering, leaving), strict=False)
        }
        faults = [
            f"{name.replace('/', '.')} is {present!r} instead of {wanted}"
            for name, wanted in queueing.SYSCTLS.items()
            if (present := _read_sysctl(name)) != wanted
        ]
        for kind in queueing.TABLES:
            faults += queueing.find_table_faults(kind, self.lanes, saved[kind.name])
        return tuple(faults)

    async def apply(self) -> None:
        """Make the rules right and read them back. Raises CommandFailed, HairpinError."""
        if self.dialect is Dialect.NFTABLES:
            await run_async(queueing.NFT_APPLY, stdin=queueing.render_nftables(self.lanes))
            self._listing = await self._read_listing()
        else:
            for script in queueing.render_iptables(self.lanes, await self._read_tables()):
                await run_async(script.argv, stdin=script.text)
            await self._write_sysctls()
        self._since = time.time()
        if faults := await self.find_faults():
            raise HairpinError(
                f"the queue rules read back other than they were written: {'; '.join(faults)}",
                "look for another program that changes this host's firewall",
            )
        log.info("queue rules applied", dialect=self.dialect, lanes=len(self.lanes))

    async def remove(self) -> None:
        """Take the rules away. The lanes' bridges must be gone first: without rules they forward."""
        if self.dialect is Dialect.NFTABLES:
            await run_async(queueing.NFT_APPLY, stdin=queueing.render_nftables_removal())
            return
        for script in queueing.render_iptables_removal(await self._read_tables()):
            await run_async(script.argv, stdin=script.text)

    def _keep_frames(
        self, began: float, counted: Mapping[int, FrameCounters], queues: tuple[QueueCounters, ...]
    ) -> None:
        now = time.time()
        self.frames = FrameSample(now, now - began, self._since, counted, queues)

    async def _read_tables(
        self, tables: Sequence[queueing.TableKind] = queueing.TABLES
    ) -> dict[str, str]:
        return {kind.name: (await run_async(kind.save)).stdout for kind in tables}

    async def _write_sysctls(self) -> None:
        if not (PROC_SYS / "net/bridge").is_dir():
            with contextlib.suppress(CommandFailed):
                await run_async(("modprobe", "br_netfilter"))
        for name, wanted in queueing.SYSCTLS.items():
            try:
                (PROC_SYS / name).write_text(wanted)
            except OSError as fault:
                raise HairpinError(
                    f"{name.replace('/', '.')} can't be set: {fault.strerror}",
                    "load br_netfilter",
                ) from fault

    async def _read_listing(self) -> tuple[str, ...]:
        listed = await run_async(queueing.NFT_LIST, check=False)
        return queueing.normalize_listing(listed.stdout) if listed.status == 0 else ()

    async def _find_nftables_faults(self) -> tuple[str, ...]:
        # nft prints the same rules in other words from version to version, so what was listed right
        # after an atomic application is the measure, and its number of rules must be ours.
        listed = await self._read_listing()
        if not listed:
            return (f"the table bridge {queueing.CHAIN} is missing",)
        wanted = queueing.count_nftables_rules(queueing.render_nftables(self.lanes))
        present = queueing.count_nftables_rules("\n".join(listed))
        if present != wanted:
            return (f"the table bridge {queueing.CHAIN} has {present} rules instead of {wanted}",)
        if self._listing is not None and listed != self._listing:
            return (f"the table bridge {queueing.CHAIN} was changed",)
        return ()


def _read_sysctl(name: str) -> str | None:
    try:
        return (PROC_SYS / name).read_text().strip()
    except OSError:
        return None
