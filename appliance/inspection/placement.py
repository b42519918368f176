"""Which cores do what: queues of each lane, where their threads run, how urgent an engine is. Pure.

A lane's packets are shared out to its queues by the pair of addresses and the protocol, so both directions
of a connection, its fragments too, come to one thread in their order (kernel, nf_queue.h: `nfqueue_hash`).
On few cores everything shares all of them: measured, pinning gains nothing there (docs/performance.md).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from appliance.inspection.publish import Placement

PINNED_FROM = 4
"""Cores from which on threads get their own. Below, the switch and the engines need all of them in turn."""
QUEUES_MOST = 16
"""More threads of one engine than this cost more memory than they are likely to bring."""
NICE = -10
"""As urgent as ovs-vswitchd is by its own start script: a packet passes both, twice."""


@dataclass(frozen=True, slots=True)
class Cores:
    """The processor cores of this machine, and those that this process may use (sched_getaffinity(2))."""

    present: int
    usable: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class LanePlacement:
    """``cores``: one for each queue's thread, none where the scheduler chooses; then ``reason`` says why.

    ``others``: the cores of the engine's other threads. ``nice`` as nice(1) has it.
    """

    queues: int
    cores: tuple[int, ...] = ()
    others: tuple[int, ...] = ()
    nice: int = NICE
    reason: str = ""


def find_queue_count(present: int, lanes: int) -> int:
    """How many queues a lane gets that names none: an even share of all cores but the switch's."""
    if present < PINNED_FROM:
        return 1
    return max(1, min(QUEUES_MOST, (present - 1) // max(1, lanes)))


def number_queues(
    wanted: Sequence[tuple[int, ...] | None], present: int
) -> tuple[tuple[int, ...], ...]:
    """Every lane's queue numbers: its own where it names some, else the lowest row that is free."""
    taken = {number for row in wanted for number in row or ()}
    count = find_queue_count(present, len(wanted))
    found: list[tuple[int, ...]] = []
    for row in wanted:
        if row is None:
            first = 0
            while any(number in taken for number in range(first, first + count)):
                first += 1
            row = tuple(range(first, first + count))
            taken.update(row)
        found.append(row)
    return tuple(found)


def find_placement(
    cores: Cores, queues: Mapping[str, int], *, pinned: bool = True, nice: int = NICE
) -> Mapping[str, LanePlacement]:
    """Each lane's by its name. ``queues``: how many it has, in the order of the lanes; ``pinned`` as set.

    The first core stays with the switch, interrupts and everything else; the threads of all lanes take the
    others in turn, so no two share one while there are enough.
    """
    reason = _find_reason(cores, pinned=pinned)
    if reason:
        return MappingProxyType(
            {name: LanePlacement(count, nice=nice, reason=reason) for name, count in queues.items()}
        )
    first, *others = sorted(cores.usable)
    found: dict[str, LanePlacement] = {}
    given = 0
    for name, count in queues.items():
        mine = tuple(others[(given + step) % len(others)] for step in range(count))
        given += count
        found[name] = LanePlacement(count, mine, (first,), nice)
    return MappingProxyType(found)


def _find_reason(cores: Cores, *, pinned: bool) -> str:
    if not pinned:
        return "inspection.pinned is false"
    if len(cores.usable) < cores.present:
        return f"only {len(cores.usable)} of {cores.present} cores may be used here"
    if cores.present < PINNED_FROM:
        return f"{cores.present} cores are shared by all; threads are pinned from {PINNED_FROM} on"
    return ""


@dataclass(frozen=True, slots=True)
class ThreadSight:
    """One thread of an engine as it is: its name (comm), the cores it may use, its niceness."""

    name: str
    cores: tuple[int, ...]
    nice: int


PACKET_THREAD = "W-NFQ#"
"""How Suricata names the threads that take packets from queues, in runmode `workers`."""


def find_placement_faults(wanted: LanePlacement, seen: Iterable[ThreadSight]) -> tuple[str, ...]:
    """How an engine's packet threads are placed other than they should be; empty when they are right.

    Nothing is less inspected for it, so it is told and never ends an engine. A queue without a thread is
    another matter: see `heartbeat.find_hang`.
    """
    threads = [thread for thread in seen if thread.name.startswith(PACKET_THREAD)]
    faults = []
    if len(threads) != wanted.queues:
        faults.append(f"{len(threads)} packet threads for {wanted.queues} queues")
    if wanted.cores:
        have = sorted(thread.cores for thread in threads)
        if have != sorted((core,) for core in wanted.cores):
            shown = ", ".join(format_cores(cores) for cores in have)
            faults.append(f"threads on cores {shown} instead of {format_cores(wanted.cores)}")
    if late := sorted({thread.nice for thread in threads if thread.nice > wanted.nice}):
        faults.append(f"niceness {', '.join(map(str, late))} instead of {wanted.nice}")
    return tuple(faults)


def format_cores(cores: Iterable[int]) -> str:
    return "+".join(map(str, sorted(cores)))


def build_placement(wanted: LanePlacement, seen: Iterable[ThreadSight]) -> Placement:
    """What is published of an engine's packet threads."""
    threads = [thread for thread in seen if thread.name.startswith(PACKET_THREAD)]
    return Placement(
        threads=len(threads),
        cores=tuple(thread.cores for thread in threads),
        nice=max((thread.nice for thread in threads), default=None),
        pinned=bool(wanted.cores),
        reason=wanted.reason,
    )


def format_placement(seen: Placement) -> str:
    """One lane's, for a person."""
    where = (
        f"on cores {', '.join(format_cores(cores) for cores in seen.cores)}"
        if seen.pinned
        else f"on all cores ({seen.reason})"
    )
    return f"{seen.threads} packet thread(s) {where}, niceness {seen.nice}"
