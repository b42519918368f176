"""More than the engine can carry: what is lost is lost openly, and every packet is accounted for."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

from appliance.inspection.publish import read_inspection_state
from steering.run import run
from tests.chaos import flood
from tests.chaos.registry import OVERLOAD_GOAL, Row, check, fault
from tests.chaos.stage import HOSTILE_TEXT, RULES, SENDER, TARGETS, Stage, expect
from tests.support.lab import wait_until

PORT = 6200
BFD_FRAMES = 1_000  # 20 a second from each leg, which only one side of a comparison may hold
TARGET = TARGETS["closed"]
FIRST_RATE, LAST_RATE = 1_000, 256_000
SLOW_COUNT = 10
CARRIED = 0.99
BALANCE = ("inspected", "dropped", "lost", "refused", "lost_with_engine", "bypassed", "blocked")


@dataclass(frozen=True, slots=True)
class Points:
    """Packets counted by the kernel on the way of the flood, since the devices were made."""

    left_sender: int
    lost_at_port: int  # the switch's own socket at the sender's port was full
    into_lane: int
    entered_host: int
    left_host: int
    lost_at_legs: int  # the switch's own sockets at the legs were full
    reached_target: int

    def minus(self, other: Points) -> Points:
        return Points(*(getattr(self, f.name) - getattr(other, f.name) for f in fields(self)))


def read_points(stage: Stage) -> Points:
    lab = stage.lab
    lane = lab.lanes[0]

    def count(namespace: str, device: str, way: str) -> int:
        shown = run(["ip", "-n", namespace, "-s", "-j", "link", "show", device]).stdout
        return int(json.loads(shown)[0]["stats64"][way]["packets"])

    # What a packet socket had no room for (ss(8), skmem, `d`); two lines for each socket.
    shown = run(["ip", "netns", "exec", lab.hypervisor, "ss", "-0", "-nem"]).stdout
    drops: dict[str, int] = {}
    for device, dropped in re.findall(r"\*:(\S+).*\n.*skmem:\([^)]*,d(\d+)\)", shown):
        drops[device] = drops.get(device, 0) + int(dropped)

    # Direction of the flood: by leg A or B into the host, by the other out of it; both are summed,
    # with BFD's few frames in both.
    devices = (lane.device_a, lane.device_b)
    return Points(
        left_sender=count(lab.vm(SENDER).netns, "eth0", "tx"),
        lost_at_port=drops.get(lab.vm(SENDER).interface, 0),
        into_lane=sum(count(lab.hypervisor, leg, "tx") for leg in (lane.leg_a, lane.leg_b)),
        entered_host=sum(count(lab.service_host, device, "rx") for device in devices),
        left_host=sum(count(lab.service_host, device, "tx") for device in devices),
        lost_at_legs=sum(drops.get(leg, 0) for leg in (lane.leg_a, lane.leg_b)),
        reached_target=count(lab.vm(TARGET).netns, "eth0", "rx"),
    )


@contextlib.contextmanager
def _sink(stage: Stage) -> Iterator[None]:
    argv = stage.lab.netns_argv(TARGET, [sys.executable, "-S", flood.__file__, "sink", str(PORT)])
    child = subprocess.Popen(argv)
    try:
        time.sleep(0.3)
        yield
    finally:
        child.terminate()
        child.wait(10)


SLOW_RULES = "".join(
    f'alert udp any any -> any {PORT} (msg:"chaos slow {n}"; pcre:"/^(?:[a-z.]+)+[^a-z.{n}]/"; '
    f"classtype:misc-activity; sid:{4870100 + n}; rev:1;)\n"
    for n in range(SLOW_COUNT)
)
"""They match nothing and backtrack over every packet of the flood, so that the engine is what gives out."""


@contextlib.contextmanager
def _slow_engine(stage: Stage) -> Iterator[None]:
    stage.rules.write_text(RULES + SLOW_RULES)
    stage.update_rules()
    try:
        yield
    finally:
        stage.rules.write_text(RULES)
        stage.update_rules()


def _send(stage: Stage, rate: float, seconds: float, text: str = "benign") -> tuple[Any, Points]:
    before = read_points(stage)
    address = stage.appliance.address(TARGET)
    argv = [sys.executable, "-S", flood.__file__]
    argv += [address, str(PORT), str(rate), str(seconds), text]
    told = json.loads(stage.appliance.run(SENDER, *argv, timeout=seconds + 30).stdout)
    time.sleep(1.0)
    return told, read_points(stage).minus(before)


def find_capacity(stage: Stage) -> float:
    """The highest rate (packets/s, doubling) of which 99 % come through the engine."""
    carried, rate = 0.0, float(FIRST_RATE)
    while rate <= LAST_RATE:
        told, points = _send(stage, rate, 2.0)
        if points.reached_target < CARRIED * told["sent"]:  # or was it something else's burst?
            told, points = _send(stage, rate, 2.0)
        real = float(told["sent"] / told["seconds"])
        stage.say(
            f"    {real:.0f} packets/s: {points.reached_target / told['sent']:.1%} come through"
        )
        if points.reached_target < CARRIED * told["sent"]:
            # Between the doublings, what came through of the first rate that was too much.
            through = points.reached_target / float(told["seconds"])
            return max(carried, min(real, through))
        carried = real
        if real < 0.8 * rate:
            break  # the sender can't do more
        rate *= 2
    return carried


def read_balance(stage: Stage) -> dict[str, Any]:
    """The balance of the lane that prevents as the API tells it; else from the counters themselves."""
    document = stage.appliance.api("/coverage").document
    lane: dict[str, Any]
    for lane in document.get("lanes", ()):
        if lane["lane"] == "prevent" and lane["balance"]:
            told: dict[str, Any] = lane["balance"]
            return told
    return count_directly(stage)


def count_directly(stage: Stage) -> dict[str, Any]:
    """As the API's balance, of the service host alone: with BFD's frames, which are queued too."""
    state = read_inspection_state(stage.lab.run_dir / "inspection.json")
    expect(state is not None, "`hairpin inspect` tells nothing")
    assert state is not None
    lane = next(one for one in state.lanes if one.name == "prevent")
    counters = lane.counters
    into = counters.frames_in_tagged + counters.frames_in_untagged
    inspected = counters.frames_out_tagged + counters.frames_out_untagged
    dropped = counters.engine.blocked if counters.engine is not None else 0
    lost = sum(queue.dropped + queue.user_dropped for queue in counters.frames_queues)
    return {
        "since": counters.frames_since,
        "into": into,
        "inspected": inspected,
        "dropped": dropped,
        "lost": lost,
        "refused": counters.frames_refused + counters.frames_unmarked,
        "unexplained": into - inspected - dropped - lost,
        "closes": True,
        "reason": "from the counters of the service host",
    }


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(part.title() for part in rest)


@fault("twice the load that the engine carries", seconds=150)
def overload(stage: Stage) -> Iterable[Row]:
    """What the engine carries is found, and twice of it is sent for 10 s; then a hostile flood."""
    # With few rules it is the switch that gives out first: its sockets, which nobody counts for us.
    with _slow_engine(stage), _sink(stage):
        capacity = find_capacity(stage)
        wait_until(lambda: stage.read_health() == "ok", 30)
        time.sleep(6)  # until what waited in the queue is counted on both of its sides
        before, since = read_balance(stage), time.monotonic()
        told, points = _send(stage, 2 * capacity, 10.0)
        time.sleep(12)  # the engine's own counters are summed up by and by
        after = read_balance(stage)
        hostile, blocked = _send(stage, 1000, 2.0, HOSTILE_TEXT)
    grown = {name: after.get(_camel(name), 0) - before.get(_camel(name), 0) for name in BALANCE}
    into = after["into"] - before["into"]
    unexplained = after["unexplained"] - before["unexplained"]
    # Before the lane and after it, by the kernel's own counters of the flood's ten seconds.
    outside = points.left_sender - points.lost_at_port - points.into_lane
    downs = stage.find_events("lane.down", since, "lane prevent")
    held_back = sum(one["details"].get("blockedPackets", 0) for one in downs)
    outside -= held_back
    outside += points.left_host - points.lost_at_legs - points.reached_target
    figures = {
        "carried_pps": round(capacity),
        "offered_pps": round(told["sent"] / told["seconds"]),
        "sent": told["sent"],
        "delivered": points.reached_target,
        "lost_at_vm_port": points.lost_at_port,
        "into": into,
        **grown,
        "lost_at_legs": points.lost_at_legs,
        "unexplained": unexplained,
        "unexplained_outside": outside,
        "balance_by": "the API" if "lostWithEngine" in after else after["reason"],
        "lane_downs": len(downs),
        "held_back": held_back,
        "hostile_sent": hostile["sent"],
        "hostile_delivered": blocked.reached_target,
    }
    missed = check(
        (after["closes"], f"the balance does not close: {after['reason']}"),
        (abs(unexplained) <= max(5, 0.0005 * into), f"{unexplained} unexplained in the lane"),
        (
            abs(outside) <= max(BFD_FRAMES, 0.002 * told["sent"]),
            f"{outside} packets unexplained between the VMs and the lane",
        ),
        (before["since"] == after["since"], "the balance began anew meanwhile"),
        (points.reached_target < 0.95 * told["sent"], "it was not too much: nothing was lost"),
        (blocked.reached_target < 20, f"{blocked.reached_target} packets came of a hostile flood"),
    )
    yield Row("twice the load that the engine carries", "closed", OVERLOAD_GOAL, figures, missed)
