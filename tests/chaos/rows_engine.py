"""Engines that die, hang, or lose their wires: closed is closed, open is open, at once and by itself."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from tests.chaos.meter import Traffic
from tests.chaos.registry import CLOSED_GOAL, OPEN_GOAL, Row, check, fault
from tests.chaos.stage import EngineWatch, Stage

OPEN_WITHIN = 0.2
BACK_WITHIN = 1.0
ENGINE = "engine-prevent"
SWEEP_SECONDS = 0.75
"""OVS gives what it sent between two sweeps of its revalidators to the bucket that lives at the sweep: at

each failover, there and back, so much traffic may be told of the wrong bucket. A sweep begins
max-revalidator (500 ms) after the last one ended, and later where the cores are busy: seen up to 0.54 s.
"""
UNNOTICED_SECONDS = 0.3
"""An engine that is back sooner is no failure of its lane: BFD needs three silent intervals, and what the

queue's listener was not there for was dropped in both modes.
"""


def build_rows(
    name: str, stage: Stage, traffic: Traffic, struck: float, returned: float
) -> tuple[Row, Row]:
    """A row for closed and one for open, of a lane that failed at ``struck``.

    ``returned`` is when what failed was there again: an engine said that it started, a link is up.
    """
    detected = stage.find_detected("lane.down", struck, "lane prevent")
    found = []
    for mode in ("closed", "open"):
        figures: dict[str, Any] = traffic.build_figures(mode)
        figures["detected_s"] = detected
        uninspected = traffic.find_uninspected(mode)
        # Held up or lost, it makes no difference to who waits for it.
        gap = traffic.find_gap(mode, struck - 0.02, min(struck + 3, traffic.ended))
        pause = gap if mode == "open" else traffic.find_pause(mode, struck)
        figures["passes_again_ms"] = round(pause * 1000)
        figures["down_s"] = round(returned - struck, 2)
        # Not before the engine's return: nobody inspects then.
        back = max([0.0, *(moment - returned for moment in uninspected)])
        figures["inspection_back_s"] = round(back, 3)
        unnoticed = detected is None and returned - struck < UNNOTICED_SECONDS
        if mode == "closed":
            figures["carried_again_s"] = round(pause - (returned - struck), 2)
            missed = check(
                (not uninspected, f"{len(uninspected)} hostile packets were delivered"),
                (detected is not None or unnoticed, "no event tells that the lane was down"),
            )
            found.append(Row(name, mode, CLOSED_GOAL, figures, missed))
        else:
            seen = traffic.count_between(mode, uninspected)
            edge = round(SWEEP_SECONDS * traffic.find_rate(mode))
            told = stage.wait_told(struck, seen, edge)
            figures |= {"uninspected_told": told, "uninspected_seen": seen, "told_within": edge}
            inspected_again = traffic.count_delivered(mode, "benign", returned + BACK_WITHIN) > 0
            missed = check(
                (pause <= OPEN_WITHIN, f"passed again after {pause * 1000:.0f} ms"),
                (back <= BACK_WITHIN, f"inspected again {back:.2f} s after the engine's return"),
                (
                    (unnoticed and not seen) or (told is not None and abs(told - seen) <= edge),
                    f"the event tells of {told} uninspected packets, {seen} were seen",
                ),
                (inspected_again, "nothing was delivered after the engine's return"),
            )
            found.append(Row(name, mode, OPEN_GOAL, figures, missed))
    return found[0], found[1]


@fault("no fault", quick=True)
def measure_nothing(stage: Stage) -> Iterable[Row]:
    """Nothing is done: what the meter says of a healthy appliance."""
    with stage.traffic() as meter:
        time.sleep(3)
    for mode in ("closed", "open"):
        figures = meter.traffic.build_figures(mode)
        missed = check(
            (figures["uninspected"] == 0, f"{figures['uninspected']} hostile packets delivered"),
            (figures["lost"] == 0, f"{figures['lost']} benign packets lost"),
            (figures["doubled"] == 0, f"{figures['doubled']} packets doubled"),
            (figures["hostile_sent"] > 500, "too few were sent to tell anything"),
        )
        yield Row("no fault", mode, "0 lost, 0 doubled, 0 uninspected", figures, missed)


@fault("engine kill -9", quick=True)
def kill_engine(stage: Stage) -> Iterable[Row]:
    """The engine is killed; whoever supervises it starts another."""
    with stage.traffic() as meter:
        watch = EngineWatch(stage)
        struck = stage.kill(ENGINE)
        returned = watch.wait_started()
        stage.wait_forwarding()
        time.sleep(1.5)
    return build_rows("engine kill -9", stage, meter.traffic, struck, returned)


@fault("engine hang (SIGSTOP), replaced", quick=True)
def stop_engine(stage: Stage) -> Iterable[Row]:
    """The engine is stopped and stays so; it is killed and replaced."""
    with stage.traffic() as meter:
        watch = EngineWatch(stage)
        struck = stage.kill(ENGINE, signal.SIGSTOP)
        returned = watch.wait_started()
        stage.wait_forwarding()
        time.sleep(1.5)
    return build_rows("engine hang (SIGSTOP), replaced", stage, meter.traffic, struck, returned)


@fault("engine hang (SIGSTOP), resumed after 1.5 s")
def stop_and_continue_engine(stage: Stage) -> Iterable[Row]:
    """The engine is stopped and goes on before anybody replaces it."""
    with stage.traffic() as meter:
        struck = stage.kill(ENGINE, signal.SIGSTOP)
        time.sleep(1.5)
        returned = stage.kill(ENGINE, signal.SIGCONT)
        stage.wait_forwarding()
        time.sleep(1.5)
    return build_rows(
        "engine hang (SIGSTOP), resumed after 1.5 s", stage, meter.traffic, struck, returned
    )


@contextmanager
def _links_down(stage: Stage, namespace: str, devices: tuple[str, ...]) -> Iterator[float]:
    def set_links(state: str) -> None:
        for device in devices:
            stage.run_in(namespace, "ip", "link", "set", device, state)

    struck = time.monotonic()
    set_links("down")
    try:
        yield struck
    finally:
        set_links("up")


def _measure_links(
    stage: Stage, name: str, namespace: str, devices: tuple[str, ...]
) -> tuple[Row, Row]:
    with stage.traffic() as meter:
        with _links_down(stage, namespace, devices) as struck:
            time.sleep(2)
        returned = time.monotonic()
        stage.wait_forwarding()
        time.sleep(1.5)
    return build_rows(name, stage, meter.traffic, struck, returned)


@fault("links down in the service host", quick=True)
def down_service_links(stage: Stage) -> Iterable[Row]:
    """Both legs' devices of the lane are set down in the service host for 2 s."""
    lane = stage.lab.lanes[0]
    devices = (lane.device_a, lane.device_b)
    return _measure_links(stage, "links down in the service host", stage.lab.service_host, devices)


@fault("links down at the switch")
def down_switch_links(stage: Stage) -> Iterable[Row]:
    """Both legs of the lane are set down in the hypervisor for 2 s."""
    lane = stage.lab.lanes[0]
    return _measure_links(
        stage, "links down at the switch", stage.lab.hypervisor, (lane.leg_a, lane.leg_b)
    )


@fault("one link down in the service host")
def down_one_link(stage: Stage) -> Iterable[Row]:
    """One leg's device of the lane is set down in the service host for 2 s."""
    return _measure_links(
        stage,
        "one link down in the service host",
        stage.lab.service_host,
        (stage.lab.lanes[0].device_b,),
    )
