"""The plain lab: VMs on a switch as libvirt would make them, legs that wait for a service host."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys

import pytest

from appliance import lab as the_lab
from appliance.lab import LabState
from appliance.lab.processes import find_pids_in
from steering.errors import HairpinError, WrongInput
from steering.run import run
from tests.support.lab import reaches, wait_until

pytestmark = pytest.mark.lab


def as_service_user(*argv: str) -> str:
    drop = ["setpriv", "--reuid=hairpin", "--regid=hairpin", "--init-groups", "--inh-caps=-all"]
    return run([*drop, "--bounding-set=-all", "--no-new-privs", "--", *argv]).stdout


def read_interface(state: LabState, name: str, column: str) -> str:
    return run(state.vsctl_argv(["get", "Interface", name, column])).stdout.strip()


def test_vms_reach_each_other_over_both_families_and_with_full_frames(bare_lab: LabState) -> None:
    assert [vm.name for vm in bare_lab.vms] == ["web-1", "app-1", "db-1", "web-2"]
    for vm in bare_lab.vms[:-1]:
        assert reaches(bare_lab, "web-2", vm.address4, "-M", "do", "-s", "1472")
        assert reaches(bare_lab, "web-2", vm.address6, "-M", "do", "-s", "1452")


def test_the_switch_shows_each_vm_as_libvirt_writes_it(bare_lab: LabState) -> None:
    for vm in bare_lab.vms:
        assert read_interface(bare_lab, vm.interface, "external_ids:iface-id") == f'"{vm.iface_id}"'
        assert read_interface(bare_lab, vm.interface, "external_ids:attached-mac") == f'"{vm.mac}"'
        assert read_interface(bare_lab, vm.interface, "external_ids:vm-id") == f'"{vm.vm_id}"'
        assert read_interface(bare_lab, vm.interface, "external_ids:iface-status") == "active"
        assert the_lab.find_ofport(bare_lab, vm) == vm.ofport
    assert the_lab.find_flows(bare_lab) == ["priority=0 actions=NORMAL"]


def test_switch_and_links_carry_super_packets(bare_lab: LabState) -> None:
    asked = ["get", "Open_vSwitch", ".", "other_config:userspace-tso-enable"]
    assert run(bare_lab.vsctl_argv(asked)).stdout.strip() == '"true"'
    ends = [(vm.netns, vm.device) for vm in bare_lab.vms]
    for lane in bare_lab.lanes:
        ends += [(bare_lab.service_host, device) for _leg, device, _ofport in lane.all_legs]
        ends += [(bare_lab.hypervisor, leg) for leg, _device, _ofport in lane.all_legs]
    for netns, device in ends:
        shown = run(["ip", "netns", "exec", netns, "ethtool", "-k", device]).stdout
        assert "tx-checksumming: on" in shown
        assert "tcp-segmentation-offload: on" in shown
        assert "generic-segmentation-offload: on" in shown
    # Each port's socket holds many of them, also a port's that came later.
    sockets = ["ip", "netns", "exec", bare_lab.hypervisor, "ss", "-0", "-n", "-m"]
    ports = [line for line in run(sockets).stdout.splitlines() if ":vnet" in line or ":hp-" in line]
    assert len(ports) == len(bare_lab.vms) + 6 + 2
    assert all("rb8388608" in line for line in ports), ports


def test_the_service_user_may_use_the_switch_also_after_vswitchd_was_killed(
    bare_lab: LabState,
) -> None:
    for _again in range(2):
        assert "br-int" in as_service_user(*bare_lab.vsctl_argv(["show"]))
        assert "NORMAL" in as_service_user(*bare_lab.ofctl_argv(["dump-flows"]))
        trace = ["ovs-appctl", "-t", str(bare_lab.vswitchd), "ofproto/trace", "br-int", "in_port=1"]
        assert "Datapath actions" in as_service_user(*trace)
        the_lab.restart_vswitchd(bare_lab, plain_flow=True)
    assert reaches(bare_lab, "web-1", bare_lab.vm("app-1").address4)


def test_a_vswitchd_that_comes_back_empty_passes_nothing(bare_lab: LabState) -> None:
    the_lab.restart_vswitchd(bare_lab)
    try:
        assert the_lab.find_flows(bare_lab) == []
        assert not reaches(bare_lab, "web-1", bare_lab.vm("app-1").address4)
    finally:
        the_lab.add_plain_flow(bare_lab)
    assert reaches(bare_lab, "web-1", bare_lab.vm("app-1").address4)


def test_bfd_comes_up_through_the_service_host_and_only_in_the_lane_that_passes(
    bare_lab: LabState,
) -> None:
    assert not any(the_lab.find_forwarding_legs(bare_lab).values())
    inside = ["ip", "-n", bare_lab.service_host, "link"]
    run([*inside, "add", "name", "through", "type", "bridge", "mcast_snooping", "0"])
    try:
        lane = bare_lab.lanes[1]
        for device in (lane.device_a, lane.device_b):
            run([*inside, "set", "dev", device, "master", "through"])
        run([*inside, "set", "dev", "through", "up"])
        expected = {"hp-prev-a": False, "hp-prev-b": False, "hp-det-a": True, "hp-det-b": True}
        assert wait_until(lambda: the_lab.find_forwarding_legs(bare_lab) == expected)
    finally:
        run([*inside, "del", "dev", "through"])
    nowhere = dict.fromkeys(expected, False)
    assert wait_until(lambda: the_lab.find_forwarding_legs(bare_lab) == nowhere)


def test_normal_never_hands_a_frame_to_a_leg_nor_from_one_leg_to_the_other(
    bare_lab: LabState,
) -> None:
    first = bare_lab.vms[0]
    flood = f"dl_src={first.mac},dl_dst=ff:ff:ff:ff:ff:ff"
    appctl = ["ovs-appctl", "-t", str(bare_lab.vswitchd)]
    named = run([*appctl, "dpif/show"]).stdout
    legs = {leg for lane in bare_lab.lanes for leg, _device, _ofport in lane.all_legs}
    numbers = {
        number: name
        for name, number in re.findall(r"(\S+) \d+/(\d+):", named)
        if name in legs or name.startswith("vnet")
    }
    assert len(numbers) == len(legs) + len(bare_lab.vms)

    def find_outputs(in_port: str) -> set[str]:
        shown = run([*appctl, "ofproto/trace", "br-int", f"in_port={in_port},{flood}"]).stdout
        actions = shown.rpartition("Datapath actions: ")[2].strip().split(",")
        return {numbers[one] for one in actions if one in numbers}

    others = {vm.interface for vm in bare_lab.vms[1:]}
    assert find_outputs(first.interface) == others
    # No loop through the service host. (VMs' ports carry every VLAN, as libvirt leaves them.)
    assert find_outputs("hp-prev-a").isdisjoint(legs)
    assert find_outputs("hp-prev-c").isdisjoint(legs)


def test_the_mirror_shows_each_frame_once(bare_lab: LabState) -> None:
    tcpdump = ["tcpdump", "-n", "-e", "-l", "-i", "mir0", "icmp"]
    inside = ["ip", "netns", "exec", bare_lab.observer, "timeout", "3"]
    with subprocess.Popen(
        [*inside, *tcpdump], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as capture:
        assert capture.stderr is not None
        while "listening on" not in capture.stderr.readline():
            assert capture.poll() is None
        assert reaches(bare_lab, "web-1", bare_lab.vm("db-1").address4)
        shown = capture.communicate()[0]
    assert (shown.count("echo request"), shown.count("echo reply")) == (1, 1)


def test_a_vm_comes_moves_takes_an_address_and_goes(bare_lab: LabState) -> None:
    state = the_lab.add_vm(bare_lab, "extra")
    added = state.vm("extra")
    # The switch has said that the port is there; a busy machine may lose the first ping all the same.
    assert wait_until(lambda: reaches(state, "web-1", added.address4), 5)
    assert wait_until(lambda: reaches(state, "web-1", added.address6), 5)
    assert the_lab.find_ofport(state, added) == added.ofport
    mirror = run(state.vsctl_argv(["get", "Mirror", "hairpin-observe", "select_src_port"])).stdout
    assert mirror.count(",") == len(bare_lab.vms)

    state = the_lab.move_vm(state, "extra")
    assert the_lab.find_ofport(state, "extra") == state.vm("extra").ofport != added.ofport
    assert state.vm("extra").vm_id == added.vm_id
    assert wait_until(lambda: reaches(state, "web-1", added.address4), 5)

    state = the_lab.change_address(state, "extra", "10.77.0.200")
    assert wait_until(lambda: reaches(state, "web-1", "10.77.0.200"), 5)
    assert not reaches(state, "web-1", added.address4)

    state, role = the_lab.start_in_vm(state, "extra", ["sleep", "600"])
    pid, _started = the_lab.find_process(state, role)
    # `ip netns exec` has been started, and enters the namespace a moment later.
    assert wait_until(lambda: find_pids_in([added.netns]) == [pid])
    state = the_lab.remove_vm(state, "extra")
    assert not os.path.exists(f"/proc/{pid}")
    assert not os.path.exists(f"/run/netns/{added.netns}")
    with pytest.raises(WrongInput, match="no VM 'extra'"):
        state.vm("extra")
    with pytest.raises(HairpinError, match="is not running"):
        the_lab.find_process(state, role)
    state = the_lab.stop_process(state, role)
    assert state.vms == bare_lab.vms


def test_a_command_in_a_vm_gives_its_status_and_takes_our_signals(bare_lab: LabState) -> None:
    assert the_lab.run_in(bare_lab.name, "web-1", ["true"]) == 0
    assert the_lab.run_in(bare_lab.name, "web-1", ["sh", "-c", "exit 42"]) == 42
    assert the_lab.run_in(bare_lab.name, "web-1", ["sh", "-c", "kill -9 $$"]) == 137
    assert the_lab.run_in(bare_lab.name, "web-1", ["no-such-command"]) == 127
    with pytest.raises(WrongInput, match="no VM 'web-9'"):
        the_lab.run_in(bare_lab.name, "web-9", ["true"])
    with pytest.raises(HairpinError, match="no lab"):
        the_lab.run_in("nolab", "web-1", ["true"])

    script = (
        "import sys; from appliance.lab import run_in;"
        f"sys.exit(run_in({bare_lab.name!r}, 'web-1', sys.argv[1:]))"
    )
    argv = [sys.executable, "-c", script]
    echoed = subprocess.run([*argv, "cat"], input=b"through", capture_output=True, check=True)
    assert echoed.stdout == b"through"
    shell = 'trap "exit 9" TERM; echo ready; while :; do sleep 0.1; done'
    with subprocess.Popen([*argv, "sh", "-c", shell], stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        assert running.stdout.readline() == b"ready\n"
        running.send_signal(signal.SIGTERM)
        assert running.wait(10) == 9


def test_status_tells_what_stands_and_what_is_missing(bare_lab: LabState) -> None:
    status = the_lab.read_status(bare_lab.name)
    assert (status.standing, status.whole, status.problems) == (True, True, ())
    document = json.loads(json.dumps(status.document()))
    assert [vm["name"] for vm in document["vms"]] == [vm.name for vm in bare_lab.vms]
    assert [lane["profile"] for lane in document["lanes"]] == ["prevent", "detect"]

    the_lab.kill_process(bare_lab, "ovs-vswitchd")
    broken = the_lab.read_status(bare_lab.name)
    assert (broken.whole, broken.problems) == (False, ("ovs-vswitchd is not running",))
    the_lab.restart_vswitchd(bare_lab, plain_flow=True)
    assert the_lab.read_status(bare_lab.name).whole

    none = the_lab.read_status("nolab")
    assert (none.standing, none.whole, none.vms) == (False, False, ())
