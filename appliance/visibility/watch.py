"""The observer's decisions: what nfstream's reports add up to, when a worker has stalled. Pure."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from appliance.visibility.state import Totals

# Long for a loaded machine, short for a person who waits.
START_SECONDS = 60.0
PROGRESS_SECONDS = 8.0
RECORD_SLACK_SECONDS = 20.0
_WRAP = 2**32


@dataclass(frozen=True, slots=True)
class Report:
    """nfstream's own counters of one worker: 32 bits each, they wrap."""

    processed: int
    ignored: int
    dropped: int


def parse_report(line: bytes) -> Report | None:
    """nfstream's report, None for anything else that it prints.

    Its two processes share their standard output: a warning's text may stand before the report.
    """
    try:
        found = json.loads(line[max(0, line.find(b"{")) :])
        return Report(
            int(found["packets_processed"]) % _WRAP,
            int(found["packets_ignored"]) % _WRAP,
            int(found["packets_dropped_filtered_by_kernel"]) % _WRAP,
        )
    except (ValueError, TypeError, KeyError):
        return None


def count_aborted(line: bytes) -> int:
    """How many packets a line of nfstream's standard output says it had no memory for."""
    return line.count(b"Failed to allocate memory space for flow creation")


def parse_beat(line: bytes) -> int | None:
    """The source port of a heartbeat's line, None for any other line."""
    if not line.startswith(b'{"beat":'):
        return None
    try:
        return int(json.loads(line)["beat"])
    except (ValueError, TypeError, KeyError):
        return None


@dataclass(slots=True)
class Worker:
    """What is known of the present worker. Times are monotonic seconds.

    ``processed`` counts heartbeats too. Beats are numbered through all workers: ``first_beat`` is
    the first that this worker could meter, ``sent_beat`` the newest sent when it last reported,
    ``last_beat`` the newest that came back as one of ``beats_recorded`` records. ``aborted`` are
    packets for whose flow there was no memory.
    """

    started: float
    first_beat: int
    processed: int = 0
    ignored: int = 0
    dropped: int = 0
    aborted: int = 0
    recorded: int = 0
    beats_recorded: int = 0
    sent_beat: int = 0
    last_beat: int | None = None
    progressed: float | None = None
    beat_recorded: float | None = None
    _last: Report = field(default_factory=lambda: Report(0, 0, 0))

    def take_report(self, report: Report, sent_beat: int, now: float) -> None:
        before = self._last
        self.sent_beat = sent_beat
        moved = (report.processed - before.processed) % _WRAP
        self.processed += moved
        self.ignored += (report.ignored - before.ignored) % _WRAP
        self.dropped += (report.dropped - before.dropped) % _WRAP
        self._last = report
        if moved:
            self.progressed = now

    def take_beat(self, beat: int, now: float) -> None:
        self.beats_recorded += 1
        self.last_beat = beat
        self.beat_recorded = now

    @property
    def in_flight(self) -> int:
        """Packets of flows that have not expired, by the last report; heartbeats left out.

        Too low by a few until the first heartbeat is recorded: some were sent before the worker
        was capturing.
        """
        last = self.first_beat - 1 if self.last_beat is None else self.last_beat
        beats = self.beats_recorded + max(0, self.sent_beat - last)
        return max(0, self.processed - self.recorded - self.aborted - beats)


def find_fault(
    worker: Worker, now: float, idle_seconds: int, active_seconds: int, *, has_worker: bool
) -> str | None:
    """Why a worker must be replaced, None while it is well.

    nfstream does not notice the death of its worker (``has_worker`` is whether it has one). Two
    proofs that it works: its packet counter moves (heartbeats arrive all the time), and heartbeats come
    back as records. A record takes the idle timeout, and up to the active timeout more behind
    a long flow: nfstream's cache is kept in the order of creation.
    """
    if worker.progressed is None:
        waited = now - worker.started
        return (
            f"no packet metered {waited:.0f} s after its start" if waited > START_SECONDS else None
        )
    if not has_worker:
        return "nfstream's worker died"
    if now - worker.progressed > PROGRESS_SECONDS:
        return f"no packet metered for {now - worker.progressed:.0f} s"
    allowed = idle_seconds + active_seconds + RECORD_SLACK_SECONDS
    waited = now - (worker.started if worker.beat_recorded is None else worker.beat_recorded)
    return f"no heartbeat recorded for {waited:.0f} s" if waited > allowed else None


def build_totals(
    ended: Totals, worker: Worker | None, port: int, flows: int, unwritten: int
) -> Totals:
    """Totals of all workers: those that ended (``ended``) and the present one."""
    return Totals(
        port=port,
        recorded=ended.recorded + (worker.recorded if worker else 0),
        in_flight=worker.in_flight if worker else 0,
        unmetered=ended.unmetered + (worker.ignored if worker else 0),
        dropped=ended.dropped + (worker.dropped if worker else 0),
        lost=ended.lost + (worker.aborted if worker else 0),
        flows=flows,
        unwritten=unwritten,
    )


def end_worker(ended: Totals, worker: Worker) -> Totals:
    """The totals of ended workers with one more: what it had in flight is lost."""
    return ended.model_copy(
        update={
            "recorded": ended.recorded + worker.recorded,
            "unmetered": ended.unmetered + worker.ignored,
            "dropped": ended.dropped + worker.dropped,
            "lost": ended.lost + worker.aborted + worker.in_flight,
        }
    )
