"""Decides when an engine is hung, and how long to wait before it is started again. Pure.

An engine that loads rules does not answer its command socket for seconds, but burns processor time;
one that hangs or was stopped does neither. So silence alone condemns only after a long time, silence
of an idle engine after a short one. Packets that wait while the engine idles are silence, too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

SILENT_LIMIT = 3.0
"""Seconds without an answer, or with packets waiting all the time, of an engine that does nothing."""
BUSY_LIMIT = 180.0
"""Seconds without an answer of an engine that works: longer than any ruleset takes to load."""
IDLE_SHARE = 0.05
"""An engine that used less than this share of one processor did nothing."""
BACKOFF_WINDOW = 60.0
BACKOFF_LIMIT = 30.0


@dataclass(frozen=True, slots=True)
class Beat:
    """An engine at one moment. `at` and `cpu` are in seconds (monotonic, processor time)."""

    at: float
    answered: bool
    waiting: int
    cpu: float


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
    for run, what in ((silent, "did not answer"), (stuck, "left packets waiting")):
        if not run:
            continue
        first = run[0]
        lasted = now.at - first.at
        if lasted >= SILENT_LIMIT and now.cpu - first.cpu < IDLE_SHARE * lasted:
            return f"the engine {what} for {lasted:.1f} s and did nothing"
    if silent and now.at - silent[0].at >= BUSY_LIMIT:
        return f"the engine did not answer for {now.at - silent[0].at:.0f} s"
    return None


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
