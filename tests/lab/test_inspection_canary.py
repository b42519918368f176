"""Canaries through a real switch, a real bridge and a real engine, sent on request by `hairpin inspect`.

The flows are by hand and above Hairpin's own: this is about who sends and watches, not about tables.
"""

from __future__ import annotations

import asyncio
import secrets

import pytest

from appliance.inspection import canary_client
from appliance.inspection.canary_client import PartReport, ProbeReport
from appliance.lab import LabState
from appliance.lab.changes import kill_process
from appliance.lab.services import INSPECT, start_service
from appliance.rules.canary import find_token
from appliance.settings import Settings, read_settings
from steering.canary import SOURCE_MAC, build_destination_mac
from steering.errors import HairpinError
from steering.model import Lane, Profile
from steering.run import run
from tests.support.lab import wait_until

pytestmark = pytest.mark.lab

WHOLE = {"sent": True, "entered": True, "left": True, "returned": True}
DROPPED = {"sent": True, "entered": True, "left": False, "returned": False}


@pytest.fixture(scope="module")
def settings(module_lab: LabState) -> Settings:
    found = read_settings(module_lab.settings_file)
    for lane in found.build_lanes():
        for answer, leg in ((False, lane.leg_a), (True, lane.leg_b)):
            there = build_destination_mac(lane, answer=answer)
            steer = f"in_port=hp-canary,dl_dst={there}"
            back = f"in_port={leg.interface},dl_vlan={lane.vlan},dl_src={SOURCE_MAC}"
            for match, actions in (
                (steer, f"mod_vlan_vid:{lane.vlan},output:{leg.interface}"),
                (back, "strip_vlan,output:hp-canary"),
            ):
                flow = f"priority=400,{match},actions={actions}"
                run(module_lab.ofctl_argv(["add-flow", flow]))
    return found


def find_lane(settings: Settings, profile: Profile = Profile.PREVENT) -> Lane:
    return next(lane for lane in settings.build_lanes() if lane.profile is profile)


def probe(settings: Settings, lane: Lane, ruleset: str | None = None) -> ProbeReport:
    if ruleset is None:
        ruleset = find_token(settings.ruleset(lane).read_text())
        assert ruleset is not None
    return asyncio.run(
        canary_client.probe(settings.canary_socket, lane.name, ruleset, secrets.token_hex(16), 1.0)
    )


def find_steps(part: PartReport) -> dict[str, bool]:
    steps = part.model_dump(include={"sent", "entered", "left", "returned"})
    return {name: bool(reached) for name, reached in steps.items()}


@pytest.mark.parametrize("profile", [Profile.PREVENT, Profile.DETECT])
def test_controls_come_back_and_hostile_ones_end_in_the_engine(
    module_lab: LabState, settings: Settings, profile: Profile
) -> None:
    lane = find_lane(settings, profile)
    report = probe(settings, lane)
    assert report.fault == ""
    assert len(report.parts) == 8
    for part in report.parts:
        assert find_steps(part) == (DROPPED if part.hostile else WHOLE), part
        assert part.vlan == lane.vlan
    assert report.queued >= 8
    assert report.queue_dropped == 0


def test_hostile_ones_of_another_ruleset_come_back(
    module_lab: LabState, settings: Settings
) -> None:
    report = probe(settings, find_lane(settings), ruleset="0" * 16)
    assert [find_steps(part) for part in report.parts] == [WHOLE] * 8


def test_probes_of_both_lanes_at_once_do_not_see_each_other(
    module_lab: LabState, settings: Settings
) -> None:
    async def ask() -> list[ProbeReport]:
        asked = (
            canary_client.probe(
                settings.canary_socket,
                lane.name,
                find_token(settings.ruleset(lane).read_text()) or "",
                secrets.token_hex(16),
                1.0,
            )
            for lane in settings.build_lanes()
            for _ in range(3)
        )
        return list(await asyncio.gather(*asked))

    for report in asyncio.run(ask()):
        assert report.fault == ""
        for part in report.parts:
            assert find_steps(part) == (DROPPED if part.hostile else WHOLE), report.lane


def test_packet_that_is_lost_in_the_service_host_has_entered(
    module_lab: LabState, settings: Settings
) -> None:
    lane = find_lane(settings)
    tc = ["ip", "netns", "exec", module_lab.service_host, "tc"]
    # It is there already where the lane has a third leg.
    run([*tc, "qdisc", "add", "dev", lane.leg_a.device, "clsact"], check=False)
    # ldb vlan_tag_present; jeq #1; TC_ACT_SHOT, else TC_ACT_OK: BFD goes on.
    tagged = "4,48 0 0 4294963248,21 0 1 1,6 0 0 2,6 0 0 0"
    where = ["dev", lane.leg_a.device, "ingress", "protocol", "all"]
    run([*tc, "filter", "add", *where, "bpf", "da", "bytecode", tagged])
    try:
        report = probe(settings, lane)
    finally:
        run([*tc, "filter", "del", "dev", lane.leg_a.device, "ingress"])
    for part in report.parts:
        whole = part.answer and not part.hostile
        assert find_steps(part) == (WHOLE if whole else DROPPED), part


def test_packet_that_the_switch_does_not_steer_never_enters(
    module_lab: LabState, settings: Settings
) -> None:
    lane = find_lane(settings)
    there = build_destination_mac(lane, answer=True)
    match = f"priority=500,in_port=hp-canary,dl_dst={there}"
    run(module_lab.ofctl_argv(["add-flow", f"{match},actions=drop"]))
    try:
        report = probe(settings, lane)
    finally:
        run(module_lab.ofctl_argv(["del-flows", "--strict", match]))
    lost = {"sent": True, "entered": False, "left": False, "returned": False}
    for part in report.parts:
        assert find_steps(part) == (lost if part.answer else DROPPED if part.hostile else WHOLE)


def test_device_that_is_down_is_named_and_set_up_again(
    module_lab: LabState, settings: Settings
) -> None:
    device = settings.canary.device
    host = ["ip", "-n", module_lab.service_host, "link"]
    run([*host, "set", device, "down", "promisc", "off"])
    report = probe(settings, find_lane(settings))
    assert report.fault.startswith(f"the device `{device}` in the service host is down; ")

    def is_whole() -> bool:
        return all(p.returned for p in probe(settings, find_lane(settings)).parts if not p.hostile)

    assert wait_until(is_whole, 6)
    shown = run([*host, "show", device]).stdout
    assert "master" not in shown
    # What comes back is for another address, which a card (a virtio one, too) would not take in.
    assert "PROMISC" in shown


def test_restarted_inspect_offers_canaries_again(module_lab: LabState, settings: Settings) -> None:
    kill_process(module_lab, INSPECT)
    start_service(module_lab, INSPECT)

    def answers() -> bool:
        try:
            return probe(settings, find_lane(settings)).fault == ""
        except HairpinError:
            return False

    assert wait_until(answers, 10)
