"""The whole appliance on lanes of two queues each: steering, BFD, canaries, balance and heartbeat hold."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from appliance.inspection.publish import read_inspection_state
from appliance.lab import LabState, bring_up, take_down
from appliance.lab.plan import build_lanes
from tests.support.appliance import BLOCKED, Appliance, build_base, build_policy, inspect
from tests.support.lab import build_name, wait_until

pytestmark = [pytest.mark.lab, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def lab() -> Iterator[LabState]:
    lanes = [
        {
            "profile": lane.profile,
            "vlan": lane.vlan,
            "queues": [2 * number, 2 * number + 1],
            "legA": {"interface": lane.leg_a, "device": lane.device_a},
            "legB": {"interface": lane.leg_b, "device": lane.device_b},
        }
        for number, lane in enumerate(build_lanes(bytes(10)))
    ]
    name = build_name("q")
    try:
        yield bring_up(name, 6, overrides={"lanes": lanes})
    finally:
        take_down(name)


@pytest.fixture(scope="module")
def appliance(lab: LabState, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Appliance]:
    one = Appliance(lab, tmp_path_factory.mktemp("servers"))
    try:
        one.start_web("app-1", "app-2")
        one.apply([*build_base(lab), build_policy("all", "web", "app", inspect("prevent"))])
        yield one
    finally:
        one.stop_all()


def test_every_pair_is_inspected_and_every_lane_is_proved(appliance: Appliance) -> None:
    for profile in ("prevent", "detect"):
        assert wait_until(lambda profile=profile: appliance.is_forwarding(profile), 20), profile  # type: ignore[misc]
    for family in (4, 6):
        for source in ("web-1", "web-2"):
            for target in ("app-1", "app-2"):
                assert appliance.curl(source, target, family=family).status == 0
                assert appliance.attack(source, target, family=family).status == BLOCKED

    def proved() -> bool:
        answer = appliance.api("/canaries", "POST")
        lanes = answer.document["lanes"] if answer.status == 200 else []
        return len(lanes) == 2 and all(one["canary"]["passed"] for one in lanes)

    assert wait_until(proved, 30)


def test_the_balance_closes_over_both_queues(appliance: Appliance) -> None:
    def closes() -> bool:
        balance = next(
            one["balance"]
            for one in appliance.api("/coverage").document["lanes"]
            if one["lane"] == "prevent"
        )
        return bool(balance and balance["into"] > 0 and balance["closes"])

    with appliance.pinging("web-1", "app-1", "-i", "0.01"):
        assert wait_until(closes, 30)
    assert wait_until(closes, 30)


def test_both_threads_are_there_and_no_engine_was_replaced(appliance: Appliance) -> None:
    state = read_inspection_state(appliance.lab.settings.inspection_state)
    assert state is not None
    for number, lane in enumerate(state.lanes):
        assert [queue.number for queue in lane.queues] == [2 * number, 2 * number + 1]
        assert (lane.restarts, lane.placement.threads, lane.placement.nice) == (0, 2, -10)
        assert not [fault for fault in lane.faults if fault.mended is None]
