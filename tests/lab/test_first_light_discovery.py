"""VMs are found, not configured: they come, go, move, change addresses, and can't pass for others."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from datetime import datetime
from typing import Any

import pytest

from appliance import lab as the_lab
from appliance.lab import LabState
from tests.support.appliance import (
    BLOCKED,
    Appliance,
    build_base,
    build_policy,
    inspect,
)
from tests.support.lab import reaches, wait_until

pytestmark = pytest.mark.lab


def build_documents(lab: LabState, *more: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        *build_base(lab),
        build_policy("web-to-app", "web", "app", inspect("prevent")),
        build_policy("app-to-web", "app", "web", inspect("prevent")),
        *more,
    ]


@pytest.fixture(scope="module")
def appliance(module_lab: LabState, tmp_path_factory: pytest.TempPathFactory) -> Appliance:
    appliance = Appliance(module_lab, tmp_path_factory.mktemp("servers"))
    appliance.start_web("web-1", "app-1")
    appliance.apply(build_documents(module_lab))
    assert wait_until(lambda: appliance.is_forwarding("prevent"))
    return appliance


def count_vlan(appliance: Appliance, source: str, destination: str) -> int:
    """How often the first packet of a connection is sent into the prevent lane."""
    one, other = appliance.lab.vm(source), appliance.lab.vm(destination)
    traced = appliance.trace(
        f"in_port={the_lab.find_ofport(appliance.lab, one)},tcp,dl_src={one.mac},dl_dst={other.mac},"
        f"nw_src={one.address4},nw_dst={other.address4},nw_ttl=64,"
        "tcp_src=40000,tcp_dst=80,tcp_flags=0x002",
        "--ct-next",
        "trk,new",
    )
    vlan = appliance.lab.lanes[0].vlan
    return traced.rpartition("Datapath actions:")[2].count(f"push_vlan(vid={vlan}")


def test_vms_are_found_with_the_names_tags_and_zones_of_the_documents(appliance: Appliance) -> None:
    found = {vm["name"]: vm for vm in appliance.read("vms")["items"]}
    assert set(found) == {vm.name for vm in appliance.lab.vms}
    for vm in appliance.lab.vms:
        one = found[vm.name]
        assert (one["vmId"], one["tags"], one["zones"]) == (vm.vm_id, {"tier": vm.zone}, [vm.zone])
        (port,) = one["ports"]
        assert (port["interface"], port["mac"], port["ofport"], port["bridge"]) == (
            vm.interface,
            vm.mac,
            vm.ofport,
            "br-int",
        )
        assert port["linkUp"]
        assert one["inScope"]


@pytest.mark.parametrize("family", [4, 6])
def test_addresses_are_learned_with_the_time(appliance: Appliance, family: int) -> None:
    # The neighbours know each other: a flushed cache makes them ask.
    for vm in appliance.lab.vms:
        appliance.run(vm.name, "ip", "neigh", "flush", "all")
    address = appliance.address("db-2", family)
    assert reaches(appliance.lab, "web-1", address)

    def find() -> list[dict[str, Any]]:
        vm = appliance.find_vm("db-2")
        assert vm is not None
        return [one for one in vm["addresses"] if one["address"] == address]

    assert wait_until(find, 5)
    since = datetime.fromisoformat(find()[0]["since"]).timestamp()
    assert appliance.lab.created < since <= time.time()


def test_a_vm_that_moves_is_inspected_within_a_second(appliance: Appliance) -> None:
    moved = time.monotonic()
    appliance.lab = the_lab.move_vm(appliance.lab, "app-1")
    assert wait_until(lambda: count_vlan(appliance, "web-1", "app-1") == 1, 1.0)
    port = the_lab.find_ofport(appliance.lab, "app-1")
    vm = appliance.find_vm("app-1")
    assert vm is not None
    assert vm["ports"][0]["ofport"] == port
    time.sleep(max(0.0, moved + 1.0 - time.monotonic()))
    before = appliance.find_latest_alert()
    assert appliance.curl("web-1", "app-1").status == 0
    assert appliance.attack("web-1", "app-1").status == BLOCKED
    assert appliance.wait_alerts(before)[0]["verdict"] == "blocked"


def test_a_vm_that_comes_is_inspected_and_one_that_goes_leaves_no_flow(
    appliance: Appliance,
) -> None:
    started = time.time()
    appliance.lab = the_lab.add_vm(appliance.lab, "app-9")
    assert wait_until(lambda: appliance.find_vm("app-9"), 1.0)
    appliance.apply(build_documents(appliance.lab))
    appliance.start_web("app-9")
    before = appliance.find_latest_alert()
    assert appliance.curl("web-1", "app-9").stdout == "hello from app-9\n"
    assert appliance.attack("web-1", "app-9").status == BLOCKED
    assert appliance.wait_alerts(before)[0]["destination"]["vm"]["name"] == "app-9"
    appliance.lab = the_lab.remove_vm(appliance.lab, "app-9")
    appliance.roles = [role for role in appliance.roles if not role.startswith("app-9")]
    assert wait_until(lambda: not appliance.find_port_flows(7), 1.0)
    # It comes back: its document is still there, so it is inspected before anybody does anything.
    appliance.lab = the_lab.add_vm(appliance.lab, "app-9")
    assert wait_until(lambda: count_vlan(appliance, "web-1", "app-9") == 1, 1.0)
    appliance.lab = the_lab.remove_vm(appliance.lab, "app-9")
    assert wait_until(lambda: len(appliance.find_events("ports.changed", started)) >= 4, 5)
    appliance.apply(build_documents(appliance.lab))


def test_an_address_that_changes_hands_is_attributed_to_who_held_it(appliance: Appliance) -> None:
    shared = "10.77.0.200"
    app = appliance.address("app-1")

    def take(vm: str) -> None:
        appliance.run(vm, "ip", "address", "add", f"{shared}/24", "dev", "eth0")
        appliance.run(vm, "ip", "neigh", "flush", "all")
        appliance.run(vm, "ping", "-c1", "-W1", "-I", shared, app)  # asks by ARP, from that address

    def holds(vm: str) -> bool:
        found = appliance.find_vm(vm)
        return found is not None and shared in [one["address"] for one in found["addresses"]]

    def attack(vm: str) -> dict[str, Any]:
        before = appliance.find_latest_alert()
        assert appliance.attack(vm, "app-1", "--interface", shared).status == BLOCKED
        (alert,) = appliance.wait_alerts(before)[:1]
        assert alert["source"]["address"] == shared
        return alert

    take("web-1")
    assert wait_until(lambda: holds("web-1"), 5)
    first = attack("web-1")
    assert first["source"]["vm"]["name"] == "web-1"
    appliance.run("web-1", "ip", "address", "del", f"{shared}/24", "dev", "eth0")
    take("web-2")
    assert wait_until(lambda: holds("web-2"), 5)
    assert not holds("web-1")
    second = attack("web-2")
    assert second["source"]["vm"]["name"] == "web-2"
    # What was said of the past stays.
    assert appliance.api(f"/alerts/{first['id']}").document["source"]["vm"]["name"] == "web-1"
    appliance.run("web-2", "ip", "address", "del", f"{shared}/24", "dev", "eth0")


# A VM that lies: what it sends is held against what arrives at the other's port.

SEND = """
import sys
from scapy.all import *
conf.verb = 0
sendp([eval(frame) for frame in sys.argv[1:]] * 3, iface="eth0", inter=0.01)
"""
HONEST = "Ether(src=ME, dst=THEM)/IP(src='10.77.0.1', dst='10.77.0.2')/UDP(dport=9)/Raw('MARK.')"
HONEST_ARP = (
    "Ether(src=ME, dst=THEM)/ARP(op=2, hwsrc=ME, psrc='10.77.0.201', hwdst=THEM, pdst='10.77.0.2')"
)
HONEST_ND = (
    "Ether(src=ME, dst=THEM)/IPv6(src='fd77::1', dst='fd77::2')"
    "/ICMPv6ND_NA(tgt='fd77::201', R=0, S=0, O=1)/ICMPv6NDOptDstLLAddr(lladdr=ME)"
)
FORGED = {
    "another's MAC": HONEST.replace("src=ME", "src=OTHER"),
    "an unknown MAC": HONEST.replace("src=ME", "src='02:aa:aa:aa:aa:aa'"),
    "the prevent lane's tag": HONEST.replace("/IP", "/Dot1Q(vlan=3901)/IP", 1),
    "the detect lane's tag": HONEST.replace("/IP", "/Dot1Q(vlan=3902)/IP", 1),
    "any tag": HONEST.replace("/IP", "/Dot1Q(vlan=77)/IP", 1),
    "a priority tag": HONEST.replace("/IP", "/Dot1Q(vlan=0)/IP", 1),
    "two tags": HONEST.replace("/IP", "/Dot1Q(vlan=77)/Dot1Q(vlan=3901)/IP", 1),
    "a service tag": HONEST.replace("/IP", "/Dot1AD(vlan=3901)/IP", 1),
}


def forge(appliance: Appliance, vm: str, *frames: str, at: str = "app-1") -> str:
    """What tcpdump shows at ``at`` of the frames that ``vm`` sends.

    In a frame, ME is its sender's MAC, THEM that of ``at``, OTHER that of web-2.
    """
    lab = appliance.lab
    macs = {"ME": lab.vm(vm).mac, "THEM": lab.vm(at).mac, "OTHER": lab.vm("web-2").mac}
    written = []
    for frame in frames:
        for name, mac in macs.items():
            frame = frame.replace(f"={name}", f"={mac!r}")
        written.append(frame)
    argv = lab.netns_argv(at, ["tcpdump", "-lnnAe", "--immediate-mode", "-i", "eth0"])
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdout=pipe, stderr=pipe, text=True) as sniffer:
        assert sniffer.stderr is not None
        assert any("listening on" in line for line in sniffer.stderr)
        try:
            done = appliance.run(vm, sys.executable, "-c", SEND, *written)
            assert done.status == 0, done.stderr
            time.sleep(0.3)
        finally:
            sniffer.terminate()
            seen = sniffer.communicate(timeout=5)[0]
    return seen


def test_no_forged_frame_of_a_vm_in_scope_is_delivered(appliance: Appliance) -> None:
    frames = {"none": HONEST, **FORGED}
    marked = [
        frame.replace("MARK.", f"MARK-{number}.") for number, frame in enumerate(frames.values())
    ]
    delivered: set[str] = set()

    def see() -> bool:
        seen = forge(appliance, "web-1", *marked)
        delivered.update(what for number, what in enumerate(frames) if f"MARK-{number}." in seen)
        return bool(delivered)

    assert wait_until(see, 10), "not even the honest frame arrived"
    assert delivered == {"none"}


def test_no_false_arp_or_neighbour_advertisement_is_delivered(appliance: Appliance) -> None:
    false = [
        HONEST_ARP.replace("hwsrc=ME", "hwsrc=OTHER").replace("201", "202"),
        HONEST_ND.replace("lladdr=ME", "lladdr=OTHER").replace("201", "202"),
    ]
    seen = forge(appliance, "web-1", HONEST_ARP, HONEST_ND, *false)
    assert "10.77.0.201" in seen
    assert "fd77::201" in seen
    assert "10.77.0.202" not in seen
    assert "fd77::202" not in seen


def test_a_vm_out_of_scope_cant_use_the_mac_of_one_in_scope(appliance: Appliance) -> None:
    own, used = HONEST, HONEST.replace("src=ME", "src=OTHER").replace("MARK.", "STOLEN.")
    for at in ("app-1", "db-2"):
        seen = forge(appliance, "db-1", own, used, at=at)
        assert "MARK." in seen
        assert "STOLEN." not in seen


def count_spoofed(appliance: Appliance) -> int:
    flows = appliance.ofctl("dump-flows").splitlines()
    return sum(
        int(found[1])
        for line in flows
        if "cookie=0x485002" in line and (found := re.search(r"n_packets=(\d+)", line))
    )


def test_a_vm_that_takes_anothers_mac_is_cut_off_and_counted(appliance: Appliance) -> None:
    lab = appliance.lab
    stolen, own = lab.vm("web-1").mac, lab.vm("web-2").mac
    before = count_spoofed(appliance)
    try:
        appliance.run("web-2", "ip", "link", "set", "eth0", "address", stolen)
        assert not reaches(lab, "web-2", appliance.address("app-1"))
        assert reaches(lab, "app-1", appliance.address("web-1")), "whom it passes for is cut off"
    finally:
        appliance.run("web-2", "ip", "link", "set", "eth0", "address", own)
    assert wait_until(lambda: count_spoofed(appliance) > before, 5)
    assert wait_until(lambda: reaches(lab, "web-2", appliance.address("app-1")), 5)


@pytest.mark.parametrize(("source", "destination"), [("web-1", "app-1"), ("db-1", "db-2")])
def test_forged_bfd_changes_no_lane(appliance: Appliance, source: str, destination: str) -> None:
    """Through an inspected pair and a direct one, to every address that BFD might listen on."""
    lab = appliance.lab
    # RFC 5880, 4.1: version 1; state AdminDown; multiplier 3; length 24; no discriminator of theirs.
    body = "Raw(bytes([32, 0, 3, 24, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1, 134, 160, 0, 1, 134, 160] + [0] * 4))"
    frames = [
        f"Ether(src=ME, dst={mac})/IP(dst={address!r}, ttl=255)/UDP(sport=49152, dport=3784)/{body}"
        for mac in ("THEM", "'00:23:20:00:00:01'", *(repr(lane.bfd_mac) for lane in lab.lanes))
        for address in (appliance.address(destination), "169.254.1.1", "169.254.1.0")
    ]
    started = time.time()
    seen = forge(appliance, source, *frames, at=destination)
    assert f"> {appliance.address(destination)}.3784" in seen, "it did not even pass"
    time.sleep(0.5)
    assert appliance.is_forwarding("prevent")
    assert appliance.is_forwarding("detect")
    assert appliance.find_events("lane.down", started) == []
