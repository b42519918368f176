"""The meter of the fault campaign: what it says of streams whose fate is known."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.chaos.meter import (
    BENIGN,
    COUNTED,
    HOSTILE,
    Stream,
    Traffic,
    compare_numbers,
    cut_start,
    parse_streams,
)

STEP = 0.005


def build_stream(fates: list[int], kind: str = BENIGN, began: float = 100.0) -> Stream:
    """A packet each 5 ms; ``fates`` has how often each arrived, 1 ms later."""
    sent = tuple(began + STEP * number for number in range(len(fates)))
    arrived = tuple((n, sent[n] + 0.001) for n, times in enumerate(fates) for _ in range(times))
    return Stream("closed", kind, f"closed/{kind}", sent, arrived)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60))
def test_each_packet_is_lost_or_delivered_and_what_comes_twice_is_doubled(fates: list[int]) -> None:
    stream = build_stream(fates)
    assert len(stream.find_lost()) == fates.count(0)
    assert len(stream.find_delivered()) == len(fates) - fates.count(0)
    assert stream.count_doubled() == sum(fates) - (len(fates) - fates.count(0))


def test_a_pause_lasts_until_packets_arrive_again_and_a_later_loss_is_another() -> None:
    fates = [1] * 40 + [0] * 30 + [1] * 60 + [0] * 2 + [1] * 40
    stream = build_stream(fates)
    struck = stream.sent[39] + 0.001
    assert round(stream.find_pause(struck), 3) == round(stream.sent[70] - struck, 3)
    assert build_stream([1] * 100).find_pause(100.1) == 0.0
    # It never passed again: the pause lasts as long as was measured.
    silent = build_stream([1] * 40 + [0] * 60)
    assert silent.find_pause(silent.sent[40]) == silent.sent[-1] - silent.sent[40]


def test_the_longest_gap_is_seen_at_the_edges_too() -> None:
    stream = build_stream([0] * 20 + [1] * 20)
    assert round(stream.find_longest_gap(100.0, 100.2), 3) == 0.101
    assert round(stream.find_longest_gap(100.15, 100.5), 3) == 0.304


def test_a_hostile_packet_that_is_delivered_passed_uninspected_and_benign_ones_with_it() -> None:
    benign = build_stream([1] * 100)
    hostile = build_stream([0] * 50 + [1] * 10 + [0] * 40, HOSTILE)
    traffic = Traffic((benign, hostile), 100.0, 100.5)
    uninspected = traffic.find_uninspected("closed")
    assert uninspected == list(hostile.sent[50:60])
    assert traffic.count_between("closed", uninspected) == 10 + 9  # up to the last hostile one
    figures = traffic.build_figures("closed")
    assert (figures["uninspected"], figures["hostile_sent"], figures["lost"]) == (10, 100, 0)
    assert traffic.find_uninspected("open") == []


def test_the_start_is_cut_off_but_not_from_what_is_counted() -> None:
    traffic = Traffic(
        (build_stream([0] * 10 + [1] * 10), build_stream([1] * 20, COUNTED)), 100.05, 100.1
    )
    benign, counted = cut_start(traffic).streams
    assert (len(benign.sent), benign.find_lost()) == (10, [])
    assert len(counted.sent) == 20


def test_numbers_are_compared_with_what_was_stored() -> None:
    tally = compare_numbers(range(5), [0, 1, 1, 3, 4, 9])
    assert (tally.expected, tally.lost, tally.doubled) == (5, (2,), (1,))


def test_what_the_vms_wrote_is_put_together() -> None:
    name = "open/hostile/web-1/app-2/4"
    documents = [
        {"sent": {name: [1.0, 1.1, 1.2]}, "unsent": {name: 1}, "arrived": {}},
        {"sent": {}, "unsent": {}, "arrived": {name: [[0, 2], [1.01, 1.21]]}},
    ]
    (stream,) = parse_streams(documents, {name: ("open", HOSTILE)})
    assert stream.find_lost() == [1.1]
    assert (stream.mode, stream.kind, stream.unsent) == ("open", HOSTILE, 1)
