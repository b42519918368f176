"""A lab whose service host is a VM of the image: its host.yaml, and QEMU's command from libvirt's XML. Pure."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from appliance.hosting.spec import HostSpec, build_ports, parse_spec
from appliance.lab.plan import (
    APPLIANCE_ADDRESS,
    BRIDGE,
    HOST_ADDRESS,
    LabLane,
    LabState,
    build_state,
)
from appliance.lab.qemu import Nic, VmSpec
from steering.errors import HairpinError
from steering.model import Profile

API_PORT = 8470
MANAGEMENT_BRIDGE = "br-mgmt"
MANAGEMENT_TAP = "hp-mgmt"
MANAGER_PORT = "hp-adm"
MANAGER_DEVICE = "eth0"
QEMU_ROLE = "qemu"
CORES = 2
MEMORY_MIB = 2560
DISK_BYTES = 8 * 2**30
BFD_MILLISECONDS = {True: 50, False: 200}
"""By whether the VM has KVM: an emulated one answers late, and a lane that is declared dead is not inspected."""


def build_vm_state(name: str, vms: int, *, now: float, super_packets: bool, kvm: bool) -> LabState:
    """The whole of a new lab. Raises WrongInput for a wrong name or number of VMs."""
    state = build_state(
        name,
        vms,
        serve=False,
        overrides={},
        random=bytes(10),
        api_port=API_PORT,
        now=now,
        super_packets=super_packets,
    )
    state = replace(state, service_vm=True)
    return replace(state, lanes=build_host_lanes(build_host(state, kvm=kvm)))


def render_host(state: LabState, *, kvm: bool) -> str:
    """`host.yaml` of the lab's hypervisor, as its administrator would write it."""
    document = {
        "apiVersion": "hairpin/v1",
        "kind": "Host",
        "name": f"lab-{state.name}",
        "address": HOST_ADDRESS,
        "bridge": BRIDGE,
        "directory": str(state.directory / "host-tls"),
        "ovsDatabase": str(state.ovs_dir / "conf.db"),
        "vmDirectory": str(state.directory / "host-vm"),
        "taps": "kept",
        "bfdMilliseconds": BFD_MILLISECONDS[kvm],
        "lanes": [{"profile": "prevent", "vlan": 3901}, {"profile": "detect", "vlan": 3902}],
        "vm": {
            "memoryMiB": MEMORY_MIB,
            "cpus": CORES,
            "qemuGroup": "root",
            "management": {"bridge": MANAGEMENT_BRIDGE, "address": f"{APPLIANCE_ADDRESS}/24"},
        },
    }
    return yaml.safe_dump(document, sort_keys=False)


def build_host(state: LabState, *, kvm: bool) -> HostSpec:
    return parse_spec(render_host(state, kvm=kvm))


def build_host_lanes(host: HostSpec) -> tuple[LabLane, ...]:
    """The lanes that `hairpin host prepare` makes of it. Their BFD addresses are its secret."""
    ports = build_ports(host, bytes(32))

    def build(profile: Profile, vlan: int, queue: int) -> LabLane:
        legs = {port.leg: port for port in ports if port.profile is profile}
        return LabLane(
            profile=str(profile),
            vlan=vlan,
            queues=(queue,),
            leg_a=legs["a"].interface,
            leg_b=legs["b"].interface,
            device_a="",
            device_b="",
            ofport_a=legs["a"].ofport,
            ofport_b=legs["b"].ofport,
            bfd_mac="",
            leg_c=legs["c"].interface,
            ofport_c=legs["c"].ofport,
        )

    return tuple(build(lane.profile, lane.vlan, index) for index, lane in enumerate(host.lanes))


@dataclass(frozen=True, slots=True)
class Domain:
    """What a libvirt domain says that QEMU is told. ``links``: (MAC, tap or bridge, MTU or 0)."""

    name: str
    memory_mib: int
    cores: int
    seed_name: str
    seed_file: str
    links: tuple[tuple[str, str, int], ...]


def parse_domain(text: str) -> Domain:
    """The XML that `hairpin host prepare` makes, which is trusted. Raises HairpinError for another."""
    try:
        domain = ElementTree.fromstring(text)  # noqa: S314 - our own program's
        entry = _find(domain, "sysinfo/entry")
        links = []
        for link in domain.iterfind("devices/interface"):
            target, source, mtu = (link.find(name) for name in ("target", "source", "mtu"))
            where = "" if target is None else target.attrib["dev"]
            if target is None and source is not None:
                where = source.attrib["bridge"]
            size = 0 if mtu is None else int(mtu.attrib["size"])
            links.append((_find(link, "mac").attrib["address"], where, size))
        return Domain(
            name=_find(domain, "name").text or "",
            memory_mib=int(_find(domain, "memory").text or ""),
            cores=int(_find(domain, "vcpu").text or ""),
            seed_name=entry.attrib["name"],
            seed_file=entry.attrib["file"],
            links=tuple(links),
        )
    except (ElementTree.ParseError, KeyError, ValueError) as fault:
        raise HairpinError(f"no domain of `hairpin host prepare`: {fault!r}") from fault


def _find(parent: ElementTree.Element, path: str) -> ElementTree.Element:
    found = parent.find(path)
    if found is None:
        raise KeyError(path)
    return found


def build_vm_spec(state: LabState, domain: Domain, disk: Path) -> VmSpec:
    """As libvirt would start it: a leg's tap hands super-packets on (``vnet_hdr``), its MTU is told the guest."""
    nics = tuple(
        Nic.tap(
            MANAGEMENT_TAP if where == MANAGEMENT_BRIDGE else where,
            mac,
            options=f"host_mtu={mtu}" if mtu else "",
        )
        for mac, where, mtu in domain.links
    )
    return VmSpec(
        disk=disk,
        directory=state.directory / "vm",
        disk_format="qcow2" if disk.suffix == ".qcow2" else "raw",
        disk_bytes=DISK_BYTES,
        memory_mib=domain.memory_mib,
        cores=domain.cores,
        nics=nics,
        namespace=state.hypervisor,
        options=("-fw_cfg", f"name={domain.seed_name},file={domain.seed_file}"),
    )


def find_image(named: str | None, found: Iterable[Path]) -> Path | None:
    """The disk that is named, or else the newest of those that were built; None for none.

    ``found``: in order of age, the oldest first. A raw disk is read faster than a compressed one.
    """
    if named:
        return Path(named)
    built = list(found)
    best = [path for path in built if path.suffix == ".raw"] or built
    return best[-1] if best else None
