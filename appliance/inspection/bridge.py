"""The door to netlink: each lane's bridge in the service host, made right and kept right.

Works in the network namespace of the calling thread. Two ports and no learning: flooding is
forwarding. Nothing here has an address or answers ARP, so the service host itself says nothing in a
lane. Rules (`netfilter`) come before: a bridge without them would forward everything.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
from pyroute2 import IPRoute, NetlinkError
from pyroute2.netns import setns

from appliance.inspection.queueing import find_bridge_name
from steering.errors import HairpinError
from steering.model import Lane

log = structlog.get_logger("inspection.bridge")

IFF_UP = 0x1
IFF_NOARP = 0x80
IFF_PROMISC = 0x100
NAMESPACES = Path("/var/run/netns")


@dataclass(frozen=True, slots=True)
class BridgeReport:
    """A lane's bridge after it was seen to. `changes` is what was not as it should be and was mended,
    `missing` the devices that are not there, `mtus` what each device that is there can carry."""

    changes: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    mtus: tuple[int, ...] = ()


def enter_namespace(name: str | None) -> None:
    """Move this thread into a named network namespace; threads and processes it starts come along.

    Must run before the process has other threads. Nothing happens when it is there already. Raises
    HairpinError when there is no such namespace or it may not be entered.
    """
    if name is None:
        return
    path = NAMESPACES / name
    try:
        wanted, present = os.stat(path), os.stat("/proc/thread-self/ns/net")
        if (wanted.st_dev, wanted.st_ino) != (present.st_dev, present.st_ino):
            setns(str(path))
    except OSError as fault:
        raise HairpinError(
            f"the network namespace `{name}` can't be entered: {fault.strerror}",
            "make it, or correct inspection.netns in the settings",
        ) from fault


def write_bridges(lanes: Sequence[Lane]) -> tuple[BridgeReport, ...]:
    """Make every lane's bridge right; one report a lane, in their order. Idempotent; blocks shortly.

    Raises HairpinError when the kernel refuses.
    """
    try:
        with IPRoute() as netlink:
            return tuple(_write_bridge(netlink, lane) for lane in lanes)
    except NetlinkError as fault:
        raise HairpinError(
            f"a lane's bridge can't be made: {fault}",
            "run `hairpin doctor`; is this CAP_NET_ADMIN?",
        ) from fault


def write_lone_device(device: str, whose: str, *, hears_all: bool = False) -> BridgeReport:
    """Make the device of a canary or a third leg right: up, silent, in no bridge. Idempotent; blocks shortly.

    ``hears_all``: what comes back to it is for another address than its own, and a card (virtio's, too) drops such.
    Raises HairpinError when the kernel refuses.
    """
    try:
        with IPRoute() as netlink:
            link = _find_link(netlink, device)
            if link is None:
                return BridgeReport(missing=(device,))
            changes = _write_quiet(netlink, link, device)
            if link.get("IFLA_MASTER"):
                netlink.link("set", index=link["index"], master=0)
                changes.append(f"{device} was in a bridge")
            if hears_all and not link["flags"] & IFF_PROMISC:
                flags = link["flags"] | IFF_PROMISC
                netlink.link("set", index=link["index"], flags=flags, change=IFF_PROMISC)
                changes.append(f"{device} heard its own address only")
            changes += _write_up(netlink, link, device)
    except NetlinkError as fault:
        raise HairpinError(
            f"{whose} device {device} can't be made right: {fault}",
            "run `hairpin doctor`; is this CAP_NET_ADMIN?",
        ) from fault
    if changes:
        log.info("device changed", device=device, changes=changes)
    return BridgeReport(tuple(changes), (), (int(link.get("IFLA_MTU")),))


def remove_bridges(lanes: Sequence[Lane]) -> None:
    """Take the lanes' bridges away; their devices stay, down and without a master."""
    with IPRoute() as netlink:
        for lane in lanes:
            for device in (lane.leg_a.device, lane.leg_b.device):
                if link := _find_link(netlink, device):
                    netlink.link("set", index=link["index"], state="down")
            if bridge := _find_link(netlink, find_bridge_name(lane)):
                netlink.link("del", index=bridge["index"])


def _find_link(netlink: Any, name: str) -> Any | None:
    index = netlink.link_lookup(ifname=name)
    return netlink.get_links(index[0])[0] if index else None


def _write_bridge(netlink: Any, lane: Lane) -> BridgeReport:
    name = find_bridge_name(lane)
    changes: list[str] = []
    missing: list[str] = []
    mtus: list[int] = []
    bridge = _find_link(netlink, name)
    if bridge is None:
        netlink.link(
            "add", ifname=name, kind="bridge", br_stp_state=0, br_mcast_snooping=0, br_ageing_time=0
        )
        bridge = _find_link(netlink, name)
        changes.append(f"{name} was missing")
    if bridge is None:
        raise HairpinError(f"the bridge {name} vanished while it was made")
    data = bridge.get_nested("IFLA_LINKINFO", "IFLA_INFO_DATA")
    for attribute, key in (
        ("IFLA_BR_STP_STATE", "br_stp_state"),
        ("IFLA_BR_MCAST_SNOOPING", "br_mcast_snooping"),
    ):
        if data is not None and data.get(attribute):
            netlink.link("set", index=bridge["index"], kind="bridge", **{key: 0})
            changes.append(f"{name} had {key} on")
    changes += _write_quiet(netlink, bridge, name)
    for device in (lane.leg_a.device, lane.leg_b.device):
        link = _find_link(netlink, device)
        if link is None:
            missing.append(device)
            continue
        mtus.append(int(link.get("IFLA_MTU")))
        # Enslaved while down and silent: nothing may pass or be said before learning is off.
        changes += _write_quiet(netlink, link, device)
        if link.get("IFLA_MASTER") != bridge["index"]:
            netlink.link("set", index=link["index"], master=bridge["index"])
            changes.append(f"{device} was not in {name}")
        port = _find_link(netlink, device)
        learning = port.get_nested("IFLA_LINKINFO", "IFLA_INFO_SLAVE_DATA") if port else None
        if learning is None or learning.get("IFLA_BRPORT_LEARNING") != 0:
            netlink.brport("set", index=link["index"], learning=0)
            changes.append(f"{device} was learning")
        changes += _write_up(netlink, link, device)
    changes += _write_up(netlink, bridge, name)
    if changes:
        log.info("bridge changed", bridge=name, changes=changes)
    return BridgeReport(tuple(changes), tuple(missing), tuple(mtus))


def _write_quiet(netlink: Any, link: Any, name: str) -> list[str]:
    """No IPv6, no ARP, no address on a device."""
    changes: list[str] = []
    disabled = Path("/proc/sys/net/ipv6/conf") / name / "disable_ipv6"
    try:
        if disabled.read_text().strip() != "1":
            disabled.write_text("1")
            changes.append(f"{name} spoke IPv6")
    except FileNotFoundError:
        pass  # a kernel without IPv6
    except OSError as fault:
        raise HairpinError(f"IPv6 on {name} can't be disabled: {fault.strerror}") from fault
    if not link["flags"] & IFF_NOARP:
        netlink.link("set", index=link["index"], flags=link["flags"] | IFF_NOARP, change=IFF_NOARP)
        changes.append(f"{name} answered ARP")
    if netlink.get_addr(index=link["index"]):
        netlink.flush_addr(index=link["index"])
        changes.append(f"{name} had an address")
    return changes


def _write_up(netlink: Any, link: Any, name: str) -> list[str]:
    if link["flags"] & IFF_UP:
        return []
    netlink.link("set", index=link["index"], state="up")
    return [f"{name} was down"]
