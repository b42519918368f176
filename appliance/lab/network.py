"""The lab's network namespaces and links, by netlink; never anything in the root namespace."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pyroute2 import NetNS, config, netns
from pyroute2.netlink.exceptions import NetlinkError

from appliance.lab.plan import (
    CANARY_DEVICE,
    CANARY_PORT,
    MIRROR_DEVICE,
    MIRROR_PORT,
    ROOT,
    SWITCH_MTU,
    VM_MTU,
    LabLane,
    LabState,
    LabVm,
)
from appliance.lab.processes import NETNS_DIR
from steering.errors import HairpinError
from steering.run import run

# pyroute2 forks to enter a namespace; on a busy machine its second is soon over.
config.default_communicate_timeout = 15
config.default_create_socket_timeout = 20

# Frames that the kernel sends of its own accord would look like a VM's, or like a leg's.
_QUIET = ("net.ipv6.conf.all.disable_ipv6=1", "net.ipv6.conf.default.disable_ipv6=1")
_VM_SYSCTLS = (
    "net.ipv6.conf.default.accept_dad=0",
    "net.ipv6.conf.default.accept_ra=0",
    "net.ipv6.conf.default.router_solicitations=0",
)


@contextlib.contextmanager
def open_namespace(name: str) -> Iterator[Any]:
    try:
        # flags=0: without it a namespace that is missing would be made.
        with NetNS(name, flags=0) as handle:
            yield handle
    except NetlinkError as fault:
        raise HairpinError(f"netlink in {name}: {fault}") from fault
    except OSError as fault:
        raise HairpinError(f"network namespace {name}: {fault}") from fault


def find_namespaces(prefix: str) -> list[str]:
    """The named network namespaces that begin with ``prefix``."""
    try:
        return sorted(name for name in os.listdir(NETNS_DIR) if name.startswith(prefix))
    except FileNotFoundError:
        return []


def is_namespace(name: str) -> bool:
    """Whether the name stands for a namespace, and isn't just a file left by a killed command."""
    return os.path.ismount(NETNS_DIR / name)


def _is_mounted() -> bool:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return any(os.path.realpath(line.split()[4]) == str(NETNS_DIR) for line in lines)


def create_namespace(name: str, *, vm: bool) -> None:
    """Make a namespace with `lo` up, quiet but for a VM's."""
    mark = ROOT / ".netns-mount"
    if not _is_mounted():
        # Making the first namespace of a machine mounts this directory on itself; whoever made
        # that mount takes it away again.
        mark.touch(mode=0o600)
    try:
        netns.create(name)
    except OSError as fault:
        raise HairpinError(
            f"can't make the network namespace {name}: {fault}",
            "this needs root with CAP_SYS_ADMIN (in a container: --privileged)",
        ) from fault
    sysctls = _VM_SYSCTLS if vm else _QUIET
    run(["ip", "netns", "exec", name, "sysctl", "-q", "-w", *sysctls])
    with open_namespace(name) as link:
        link.link("set", index=1, state="up")


def remove_namespace(name: str) -> None:
    """Remove a namespace, or what a killed command left of one."""
    try:
        netns.remove(name)
    except FileNotFoundError:
        return
    except OSError as fault:
        raise HairpinError(f"can't remove the network namespace {name}: {fault}") from fault


def remove_netns_mount() -> None:
    """Take away the mount on /run/netns if a lab made it and nobody uses it any more."""
    mark = ROOT / ".netns-mount"
    if not mark.exists() or find_namespaces(""):
        return
    if _is_mounted():
        run(["umount", str(NETNS_DIR)])
    with contextlib.suppress(OSError):
        NETNS_DIR.rmdir()
    mark.unlink(missing_ok=True)


def _add_pair(
    state: LabState, interface: str, peer_netns: str, device: str, mtu: tuple[int, int], mac: str
) -> None:
    hypervisor = state.hypervisor
    peer: dict[str, Any] = {"ifname": device, "net_ns_fd": peer_netns, "mtu": mtu[1]}
    if mac:
        peer["address"] = mac
    with open_namespace(hypervisor) as link:
        link.link("add", ifname=interface, kind="veth", mtu=mtu[0], peer=peer, state="up")
    if state.super_packets:
        return
    # OVS reads frames by AF_PACKET: a checksum left to the card would go out half done, and a
    # super-packet would not fit.
    for name, end in ((hypervisor, interface), (peer_netns, device)):
        off = ["tx", "off", "tso", "off", "gso", "off"]
        run(["ip", "netns", "exec", name, "ethtool", "-K", end, *off])


def create_vm_link(state: LabState, vm: LabVm) -> None:
    """The VM's `eth0` with its addresses, and the other end in the hypervisor."""
    pair = (VM_MTU, VM_MTU)
    _add_pair(state, vm.interface, vm.netns, vm.device, pair, vm.mac)
    with open_namespace(vm.netns) as link:
        (index,) = link.link_lookup(ifname=vm.device)
        link.link("set", index=index, state="up")
        link.addr("add", index=index, address=vm.address4, prefixlen=24)
        # IFA_F_NODAD: usable at once.
        link.addr("add", index=index, address=vm.address6, prefixlen=64, flags=0x02)


def create_lane_links(state: LabState, lane: LabLane) -> None:
    """The legs of a lane; the service host gets the devices only, `hairpin inspect` the rest."""
    pair = (state.leg_mtu, state.leg_mtu)
    for interface, device, _ofport in lane.all_legs:
        _add_pair(state, interface, state.service_host, device, pair, "")
        set_up(state.service_host, device)


def create_canary_link(state: LabState) -> None:
    """Hairpin's own port, with its other end in the service host."""
    pair = (SWITCH_MTU, SWITCH_MTU)
    _add_pair(state, CANARY_PORT, state.service_host, CANARY_DEVICE, pair, "")
    set_up(state.service_host, CANARY_DEVICE)


def create_mirror_link(state: LabState) -> None:
    pair = (SWITCH_MTU, SWITCH_MTU)
    _add_pair(state, MIRROR_PORT, state.observer, MIRROR_DEVICE, pair, "")
    set_up(state.observer, MIRROR_DEVICE)


def set_up(namespace: str, device: str) -> None:
    with open_namespace(namespace) as link:
        (index,) = link.link_lookup(ifname=device)
        link.link("set", index=index, state="up")


def remove_link(namespace: str, device: str) -> None:
    """Delete a link (and its peer); nothing when it's gone already."""
    with open_namespace(namespace) as link:
        for index in link.link_lookup(ifname=device):
            link.link("del", index=index)


def replace_address4(vm: LabVm, address: str) -> None:
    """Give a VM another IPv4 address in the place of the one it has."""
    with open_namespace(vm.netns) as link:
        (index,) = link.link_lookup(ifname=vm.device)
        # In this order: the first address of a network takes the others with it.
        try:
            link.addr("del", index=index, address=vm.address4, prefixlen=24)
        except NetlinkError as fault:
            if fault.code != errno.EADDRNOTAVAIL:
                raise
        link.addr("add", index=index, address=address, prefixlen=24)


def find_missing(names: Sequence[str]) -> list[str]:
    """The namespaces of ``names`` that don't stand."""
    return [name for name in names if not is_namespace(name)]
