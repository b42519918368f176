"""The demonstration with a VM, as far as it needs none: plans, QEMU's command, and what its tools print."""

from __future__ import annotations

from pathlib import Path

import pytest

from appliance.hosting.pki import issue
from appliance.hosting.spec import build_ports
from appliance.hosting.vm import render_domain, render_seed
from appliance.lab import demo
from appliance.lab.demo_policies import build_documents
from appliance.lab.demo_report import Check, render_summary
from appliance.lab.demo_vm import DEMO, STEPS
from appliance.lab.demo_vm_fast import LET_GO, POLICY, read_transfer, render_shortcut_policy
from appliance.lab.demo_vm_steps import find_faults
from appliance.lab.plan import LabState
from appliance.lab.qemu import build_argv
from appliance.lab.store import parse_state, render_state
from appliance.lab.vm_lab import find_largest
from appliance.lab.vm_plan import (
    BFD_MILLISECONDS,
    build_host,
    build_vm_spec,
    build_vm_state,
    find_image,
    parse_domain,
)
from appliance.rules.age import DAY, RulesAge, judge_age
from steering.coverage import build_coverage
from steering.decide import resolve_machines
from steering.errors import HairpinError
from steering.model import Port
from steering.parse import parse_documents
from steering.run import Finished


def build_lab(*, kvm: bool = False) -> LabState:
    return build_vm_state("demovm", 6, now=0.0, super_packets=True, kvm=kvm)


def render_xml(state: LabState) -> str:
    host = build_host(state, kvm=False)
    return render_domain(host, build_ports(host, bytes(32)))


def test_the_lab_has_a_manager_in_the_place_of_a_service_host() -> None:
    state = build_lab()
    assert state.namespaces[:2] == ("hp-demovm-hv", "hp-demovm-adm")
    assert state.url == "https://10.78.0.2:8470"
    assert state.client_argv == ("ip", "netns", "exec", "hp-demovm-adm")
    assert state.client_env["HAIRPIN_CA_FILE"] == "/run/hairpin-lab/demovm/api.pem"
    assert state.client_env["HAIRPIN_TOKEN_FILE"] == "/run/hairpin-lab/demovm/keys/token"
    assert parse_state(render_state(state)) == state


def test_the_lab_s_lanes_are_those_that_the_host_is_prepared_with() -> None:
    state = build_lab()
    ports = build_ports(build_host(state, kvm=False), bytes(32))
    legs = {(name, ofport) for lane in state.lanes for name, _device, ofport in lane.all_legs}
    assert legs == {(port.interface, port.ofport) for port in ports if port.profile is not None}
    assert {lane.vlan for lane in state.lanes} == {3901, 3902}


@pytest.mark.parametrize("kvm", [True, False])
def test_bfd_is_as_slow_as_the_vm(kvm: bool) -> None:
    assert build_host(build_lab(kvm=kvm), kvm=kvm).bfd_milliseconds == BFD_MILLISECONDS[kvm]


def test_qemu_gets_what_libvirt_would_be_told() -> None:
    state = build_lab()
    host = build_host(state, kvm=False)
    ports = build_ports(host, bytes(32))
    spec = build_vm_spec(state, parse_domain(render_xml(state)), Path("/images/hairpin.raw"))
    argv = " ".join(build_argv(spec, kvm=False))
    assert argv.startswith("ip netns exec hp-demovm-hv qemu-system-x86_64 ")
    for number, port in enumerate(ports, 1):
        assert f"tap,id=net{number},ifname={port.interface}," in argv
        assert f"netdev=net{number},mac={port.mac},romfile=,host_mtu=1504" in argv
    assert "ifname=hp-mgmt," in argv
    seed = f"file={host.vm_directory}/hairpin-seed.yaml"
    assert f"-fw_cfg name=opt/io.systemd.credentials/hairpin.seed,{seed}" in argv


def test_no_secret_is_on_qemu_s_command_line() -> None:
    """Everybody on the host may read it: the seed goes by its file."""
    state, token = build_lab(), "an-api-token-of-more-than-32-characters"
    host = build_host(state, kvm=False)
    ports = build_ports(host, bytes(32))
    pki = issue(host.name, [], host.address, 0.0)
    seed = render_seed(host, ports, pki, token)
    assert token in seed
    spec = build_vm_spec(state, parse_domain(render_domain(host, ports)), Path("/i.qcow2"))
    argv = " ".join(build_argv(spec, kvm=True))
    assert token not in argv
    assert "PRIVATE KEY" not in argv
    assert "credential.binary" not in argv


@pytest.mark.parametrize("text", ["", "<domain/>", "<domain><sysinfo><entry/></sysinfo></domain>"])
def test_another_s_xml_is_refused(text: str) -> None:
    with pytest.raises(HairpinError):
        parse_domain(text)


def test_the_image_is_the_named_one_or_the_newest_raw_one() -> None:
    old, new, packed = Path("/o/a.raw"), Path("/o/b.raw"), Path("/o/c.qcow2")
    assert find_image("/x/y.raw", [old]) == Path("/x/y.raw")
    assert find_image("", [old, new, packed]) == new
    assert find_image(None, [packed]) == packed
    assert find_image(None, []) is None


def test_the_largest_packet_is_read_by_lane() -> None:
    page = (
        "# TYPE hairpin_lane_largest_packet_bytes gauge\n"
        'hairpin_lane_largest_packet_bytes{lane="prevent"} 65226.0\n'
        'hairpin_lane_largest_packet_bytes{lane="detect"} 0.0\n'
    )
    assert find_largest(page) == {"prevent": 65226, "detect": 0}


def test_a_download_is_what_curl_wrote() -> None:
    moved = read_transfer(Finished(0, "200 20000000 2500000", ""))
    assert (moved.status, moved.size, moved.rate) == (200, 20_000_000, 20e6)
    assert str(moved) == "20 MB at 20 Mbit/s"
    assert read_transfer(Finished(28, "", "timed out")).status == 0


def test_the_policy_with_a_shortcut_is_for_one_pair_only() -> None:
    vms = build_lab().vms
    text = f"{build_documents(vms, with_added=True)}---\n{render_shortcut_policy()}"
    found = parse_documents(text)
    ports = [
        Port(vm.interface, vm.ofport, vm.mac, vm.iface_id, vm.vm_id, "br-int", None) for vm in vms
    ]
    pairs = {
        (one.source.name, one.destination.name): one
        for one in build_coverage(found, resolve_machines(found, ports)).pairs
    }
    by_policy = {pair: {service.policy for service in one.services} for pair, one in pairs.items()}
    assert {pair for pair, names in by_policy.items() if POLICY in names} == {LET_GO}
    assert f"{POLICY} leaves inspection after 1MB" in str(pairs[LET_GO].gap)


def build_health(*reasons: str, inspecting: bool = True, switch: str = "ok") -> dict[str, object]:
    lanes = [{"name": "prevent", "inspecting": inspecting}]
    return {
        "components": {"switch": {"status": switch}, "lanes": lanes},
        "problems": [{"reason": reason} for reason in reasons],
    }


def test_only_the_age_of_an_image_s_rules_is_no_fault() -> None:
    starter = RulesAge(0.0, "starter", starter_only=True)
    old = judge_age(starter, 90 * DAY, 30 * DAY)
    early = judge_age(starter, -DAY, 30 * DAY)
    assert old
    assert early
    assert find_faults(build_health(old, early)) == []
    assert find_faults(build_health(old, "its canary was lost")) == ["its canary was lost"]
    assert find_faults(build_health(inspecting=False)) == ["lane prevent does not inspect"]
    assert find_faults(build_health(switch="failing")) == ["the switch"]


def test_it_shows_all_that_the_demonstration_without_a_vm_shows_of_policies() -> None:
    assert STEPS[: len(demo.POLICY_STEPS)] == demo.POLICY_STEPS
    assert (DEMO.lab, DEMO.last) == ("demovm", "g")
    assert render_summary([Check("", "", "", "", True)], DEMO.name) == "demo-vm: PASS 1/1"
