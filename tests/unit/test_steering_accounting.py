"""Growth of the switch's counters, from readings between which they go on, fall, vanish and come back."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steering.accounting import Meter, parse_meter, read_growth, render_meter
from steering.compile import compile_program
from steering.counters import (
    Count,
    Counters,
    LaneCount,
    Tally,
    add_tallies,
    build_counters,
    find_tallies,
)
from steering.decide import resolve_machines
from steering.errors import HairpinError
from steering.flows import FlowKey
from steering.model import OnFailure, PolicySet
from steering.pipeline import CookieKind, Table, build_cookie, build_group_id, build_steer_key
from tests.support.worlds import LANES, build_port

LANE_NAMES = tuple(lane.name for lane in LANES)


def build_reading(*tallies: Tally) -> Counters:
    return add_tallies(tallies, ["web"], LANE_NAMES)


def build_tally(name: str, packets: int, size: int = 0, kind: str = "into") -> Tally:
    return Tally(name, kind, "prevent", Count(packets, size))


# What happens to each of three counters between two readings: it counts, is reset and counts, or is gone.
steps = st.lists(
    st.tuples(
        st.sampled_from(["count", "count", "reset", "gone"]),
        st.integers(0, 50),
    ),
    min_size=3,
    max_size=3,
)


@given(st.lists(steps, min_size=1, max_size=20), st.booleans())
def test_growth_is_never_negative_never_more_than_was_counted_and_survives_a_restart(
    readings: list[list[tuple[str, int]]], restarts: bool
) -> None:
    meter, standing = Meter(), [0, 0, 0]
    told, true, hidden = 0, 0, 0
    for reading in readings:
        tallies = []
        for place, (what, packets) in enumerate(reading):
            if what != "count":
                # A reset shows when the counter is below its old value; else this much stays untold.
                if what == "reset" and packets >= standing[place]:
                    hidden += standing[place]
                standing[place] = 0
            if what != "gone":
                standing[place] += packets
                true += packets
                tallies.append(build_tally(f"c{place}", standing[place], 60 * standing[place]))
        growth, meter = read_growth(meter, build_reading(*tallies))
        into = growth.lanes["prevent"].into
        assert into.packets >= 0
        assert into.bytes == 60 * into.packets
        told += into.packets
        if restarts:
            meter = parse_meter(json.loads(json.dumps(render_meter(meter))))
    assert told == true - hidden


def test_one_bucket_that_was_reset_hides_nothing_of_another() -> None:
    """The sum did not fall; a meter of sums would have told 50."""
    _, meter = read_growth(Meter(), build_reading(build_tally("a", 100), build_tally("b", 100)))
    growth, _ = read_growth(meter, build_reading(build_tally("a", 20), build_tally("b", 230)))
    assert growth.lanes["prevent"].into == Count(20 + 130)


def test_a_counter_that_shows_more_packets_but_fewer_bytes_was_reset() -> None:
    _, meter = read_growth(Meter(), build_reading(build_tally("a", 10, 15_000)))
    growth, _ = read_growth(meter, build_reading(build_tally("a", 12, 720)))
    assert growth.lanes["prevent"].into == Count(12, 720)


def test_what_grew_while_nobody_watched_is_told() -> None:
    _, meter = read_growth(Meter(), build_reading(build_tally("a", 10, 600)))
    stored = json.dumps(render_meter(meter))
    assert stored == '{"a": [10, 600]}'
    growth, _ = read_growth(
        parse_meter(json.loads(stored)), build_reading(build_tally("a", 110, 6600))
    )
    assert growth.lanes["prevent"].into == Count(100, 6000)


@pytest.mark.parametrize(
    "stored", [None, [], {"a": 1}, {"a": [1]}, {"a": [1, -1]}, {"a": [1, "2"]}, {"a": [True, 1]}]
)
def test_what_is_no_reading_is_refused(stored: object) -> None:
    with pytest.raises(HairpinError, match="can't be read"):
        parse_meter(stored)


def test_each_group_tells_what_went_in_and_what_its_second_bucket_took() -> None:
    lane = LANES[0]
    groups = []
    for on_failure in OnFailure:
        for answer in (False, True):
            key = build_steer_key(lane, on_failure, answer=answer)
            groups.append((build_group_id(key), ((key, 60 * key), (100 * key, 6000 * key))))
    steer = FlowKey(Table.STEER.number, 100, "reg2=0x10")
    back = FlowKey(Table.RETURN.number, 100, "in_port=201,dl_vlan=3901")
    cookie = build_cookie(CookieKind.LANE, lane.number)
    flows = [(steer, cookie, 7, 420), (back, cookie, 5, 300)]
    counters = build_counters(find_tallies(flows, groups, PolicySet(), LANES), PolicySet(), LANES)
    assert counters.lanes["prevent"] == LaneCount(
        steered=Count(7, 420),
        into=Count(0x10 + 0x11 + 0x12 + 0x13, 60 * (0x10 + 0x11 + 0x12 + 0x13)),
        bypassed=Count(100 * (0x11 + 0x13), 6000 * (0x11 + 0x13)),
        blocked=Count(100 * (0x10 + 0x12), 6000 * (0x10 + 0x12)),
        returned=Count(5, 300),
    )
    assert counters.lanes["detect"] == LaneCount()


def test_a_lane_without_legs_only_bypasses_and_blocks() -> None:
    lane = LANES[0]
    legless = replace(
        lane, leg_a=replace(lane.leg_a, ofport=0), leg_b=replace(lane.leg_b, ofport=0)
    )
    program = compile_program(
        PolicySet(), resolve_machines(PolicySet(), (build_port(1),)), (legless,)
    )
    groups = [
        (group.group_id, tuple((1, 60) for _ in group.buckets))
        for group in program.groups
        if group.kind == "ff"
    ]
    counters = build_counters(
        find_tallies([], groups, PolicySet(), (legless,)), PolicySet(), (legless,)
    )
    assert counters.lanes["prevent"] == LaneCount(bypassed=Count(2, 120), blocked=Count(2, 120))


def test_every_counter_has_a_name_of_its_own() -> None:
    program = compile_program(
        PolicySet(), resolve_machines(PolicySet(), (build_port(1),)), LANES, canary=211
    )
    flows = [(flow.key, flow.cookie, 1, 60) for flow in program.flows]
    groups = [(group.group_id, ((1, 60), (1, 60))) for group in program.groups]
    names = [tally.name for tally in find_tallies(flows, groups, PolicySet(), LANES)]
    assert len(names) == len(set(names)) > 20
