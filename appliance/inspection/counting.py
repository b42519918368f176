"""How many frames went into a lane's queues and came out of them, from the rules' own counters. Pure.

The queue rules count as they decide (`queueing`): a frame is counted in where it is let go on to the
queue, and out where it leaves by a leg after the engine's verdict. Untagged ones are the switch's BFD.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pydantic import BaseModel, TypeAdapter, ValidationError

from appliance.inspection import queueing
from steering.model import Lane


@dataclass(frozen=True, slots=True)
class FrameCounters:
    """Frames of one lane, both ways together, since its rules were written.

    `refused` are those that are not the lane's own IP, dropped before the queue; `unmarked` those that
    wanted to leave without having been queued (0 in the nftables dialect, where none can).
    """

    in_tagged: int = 0
    in_untagged: int = 0
    out_tagged: int = 0
    out_untagged: int = 0
    refused: int = 0
    unmarked: int = 0


class _Counter(BaseModel):
    name: str
    packets: int


class _Entry(BaseModel):
    counter: _Counter | None = None


class _Listing(BaseModel):
    nftables: list[_Entry]


_LISTING = TypeAdapter(_Listing)


def parse_counted_rules(saved: str) -> Mapping[str, int]:
    """Packets by rule of our chain, from what `ebtables-save -c` printed (`[packets:bytes] -A ...`)."""
    found: dict[str, int] = {}
    for line in saved.splitlines():
        if match := re.fullmatch(rf"\[(\d+):\d+\] (-A {queueing.CHAIN} .*)", line.strip()):
            found[match[2]] = found.get(match[2], 0) + int(match[1])
    return found


def build_frame_counters(
    lanes: Sequence[Lane], filter_saved: str, nat_saved: str
) -> Mapping[int, FrameCounters]:
    """Each lane's counters by its number, from `ebtables-save -c` of the tables filter and nat."""
    entering, leaving = parse_counted_rules(filter_saved), parse_counted_rules(nat_saved)

    def add(counted: Mapping[str, int], rules: Sequence[str], tagged: bool | None = None) -> int:
        return sum(
            counted.get(rule, 0)
            for rule in rules
            if tagged is None or (f" -p {queueing.TAGGED} " in rule) is tagged
        )

    return {
        lane.number: FrameCounters(
            in_tagged=add(entering, queueing.render_entering(lane), True),
            in_untagged=add(entering, queueing.render_entering(lane), False),
            out_tagged=add(leaving, queueing.render_leaving(lane), True),
            out_untagged=add(leaving, queueing.render_leaving(lane), False),
            refused=add(entering, queueing.render_refusing(lane)[:2]),
            unmarked=add(leaving, queueing.render_refusing(lane)[2:]),
        )
        for lane in lanes
    }


def parse_nftables_counters(lanes: Sequence[Lane], listed: str) -> Mapping[int, FrameCounters]:
    """Each lane's counters by its number, from `nft -j list counters`; none when it can't be read."""
    try:
        entries = _LISTING.validate_json(listed).nftables
    except ValidationError:
        return {}
    packets = {entry.counter.name: entry.counter.packets for entry in entries if entry.counter}
    return {
        lane.number: FrameCounters(
            **{
                what: packets.get(queueing.find_counter_name(lane, what), 0)
                for what in queueing.COUNTED
            }
        )
        for lane in lanes
    }
