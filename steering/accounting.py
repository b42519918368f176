"""How much the switch's counters grew from one reading to the next, over resets and restarts. Pure.

A counter that fell was reset: what it shows now is new. One that was reset and passed its old value
between two readings looks as if it had only grown: then less is told than was, never more. (The age of
a flow does not help: OVS keeps the counts of a flow that is replaced, and a group's age when it is reset.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from steering.counters import Count, Counters, add_tallies
from steering.errors import HairpinError


@dataclass(frozen=True, slots=True)
class Meter:
    """Where each counter stood when it was read last, by `Tally.name`. Empty: nothing was read yet."""

    last: Mapping[str, Count] = field(default_factory=lambda: MappingProxyType({}))


def read_growth(meter: Meter, counters: Counters) -> tuple[Counters, Meter]:
    """What was counted since the meter's last reading, never negative; and the meter after this one.

    A counter that was not there before grew from 0: also what passed while nobody read it.
    """
    grown = tuple(
        replace(tally, count=_find_growth(meter.last.get(tally.name, Count()), tally.count))
        for tally in counters.tallies
    )
    # What is gone from the switch is forgotten: it starts from 0 should it come again.
    after = Meter(MappingProxyType({tally.name: tally.count for tally in counters.tallies}))
    return add_tallies(grown, counters.policies, counters.lanes), after


def _find_growth(last: Count, now: Count) -> Count:
    if now.packets < last.packets or now.bytes < last.bytes:
        return now
    return Count(now.packets - last.packets, now.bytes - last.bytes)


def render_meter(meter: Meter) -> dict[str, list[int]]:
    """For a store: counter -> [packets, bytes]."""
    return {name: [count.packets, count.bytes] for name, count in meter.last.items()}


def parse_meter(stored: object) -> Meter:
    """What `render_meter` gave. Raises HairpinError for anything else."""
    try:
        if not isinstance(stored, dict):
            raise TypeError("no mapping")
        last = {str(name): _parse_count(pair) for name, pair in stored.items()}
    except (TypeError, ValueError) as fault:
        raise HairpinError(
            f"the stored readings of the switch's counters can't be read: {fault}",
            "remove them; what was counted until now is then told once more",
        ) from fault
    return Meter(MappingProxyType(last))


def _parse_count(pair: object) -> Count:
    if not isinstance(pair, list) or len(pair) != 2:
        raise TypeError(f"{pair!r} is no pair of numbers")
    if not all(type(number) is int and number >= 0 for number in pair):
        raise ValueError(f"{pair!r} are not counts")
    return Count(*pair)
