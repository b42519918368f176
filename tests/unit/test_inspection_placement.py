"""Queues, cores and urgency from the cores present; and what is told when an engine is placed otherwise."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from appliance.inspection.config import build_engine_config, render_engine_config
from appliance.inspection.heartbeat import (
    STALLED_LIMIT,
    Beat,
    QueueBeat,
    find_hang,
    find_untaken,
)
from appliance.inspection.placement import (
    NICE,
    Cores,
    LanePlacement,
    ThreadSight,
    build_placement,
    find_placement,
    find_placement_faults,
    find_queue_count,
    format_placement,
    number_queues,
)
from appliance.inspection.process import read_cores, read_threads, write_group_nice
from appliance.inspection.publish import Placement
from appliance.settings import Settings, parse_settings

DATA = Path(__file__).parents[2] / "suricata"
SETTINGS = """
lanes:
  - profile: prevent
    vlan: 101
    legA: {interface: a1, device: d1}
    legB: {interface: a2, device: d2}
  - profile: detect
    vlan: 102
    legA: {interface: a3, device: d3}
    legB: {interface: a4, device: d4}
"""


def all_of(count: int) -> Cores:
    return Cores(count, tuple(range(count)))


@pytest.mark.parametrize(
    ("cores", "lanes", "queues"),
    [
        (1, 1, 1),
        (2, 1, 1),
        (2, 2, 1),
        (3, 1, 1),
        (4, 1, 3),
        (4, 2, 1),
        (4, 8, 1),
        (8, 1, 7),
        (8, 2, 3),
        (64, 1, 16),
        (64, 2, 16),
        (64, 8, 7),
    ],
)
def test_queues_of_a_lane_from_the_cores_present(cores: int, lanes: int, queues: int) -> None:
    assert find_queue_count(cores, lanes) == queues


@pytest.mark.parametrize(
    ("cores", "queues", "expected"),
    [
        (1, {"prevent": 1}, {"prevent": ()}),
        (2, {"prevent": 1, "detect": 1}, {"prevent": (), "detect": ()}),
        (4, {"prevent": 3}, {"prevent": (1, 2, 3)}),
        (4, {"prevent": 1, "detect": 1}, {"prevent": (1,), "detect": (2,)}),
        (8, {"prevent": 3, "detect": 3}, {"prevent": (1, 2, 3), "detect": (4, 5, 6)}),
        # More threads than cores: they take turns, and the first core stays the switch's.
        (4, {"prevent": 2, "detect": 2}, {"prevent": (1, 2), "detect": (3, 1)}),
    ],
)
def test_threads_get_cores_from_four_on(
    cores: int, queues: dict[str, int], expected: dict[str, tuple[int, ...]]
) -> None:
    found = find_placement(all_of(cores), queues)
    assert {name: one.cores for name, one in found.items()} == expected
    for one in found.values():
        assert one.nice == NICE
        assert bool(one.cores) is not bool(one.reason)
        assert one.others == ((0,) if one.cores else ())


@given(st.integers(1, 128), st.integers(1, 8))
def test_whatever_the_cores_each_thread_has_one_that_is_there(present: int, lanes: int) -> None:
    rows = number_queues([None] * lanes, present)
    numbers = [number for row in rows for number in row]
    assert len(set(numbers)) == len(numbers)
    assert all(row == tuple(range(row[0], row[0] + len(row))) for row in rows)
    found = find_placement(
        all_of(present), {str(number): len(row) for number, row in enumerate(rows)}
    )
    given_out = [core for one in found.values() for core in one.cores]
    assert 0 not in given_out
    assert set(given_out) <= set(range(present))
    if given_out and len(numbers) < present:
        assert len(set(given_out)) == len(given_out) == len(numbers)


def test_numbers_that_lanes_name_are_theirs() -> None:
    assert number_queues([None, (1, 2), None], 8) == ((3, 4), (1, 2), (5, 6))
    assert number_queues([(7,), None], 2) == ((7,), (0,))


def test_why_threads_are_not_pinned_is_told() -> None:
    def reason(cores: Cores, *, pinned: bool = True) -> str:
        return find_placement(cores, {"prevent": 2}, pinned=pinned)["prevent"].reason

    assert reason(all_of(2)) == "2 cores are shared by all; threads are pinned from 4 on"
    assert reason(Cores(8, (0, 1))) == "only 2 of 8 cores may be used here"
    assert reason(all_of(8), pinned=False) == "inspection.pinned is false"
    assert reason(all_of(8)) == ""


def test_settings_without_queues_take_them_from_the_cores() -> None:
    settings = parse_settings(SETTINGS)
    assert [lane.queues for lane in settings.build_lanes(2)] == [(0,), (1,)]
    assert [lane.queues for lane in settings.build_lanes(8)] == [(0, 1, 2), (3, 4, 5)]


def render(settings: Settings, cores: int) -> dict[str, object]:
    lanes = settings.build_lanes(cores)
    places = find_placement(all_of(cores), {lane.name: len(lane.queues) for lane in lanes})
    config = build_engine_config(settings, lanes[1], places[lanes[1].name])
    document: dict[str, object] = yaml.safe_load(render_engine_config(config, DATA))
    return document


def test_engine_is_told_its_cores_only_where_it_has_some() -> None:
    settings = parse_settings(SETTINGS)
    assert "threading" not in render(settings, 2)
    assert render(settings, 8)["threading"] == {
        "set-cpu-affinity": True,
        "cpu-affinity": [
            {"management-cpu-set": {"cpu": [0]}},
            {"worker-cpu-set": {"cpu": [4, 5, 6], "mode": "exclusive"}},
        ],
    }


PINNED = LanePlacement(2, (1, 2), (0,))
RIGHT = (
    ThreadSight("Suricata-Main", (0,), NICE),
    ThreadSight("W-NFQ#0", (1,), NICE),
    ThreadSight("W-NFQ#1", (2,), NICE),
)


def test_threads_that_are_placed_otherwise_are_told() -> None:
    assert find_placement_faults(PINNED, RIGHT) == ()
    assert find_placement_faults(PINNED, RIGHT[:2]) == (
        "1 packet threads for 2 queues",
        "threads on cores 1 instead of 1+2",
    )
    loose = (RIGHT[1], replace(RIGHT[2], cores=(0, 1, 2, 3), nice=0))
    assert find_placement_faults(PINNED, loose) == (
        "threads on cores 0+1+2+3, 1 instead of 1+2",
        "niceness 0 instead of -10",
    )
    # Shared cores: where they run is the scheduler's affair. More urgent than asked for is no fault.
    free = LanePlacement(2, nice=-5, reason="two cores")
    assert find_placement_faults(free, RIGHT) == ()


def test_what_is_published_is_what_was_seen() -> None:
    seen = build_placement(PINNED, RIGHT)
    assert seen == Placement(threads=2, cores=((1,), (2,)), nice=NICE, pinned=True, reason="")
    assert format_placement(seen) == "2 packet thread(s) on cores 1, 2, niceness -10"
    shared = build_placement(LanePlacement(1, reason="2 cores are shared"), RIGHT[1:2])
    told = "1 packet thread(s) on all cores (2 cores are shared), niceness -10"
    assert format_placement(shared) == told


def test_threads_are_read_with_their_names_cores_and_niceness() -> None:
    code = "import os, threading; open('/proc/thread-self/comm', 'w').write('W-NFQ#7'); input()"
    argv = ["nice", "-n", "3", sys.executable, "-c", code]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, start_new_session=True) as child:
        try:
            for _ in range(300):
                if any(one.name == "W-NFQ#7" for one in read_threads(child.pid)):
                    break
                threading.Event().wait(0.02)
            (seen,) = read_threads(child.pid)
            assert seen == ThreadSight("W-NFQ#7", read_cores().usable, os.nice(0) + 3)
            group = Path(f"/proc/{child.pid}/autogroup")
            if os.geteuid() == 0 and group.exists():
                assert write_group_nice(child.pid, -7) == ""
                assert group.read_text().split()[-1] == "-7"
        finally:
            with contextlib.suppress(BrokenPipeError):
                child.communicate(b"\n", 10)
    assert read_threads(child.pid) == ()
    assert write_group_nice(child.pid, -7) == ""


@pytest.mark.skipif(
    os.geteuid() != 0 or not Path("/proc/self/autogroup").exists(),
    reason="only root may, and only where the kernel groups sessions",
)
def test_two_sessions_at_once_both_get_their_niceness_without_cap_sys_admin() -> None:
    """As in the image, where two lanes start together: health said "not placed as it should be" after a boot."""
    code = (
        "import subprocess\n"
        "from appliance.inspection.process import write_group_nice\n"
        "children = [subprocess.Popen(['sleep', '20'], start_new_session=True) for _ in range(3)]\n"
        "print([write_group_nice(child.pid, -7) for child in children])\n"
        "print([open(f'/proc/{child.pid}/autogroup').read().split()[-1] for child in children])\n"
        "for child in children: child.kill()\n"
    )
    done = subprocess.run(
        ["setpriv", "--bounding-set", "-sys_admin", "--inh-caps", "-sys_admin", sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )  # fmt: skip
    assert done.stdout.splitlines() == ["['', '', '']", "['-7', '-7', '-7']"]


def build_beats(*rows: tuple[tuple[int, int], ...]) -> list[Beat]:
    """A beat a second of a busy engine; each row has (waiting, given back) of queue 0, 1 ..."""
    return [
        Beat(
            at=float(at),
            answered=True,
            waiting=sum(waiting for waiting, _ in row),
            cpu=float(at),
            queued=sum(waiting + back for waiting, back in row),
            taken=sum(back for _, back in row),
            queues=tuple(QueueBeat(number, *one) for number, one in enumerate(row)),
        )
        for at, row in enumerate(rows)
    ]


def test_one_thread_of_several_that_hangs_is_a_hang() -> None:
    beats = build_beats(*(((3, 900 + 40 * at), (5, 70)) for at in range(9)))
    assert find_hang(beats) == "queue 1 gave no packet back for 8.0 s while 5 waited"
    assert find_hang(beats[: int(STALLED_LIMIT)]) is None


def test_a_queue_that_nobody_takes_from_is_a_hang() -> None:
    """Also where no packet waits: the kernel drops what it gives to such a queue."""
    busy = build_beats(*(((3, 900 + 40 * at),) for at in range(9)))
    beats = [replace(beat, untaken=find_untaken((0, 1), (0,))) for beat in busy]
    assert find_hang(beats) == "nobody took packets from queue 1 for 8.0 s"
    assert find_hang(beats[: int(STALLED_LIMIT)]) is None
    assert find_hang([*beats[:-2], *busy[-2:]]) is None, "taken from since"
    late = [*busy[:4], *beats[4:]]
    assert find_hang(late) is None


def test_queues_are_not_missed_before_the_engine_took_any() -> None:
    assert find_untaken((0, 1), ()) == ()
    assert find_untaken((0, 1), (0, 1)) == ()
    assert find_untaken((4, 5, 6), (5,)) == (4, 6)


def test_queues_that_are_slow_idle_or_bound_anew_are_no_hang() -> None:
    slow = build_beats(*(((3, 900 + 40 * at), (5, 70 + at)) for at in range(30)))
    idle = build_beats(*(((3, 900 + 40 * at), (0, 70)) for at in range(30)))
    anew = build_beats(*(((3, 40 * at), (5, 70 if at < 5 else 0)) for at in range(12)))
    for beats in (slow, idle, anew):
        assert find_hang(beats) is None
