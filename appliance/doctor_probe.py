"""The facts that `hairpin doctor` judges. Looks only; kernel parts are tried in a throw-away namespace."""

from __future__ import annotations

import json
import os
import platform
import pwd
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from appliance.doctor import (
    USERS,
    DeviceFacts,
    EngineFacts,
    Facts,
    PortFacts,
    Probe,
    SwitchFacts,
)
from appliance.inspection.publish import Placement, read_inspection_state
from appliance.settings import Settings
from appliance.settings_switch import SwitchSettings
from steering.errors import CommandFailed
from steering.model import Lane, Leg
from steering.peer import find_peer_fault
from steering.run import Finished, run
from steering.tls import find_options

COMMANDS = ("ethtool", "ip", "ovs-ofctl", "ovs-vsctl", "setpriv", "suricata-update")
OFFLOADS = ("tx-checksumming", "tcp-segmentation-offload", "generic-segmentation-offload")
_NFT_QUEUE = """table bridge probe {
  chain forward { type filter hook forward priority 0; ether type ip queue to 0; }
}
"""
_PROBES: Mapping[str, tuple[tuple[str, ...], str | None]] = {
    "veth": (("ip", "link", "add", "name", "a", "type", "veth", "peer", "name", "b"), None),
    "bridge": (("ip", "link", "add", "name", "a", "type", "bridge"), None),
    "br_netfilter": (("sysctl", "-n", "net.bridge.bridge-nf-call-iptables"), None),
    "iptables NFQUEUE": (
        ("iptables", "-t", "mangle", "-A", "FORWARD", "-j", "NFQUEUE", "--queue-num", "0"),
        None,
    ),
    "nft queue": (("nft", "-f", "-"), _NFT_QUEUE),
}


def _try(argv: Sequence[str], stdin: str | None = None) -> Finished:
    """As `run`, but a program that is missing or hangs is an answer too."""
    try:
        return run(argv, stdin=stdin, check=False, timeout=10)
    except CommandFailed as fault:
        return Finished(127 if fault.status is None else fault.status, "", fault.output)


def _last_line(ended: Finished) -> str:
    lines = (ended.stderr or ended.stdout).strip().splitlines()
    return lines[-1] if lines else f"status {ended.status}"


def probe_kernel() -> dict[str, Probe]:
    """Try each kernel part in a network namespace that ends with the command."""
    if os.geteuid() != 0:
        return {name: Probe(None, "needs root") for name in _PROBES}
    if _try(["unshare", "--net", "--", "true"]).status != 0:
        return {name: Probe(None, "can't make a network namespace") for name in _PROBES}
    found = {}
    for name, (argv, stdin) in _PROBES.items():
        ended = _try(["unshare", "--net", "--", *argv], stdin)
        found[name] = Probe(ended.status == 0, "" if ended.status == 0 else _last_line(ended))
    return found


def read_placement(settings: Settings) -> dict[str, Placement]:
    """By lane, where `hairpin inspect` saw its engine's packet threads."""
    state = read_inspection_state(settings.inspection_state)
    return {lane.name: lane.placement for lane in (state.lanes if state else ())}


def read_engine(path: Path) -> EngineFacts:
    """What the installed Suricata says of itself (`suricata --build-info`)."""
    if not path.exists():
        return EngineFacts(path)
    build = _try([str(path), "--build-info"]).stdout
    version = next(
        (line.split()[4] for line in build.splitlines() if line.startswith("This is Suricata")), ""
    )

    def has(feature: str) -> bool:
        return any(
            line.strip().startswith(feature) and line.strip().endswith("yes")
            for line in build.splitlines()
        )

    package = _try(["dpkg-query", "-W", "-f", "${Version}", "suricata"])
    return EngineFacts(
        path=path,
        version=version,
        package=package.stdout.strip() if package.status == 0 else "",
        nfqueue=has("NFQueue support:"),
        hyperscan=has("Hyperscan support:"),
    )


def parse_rows(text: str) -> list[dict[str, Any]]:
    """ovs-vsctl's JSON table as one dict a row; sets become lists, maps dicts (RFC 7047, 5.1)."""

    def parse_value(value: Any) -> Any:
        match value:
            case ["set", list(items)]:
                return [parse_value(item) for item in items]
            case ["map", list(pairs)]:
                return {key: parse_value(item) for key, item in pairs}
            case ["uuid", str(uuid)]:
                return uuid
        return value

    table = json.loads(text)
    headings = table["headings"]
    return [dict(zip(headings, map(parse_value, row), strict=True)) for row in table["data"]]


def read_switch(settings: SwitchSettings) -> SwitchFacts:
    """The bridge of the settings with its ports, by ovs-vsctl and ovs-ofctl."""
    tls = settings.tls_files
    reach = [f"--db={settings.ovsdb}", *find_options(settings.ovsdb, tls), "--timeout=5"]
    vsctl = ["ovs-vsctl", *reach, "--format=json"]
    if fault := find_peer_fault("ovsdb", settings.ovsdb, tls):
        return SwitchFacts(False, str(fault))
    bridges = _try(
        [*vsctl, "--columns=name,datapath_type,fail_mode", "list", "Bridge"],
    )
    if bridges.status != 0:
        return SwitchFacts(False, _last_line(bridges))
    bridge = next(
        (row for row in parse_rows(bridges.stdout) if row["name"] == settings.bridge), None
    )
    if bridge is None:
        return SwitchFacts(True, bridge=settings.bridge)
    tso = _try(
        [
            *vsctl[:-1],
            "--if-exists",
            "get",
            "Open_vSwitch",
            ".",
            "other_config:userspace-tso-enable",
        ]
    )
    listed = _try([*vsctl, "list-ifaces", settings.bridge]).stdout.split()
    columns = "--columns=name,mtu,external_ids,error"
    interfaces = _try([*vsctl, columns, "list", "Interface"])
    rows = parse_rows(interfaces.stdout) if interfaces.status == 0 else []
    options = ["-O", "OpenFlow15", *find_options(settings.openflow, tls), "--timeout=5"]
    shown = _try(["ovs-ofctl", *options, "show", settings.openflow])
    peer = find_peer_fault("openflow", settings.openflow, tls)
    refused = str(peer) if peer else "" if shown.status == 0 else _last_line(shown)
    openflow = Probe(not refused, refused)
    return SwitchFacts(
        reachable=True,
        bridge=settings.bridge,
        found=True,
        datapath_type=str(bridge["datapath_type"]),
        fail_mode=str(bridge["fail_mode"] or ""),
        openflow=openflow,
        userspace_tso=tso.stdout.strip().strip('"') == "true",
        ports=tuple(
            PortFacts(
                name=row["name"],
                mtu=row["mtu"] if isinstance(row["mtu"], int) else None,
                is_vm="vm-id" in row["external_ids"],
                error=str(row["error"] or ""),
            )
            for row in rows
            if row["name"] in listed
        ),
    )


def _find_service_host(settings: Settings) -> list[str]:
    """What to put before a command to run it where the legs' devices are."""
    if settings.inspection.netns is not None:
        return ["ip", "netns", "exec", settings.inspection.netns]
    try:
        pid = json.loads(settings.inspection_state.read_text())["pid"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    if not isinstance(pid, int) or pid <= 1 or not Path(f"/proc/{pid}/ns/net").exists():
        return []
    return ["nsenter", f"--net=/proc/{pid}/ns/net", "--"]


def _find_legs(lane: Lane) -> tuple[Leg, ...]:
    return tuple(leg for leg in (lane.leg_a, lane.leg_b, lane.leg_c) if leg is not None)


def read_devices(settings: Settings) -> tuple[DeviceFacts, ...]:
    """The legs' ends in the service host, when that is this machine."""
    inside = _find_service_host(settings)
    found = []
    for lane in settings.build_lanes():
        for leg in _find_legs(lane):
            features = _try([*inside, "ethtool", "-k", leg.device])
            if features.status != 0:
                found.append(DeviceFacts(leg.device, None))
                continue
            lines = {line.strip() for line in features.stdout.splitlines()}
            on = tuple(name for name in OFFLOADS if f"{name}: on" in lines)
            shown = _try([*inside, "ip", "-json", "link", "show", "dev", leg.device])
            mtu = json.loads(shown.stdout)[0]["mtu"] if shown.status == 0 else None
            found.append(DeviceFacts(leg.device, on, mtu))
    return tuple(found)


def read_super_packets(settings: Settings) -> dict[str, str]:
    """By lane, what `hairpin inspect` published of super-packets."""
    state = read_inspection_state(settings.inspection_state)
    return {
        lane.name: " ".join(
            part
            for part in (
                str(lane.super_packets.state),
                f"({lane.super_packets.reason})" if lane.super_packets.reason else "",
                f"largest {lane.super_packets.largest} bytes",
            )
            if part
        )
        for lane in (state.lanes if state else ())
    }


def read_shortcuts(settings: Settings) -> dict[str, str]:
    """By lane with a third leg, what `hairpin inspect` published of its shortcut."""
    state = read_inspection_state(settings.inspection_state)
    wanted = {lane.name for lane in settings.build_lanes() if lane.leg_c is not None}
    return {
        lane.name: f"{lane.shortcut.state}{f' ({lane.shortcut.reason})' if lane.shortcut.reason else ''}"
        for lane in (state.lanes if state else ())
        if lane.name in wanted
    }


def read_cpu_flags() -> frozenset[str]:
    """The first processor's flags, none where the kernel shows none (proc_cpuinfo(5))."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


def read_rtc() -> float | None:
    """The hardware clock, None where there's none to read."""
    try:
        return float(Path("/sys/class/rtc/rtc0/since_epoch").read_text())
    except (OSError, ValueError):
        return None


def read_synchronised() -> bool | None:
    """Whether a time service keeps the clock, None when there's nobody to ask."""
    if shutil.which("timedatectl") is None:
        return None
    answer = _try(["timedatectl", "show", "--property=NTPSynchronized", "--value"])
    return {"yes": True, "no": False}.get(answer.stdout.strip()) if answer.status == 0 else None


def _find_existing(path: Path) -> Path:
    return next(one for one in (path, *path.parents) if one.exists())


def _is_user(name: str) -> bool:
    try:
        pwd.getpwnam(name)
    except KeyError:
        return False
    return True


def _has_command(name: str) -> bool:
    beside = Path(sys.executable).parent / name
    return shutil.which(name) is not None or beside.exists()


def read_facts(settings: Settings | None) -> Facts:
    """Everything at once; with no settings, what concerns the machine only."""
    engine = Path("/usr/bin/suricata") if settings is None else settings.inspection.suricata
    state_dir = Path("/var/lib/hairpin") if settings is None else settings.state_dir
    lanes = () if settings is None else settings.build_lanes()
    disk_path = _find_existing(state_dir)
    version = _try(["ovs-vswitchd", "--version"])
    return Facts(
        root=os.geteuid() == 0,
        python=sys.version_info[:3],
        machine=platform.machine(),
        cpu_flags=read_cpu_flags(),
        ovs_version=version.stdout if version.status == 0 else "",
        placement={} if settings is None else read_placement(settings),
        engine=read_engine(engine),
        kernel=probe_kernel(),
        kernel_openvswitch=Path("/sys/module/openvswitch").exists(),
        now=time.time(),
        rtc=read_rtc(),
        synchronised=read_synchronised(),
        disk_path=disk_path,
        disk_free=shutil.disk_usage(disk_path).free,
        missing_users=tuple(user for user in USERS if not _is_user(user)),
        leg_names=tuple(leg.interface for lane in lanes for leg in _find_legs(lane)),
        require_hyperscan=settings is None or settings.inspection.require_hyperscan,
        switch=None if settings is None else read_switch(settings.switch),
        devices=() if settings is None else read_devices(settings),
        super_packets={} if settings is None else read_super_packets(settings),
        shortcuts={} if settings is None else read_shortcuts(settings),
        commands={name: _has_command(name) for name in COMMANDS},
    )
