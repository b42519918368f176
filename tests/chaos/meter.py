"""What the streams say: sent, delivered, lost, doubled, and what passed uninspected. Pure.

A *hostile* packet matches a drop rule: one that is delivered has passed uninspected. A *benign* one
that is not delivered was lost. Times are CLOCK_MONOTONIC seconds.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

BENIGN, HOSTILE, COUNTED = "benign", "hostile", "counted"
"""Kinds of streams; of the last each packet should be dropped and make an alert of its own."""


@dataclass(frozen=True, slots=True)
class Stream:
    """One numbered stream. ``sent[n]`` is when packet n was sent; ``arrived`` has (n, when)."""

    mode: str
    kind: str
    name: str
    sent: tuple[float, ...]
    arrived: tuple[tuple[int, float], ...]
    unsent: int = 0

    def find_lost(self, since: float = 0.0, until: float = float("inf")) -> list[float]:
        """When each lost packet of those sent in [since, until) was sent."""
        there = {number for number, _ in self.arrived}
        return [
            moment
            for number, moment in enumerate(self.sent)
            if since <= moment < until and number not in there
        ]

    def find_delivered(self, since: float = 0.0, until: float = float("inf")) -> list[float]:
        """When each delivered packet of those sent in [since, until) was sent; doubled ones once."""
        there = sorted({number for number, _ in self.arrived})
        return [self.sent[number] for number in there if since <= self.sent[number] < until]

    def count_doubled(self) -> int:
        seen = Counter(number for number, _ in self.arrived)
        return sum(count - 1 for count in seen.values())

    def find_longest_gap(self, since: float, until: float) -> float:
        """The longest time in seconds, in [since, until), in which nothing arrived."""
        moments = [since, *sorted(t for _, t in self.arrived if since <= t < until), until]
        return max(b - a for a, b in itertools.pairwise(moments))

    def find_pause(self, struck: float, within: float = 3.0, lull: float = 0.1) -> float:
        """Seconds from ``struck`` to the end of the first run of losses that begins ``within`` then.

        0 when nothing was lost. The run ends where all of ``lull`` seconds' packets were delivered.
        """
        lost = self.find_lost(struck - 0.05, struck + within)
        if not lost:
            return 0.0
        end = lost[0]
        for moment in self.find_lost(struck - 0.05):
            if moment - end > lull:
                break
            end = max(end, moment)
        following = [moment for moment in self.find_delivered(end) if moment > end]
        return (following[0] if following else self.sent[-1]) - struck


@dataclass(frozen=True, slots=True)
class Tally:
    """Numbered events compared with those that were stored."""

    expected: int
    lost: tuple[int, ...]
    doubled: tuple[int, ...]


def compare_numbers(expected: Iterable[int], stored: Iterable[int]) -> Tally:
    """What is missing of the expected numbers, and which are there more than once."""
    wanted, seen = set(expected), Counter(stored)
    return Tally(
        len(wanted),
        tuple(sorted(wanted - set(seen))),
        tuple(sorted(number for number, count in seen.items() if count > 1)),
    )


@dataclass(frozen=True, slots=True)
class Traffic:
    """All streams of one measurement, from ``began`` to ``ended``."""

    streams: tuple[Stream, ...]
    began: float
    ended: float

    def find(self, mode: str, kind: str) -> tuple[Stream, ...]:
        return tuple(one for one in self.streams if (one.mode, one.kind) == (mode, kind))

    def count_sent(self, mode: str, kind: str) -> int:
        return sum(len(one.sent) for one in self.find(mode, kind))

    def count_lost(self, mode: str, since: float = 0.0, until: float = float("inf")) -> int:
        return sum(len(one.find_lost(since, until)) for one in self.find(mode, BENIGN))

    def count_delivered(
        self, mode: str, kind: str, since: float = 0.0, until: float = float("inf")
    ) -> int:
        return sum(len(one.find_delivered(since, until)) for one in self.find(mode, kind))

    def find_uninspected(self, mode: str) -> list[float]:
        """When each hostile packet that was delivered had been sent, in order."""
        return sorted(t for one in self.find(mode, HOSTILE) for t in one.find_delivered())

    def count_between(self, mode: str, uninspected: Sequence[float]) -> int:
        """All packets of the mode that were delivered while hostile ones were, benign and hostile."""
        if not uninspected:
            return 0
        first, last = uninspected[0], uninspected[-1]
        benign = self.count_delivered(mode, BENIGN, first, last)
        return len(uninspected) + benign

    def find_rate(self, mode: str) -> float:
        """Packets of the mode that are sent in a second, of both kinds and all ways."""
        sent = self.count_sent(mode, BENIGN) + self.count_sent(mode, HOSTILE)
        return sent / max(self.ended - self.began, 0.001)

    def find_pause(self, mode: str, struck: float, within: float = 3.0) -> float:
        """The longest pause of any benign stream of the mode after ``struck`` (s)."""
        return max((one.find_pause(struck, within) for one in self.find(mode, BENIGN)), default=0.0)

    def find_gap(self, mode: str, since: float, until: float) -> float:
        """The longest time in seconds in which some benign stream of the mode delivered nothing."""
        return max(
            (one.find_longest_gap(since, until) for one in self.find(mode, BENIGN)), default=0.0
        )

    def build_figures(self, mode: str) -> dict[str, Any]:
        """What every row tells of a mode."""
        gap = self.find_gap(mode, self.began, self.ended)
        return {
            "sent": self.count_sent(mode, BENIGN),
            "delivered": self.count_delivered(mode, BENIGN),
            "lost": self.count_lost(mode),
            "doubled": sum(one.count_doubled() for one in self.streams if one.mode == mode),
            "longest_gap_ms": round(gap * 1000),
            "hostile_sent": self.count_sent(mode, HOSTILE),
            "uninspected": len(self.find_uninspected(mode)),
            "control_lost": self.count_lost("direct"),
        }


def cut_start(traffic: Traffic) -> Traffic:
    """Without the packets that were sent before ``began``; the rest is numbered anew.

    Not what is counted: its numbers stand in alerts.
    """
    cut = []
    for one in traffic.streams:
        if one.kind == COUNTED:
            cut.append(one)
            continue
        first = sum(moment < traffic.began for moment in one.sent)
        arrived = tuple((number - first, t) for number, t in one.arrived if number >= first)
        cut.append(replace(one, sent=one.sent[first:], arrived=arrived))
    return replace(traffic, streams=tuple(cut))


def parse_streams(
    documents: Iterable[Mapping[str, Any]], plan: Mapping[str, tuple[str, str]]
) -> tuple[Stream, ...]:
    """Streams from what each VM's `traffic.py` wrote; ``plan`` has (mode, kind) by stream name."""
    sent: dict[str, Sequence[float]] = {}
    unsent: dict[str, int] = {}
    arrived: dict[str, list[tuple[int, float]]] = {}
    for document in documents:
        sent |= document["sent"]
        unsent |= document["unsent"]
        for name, (numbers, times) in document["arrived"].items():
            arrived.setdefault(name, []).extend(zip(numbers, times, strict=True))
    return tuple(
        Stream(mode, kind, name, tuple(sent[name]), tuple(arrived.get(name, ())), unsent[name])
        for name, (mode, kind) in plan.items()
    )
