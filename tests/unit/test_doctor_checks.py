"""What the doctor makes of what it finds: each fault gets its finding, its gravity and its mend."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from appliance.doctor import (
    DeviceFacts,
    EngineFacts,
    Facts,
    Finding,
    PortFacts,
    Probe,
    SwitchFacts,
    check_facts,
    check_placement,
    parse_version,
)
from appliance.doctor_probe import parse_rows
from appliance.inspection.publish import Placement

WORKS = Probe(True)
BROKEN = Probe(False, "no such thing")
KERNEL = {
    "veth": WORKS,
    "bridge": WORKS,
    "br_netfilter": WORKS,
    "iptables NFQUEUE": WORKS,
    "nft queue": WORKS,
}
ENGINE = EngineFacts(Path("/usr/bin/suricata"), "7.0.10", "1:7.0.10-1+deb13u4", True, True)
SWITCH = SwitchFacts(
    reachable=True,
    bridge="br-int",
    found=True,
    datapath_type="netdev",
    fail_mode="secure",
    openflow=WORKS,
    ports=(
        PortFacts("vnet0", 1500, True),
        PortFacts("leg-a", 1600, False),
        PortFacts("leg-b", 1600, False),
    ),
)
WHOLE = Facts(
    root=True,
    python=(3, 11, 2),
    machine="x86_64",
    cpu_flags=frozenset({"ssse3"}),
    ovs_version="ovs-vswitchd (Open vSwitch) 3.1.0",
    engine=ENGINE,
    kernel=KERNEL,
    kernel_openvswitch=False,
    now=1_800_000_000.0,
    rtc=1_800_000_001.0,
    synchronised=True,
    disk_path=Path("/var/lib"),
    disk_free=20 * 2**30,
    missing_users=(),
    leg_names=("leg-a", "leg-b"),
    switch=SWITCH,
    devices=(DeviceFacts("dev-a", (), 1600), DeviceFacts("dev-b", (), 1600)),
    commands={"ip": True},
)


def find(facts: Facts, name: str) -> Finding:
    (one,) = [finding for finding in check_facts(facts) if finding.name == name]
    return one


def test_a_whole_machine_has_nothing_to_mend() -> None:
    for finding in check_facts(WHOLE):
        assert (finding.ok, finding.level) == (True, "ok"), finding


def test_without_settings_only_the_machine_is_judged() -> None:
    names = {finding.name for finding in check_facts(replace(WHOLE, switch=None, devices=()))}
    assert {"root", "python", "kernel queues", "suricata", "open vswitch", "disk"} <= names
    assert names.isdisjoint({"switch reachable", "bridge", "legs", "mtu", "offloads"})


PORTS = SWITCH.ports
FAULTS: list[tuple[str, str, str, dict[str, Any]]] = [
    ("root", "warn", "sudo", {"root": False}),
    ("python", "fail", "3.11 to 3.13", {"python": (3, 14, 0)}),
    ("users", "fail", "useradd", {"missing_users": ("hairpin",)}),
    ("programs", "fail", "make setup", {"commands": {"ip": True, "ethtool": False}}),
    ("disk", "warn", "free space", {"disk_free": 2 * 2**30}),
    ("disk", "fail", "free space", {"disk_free": 2**20}),
    ("clock", "fail", "set the clock", {"now": 0.0}),
    ("clock", "warn", "hwclock", {"rtc": 1_800_003_600.0}),
    ("clock", "warn", "time service", {"synchronised": False}),
    ("kernel veth", "fail", "modprobe veth", {"kernel": {**KERNEL, "veth": BROKEN}}),
    ("kernel bridge", "fail", "modprobe bridge", {"kernel": {**KERNEL, "bridge": BROKEN}}),
    (
        "kernel queues",
        "fail",
        "nft_queue",
        {"kernel": {**KERNEL, "nft queue": BROKEN, "br_netfilter": BROKEN}},
    ),
    ("kernel queues", "warn", "nft_queue", {"kernel": {"veth": WORKS, "bridge": WORKS}}),
    ("suricata", "fail", "make setup", {"engine": EngineFacts(Path("/none"))}),
    ("suricata", "fail", "Suricata 7", {"engine": replace(ENGINE, version="6.0.10")}),
    (
        "suricata security",
        "warn",
        "Debian 13",
        {"engine": replace(ENGINE, package="1:7.0.10-1~bpo12+1")},
    ),
    ("suricata nfqueue", "fail", "Debian's package", {"engine": replace(ENGINE, nfqueue=False)}),
    (
        "suricata hyperscan",
        "fail",
        "requireHyperscan",
        {"engine": replace(ENGINE, hyperscan=False)},
    ),
    (
        "suricata hyperscan",
        "warn",
        "requireHyperscan",
        {"engine": replace(ENGINE, hyperscan=False), "require_hyperscan": False},
    ),
    ("processor", "fail", "host-passthrough", {"cpu_flags": frozenset()}),
    ("open vswitch", "warn", "newer", {"ovs_version": "ovs-vswitchd (Open vSwitch) 2.17.9"}),
    ("open vswitch", "fail", "newer", {"ovs_version": "ovs-vswitchd (Open vSwitch) 2.15.0"}),
    ("open vswitch", "fail", "openvswitch-switch", {"ovs_version": "", "switch": None}),
    ("switch reachable", "fail", "switch.ovsdb", {"switch": SwitchFacts(False, "no such file")}),
    ("bridge", "fail", "add-br br-int", {"switch": replace(SWITCH, found=False)}),
    ("openflow", "fail", "switch.openflow", {"switch": replace(SWITCH, openflow=BROKEN)}),
    ("fail mode", "fail", "set-fail-mode br-int", {"switch": replace(SWITCH, fail_mode="")}),
    ("datapath", "fail", "modprobe openvswitch", {"switch": replace(SWITCH, datapath_type="")}),
    (
        "ports",
        "warn",
        "ovs-vsctl show",
        {"switch": replace(SWITCH, ports=(*PORTS, PortFacts("gone", None, False, "no device")))},
    ),
    ("legs", "fail", "add-port br-int leg-b", {"switch": replace(SWITCH, ports=PORTS[:2])}),
    (
        "mtu",
        "fail",
        "mtu 1600",
        {"switch": replace(SWITCH, ports=(*PORTS[:2], PortFacts("leg-b", 1500, False)))},
    ),
    ("mtu", "fail", "mtu", {"devices": (DeviceFacts("dev-a", (), 1503),)}),
    (
        "mtu",
        "fail",
        "mtu 9100",
        {"switch": replace(SWITCH, ports=(PortFacts("vnet0", 9000, True), *PORTS[1:]))},
    ),
    ("offloads", "fail", "ethtool -K", {"devices": (DeviceFacts("dev-a", ("tx",), 1600),)}),
    ("offloads", "warn", "service host", {"devices": (DeviceFacts("dev-a", None),)}),
]


@pytest.mark.parametrize(
    ("name", "level", "mend", "change"), FAULTS, ids=[f"{one[0]}-{one[1]}" for one in FAULTS]
)
def test_a_fault_is_found_with_its_gravity_and_its_mend(
    name: str, level: str, mend: str, change: dict[str, Any]
) -> None:
    finding = find(replace(WHOLE, **change), name)
    assert finding.ok is not True
    assert finding.level == level
    assert mend in finding.mend
    others = [one for one in check_facts(replace(WHOLE, **change)) if one.name != name]
    assert all(one.level == "ok" for one in others), others


def test_one_dialect_of_queues_is_enough() -> None:
    lab = {**KERNEL, "nft queue": BROKEN}
    assert find(replace(WHOLE, kernel=lab), "kernel queues").found.endswith("iptables")
    appliance = {**KERNEL, "iptables NFQUEUE": BROKEN, "br_netfilter": BROKEN}
    assert find(replace(WHOLE, kernel=appliance), "kernel queues").found.endswith("nftables")


def test_other_processors_need_no_ssse3() -> None:
    facts = replace(WHOLE, machine="aarch64", cpu_flags=frozenset())
    assert "processor" not in {finding.name for finding in check_facts(facts)}


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("ovs-vswitchd (Open vSwitch) 3.1.0\nDPDK 22.11.11", (3, 1, 0)),
        ("7.0.10", (7, 0, 10)),
        ("7.0.11-dev", (7, 0, 11)),
        ("", ()),
        ("none", ()),
    ],
)
def test_a_version_is_read_as_numbers(text: str, version: tuple[int, ...]) -> None:
    assert parse_version(text) == version


def test_a_table_of_ovsdb_reads_as_rows() -> None:
    document = {
        "headings": ["name", "mtu", "external_ids", "error"],
        "data": [
            ["vnet0", 1500, ["map", [["vm-id", "x"]]], ["set", []]],
            ["gone", ["set", []], ["map", []], "no device"],
        ],
    }
    assert parse_rows(json.dumps(document)) == [
        {"name": "vnet0", "mtu": 1500, "external_ids": {"vm-id": "x"}, "error": []},
        {"name": "gone", "mtu": [], "external_ids": {}, "error": "no device"},
    ]


def test_super_packets_that_no_engine_takes_are_told() -> None:
    assert not [one for one in check_facts(WHOLE) if one.name == "super-packets"]
    taken = replace(WHOLE, super_packets={"prevent": "on, largest 65212 bytes"})
    assert find(taken, "super-packets").level == "ok"
    refused = replace(WHOLE, super_packets={"prevent": "on", "detect": "off (refused)"})
    assert find(refused, "super-packets").level == "warn"
    assert "detect: off (refused)" in find(refused, "super-packets").found


def test_a_shortcut_that_is_off_where_the_settings_have_a_third_leg_is_told() -> None:
    assert not [one for one in check_facts(WHOLE) if one.name == "shortcut"]
    ready = replace(WHOLE, shortcuts={"prevent": "ready (no connection was let go yet)"})
    assert find(ready, "shortcut").level == "ok"
    down = replace(WHOLE, shortcuts={"prevent": "on", "detect": "off (device: det-c is down)"})
    assert find(down, "shortcut").level == "warn"
    assert "detect: off (device: det-c is down)" in find(down, "shortcut").found


def test_legs_are_as_wide_as_super_packets_are_cut() -> None:
    ports = (*PORTS[:1], PortFacts("leg-a", 1504, False), PortFacts("leg-b", 1600, False))
    wide = replace(SWITCH, userspace_tso=True, ports=ports)
    finding = find(replace(WHOLE, switch=wide, devices=()), "mtu")
    assert (finding.level, finding.mend) == ("fail", "ip link set dev LEG mtu 1504, at both ends")
    assert "leg-b 1600" in finding.found
    assert "leg-a" not in finding.found


def test_offloads_are_on_where_the_switch_takes_super_packets() -> None:
    on = tuple(DeviceFacts(name, ("tx-checksumming",), 1504) for name in ("dev-a", "dev-b"))
    takes = replace(WHOLE, switch=replace(SWITCH, userspace_tso=True), devices=on)
    assert find(takes, "offloads").level == "ok"
    off = replace(takes, devices=WHOLE.devices)
    assert find(off, "offloads").level == "warn"
    assert "tx on" in find(off, "offloads").mend
    # The kernel's datapath takes them anyway.
    system = replace(SWITCH, datapath_type="system")
    kernel = replace(WHOLE, switch=system, devices=on, kernel_openvswitch=True)
    assert find(kernel, "offloads").level == "ok"


def test_where_packet_threads_run_is_told() -> None:
    shared = Placement(threads=1, cores=((0, 1),), nice=-10, reason="2 cores are shared by all")
    (told,) = check_placement(replace(WHOLE, placement={"prevent": shared}))
    assert told.ok
    assert told.found == (
        "prevent: 1 packet thread(s) on all cores (2 cores are shared by all), niceness -10"
    )
    (none,) = check_placement(replace(WHOLE, placement={"prevent": Placement()}))
    assert (none.ok, none.level) == (False, "warn")
    assert list(check_placement(WHOLE)) == []
