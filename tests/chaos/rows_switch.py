"""The switch restarts, forgets, is meddled with, and its ports come and go."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

from appliance import lab as the_lab
from appliance.lab import hypervisor
from appliance.lab.store import hold_lock
from tests.chaos.meter import Traffic
from tests.chaos.registry import CLOSED_GOAL, CONTROL_GOAL, Row, check, fault
from tests.chaos.stage import MODES, TARGETS, Stage

RECONCILED_WITHIN = 2.0
MENDED_GOAL = "0 flows different afterwards, reconciled within 2 s"
OURS = "cookie=0x4850000000000000/0xffff000000000000"


def build_rows(
    name: str, stage: Stage, traffic: Traffic, struck: float, took: float, told: str
) -> Iterable[Row]:
    """Closed lets nothing past; in both modes the flows are as before, soon. ``told``: event's kind."""
    detected = stage.find_detected(told, struck)
    for mode in MODES:
        figures = traffic.build_figures(mode)
        figures |= {"detected_s": detected, "reconciled_s": round(took, 2), "flows_different": 0}
        figures["passes_again_ms"] = round(traffic.find_pause(mode, struck, 10.0) * 1000)
        uninspected = traffic.find_uninspected(mode)
        if uninspected:
            figures["uninspected_s"] = round(uninspected[-1] - uninspected[0], 3)
        missed = check(
            (took <= RECONCILED_WITHIN, f"reconciled after {took:.1f} s"),
            (
                mode == "open" or not uninspected,
                f"{len(uninspected)} hostile packets were delivered",
            ),
            (traffic.count_delivered(mode, "benign", traffic.ended - 0.5) > 0, "nothing passes"),
        )
        goal = f"{CLOSED_GOAL}; {MENDED_GOAL}" if mode == "closed" else MENDED_GOAL
        yield Row(name, mode, goal, figures, missed)


def _measure_restart(stage: Stage, name: str, plain_flow: bool) -> Iterable[Row]:
    switch = stage.appliance.read_switch()
    with stage.traffic() as meter:
        struck = time.monotonic()
        stage.appliance.lab = the_lab.restart_vswitchd(stage.lab, plain_flow=plain_flow)
        back = time.monotonic()
        took = stage.wait_switch(switch, back)
        stage.wait_forwarding()
        time.sleep(1.5)
    return build_rows(name, stage, meter.traffic, struck, took, "switch.lost")


@fault("vswitchd kill -9 and restart", quick=True)
def restart_switch(stage: Stage) -> Iterable[Row]:
    """The switch dies and comes back with no flow at all."""
    return _measure_restart(stage, "vswitchd kill -9 and restart", False)


@fault("vswitchd kill -9 and restart, NORMAL put back by hand")
def restart_plain_switch(stage: Stage) -> Iterable[Row]:
    """As before, but the administrator's own NORMAL flow is back before Hairpin's."""
    return _measure_restart(stage, "vswitchd kill -9 and restart, NORMAL put back by hand", True)


def _measure_meddling(stage: Stage, name: str, meddle: Callable[[], Any]) -> Iterable[Row]:
    switch = stage.appliance.read_switch()
    with stage.traffic() as meter:
        struck = time.monotonic()
        meddle()
        took = stage.wait_switch(switch, struck)
        time.sleep(1.5)
    return build_rows(name, stage, meter.traffic, struck, took, "drift.mended")


@fault("all flows deleted by hand", quick=True)
def delete_flows(stage: Stage) -> Iterable[Row]:
    """`ovs-ofctl del-flows` of everything, the administrator's own flow too."""
    rows = tuple(
        _measure_meddling(
            stage, "all flows deleted by hand", lambda: stage.appliance.ofctl("del-flows")
        )
    )
    the_lab.add_plain_flow(stage.lab)
    return rows


@fault("our flows deleted by hand, NORMAL left")
def delete_our_flows(stage: Stage) -> Iterable[Row]:
    """Hairpin's flows are deleted; the administrator's NORMAL is all that is left."""
    return _measure_meddling(
        stage,
        "our flows deleted by hand, NORMAL left",
        lambda: stage.appliance.ofctl("del-flows", OURS),
    )


@fault("all groups deleted by hand")
def delete_groups(stage: Stage) -> Iterable[Row]:
    """`ovs-ofctl del-groups`; the switch takes away the flows that point to them, too."""
    return _measure_meddling(
        stage, "all groups deleted by hand", lambda: stage.appliance.ofctl("del-groups")
    )


def restart_ovsdb(stage: Stage) -> None:
    """Kill the database server and start it on the same database."""
    stage.kill(hypervisor.OVSDB_SERVER)
    with hold_lock(stage.name):
        state = the_lab.read_lab(stage.name)
        (state.ovs_dir / "db.sock").unlink(missing_ok=True)
        stage.appliance.lab = hypervisor.start_ovsdb(state)


@fault("OVSDB kill -9 and restart")
def restart_database(stage: Stage) -> Iterable[Row]:
    """The database server dies and comes back: no packet notices."""
    switch = stage.appliance.read_switch()
    with stage.traffic() as meter:
        struck = time.monotonic()
        restart_ovsdb(stage)
        back = time.monotonic()
        stage.wait_ok()
        healthy = time.monotonic() - back
        took = stage.wait_switch(switch, time.monotonic())
        time.sleep(1.0)
    detected = stage.find_detected("switch.lost", struck)
    for mode in MODES:
        yield build_control_row(
            "OVSDB kill -9 and restart",
            mode,
            meter.traffic,
            {
                "detected_s": detected,
                "healthy_again_s": round(healthy, 2),
                "reconciled_s": round(healthy + took, 2),
                "flows_different": 0,
            },
        )


def build_control_row(
    name: str,
    mode: str,
    traffic: Traffic,
    figures: dict[str, Any],
    *claims: tuple[bool, str],
) -> Row:
    """A row of a fault of the control plane. ``figures``: `reconciled_s` and `flows_different` too."""
    figures = traffic.build_figures(mode) | figures
    missed = check(
        (figures["lost"] == 0, f"{figures['lost']} packets lost"),
        (figures["doubled"] == 0, f"{figures['doubled']} packets doubled"),
        (figures["uninspected"] == 0, f"{figures['uninspected']} hostile packets were delivered"),
        (figures["flows_different"] == 0, f"{figures['flows_different']} flows differ"),
        (
            figures["reconciled_s"] <= RECONCILED_WITHIN,
            f"reconciled after {figures['reconciled_s']} s",
        ),
        *claims,
    )
    return Row(name, mode, CONTROL_GOAL, figures, missed)


def _measure_ports(stage: Stage, name: str, flap: Callable[[str], Any]) -> Iterable[Row]:
    with stage.traffic() as meter:
        struck = time.monotonic()
        for mode in MODES:
            flap(TARGETS[mode])
        returned = time.monotonic()
        time.sleep(3)
    downs = len(stage.find_events("lane.down", struck, "lane prevent"))
    for mode in MODES:
        figures = meter.traffic.build_figures(mode)
        uninspected = meter.traffic.find_uninspected(mode)
        pause = meter.traffic.find_pause(mode, struck, 10.0)
        figures["away_s"] = round(returned - struck, 2)
        figures["passes_again_ms"] = round(pause * 1000)
        after = max(0.0, pause - (returned - struck))
        figures["after_return_s"] = round(after, 2)
        figures["lane_downs"] = downs
        missed = check(
            (
                not uninspected or (mode == "open" and downs > 0),
                f"{len(uninspected)} hostile packets were delivered",
            ),
            (after <= RECONCILED_WITHIN, f"passes {after:.1f} s after the port's return"),
            (figures["doubled"] == 0, f"{figures['doubled']} packets doubled"),
        )
        goal = (
            CLOSED_GOAL
            if mode == "closed"
            else "0 packets pass uninspected unless the lane is down"
        )
        yield Row(name, mode, f"{goal}; passes within 2 s of its return", figures, missed)


@fault("VM port flap", quick=True)
def flap_ports(stage: Stage) -> Iterable[Row]:
    """The ports of both receiving VMs go down and up five times."""

    def flap(vm: str) -> None:
        for _ in range(5):
            for state in ("down", "up"):
                stage.run_in(
                    stage.lab.hypervisor, "ip", "link", "set", stage.lab.vm(vm).interface, state
                )
                time.sleep(0.1)

    return _measure_ports(stage, "VM port flap", flap)


@fault("VM port comes back with another number")
def move_ports(stage: Stage) -> Iterable[Row]:
    """Both receiving VMs' ports are removed and added again with other numbers, and back."""

    def move(vm: str) -> None:
        stage.appliance.lab = the_lab.move_vm(stage.lab, vm)

    def move_both_ways(vm: str) -> None:
        move(vm)
        time.sleep(0.5)
        move(vm)

    return _measure_ports(stage, "VM port comes back with another number", move_both_ways)
