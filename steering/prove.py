"""One run of the coverage ledger: choose witnesses, have the switch trace them, judge, add up.

The traces run in a thread, a batch at a time with a pause after each, since ovs-vswitchd answers them in
the thread that also takes changes of flows. (Frames that the datapath knows pass meanwhile untouched.)
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from steering.ledger import (
    MAX_LISTED,
    ForeignFlow,
    Gap,
    Ledger,
    Result,
    Scene,
    Seen,
    Verdict,
    Violation,
    build_violation,
    find_foreign,
    judge_entry,
    judge_return,
)
from steering.model import Lane, Machine, PolicySet
from steering.rush import Rush
from steering.sampling import Chosen, Sample, choose_witnesses
from steering.switch.foreign import read_foreign
from steering.switch.replica import Replica, find_leg_liveness
from steering.switch.trace import ControlSocket, PortMap
from steering.tls import TlsFiles
from steering.witnesses import TraceRequest, render_entry, render_return

log = structlog.get_logger("prove")

BUDGET = 20_000  # traces a run
BATCH = 10  # traces until the next pause
PAUSE = 0.01  # seconds
MOST_SECONDS = 120.0
AGAIN_AFTER = 0.3  # seconds until what looks like a violation is traced once more
MOST_AGAIN = 1_000


class Prover:
    """Asks one bridge's switch; remembers of the last run only what tells what has changed since.

    ``vswitchd`` is ovs-vswitchd's control socket, ``openflow`` as for ovs-ofctl, ``pause`` in seconds,
    after every ten traces. One run at a time; while ``rush`` is claimed, it rests. With a ``replica``
    in its place the switch is copied before each run, and the copy is asked.
    """

    def __init__(
        self,
        vswitchd: Path | Replica,
        openflow: str,
        *,
        clock: Callable[[], float] = time.time,
        pause: float = PAUSE,
        rush: Rush | None = None,
        tls: TlsFiles | None = None,
    ) -> None:
        self._replica = vswitchd if isinstance(vswitchd, Replica) else None
        self._vswitchd = vswitchd.control if isinstance(vswitchd, Replica) else vswitchd
        self._openflow = openflow
        self._tls = tls
        self._clock = clock
        self._pause = pause
        self._rush = rush or Rush()
        self._known: Mapping[tuple[str, str], int] = {}
        self._lock = asyncio.Lock()

    async def close(self) -> None:
        """End what was begun for it."""
        if self._replica is not None:
            await self._replica.close()

    async def prove(
        self,
        policies: PolicySet,
        machines: Sequence[Machine],
        lanes: Sequence[Lane],
        forwarding: Mapping[str, bool],
        run: int,
        budget: int = BUDGET,
        *,
        addresses: Mapping[str, Sequence[str]] | None = None,
    ) -> Ledger:
        """Trace at most ``budget`` packets (and what looks wrong once more). Raises SwitchError.

        ``forwarding`` is by lane name and is read again at the end, so a mapping that lives is best: a
        lane that fails meanwhile is then no violation. ``run`` counts up from one run to the next.
        ``addresses`` are known ones by vm-id. When cancelled, it ends after the batch.
        """
        async with self._lock:
            stop = threading.Event()
            work = _Work(
                self._vswitchd,
                self._openflow,
                self._tls,
                tuple(lanes),
                forwarding,
                stop,
                self._pause,
                self._rush,
            )

            replica = self._replica
            if replica is not None:
                await replica.open()

            def prove() -> tuple[Ledger, Sample]:
                began = time.monotonic()
                if replica is not None:
                    legs = [(lane.name, leg.interface) for lane in lanes for leg in lane.legs]
                    replica.copy(find_leg_liveness(legs, forwarding))
                sample = choose_witnesses(
                    policies,
                    machines,
                    lanes,
                    run=run,
                    budget=budget,
                    addresses=addresses or {},
                    known=self._known,
                )
                work.do(sample)
                ledger = work.build_ledger(sample, self._clock(), run, time.monotonic() - began)
                return replace(ledger, by_copy=replica is not None), sample

            try:
                ledger, sample = await asyncio.to_thread(prove)
            finally:
                stop.set()
            self._known = sample.fingerprints
            log.info(
                "proved",
                run=run,
                traced=ledger.traced,
                violations=ledger.violation_count,
                seconds=round(ledger.seconds, 3),
            )
            return ledger


def build_prover(
    vswitchd: Path | None,
    ovsdb: str,
    openflow: str,
    bridge: str,
    directory: Path,
    *,
    tls: TlsFiles | None = None,
    rush: Rush | None = None,
) -> Prover | None:
    """By the switch's control socket; over the network by a copy in ``directory``; else there is none."""
    if vswitchd is not None:
        return Prover(vswitchd, openflow, rush=rush, tls=tls)
    if ovsdb.startswith("ssl:") and openflow.startswith("ssl:"):
        return Prover(
            Replica(directory, bridge, ovsdb, openflow, tls), openflow, rush=rush, tls=tls
        )
    return None


@dataclass(frozen=True, slots=True)
class _Asked:
    """A verdict, and the trace that it stands on."""

    chosen: Chosen
    verdict: Verdict
    request: TraceRequest
    seen: Seen


class _Work:
    """One run's traces, in its thread."""

    def __init__(
        self,
        vswitchd: Path,
        openflow: str,
        tls: TlsFiles | None,
        lanes: tuple[Lane, ...],
        forwarding: Mapping[str, bool],
        stop: threading.Event,
        pause: float,
        rush: Rush,
    ) -> None:
        self._rush = rush
        self._openflow = openflow
        self._tls = tls
        self._lanes = lanes
        self._forwarding = forwarding
        self._stop = stop
        self._pause = pause
        self._socket = ControlSocket(vswitchd)
        self._ports: PortMap = {}
        self._traced = 0
        self._results: Counter[Result] = Counter()
        self._gaps: Counter[tuple[str, str, str]] = Counter()
        self._classes: set[object] = set()
        self._pairs: set[tuple[int, int]] = set()
        self._violations: list[Violation] = []
        self._foreign: tuple[ForeignFlow, ...] = ()

    def do(self, sample: Sample) -> None:
        deadline = time.monotonic() + MOST_SECONDS
        with self._socket:
            self._ports = self._socket.read_ports()
            foreign = read_foreign(self._openflow, self._tls)
            self._foreign = find_foreign(foreign, sample.ends, self._lanes)
            scene = self._look(sample)
            doubtful: list[_Asked] = []
            for chosen in sample.chosen:
                if self._stop.is_set() or time.monotonic() > deadline:
                    break
                asked = self._ask(chosen, scene)
                if asked.verdict.result is Result.VIOLATION:
                    doubtful.append(asked)
                else:
                    self._count(asked)
            self._ask_again(doubtful, sample)

    def _look(self, sample: Sample) -> Scene:
        ports = frozenset(end.ofport for end in sample.ends)
        return Scene(self._lanes, dict(self._forwarding), ports)

    def _ask_again(self, doubtful: Sequence[_Asked], sample: Sample) -> None:
        """A flow or a lane may have changed between two traces; what is wrong stays wrong."""
        if not doubtful:
            return
        self._stop.wait(AGAIN_AFTER)
        scene = self._look(sample)
        for asked in doubtful[:MOST_AGAIN]:
            self._count(asked if self._stop.is_set() else self._ask(asked.chosen, scene))
        for asked in doubtful[MOST_AGAIN:]:
            self._count(asked)

    def _ask(self, chosen: Chosen, scene: Scene) -> _Asked:
        request = render_entry(chosen.witness)
        seen = self._trace(request)
        verdict = judge_entry(chosen.witness, chosen.expected, seen, scene)
        treatment = verdict.treatment
        if verdict.result is Result.INSPECTED and treatment is not None:
            lane, leg = treatment.lane, treatment.exit
            if lane is not None and leg is not None:
                request = render_return(chosen.witness, lane, leg)
                seen = self._trace(request)
                verdict = judge_return(chosen.witness, treatment, seen, scene)
        return _Asked(chosen, verdict, request, seen)

    def _trace(self, request: TraceRequest) -> Seen:
        if self._traced % BATCH == BATCH - 1:
            self._stop.wait(self._pause)
        self._rush.wait_free()
        self._traced += 1
        return self._socket.trace(request, self._ports)

    def _count(self, asked: _Asked) -> None:
        witness, verdict = asked.chosen.witness, asked.verdict
        self._results[verdict.result] += 1
        self._classes.add((asked.chosen.pair_class, witness.case))
        self._pairs.add((witness.source.ofport, witness.destination.ofport))
        if verdict.result is Result.BYPASSED:
            self._gaps[witness.source.name, witness.destination.name, verdict.reason] += 1
        if verdict.result is Result.VIOLATION and len(self._violations) < MAX_LISTED:
            expected = asked.chosen.expected
            self._violations.append(
                build_violation(witness, expected, asked.request, asked.seen, verdict.reason)
            )

    def build_ledger(self, sample: Sample, at: float, run: int, seconds: float) -> Ledger:
        gaps = [Gap(name, "", f"can't be traced: {why}") for name, why in sample.without]
        gaps += [Gap(*key, count) for key, count in sorted(self._gaps.items())]
        results = self._results
        return Ledger(
            at=at,
            run=run,
            classes=sample.classes,
            classes_traced=len(self._classes),
            pairs=sample.pairs,
            pairs_traced=len(self._pairs),
            traced=self._traced,
            inspected=results[Result.INSPECTED],
            direct=results[Result.DIRECT],
            denied=results[Result.DENIED],
            bypassed=results[Result.BYPASSED],
            blocked=results[Result.BLOCKED],
            violation_count=results[Result.VIOLATION],
            violations=tuple(self._violations),
            gap_count=len(gaps),
            gaps=tuple(gaps[:MAX_LISTED]),
            foreign_count=len(self._foreign),
            foreign=self._foreign[:MAX_LISTED],
            seconds=seconds,
        )
