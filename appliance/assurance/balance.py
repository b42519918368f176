"""Whether every packet that the switch sent into a lane is accounted for. Pure.

    into = inspected + dropped + lost + refused + lost_with_engine + vanished + unexplained

Nobody reads all counters at one moment. The switch's (userspace datapath) are up to a second old, the
engine's up to five, and `inspect` looks every 2 s. A tolerance in percent would hide a small black hole
for ever, and a change of load would break it. So what is compared is what the lag can't touch:

- *Wires.* `into - returned` is made of two counters that the switch pushes in the same sweep, so their
  common lag cancels and only packets that are in the lane remain. From it is taken what was lost *inside*
  by a later look of the service host: losses only grow, so a later look never explains too little.
- *Inside.* What entered, waits and left is counted by the kernel within one look. What did not leave
  must be told by the queue, or by a *later* word of the engine, which again never explains too little.

Both differences are kept since the counters began, so a hole adds up, however small, while lag does not.
What remains is a sweep, or a burst, that fell just between two readings; it is gone in the next one.
Therefore the median of five comparisons is believed, and a balance that stays open for
`BALANCE_LIMIT_SECONDS`. (Simulated with random moments, lags, loads and bursts: no false alarm, and a
hole of 1 % at 200 packets/s is told within 30 s.)

A loss that is over (a leg was down for a second) was told while the balance stayed open; when it has not
grown for `SETTLED_SECONDS` it is booked as `vanished`, and the comparison begins anew.

A counter that begins anew (switch restarted, rules written again) begins the comparison anew. Where an
engine ended, what it had taken and not told of is `lost_with_engine`. More returned than entered is not
looked for here: forged frames in a lane's VLAN are dropped by the switch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from appliance.inspection.publish import LaneCounters
from steering.counters import Counters

BALANCE_LIMIT_SECONDS = 10.0
SETTLED_SECONDS = 20.0
ENGINE_LAG_SECONDS = 5.0
"""Packet threads sum up every 3 s (Suricata, STATS_WUT_TTS), the sum is told each second, read each second."""
SKEW_SECONDS = 0.02
"""How far apart two counters of one reading may be: the switch pushes them one after the other."""
SLACK_PACKETS = 5
QUEUE_LENGTH = 4096
"""Packets that a queue may hold (Suricata, source-nfq.c)."""
_MOST_PENDING = 120
_COMPARED = 5
"""Readings of the switch of which the median is believed."""


@dataclass(frozen=True, slots=True)
class SwitchSample:
    """One lane in the switch at `at` (epoch). `into` and `returned` by counter: each is reset by itself."""

    at: float
    into: Mapping[str, int]
    returned: Mapping[str, int]
    bypassed: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    blocked: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def inside(self) -> int:
        """Packets that went in and did not come back."""
        return sum(self.into.values()) - sum(self.returned.values())


@dataclass(frozen=True, slots=True)
class HostSample:
    """One lane in the service host at `at`, counted since `since`, read within `took` seconds.

    `queued` and `queue_lost` since the queues were bound by `listeners`; none while nobody listens.
    """

    at: float
    since: float
    took: float
    in_tagged: int
    in_untagged: int
    out_tagged: int
    out_untagged: int
    refused: int
    unmarked: int
    waiting: int = 0
    queue_lost: int = 0
    queues: int = 1
    listeners: tuple[int, ...] = ()

    @property
    def ended(self) -> int:
        """Frames that entered and neither left nor wait."""
        entered, left = self.in_tagged + self.in_untagged, self.out_tagged + self.out_untagged
        return entered - left - self.unmarked - self.waiting

    @property
    def plain_ended(self) -> int:
        return self.in_untagged - self.out_untagged

    @property
    def explained(self) -> int:
        """Steered packets that the service host kept; those that wait included."""
        return self.refused + self.in_tagged - self.out_tagged


@dataclass(frozen=True, slots=True)
class EngineSample:
    """What an engine said at `at`; `key` is another one for every engine process."""

    at: float
    key: tuple[int, float]
    dropped: int


@dataclass(frozen=True, slots=True)
class Totals:
    """Packets since the book was opened."""

    into: int = 0
    inspected: int = 0
    dropped: int = 0
    lost: int = 0
    refused: int = 0
    lost_with_engine: int = 0
    vanished: int = 0
    bypassed: int = 0
    blocked: int = 0

    def add(self, **more: int) -> Totals:
        return replace(
            self, **{name: getattr(self, name) + max(0, count) for name, count in more.items()}
        )


@dataclass(frozen=True, slots=True)
class Verdict:
    """How the comparisons of one kind went: `unexplained` packets by the median of the last `most`.

    `open_since` is when the first comparison was made of those that have failed since. `recent` are
    (when, unexplained, how many of these may be chance).
    """

    most: int = 1
    recent: tuple[tuple[float, int, float], ...] = ()
    unexplained: int = 0
    open_since: float | None = None

    def judge(self, at: float, unexplained: int, slack: float) -> Verdict:
        recent = (*self.recent, (at, unexplained, slack))[-self.most :]
        over = [one for one in recent if one[1] > one[2]]
        if len(over) <= self.most // 2:
            return replace(self, recent=recent, unexplained=0, open_since=None)
        since = over[0][0] if self.open_since is None else self.open_since
        middle = sorted(one[1] for one in recent)[len(recent) // 2]
        return replace(self, recent=recent, unexplained=max(1, middle), open_since=since)

    def begin(self) -> Verdict:
        """As if nothing had been compared yet."""
        return Verdict(self.most)


@dataclass(frozen=True, slots=True)
class LaneBook:
    """All that is kept of one lane between samples. Begin with `LaneBook(name)`."""

    lane: str
    since: float | None = None
    totals: Totals = Totals()
    switch: SwitchSample | None = None
    switch_rate: float = 0.0
    host: HostSample | None = None
    engine: EngineSample | None = None
    wires: Verdict = Verdict(_COMPARED)
    begun: tuple[int, ...] = ()
    """The last values of `into - returned - explained`, each rather too high; see `_find_base`."""
    base: int | None = None
    """What that difference was when nothing was missing yet; None: not known yet."""
    waiting: tuple[tuple[SwitchSample, float], ...] = ()
    """Switch samples, each with its slack, that wait for a later look of the service host."""
    inside: Verdict = Verdict()
    taken: int = 0
    """Packets that the queue's present listener got and that did not leave."""
    listener: tuple[int, float] | None = None
    """The engine that is that listener; None: it has not told anything yet."""
    told: int = 0
    """Packets that this engine says it dropped, since it began or the comparison did."""
    former: tuple[int, float] | None = None
    """The engine that ended; its last word may still be shown."""
    untold: tuple[tuple[float, int, float], ...] = ()
    """(at, taken, slack), waiting for a later word of the engine."""
    steady: tuple[int, float] | None = None
    """(unexplained, since when it has not grown)."""


@dataclass(frozen=True, slots=True)
class Balance:
    """A lane's packets from `since` to `until` (epoch), and whether they are all accounted for.

    `closes` is False when no comparison closed for `BALANCE_LIMIT_SECONDS`; `unclosed_since` is the
    first of those that failed since. `reason` says where packets go, or "".
    """

    lane: str
    since: float
    until: float
    into: int
    inspected: int
    dropped: int
    lost: int
    refused: int
    bypassed: int
    blocked: int
    lost_with_engine: int
    vanished: int
    unexplained: int
    closes: bool
    unclosed_since: float | None
    reason: str


def build_switch_sample(at: float, counters: Counters, lane: str) -> SwitchSample:
    """From what the switch counted, read at `at` (epoch)."""

    def find(kind: str) -> Mapping[str, int]:
        return {
            one.name: one.count.packets
            for one in counters.tallies
            if (one.kind, one.key) == (kind, lane)
        }

    return SwitchSample(at, find("into"), find("returned"), find("bypassed"), find("blocked"))


def build_host_sample(counters: LaneCounters) -> HostSample | None:
    """From what `inspect` published; None while it has not counted yet."""
    if counters.frames_at is None or counters.frames_since is None:
        return None
    queues = counters.frames_queues
    return HostSample(
        at=counters.frames_at,
        since=counters.frames_since,
        took=counters.frames_took,
        in_tagged=counters.frames_in_tagged,
        in_untagged=counters.frames_in_untagged,
        out_tagged=counters.frames_out_tagged,
        out_untagged=counters.frames_out_untagged,
        refused=counters.frames_refused,
        unmarked=counters.frames_unmarked,
        waiting=sum(queue.waiting for queue in queues),
        queue_lost=sum(queue.dropped + queue.user_dropped for queue in queues),
        queues=max(1, len(queues)),
        listeners=tuple(queue.listener for queue in queues),
    )


def build_engine_sample(counters: LaneCounters) -> EngineSample | None:
    """From what `inspect` published; None while no engine has told anything."""
    told = counters.engine
    if told is None:
        return None
    return EngineSample(told.at, (told.pid, told.started), told.blocked + told.rejected)


def record_switch(book: LaneBook, sample: SwitchSample) -> LaneBook:
    """The book after the switch was read. Read `into` before `returned` where they are read apart."""
    last = book.switch
    if last is None or sample.at <= last.at:
        return replace(book, since=book.since or sample.at, switch=last or sample)
    grown = {
        name: _find_growth(getattr(last, name), getattr(sample, name))
        for name in ("into", "returned", "bypassed", "blocked")
    }
    rate = grown["into"] / (sample.at - last.at)
    slack = SLACK_PACKETS + max(rate, book.switch_rate) * SKEW_SECONDS
    book = replace(
        book,
        switch=sample,
        switch_rate=rate,
        totals=book.totals.add(
            into=grown["into"],
            inspected=grown["returned"],
            bypassed=grown["bypassed"],
            blocked=grown["blocked"],
        ),
    )
    if _fell(last.into, sample.into) or _fell(last.returned, sample.returned):
        return replace(book, begun=(), base=None, waiting=(), wires=book.wires.begin())
    return replace(book, waiting=(*book.waiting, (sample, slack))[-_MOST_PENDING:])


def record_host(
    book: LaneBook, sample: HostSample | None, engine: EngineSample | None = None
) -> LaneBook:
    """The book after the service host was read. A sample that was recorded already changes nothing."""
    book = _record_engine(book, engine)
    last = book.host
    if sample is None or (last is not None and sample.at <= last.at):
        return _judge_inside(book)
    if last is None or _began_anew(last, sample):
        # The rules count anew: so does everything that is compared with them.
        return replace(
            book,
            host=sample,
            begun=(),
            base=None,
            waiting=tuple(one for one in book.waiting if one[0].at >= sample.at),
            wires=book.wires.begin(),
            inside=book.inside.begin(),
            taken=0,
            told=0,
            untold=(),
        )
    book = _judge_wires(book, last, sample)
    return _judge_inside(replace(_record_inside(book, last, sample), host=sample))


def _find_growth(last: Mapping[str, int], now: Mapping[str, int]) -> int:
    """As `steering.accounting` grows a counter: one that fell, or is new, began at 0."""
    grown = 0
    for name, count in now.items():
        before = last.get(name, 0)
        grown += count - before if count >= before else count
    return grown


def _fell(last: Mapping[str, int], now: Mapping[str, int]) -> bool:
    return last.keys() != now.keys() or any(now[name] < count for name, count in last.items())


def _began_anew(last: HostSample, now: HostSample) -> bool:
    counted = ("in_tagged", "in_untagged", "out_tagged", "out_untagged", "refused", "unmarked")
    return now.since != last.since or any(getattr(now, n) < getattr(last, n) for n in counted)


# --- wires -----------------------------------------------------------------------------------------


def _judge_wires(book: LaneBook, last: HostSample, now: HostSample) -> LaneBook:
    """Compare every switch sample that was taken before this look of the service host."""
    held = _find_held(last, now)
    kept = []
    for sample, slack in book.waiting:
        if sample.at > now.at:
            kept.append((sample, slack))
        else:
            book = _find_base(book, last, sample)
            if book.base is None:
                continue
            unexplained = sample.inside - now.explained - book.base - held
            book = replace(book, wires=book.wires.judge(sample.at, unexplained, slack))
    return replace(book, waiting=tuple(kept))


def _find_base(book: LaneBook, last: HostSample, sample: SwitchSample) -> LaneBook:
    """The least that the difference ever was, for some readings in a row.

    Taken with an earlier look, without what waited then, nor what entered while it was taken: so too
    little is explained here, and later on nothing is missing that is not.
    """
    if sample.at < last.at:
        return book
    entered = round(book.switch_rate * (last.took + SKEW_SECONDS))
    begun = sample.inside - (last.explained - last.waiting - entered)
    window = (*book.begun, begun)[-_COMPARED:]
    if len(window) < _COMPARED:
        return replace(book, begun=window)
    highest = sorted(window)[-2]
    return replace(
        book, begun=window, base=highest if book.base is None else min(book.base, highest)
    )


def _find_held(last: HostSample, now: HostSample) -> int:
    """How many packets the queues may have held between two looks. One that overflowed was full."""
    capacity = QUEUE_LENGTH * max(last.queues, now.queues)
    if now.queue_lost != last.queue_lost or now.listeners != last.listeners:
        return capacity
    return min(capacity, 2 * max(last.waiting, now.waiting))


# --- inside ----------------------------------------------------------------------------------------


def _record_engine(book: LaneBook, engine: EngineSample | None) -> LaneBook:
    last = book.engine
    if engine is None or engine == last:
        return book
    same = last is not None and engine.key == last.key
    grown = engine.dropped - (last.dropped if same and last is not None else 0)
    # What an engine had dropped before it was met first is not of this book.
    grown = 0 if last is None else max(0, grown)
    book = replace(book, engine=engine, totals=book.totals.add(dropped=grown))
    if engine.key == book.former:
        return book
    if book.listener is None:
        return replace(book, listener=engine.key, told=grown)
    # Another engine's word, before the queue showed another listener, is kept for then.
    return replace(book, told=book.told + grown) if engine.key == book.listener else book


def _record_inside(book: LaneBook, last: HostSample, now: HostSample) -> LaneBook:
    """What became of packets inside between two looks, as far as the kernel knows."""
    ended = now.ended - last.ended
    plain = max(0, now.plain_ended - last.plain_ended)
    refused = now.refused - last.refused + now.unmarked - last.unmarked
    totals = book.totals.add(refused=refused)
    if not now.listeners and not last.listeners:
        return replace(book, totals=totals.add(refused=ended - plain))
    if now.listeners != last.listeners:
        return _end_listener(replace(book, totals=totals), last, now, ended - plain)
    lost = now.queue_lost - last.queue_lost
    took = book.taken + ended - lost
    rate = (now.in_tagged + now.in_untagged - last.in_tagged - last.in_untagged) / (
        now.at - last.at
    )
    slack = SLACK_PACKETS + rate * (now.took + SKEW_SECONDS)
    return replace(
        book,
        totals=totals.add(lost=lost - plain),
        taken=took,
        untold=(*book.untold, (now.at, took, slack))[-_MOST_PENDING:],
    )


def _end_listener(book: LaneBook, last: HostSample, now: HostSample, ended: int) -> LaneBook:
    """The queue has another listener, or none, or one again; `ended` steered packets meanwhile."""
    fresh = replace(book, taken=0, untold=(), inside=book.inside.begin())
    totals = book.totals.add(lost=now.queue_lost)
    ended -= now.queue_lost
    if not last.listeners:
        return replace(fresh, totals=totals.add(refused=ended))
    # What the former one had taken, or dropped and not told of, nobody will tell any more.
    totals = totals.add(lost_with_engine=max(0, ended) + max(0, book.taken - book.told))
    engine = book.engine
    ahead = engine is not None and engine.key not in (book.listener, book.former)
    if engine is not None and ahead:
        return replace(
            fresh, totals=totals, former=book.listener, listener=engine.key, told=engine.dropped
        )
    former = book.former if book.listener is None else book.listener
    return replace(fresh, totals=totals, former=former, listener=None, told=0)


def _judge_inside(book: LaneBook) -> LaneBook:
    """Compare what was taken with what the same engine said afterwards."""
    engine = book.engine
    if engine is None or engine.key != book.listener:
        return book
    kept = []
    for at, taken, slack in book.untold:
        if engine.at < at + ENGINE_LAG_SECONDS:
            kept.append((at, taken, slack))
        else:
            book = replace(book, inside=book.inside.judge(at, taken - book.told, slack))
    return replace(book, untold=tuple(kept))


def settle_book(book: LaneBook, now: float) -> LaneBook:
    """The book at `now` (epoch), with what is missing booked as vanished if it has not grown for a while."""
    unexplained = book.wires.unexplained + book.inside.unexplained
    if not unexplained:
        return replace(book, steady=None)
    steady = book.steady
    if steady is None or abs(unexplained - steady[0]) > SLACK_PACKETS:
        return replace(book, steady=(unexplained, now))
    if now - steady[1] < SETTLED_SECONDS:
        return book
    return replace(
        book,
        totals=book.totals.add(vanished=unexplained),
        steady=None,
        begun=(),
        waiting=(),
        wires=book.wires.begin(),
        inside=book.inside.begin(),
        taken=0,
        told=0,
        untold=(),
    )


# --- what is told ----------------------------------------------------------------------------------


def build_balance(book: LaneBook, now: float) -> Balance | None:
    """The lane's balance at `now` (epoch); None before the switch was read."""
    if book.since is None or book.switch is None:
        return None
    open_since = min(
        (one.open_since for one in (book.wires, book.inside) if one.open_since is not None),
        default=None,
    )
    totals = book.totals
    return Balance(
        lane=book.lane,
        since=book.since,
        until=book.switch.at,
        into=totals.into,
        inspected=totals.inspected,
        dropped=totals.dropped,
        lost=totals.lost,
        refused=totals.refused,
        bypassed=totals.bypassed,
        blocked=totals.blocked,
        lost_with_engine=totals.lost_with_engine,
        vanished=totals.vanished,
        unexplained=book.wires.unexplained + book.inside.unexplained,
        closes=open_since is None or now - open_since < BALANCE_LIMIT_SECONDS,
        unclosed_since=open_since,
        reason=_explain(book),
    )


def _explain(book: LaneBook) -> str:
    reasons = []
    if book.wires.unexplained:
        reasons.append(
            f"{book.wires.unexplained} packets vanished between the switch and the queue of lane "
            f"{book.lane}, on the way in or back: see what is attached to its two legs"
        )
    if book.inside.unexplained:
        reasons.append(
            f"{book.inside.unexplained} packets entered the service host in lane {book.lane} and left "
            "by no leg, and the engine does not say that it dropped them"
        )
    return "; ".join(reasons)
