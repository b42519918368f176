"""What a lab consists of: names, addresses, settings; and how it is written down and read back."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.lab import expose
from appliance.lab.plan import (
    ROOT,
    LabState,
    ProcessRecord,
    build_leg_args,
    build_state,
    build_vm,
    build_vms,
)
from appliance.lab.store import parse_state, render_state
from steering.errors import HairpinError, WrongInput
from steering.model import Profile
from tests.support.lab import find_stale


def make(vms: int = 6, **overrides: Any) -> LabState:
    return build_state(
        "lab",
        vms,
        serve=True,
        overrides=overrides,
        random=bytes(range(10)),
        api_port=8471,
        now=1000.0,
    )


def test_the_default_lab_is_six_vms_in_three_zones() -> None:
    state = make()
    assert [(vm.name, vm.zone, vm.interface, vm.mac, vm.address4) for vm in state.vms] == [
        ("web-1", "web", "vnet01", "02:48:50:00:00:01", "10.77.0.1"),
        ("app-1", "app", "vnet02", "02:48:50:00:00:02", "10.77.0.2"),
        ("db-1", "db", "vnet03", "02:48:50:00:00:03", "10.77.0.3"),
        ("web-2", "web", "vnet04", "02:48:50:00:00:04", "10.77.0.4"),
        ("app-2", "app", "vnet05", "02:48:50:00:00:05", "10.77.0.5"),
        ("db-2", "db", "vnet06", "02:48:50:00:00:06", "10.77.0.6"),
    ]
    assert state.namespaces[:4] == ("hp-lab-hv", "hp-lab-svc", "hp-lab-obs", "hp-lab-web-1")
    assert state.vm("db-2").address6 == "fd77::6"


def test_a_lane_has_a_third_leg_kept_apart_as_the_others_and_without_bfd() -> None:
    state = make()
    assert [lane.all_legs[2] for lane in state.lanes] == [
        ("hp-prev-c", "prev-c", 210),
        ("hp-det-c", "det-c", 211),
    ]
    lane = state.lanes[0]
    args = build_leg_args(lane)
    third = args[args.index(lane.leg_c) :]
    assert third[1] == f"tag={lane.vlan}"
    assert "protected=true" in third
    assert not any("bfd" in one for one in third)
    assert args.count("bfd:enable=true") == 2
    third_legs = [one.leg_c for one in state.settings.build_lanes()]
    assert [leg and leg.device for leg in third_legs] == ["prev-c", "det-c"]
    # A lab of before the third leg is still read.
    old = replace(lane, leg_c="", device_c="", ofport_c=0)
    assert old.all_legs == old.legs
    settings = replace(state, lanes=(old, state.lanes[1])).settings
    assert settings.build_lanes()[0].leg_c is None


@given(st.integers(2, 64))
def test_vms_differ_in_everything_and_keep_their_identity_when_there_are_more(count: int) -> None:
    vms = build_vms("lab", count)
    assert len(vms) == count
    for column in ("name", "netns", "interface", "ofport", "mac", "address4", "address6", "vm_id"):
        assert len({getattr(vm, column) for vm in vms}) == count
    assert all(len(vm.interface) <= 15 for vm in vms)
    assert vms == build_vms("lab", 64)[:count]
    assert {vm.vm_id for vm in vms}.isdisjoint(vm.vm_id for vm in build_vms("other", count))


@pytest.mark.parametrize("name", ["hv", "svc", "obs", "", "Web", "a b", "../x", "-web", "w" * 33])
def test_a_vm_can_not_take_a_reserved_or_odd_name(name: str) -> None:
    with pytest.raises(WrongInput):
        build_vm("lab", name, 1)


@pytest.mark.parametrize("name", ["", "a-b", "../lab", "LAB", "x" * 16])
def test_a_lab_can_not_take_a_name_that_could_belong_to_two(name: str) -> None:
    with pytest.raises(WrongInput):
        build_state(name, 2, serve=False, overrides={}, random=bytes(10), api_port=8471, now=1000.0)


def test_the_settings_are_those_of_the_appliance_and_can_be_overridden() -> None:
    state = make(
        rules={"sources": [{"name": "et", "url": "file:///rules.tar.gz"}]}, api={"port": 9}
    )
    settings = state.settings
    assert settings.state_dir == ROOT / "lab/state"
    assert settings.token_file == state.token_file
    assert settings.switch.openflow == "unix:/run/hairpin-lab/lab/ovs/br-int.mgmt"
    assert [lane.profile for lane in settings.build_lanes()] == [Profile.PREVENT, Profile.DETECT]
    assert settings.rules.sources[0].name == "et"
    assert (settings.api.port, settings.api.listen) == (9, "127.0.0.1")
    assert (settings.inspection.netns, settings.visibility.netns) == (None, state.observer)
    with pytest.raises(WrongInput, match="nonsense"):
        make(nonsense=True)


def test_bfd_addresses_are_unicast_local_and_one_per_lane() -> None:
    macs = [lane.bfd_mac for lane in make().lanes]
    assert macs == ["02:00:01:02:03:04", "02:05:06:07:08:09"]


@given(st.integers(2, 64), st.integers(0, 2**22), st.text(max_size=20))
def test_a_state_reads_back_as_it_was_written(vms: int, pid: int, log: str) -> None:
    state = make(vms).with_process(ProcessRecord("serve", pid, "boot/1", log))
    assert parse_state(render_state(state)) == state


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 2}', '{"format": 1}'])
def test_a_torn_or_foreign_state_file_is_refused_with_a_mend(text: str) -> None:
    with pytest.raises(HairpinError) as refused:
        parse_state(text)
    assert refused.value.mend


def test_what_is_needed_below_a_closed_directory_is_found_once() -> None:
    needed = [
        Path("/root/tree/appliance"),
        Path("/root/tree"),
        Path("/root/.pyenv/3.11"),
        Path("/usr"),
        Path("/home/me/venv"),
    ]
    closed = {Path("/root"), Path("/root/.pyenv"), Path("/home/me")}
    assert expose.find_covers(needed, lambda path: path not in closed) == {
        Path("/root"): (Path("/root/tree"), Path("/root/.pyenv/3.11")),
        Path("/home/me"): (Path("/home/me/venv"),),
    }
    assert expose.find_covers(needed, lambda _path: True) == {}


def test_only_labs_of_ended_test_runs_are_stale() -> None:
    names = ["lab", "t12", "t12b", "t13m", "team", "t12b.lock", "t", "t1x2"]
    assert find_stale(names, lambda pid: pid == 13) == ["t12", "t12b"]
