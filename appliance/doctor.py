"""`hairpin doctor`: every precondition, what was found of it, and how to mend it.

The judgement is pure, over facts that `appliance.doctor_probe` gathers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from appliance.inspection.placement import format_placement
from appliance.inspection.publish import Placement
from appliance.settings import Settings

Level = Literal["ok", "warn", "fail"]

PYTHON_VERSIONS = ((3, 11), (3, 13))
OVS_LEAST = (2, 17)
OVS_TESTED = (3, 1)
SURICATA_LEAST = (7, 0, 0)
VLAN_TAG = 4
USERS = ("hairpin", "hairpin-engine")
GIB = 2**30
DISK_LEAST = GIB // 2
DISK_ADVISED = 5 * GIB
CLOCK_SLACK = 60.0
YEARS = (2025, 2100)
# Debian backported the fixes of upstream's 7.0.11 and later to its 13, from this revision on.
SURICATA_FIXED = "7.0.10-1+deb13u4"


@dataclass(frozen=True, slots=True)
class Finding:
    """One precondition. ``ok`` is None when it can't be told; ``level`` says how grave that is."""

    name: str
    ok: bool | None
    level: Level
    found: str
    mend: str = ""


@dataclass(frozen=True, slots=True)
class Probe:
    """Whether something was seen to work; None when it could not be tried. ``detail`` says more."""

    works: bool | None
    detail: str = ""


@dataclass(frozen=True, slots=True)
class PortFacts:
    """An interface as OVSDB shows it. ``mtu`` in bytes; ``lane`` is its profile if it's a leg."""

    name: str
    mtu: int | None
    is_vm: bool
    error: str = ""


@dataclass(frozen=True, slots=True)
class SwitchFacts:
    """The bridge of the settings. ``reason`` says why it isn't ``reachable``."""

    reachable: bool
    reason: str = ""
    bridge: str = ""
    found: bool = False
    datapath_type: str = ""
    fail_mode: str = ""
    openflow: Probe = Probe(None)
    userspace_tso: bool = False
    ports: tuple[PortFacts, ...] = ()


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """A leg's end in the service host; ``offloads`` are those still on, None if it wasn't seen."""

    name: str
    offloads: tuple[str, ...] | None
    mtu: int | None = None


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """The installed Suricata; ``version`` is "" when there's none. ``package`` is Debian's version."""

    path: Path
    version: str = ""
    package: str = ""
    nfqueue: bool = False
    hyperscan: bool = False


@dataclass(frozen=True, slots=True)
class Facts:
    """What was found on this machine. Times in seconds since the epoch, sizes in bytes."""

    root: bool
    python: tuple[int, int, int]
    machine: str
    cpu_flags: frozenset[str]
    ovs_version: str
    engine: EngineFacts
    kernel: Mapping[str, Probe]
    kernel_openvswitch: bool
    now: float
    rtc: float | None
    synchronised: bool | None
    disk_path: Path
    disk_free: int
    missing_users: tuple[str, ...]
    leg_names: tuple[str, ...] = ()
    require_hyperscan: bool = True
    switch: SwitchFacts | None = None
    placement: Mapping[str, Placement] = field(default_factory=lambda: MappingProxyType({}))
    devices: tuple[DeviceFacts, ...] = ()
    super_packets: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    shortcuts: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    commands: Mapping[str, bool] = field(default_factory=lambda: MappingProxyType({}))


def parse_version(text: str) -> tuple[int, ...]:
    """The first dotted number in a program's output, () when there is none."""
    found = re.search(r"\d+(?:\.\d+)+", text)
    return tuple(int(part) for part in found.group().split(".")) if found else ()


def _finding(name: str, ok: bool | None, found: str, mend: str = "", *, grave: bool) -> Finding:
    if ok:
        return Finding(name, True, "ok", found)
    return Finding(name, ok, "fail" if grave and ok is False else "warn", found, mend)


def check_machine(facts: Facts) -> Iterator[Finding]:
    """Rights, interpreter, users, other programs, disk and clock."""
    yield _finding(
        "root",
        facts.root,
        "running as root" if facts.root else "not running as root: some checks can't be made",
        "sudo hairpin doctor",
        grave=False,
    )
    low, high = PYTHON_VERSIONS
    yield _finding(
        "python",
        low <= facts.python[:2] <= high,
        "Python " + ".".join(map(str, facts.python)),
        "use Python 3.11 to 3.13",
        grave=True,
    )
    missing = ", ".join(facts.missing_users)
    yield _finding(
        "users",
        not facts.missing_users,
        f"no user {missing}" if missing else " and ".join(USERS),
        "run `make setup`, or "
        + "; ".join(
            f"useradd --system --user-group --shell /usr/sbin/nologin {user}"
            for user in facts.missing_users
        ),
        grave=True,
    )
    absent = ", ".join(sorted(name for name, there in facts.commands.items() if not there))
    yield _finding(
        "programs",
        not absent,
        f"not found: {absent}" if absent else "all found",
        "run `make setup`",
        grave=True,
    )
    yield Finding(
        "disk",
        facts.disk_free >= DISK_ADVISED,
        "ok"
        if facts.disk_free >= DISK_ADVISED
        else "warn"
        if facts.disk_free >= DISK_LEAST
        else "fail",
        f"{facts.disk_free / GIB:.1f} GiB free at {facts.disk_path}",
        ""
        if facts.disk_free >= DISK_ADVISED
        else f"free space there, at least {DISK_ADVISED // GIB} GiB: alerts and rulesets grow",
    )
    yield from check_clock(facts)


def check_clock(facts: Facts) -> Iterator[Finding]:
    """Alerts, leases and certificates all hang on the time of day."""
    shown = datetime.fromtimestamp(facts.now, UTC)
    sane = YEARS[0] <= shown.year < YEARS[1]
    mend = "set the clock and run a time service: apt-get install systemd-timesyncd"
    off = None if facts.rtc is None else abs(facts.now - facts.rtc)
    if not sane:
        yield Finding("clock", False, "fail", f"the clock says {shown:%Y-%m-%d %H:%M} UTC", mend)
    elif off is not None and off > CLOCK_SLACK:
        found = f"{off:.0f} s apart from the hardware clock"
        yield Finding("clock", False, "warn", found, f"{mend}; then hwclock --systohc")
    elif facts.synchronised is False:
        yield Finding("clock", False, "warn", "not synchronised by a time service", mend)
    else:
        how = "synchronised" if facts.synchronised else "no time service was found to ask"
        yield Finding("clock", True, "ok", f"{shown:%Y-%m-%d %H:%M} UTC, {how}")


def check_kernel(facts: Facts) -> Iterator[Finding]:
    """What the service host's bridges and queues are made of; one queueing dialect is enough."""
    parts = {
        "veth": ("virtual Ethernet pairs", "modprobe veth"),
        "bridge": ("bridges", "modprobe bridge"),
    }
    for name, (what, mend) in parts.items():
        probe = facts.kernel.get(name, Probe(None))
        found = f"{what} can be made" if probe.works else probe.detail or f"{what}: not tried"
        yield _finding(f"kernel {name}", probe.works, found, mend, grave=True)
    nft = facts.kernel.get("nft queue", Probe(None))
    queue = facts.kernel.get("iptables NFQUEUE", Probe(None))
    netfilter = facts.kernel.get("br_netfilter", Probe(None))
    xt = bool(queue.works and netfilter.works)
    dialects = [name for name, works in (("nftables", nft.works), ("iptables", xt)) if works]
    if dialects:
        yield Finding("kernel queues", True, "ok", f"dialects that work: {', '.join(dialects)}")
        return
    untried = None in (nft.works, queue.works, netfilter.works)
    details = "; ".join(
        f"{name}: {probe.detail or 'does not work'}"
        for name, probe in (
            ("nft queue", nft),
            ("iptables NFQUEUE", queue),
            ("br_netfilter", netfilter),
        )
        if not probe.works
    )
    yield _finding(
        "kernel queues",
        None if untried else False,
        details,
        "modprobe -a nft_queue nfnetlink_queue, or br_netfilter with xt_NFQUEUE",
        grave=True,
    )


def check_engine(facts: Facts) -> Iterator[Finding]:
    """The installed Suricata, and the processor that its pattern matcher needs."""
    engine = facts.engine
    if not engine.version:
        found = f"no Suricata at {engine.path}"
        yield Finding("suricata", False, "fail", found, "run `make setup`")
        return
    new_enough = parse_version(engine.version) >= SURICATA_LEAST
    yield _finding(
        "suricata",
        new_enough,
        f"Suricata {engine.version}" + (f" ({engine.package})" if engine.package else ""),
        "install Suricata 7: Debian 13 has it, Debian 12 in its backports",
        grave=True,
    )
    if "~bpo12" in engine.package:
        yield Finding(
            "suricata security",
            False,
            "warn",
            f"{engine.package} lacks upstream's security fixes since 7.0.10",
            f"run the engine on Debian 13 ({SURICATA_FIXED} or later)",
        )
    yield _finding(
        "suricata nfqueue",
        engine.nfqueue,
        "built with NFQUEUE" if engine.nfqueue else "built without NFQUEUE",
        "install Debian's package of Suricata",
        grave=True,
    )
    yield _finding(
        "suricata hyperscan",
        engine.hyperscan,
        "built with Hyperscan" if engine.hyperscan else "built without Hyperscan",
        "install Debian's package of Suricata, or set inspection.requireHyperscan to false "
        "(several times the processor time)",
        grave=facts.require_hyperscan,
    )
    if facts.machine in ("x86_64", "i686"):
        there = "ssse3" in facts.cpu_flags
        yield _finding(
            "processor",
            there,
            "SSSE3 is there" if there else "no SSSE3: Hyperscan can't run",
            "give the VM a CPU model with SSSE3 (libvirt: mode='host-passthrough')",
            grave=facts.require_hyperscan,
        )


def check_switch(facts: Facts) -> Iterator[Finding]:
    """Open vSwitch itself, and the bridge of the settings."""
    version = parse_version(facts.ovs_version)
    switch = facts.switch
    # Over the network, the switch's programs need not be here.
    local = switch is None or not switch.reachable
    if not version:
        yield _finding(
            "open vswitch",
            False,
            "not installed",
            "apt-get install openvswitch-switch",
            grave=local,
        )
    else:
        old = "" if version >= OVS_TESTED else f", tested from {'.'.join(map(str, OVS_TESTED))} on"
        yield _finding(
            "open vswitch",
            version >= OVS_TESTED,
            f"Open vSwitch {'.'.join(map(str, version))}{old}",
            "install a newer Open vSwitch",
            grave=version < OVS_LEAST,
        )
    if switch is None:
        return
    yield _finding(
        "switch reachable",
        switch.reachable,
        "OVSDB answers" if switch.reachable else f"OVSDB does not answer: {switch.reason}",
        "start Open vSwitch, or correct switch.ovsdb in the settings",
        grave=True,
    )
    if not switch.reachable:
        return
    yield _finding(
        "bridge",
        switch.found,
        f"{switch.bridge} is there" if switch.found else f"there's no bridge {switch.bridge}",
        f"correct switch.bridge in the settings, or ovs-vsctl add-br {switch.bridge}",
        grave=True,
    )
    if not switch.found:
        return
    yield _finding(
        "openflow",
        switch.openflow.works,
        "the bridge answers OpenFlow" if switch.openflow.works else switch.openflow.detail,
        "correct switch.openflow in the settings; the user of the service needs the socket",
        grave=True,
    )
    yield _finding(
        "fail mode",
        switch.fail_mode == "secure",
        f"fail_mode is {switch.fail_mode or 'not set (standalone)'}",
        f"ovs-vsctl set-fail-mode {switch.bridge} secure; otherwise a restarted switch passes "
        "traffic uninspected",
        grave=True,
    )
    kind = switch.datapath_type or "system"
    yield _finding(
        "datapath",
        kind == "netdev" or facts.kernel_openvswitch,
        f"datapath_type is {kind}"
        + (
            ""
            if kind == "netdev" or facts.kernel_openvswitch
            else ", the kernel has no openvswitch"
        ),
        f"modprobe openvswitch, or ovs-vsctl set Bridge {switch.bridge} datapath_type=netdev",
        grave=True,
    )
    broken = [f"{port.name}: {port.error}" for port in switch.ports if port.error]
    if broken:
        mend = "ovs-vsctl show; mend or remove the port"
        yield Finding("ports", False, "warn", "; ".join(broken), mend)
    yield from check_legs(facts, switch)


def check_legs(facts: Facts, switch: SwitchFacts) -> Iterator[Finding]:
    """The lanes' legs: there at all, wide enough for a VM's frame with a tag, without offloads."""
    ports = {port.name: port for port in switch.ports}
    missing = [name for name in facts.leg_names if name not in ports]
    yield _finding(
        "legs",
        not missing,
        f"not on the bridge: {', '.join(missing)}" if missing else "all on the bridge",
        "; ".join(f"ovs-vsctl add-port {switch.bridge} {name}" for name in missing),
        grave=True,
    )
    widest = max((port.mtu for port in switch.ports if port.is_vm and port.mtu), default=1500)
    seen = [(name, ports[name].mtu) for name in facts.leg_names if name in ports]
    seen += [(device.name, device.mtu) for device in facts.devices]
    needed = widest + VLAN_TAG
    narrow = [f"{name} {mtu}" for name, mtu in seen if mtu is not None and mtu < needed]
    # Super-packets are cut to the MTU of the port that they leave by (docs/mtu.md, rule 2).
    wide = [
        f"{name} {mtu}"
        for name, mtu in seen
        if switch.userspace_tso and mtu is not None and mtu > needed
    ]
    known = any(mtu is not None for _name, mtu in seen)
    yield _finding(
        "mtu",
        None if not known else not narrow and not wide,
        f"too narrow for {needed}: {', '.join(narrow)}"
        if narrow
        else f"wider than {needed}, to which super-packets must be cut: {', '.join(wide)}"
        if wide
        else f"legs pass a VM's frame and its tag ({needed})"
        if known
        else "no leg's MTU is known",
        f"ip link set dev LEG mtu {needed if switch.userspace_tso else needed + 96}, at both ends",
        grave=True,
    )
    yield from check_offloads(facts, switch)


def check_offloads(facts: Facts, switch: SwitchFacts) -> Iterator[Finding]:
    """Offloads are on everywhere where the switch takes super-packets, or nowhere."""
    if facts.super_packets:
        yield _finding(
            "super-packets",
            not any(said.startswith("off") for said in facts.super_packets.values()),
            "; ".join(f"{lane}: {said}" for lane, said in facts.super_packets.items()),
            "a hairpin without them costs several times the processor time; docs/inspection.md says "
            "what they need of the switch and the links",
            grave=False,
        )
    if facts.shortcuts:
        yield _finding(
            "shortcut",
            not any(said.startswith("off") for said in facts.shortcuts.values()),
            "; ".join(f"{lane}: {said}" for lane, said in facts.shortcuts.items()),
            "policies with a shortcut are inspected throughout; docs/inspection.md says what it needs",
            grave=False,
        )
    kernel = facts.kernel_openvswitch and (switch.datapath_type or "system") != "netdev"
    if switch.userspace_tso or kernel:
        off = [one.name for one in facts.devices if one.offloads == ()]
        yield _finding(
            "offloads",
            not off,
            f"off on {', '.join(off)}" if off else "the switch takes what a card should finish",
            "ethtool -K DEVICE tx on tso on gso on, for each: else packets reach the engine cut",
            grave=False,
        )
        return
    on = [f"{one.name}: {', '.join(one.offloads)}" for one in facts.devices if one.offloads]
    unseen = [one.name for one in facts.devices if one.offloads is None]
    yield _finding(
        "offloads",
        False if on else None if unseen else True,
        f"still on: {'; '.join(on)}"
        if on
        else f"not seen from here: {', '.join(unseen)}"
        if unseen
        else "off on all legs",
        "ethtool -K DEVICE tx off tso off gso off gro off, for each"
        if on
        else "run this in the service host",
        grave=True,
    )


def check_placement(facts: Facts) -> Iterator[Finding]:
    """Where the engines' packet threads run, as seen. It costs speed, never inspection."""
    if not facts.placement:
        return
    shown = [f"{lane}: {format_placement(one)}" for lane, one in facts.placement.items()]
    yield _finding(
        "placement",
        all(one.threads > 0 for one in facts.placement.values()),
        "; ".join(shown),
        "see the lane's faults (`hairpin health`): its engine does not run, or was just started",
        grave=False,
    )


def check_facts(facts: Facts) -> tuple[Finding, ...]:
    """Every finding, in the order in which one would mend them."""
    return (
        *check_machine(facts),
        *check_kernel(facts),
        *check_engine(facts),
        *check_switch(facts),
        *check_placement(facts),
    )


def run_checks(settings: Settings | None) -> tuple[Finding, ...]:
    """Look at this machine, and with ``settings`` at what they name; changes nothing."""
    from appliance.doctor_probe import read_facts

    return check_facts(read_facts(settings))
