"""Decides when an engine is hung, and how long to wait before it is started again. Pure.

An engine that loads rules does not answer its command socket for seconds, but burns processor time;
one that hangs or was stopped does neither. So silence alone condemns only after a long time, silence
of an idle engine after a short one. Packets that wait while the engine idles are silence, too, and so
are packets that are queued while the engine, busy or not, counts none. Of several packet threads one
may hang alone, so each queue is looked at by itself, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

SILENT_LIMIT = 3.0
"""Seconds without an answer, or with packets waiting all the time, of an engine that does nothing."""
BUSY_LIMIT = 180.0
"""Seconds without an answer of an engine that works: longer than any ruleset takes to load."""
STALLED_LIMIT = 8.0
"""Seconds in which an engine counts no packet while some are queued. It counts every 3 s, tells it each second."""
IDLE_SHARE = 0.05
"""An engine that used less than this share of one processor did nothing."""
BACKOFF_WINDOW = 60.0
BACKOFF_LIMIT = 30.0


@dataclass(frozen=True, slots=True)
class QueueBeat:
    """One queue at one moment: packets that wait for a verdict, and packets that were given one."""

    number: int
    waiting: int
    given_back: int


@dataclass(frozen=True, slots=True)
class Beat:
    """An engine at one moment. `at` and `cpu` are in seconds (monotonic, processor time).

    `queued`: packets that its queues were given, `taken`: those that it says it took; None: not known.
    `queues`: each by itself, where it has several. `untaken`: the lane's queues that nobody takes packets
    from, while somebody does from another.
    """

    at: float
    answered: bool
    waiting: int
    cpu: float
    queued: int = 0
    taken: int | None = None
    queues: tuple[QueueBeat, ...] = ()
    untaken: tuple[int, ...] = ()

    @property
    def given_back(self) -> int:
        """Packets that the engine has decided, as the queue sees it."""
        return self.queued - self.waiting


def prune_beats(beats: Sequence[Beat], now: float) -> tuple[Beat, ...]:
    """The beats that a decision still needs."""
    return tuple(beat for beat in beats if now - beat.at <= BUSY_LIMIT + 10.0)


def find_hang(beats: Sequence[Beat]) -> str | None:
    """Why the engine counts as hung, or None. `beats` are in order of time."""
    if not beats:
        return None
    now = beats[-1]
    silent = _trailing(beats, lambda beat: not beat.answered)
    stuck = _trailing(beats, lambda beat: beat.waiting > 0)
    # With traffic some always wait, and a light load is no work to speak of: given back counts.
    if stuck and now.given_back > stuck[0].given_back:
        stuck = ()
    for run, what in ((silent, "did not answer"), (stuck, "left packets waiting")):
        if not run:
            continue
        first = run[0]
        lasted = now.at - first.at
        if lasted >= SILENT_LIMIT and now.cpu - first.cpu < IDLE_SHARE * lasted:
            return f"the engine {what} for {lasted:.1f} s and did nothing"
    if reason := _find_stall(beats) or _find_stuck_queue(beats) or _find_untaken_queue(beats):
        return reason
    if silent and now.at - silent[0].at >= BUSY_LIMIT:
        return f"the engine did not answer for {now.at - silent[0].at:.0f} s"
    return None


def _find_stall(beats: Sequence[Beat]) -> str | None:
    """A packet thread that does nothing for its queue, however busy the engine is and whatever it answers."""
    now = beats[-1]
    if now.taken is None or not now.answered:
        return None
    same = _trailing(beats, lambda beat: beat.taken == now.taken and beat.answered)
    lasted = now.at - same[0].at
    # What is queued in the last seconds may not be counted yet; what came before must be.
    early = [beat for beat in same if now.at - beat.at >= STALLED_LIMIT / 2]
    if lasted < STALLED_LIMIT or not early or early[-1].queued <= same[0].queued:
        return None
    queued = now.queued - same[0].queued
    return f"the engine counted no packet for {lasted:.1f} s while {queued} were queued"


def _find_stuck_queue(beats: Sequence[Beat]) -> str | None:
    """One of several queues whose packets wait while the others' go on: its thread does nothing."""
    now = beats[-1]
    if len(now.queues) < 2:
        return None
    for queue in now.queues:

        def holds(beat: Beat, same: QueueBeat = queue) -> bool:
            # A queue that was bound anew counts from 0 again: another `given_back`, another run.
            return any(
                one.number == same.number and one.waiting and one.given_back == same.given_back
                for one in beat.queues
            )

        alike = _trailing(beats, holds)
        if alike and (lasted := now.at - alike[0].at) >= STALLED_LIMIT:
            return (
                f"queue {queue.number} gave no packet back for {lasted:.1f} s "
                f"while {queue.waiting} waited"
            )
    return None


def _find_untaken_queue(beats: Sequence[Beat]) -> str | None:
    """Packets that the rules give to a queue of nobody's are dropped, and BFD may pass by another one.

    So an engine that was adopted, and began when the lane had fewer queues, would cut part of all connections.
    """
    now = beats[-1]
    for number in now.untaken:
        alike = _trailing(beats, lambda beat, same=number: same in beat.untaken)  # type: ignore[misc]
        if (lasted := now.at - alike[0].at) >= STALLED_LIMIT:
            return f"nobody took packets from queue {number} for {lasted:.1f} s"
    return None


def find_untaken(wanted: Iterable[int], bound: Iterable[int]) -> tuple[int, ...]:
    """Those of a lane's queues that nobody bound. None while none is: that engine does not run yet."""
    there = set(bound)
    return tuple(number for number in wanted if number not in there) if there else ()


def _trailing(beats: Sequence[Beat], holds: Callable[[Beat], bool]) -> Sequence[Beat]:
    start = len(beats)
    while start and holds(beats[start - 1]):
        start -= 1
    return beats[start:]


def find_restart_delay(exits: Sequence[float], now: float) -> float:
    """Seconds to wait before the next start: none after the first exit in a minute, then doubling.

    `exits` are the moments of earlier exits, the last one included.
    """
    recent = sum(1 for moment in exits if now - moment <= BACKOFF_WINDOW)
    return 0.0 if recent <= 1 else float(min(BACKOFF_LIMIT, 0.5 * 2 ** (recent - 2)))
