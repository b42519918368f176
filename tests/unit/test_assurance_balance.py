"""The balance of a simulated lane, whose counters are read at any moments and with any allowed lag."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.assurance.balance import (
    Balance,
    EngineSample,
    HostSample,
    LaneBook,
    SwitchSample,
    Verdict,
    build_balance,
    build_engine_sample,
    build_host_sample,
    build_switch_sample,
    record_host,
    record_switch,
    settle_book,
)
from appliance.inspection.publish import EngineCounters, LaneCounters, QueueState
from steering.counters import Count, Counters, Tally

STEP = 0.01
BFD = 40
"""Untagged frames a second."""


@dataclass
class Hole:
    """Where packets vanish: on the way `in`, after the engine (`inside`), or on the way `back`."""

    where: str = ""
    share: float = 0.0
    begin: float = 0.0


@dataclass
class Lane:
    """A lane in steps of 10 ms; every counter is kept for every step, so that any past can be read."""

    seconds: float
    rates: list[float]
    """Packets a second, in turns of equal length over the whole time."""
    bursts: bool = False
    dropping: float = 0.0
    """The share that the engine drops."""
    overflow: float = 0.0
    """The share that finds the queue full."""
    delay: float = 0.02
    """Seconds in the queue."""
    hole: Hole = field(default_factory=Hole)
    deaths: tuple[tuple[float, float], ...] = ()
    """(when an engine dies, seconds until another listens)."""
    seed: int = 0

    def run(self) -> Iterator[Balance]:
        """The balance after every sample."""
        self.pick = random.Random(self.seed)
        self.phase = self.pick.uniform(0.0, 1.0)
        self.asked, self.summed, self.key = 0.0, 0.0, 1
        self._simulate()
        book = LaneBook("prevent")
        for at, kind in self._schedule():
            if kind == "switch":
                book = record_switch(book, self._read_switch(at))
            else:
                book = record_host(book, self._read_host(at), self._read_engine(at))
            if (balance := build_balance(book, at)) is not None:
                yield balance

    def _simulate(self) -> None:
        steps = int(self.seconds / STEP) + 1
        names = ("into", "tag_in", "bfd_in", "tag_out", "bfd_out", "back", "told", "lost", "wait")
        self.log: dict[str, list[int]] = {name: [] for name in names}
        now = dict.fromkeys(names, 0)
        left = dict.fromkeys(("rate", "in", "inside", "back", "drop", "over", "bfd"), 0.0)

        def share(name: str, part: float, count: int) -> int:
            """That share of `count`, exact over time."""
            left[name] += part * count
            whole = int(left[name])
            left[name] -= whole
            return whole

        queue: list[tuple[int, int, int]] = []
        self.listener: list[int] = []
        self.died: list[int] = []
        listener, deaths = 1, list(self.deaths)
        returns = 0.0
        for step in range(steps):
            at = step * STEP
            hole = self.hole if at >= self.hole.begin else Hole()
            if deaths and at >= deaths[0][0]:
                returns = at + deaths.pop(0)[1]
                listener, queue = -abs(listener), []
                now["told"] = now["lost"] = 0
            if listener < 0 and at >= returns:
                listener = -listener + 1
            rate = self.rates[min(len(self.rates) - 1, int(at / self.seconds * len(self.rates)))]
            left["rate"] += rate * STEP
            arrived = 0
            if not self.bursts or self.pick.random() < 0.05:
                arrived = int(left["rate"])
                left["rate"] -= arrived
            now["into"] += arrived
            arrived -= share("in", hole.share if hole.where == "in" else 0.0, arrived)
            bfd = share("bfd", 1.0, 1) if step % int(1 / BFD / STEP) == 0 else 0
            now["tag_in"] += arrived
            now["bfd_in"] += bfd
            if listener > 0:
                over = share("over", self.overflow, arrived)
                now["lost"] += over
                queue.append((step, arrived - over, bfd))
            while queue and queue[0][0] <= step - self.delay / STEP:
                _, tagged, bfd = queue.pop(0)
                dropped = share("drop", self.dropping, tagged)
                now["told"] += dropped
                gone = share(
                    "inside", hole.share if hole.where == "inside" else 0.0, tagged - dropped
                )
                tagged -= dropped + gone
                now["tag_out"] += tagged
                now["bfd_out"] += bfd
                now["back"] += tagged - share(
                    "back", hole.share if hole.where == "back" else 0.0, tagged
                )
            now["wait"] = sum(tagged + bfd for _, tagged, bfd in queue)
            self.listener.append(max(0, listener))
            for name in names:
                self.log[name].append(now[name])

    def _value(self, name: str, at: float) -> int:
        return self.log[name][max(0, min(len(self.log[name]) - 1, int(at / STEP)))]

    def _schedule(self) -> list[tuple[float, str]]:
        found = []
        for kind, low, high in (("switch", 0.7, 1.2), ("host", 1.6, 2.3)):
            at = self.pick.uniform(0.0, 1.0)
            while at < self.seconds:
                found.append((at, kind))
                at += self.pick.uniform(low, high)
        at = 0.0
        self.sweeps = [0.0]
        while at < self.seconds:
            at += self.pick.uniform(0.05, 0.6)
            self.sweeps.append(at)
        return sorted(found)

    def _find_sweep(self, at: float) -> float:
        return max(sweep for sweep in self.sweeps if sweep <= at)

    def _read_switch(self, at: float) -> SwitchSample:
        # Two processes read at once; either may be first by some milliseconds.
        groups, flows = (self._find_sweep(max(0.0, at - self.pick.uniform(0, 0.03))) for _ in "ab")
        return SwitchSample(
            at, {"group": self._value("into", groups)}, {"flow": self._value("back", flows)}
        )

    def _read_host(self, at: float) -> HostSample:
        took = self.pick.uniform(0.001, 0.015)
        middle = at - took / 2
        listener = self.listener[min(len(self.listener) - 1, int(middle / STEP))]
        return HostSample(
            at=at,
            since=0.0,
            took=took,
            in_tagged=self._value("tag_in", at),
            in_untagged=self._value("bfd_in", at),
            out_tagged=self._value("tag_out", at - took),
            out_untagged=self._value("bfd_out", at - took),
            refused=0,
            unmarked=0,
            waiting=self._value("wait", middle) if listener else 0,
            queue_lost=self._value("lost", middle) if listener else 0,
            listeners=(listener,) if listener else (),
        )

    def _read_engine(self, at: float) -> EngineSample | None:
        """Packet threads sum up every 3 s, the sum is told every second, and asked for every second."""
        asked = max(0.0, at - self.pick.uniform(0.0, 1.0))
        died = max((one[0] for one in self.deaths if one[0] <= asked), default=0.0)
        key = self.listener[int(asked / STEP)]
        if not key:
            # Nobody answers: what the former one said last is still shown.
            asked = died - 2 * STEP
            key = self.listener[int(asked / STEP)]
        told = asked - (asked + self.phase) % 1.0
        summed = told - (told + 3 * self.phase) % 3.0
        if asked < self.asked:
            asked, summed = self.asked, self.summed
            key = self.key
        self.asked, self.summed, self.key = asked, summed, key
        born = self.listener[int(max(0.0, summed) / STEP)] == key
        return EngineSample(asked, (key, 0.0), self._value("told", summed) if born else 0)


seeds = st.integers(0, 2**32)
rates = st.lists(st.floats(0, 20_000), min_size=1, max_size=6)


def find_alarm(lane: Lane) -> tuple[float, Balance] | None:
    """When the balance first did not close, and what it said."""
    return next(((one.until, one) for one in lane.run() if not one.closes), None)


@settings(max_examples=15, deadline=None)
@given(
    seed=seeds,
    rates=rates,
    bursts=st.booleans(),
    dropping=st.sampled_from([0.0, 0.0, 0.01, 0.5, 1.0]),
    overflow=st.sampled_from([0.0, 0.0, 0.3]),
    delay=st.sampled_from([0.0, 0.01, 0.05]),
)
def test_losing_nothing_unexplained_closes_whenever_it_is_read(
    seed: int, rates: list[float], bursts: bool, dropping: float, overflow: float, delay: float
) -> None:
    lane = Lane(32.0, rates, bursts, dropping, overflow, delay, seed=seed)
    for balance in lane.run():
        assert balance.closes, balance


@settings(max_examples=15, deadline=None)
@given(
    seed=seeds,
    rate=st.floats(200, 20_000),
    share=st.floats(0.01, 1.0),
    where=st.sampled_from(["in", "inside", "back"]),
    begin=st.floats(0, 15),
    dropping=st.sampled_from([0.0, 0.0, 0.002]),
)
def test_constant_black_hole_is_an_alarm_within_thirty_seconds(
    seed: int, rate: float, share: float, where: str, begin: float, dropping: float
) -> None:
    lane = Lane(50.0, [rate], dropping=dropping, hole=Hole(where, share, begin), seed=seed)
    found = find_alarm(lane)
    assert found is not None, (rate, share, where)
    at, balance = found
    # The comparison begins with the first five readings; what vanished before is not its.
    assert at - max(begin, 9.0) <= 30
    assert balance.unexplained > 0
    assert balance.unclosed_since is not None
    assert balance.unclosed_since <= at
    if where == "inside":
        assert "left by no leg" in balance.reason
    else:
        assert "vanished between the switch and the queue of lane prevent" in balance.reason


@settings(max_examples=15, deadline=None)
@given(
    seed=seeds,
    rate=st.floats(0, 10_000),
    dropping=st.sampled_from([0.0, 0.1, 1.0]),
    deaths=st.lists(st.tuples(st.floats(6, 12), st.floats(0.05, 4)), min_size=1, max_size=3),
)
def test_engines_that_die_are_no_black_hole(
    seed: int, rate: float, dropping: float, deaths: list[tuple[float, float]]
) -> None:
    moments, at = [], 0.0
    for after, absent in deaths:
        at += after
        moments.append((at, absent))
    lane = Lane(at + 25, [rate], dropping=dropping, deaths=tuple(moments), seed=seed)
    balances = list(lane.run())
    assert all(one.closes for one in balances), next(one for one in balances if not one.closes)


def test_what_an_engine_took_into_its_death_is_told() -> None:
    lane = Lane(40.0, [1000.0], dropping=0.5, deaths=((15.0, 1.0),), seed=4)
    last = list(lane.run())[-1]
    assert last.closes
    # It dropped 500 a second and told of it up to 4 s late.
    assert 300 < last.lost_with_engine < 3500
    accounted = last.inspected + last.dropped + last.lost + last.refused + last.lost_with_engine
    assert abs(last.into - accounted) < 3500


def test_totals_of_a_quiet_time_are_exact() -> None:
    busy = Lane(60.0, [1000.0, 1000.0, 0.0], dropping=0.1, overflow=0.05, seed=1)
    last = list(busy.run())[-1]
    assert last.closes
    assert last.unexplained == 0
    assert last.reason == ""
    assert abs(last.into - last.inspected - last.dropped - last.lost - last.refused) < 400
    assert last.dropped == pytest.approx(0.095 * last.into, rel=0.05)
    assert last.lost == pytest.approx(0.05 * last.into, rel=0.05)


def test_counters_that_begin_anew_begin_the_comparison_anew() -> None:
    def host(at: float, passed: int, since: float = 0.0) -> HostSample:
        return HostSample(at, since, 0.01, passed, 0, passed, 0, 0, 0, listeners=(7,))

    def switch(at: float, into: int, back: int) -> SwitchSample:
        return SwitchSample(at, {"a": into, "b": 0}, {"c": back})

    book = LaneBook("prevent")
    book = record_switch(book, switch(0.0, 0, 0))
    for second in range(1, 6):
        book = record_host(book, host(second, second * 1000), None)
        book = record_switch(book, switch(second + 0.5, second * 1000 + 500, second * 1000))
    open_balance = build_balance(book, 6.0)
    assert open_balance is not None
    assert open_balance.into == 5500
    # Half the counters fall: the switch was restarted. Nothing is made up, nothing is missing.
    book = record_switch(book, switch(7.0, 10, 5))
    assert (book.begun, book.waiting) == ((), ())
    # The rules were written again.
    book = record_host(book, host(8.0, 3, since=7.5), None)
    book = record_switch(book, switch(8.5, 1000, 995))
    book = record_host(book, host(9.0, 990, since=7.5), None)
    balance = build_balance(book, 9.0)
    assert balance is not None
    assert (balance.closes, balance.unexplained) == (True, 0)
    assert balance.into == 5500 + 10 + 990


def test_samples_are_built_from_what_switch_and_inspect_tell() -> None:
    tallies = (
        Tally("into prevent: 1", "into", "prevent", Count(5, 500)),
        Tally("into prevent: 2", "into", "prevent", Count(6, 600)),
        Tally("into detect: 3", "into", "detect", Count(9, 900)),
        Tally("returned prevent: 4", "returned", "prevent", Count(4, 400)),
        Tally("blocked prevent: 5", "blocked", "prevent", Count(3, 300)),
    )
    switch = build_switch_sample(3.0, Counters({}, {}, {}, {}, tallies=tallies), "prevent")
    assert switch.into == {"into prevent: 1": 5, "into prevent: 2": 6}
    assert (switch.inside, sum(switch.blocked.values()), switch.bypassed) == (7, 3, {})
    assert build_host_sample(LaneCounters()) is None
    assert build_engine_sample(LaneCounters()) is None
    told = EngineCounters(pid=7, started=1.5, at=9.0, accepted=5, blocked=3, rejected=2)
    queue = QueueState(number=4, waiting=1, dropped=2, user_dropped=3, packets=9, listener=77)
    counters = LaneCounters(
        frames_at=10.0,
        frames_since=2.0,
        frames_took=0.02,
        frames_in_tagged=100,
        frames_out_tagged=90,
        frames_in_untagged=20,
        frames_out_untagged=19,
        frames_refused=4,
        frames_unmarked=1,
        frames_queues=(queue, replace_queue(queue, 5, 78)),
        engine=told,
    )
    host = build_host_sample(counters)
    assert host is not None
    assert (host.waiting, host.queue_lost, host.queues, host.listeners) == (2, 10, 2, (77, 78))
    assert (host.ended, host.plain_ended, host.explained) == (8, 1, 14)
    assert build_engine_sample(counters) == EngineSample(9.0, (7, 1.5), 5)


def replace_queue(queue: QueueState, number: int, listener: int) -> QueueState:
    return queue.model_copy(update={"number": number, "listener": listener})


def test_without_a_word_of_the_switch_there_is_no_balance() -> None:
    assert build_balance(LaneBook("prevent"), 1.0) is None
    assert replace(LaneBook("prevent"), since=1.0) != LaneBook("prevent")


def test_a_loss_that_is_over_is_booked_and_one_that_goes_on_is_not() -> None:
    over = LaneBook("prevent", wires=Verdict(unexplained=562, open_since=100.0))
    book = settle_book(over, 110.0)
    assert settle_book(book, 129.0) == book, "not long enough"
    settled = settle_book(book, 130.0)
    assert (settled.totals.vanished, settled.wires.unexplained) == (562, 0)
    assert settled.wires.open_since is None
    for second in range(100, 200, 2):
        grown = replace(book, wires=Verdict(unexplained=600 + 2 * second, open_since=100.0))
        book = settle_book(grown, float(second))
        assert book.totals.vanished == 0
