"""The service VM as libvirt is told, and what it is told when it first boots. Pure.

Its legs are taps of fixed names that libvirt makes when the VM starts (interface type `ethernet`): Open vSwitch
has the ports already and takes each tap as it appears. The seed goes by fw_cfg from a file, since what is in the
domain's XML would stand on QEMU's command line, which every user of the host may read.
"""

from __future__ import annotations

import uuid
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from typing import Any

import yaml

from appliance.firstboot.parse import read_seed
from appliance.hosting.pki import Pki
from appliance.hosting.spec import (
    CANARY_PORT,
    TAG_BYTES,
    HostSpec,
    LegPort,
    build_mac,
    render_connection,
    seed_path,
)
from steering.errors import FieldError, WrongInput

CREDENTIAL = "opt/io.systemd.credentials/hairpin.seed"
# What libvirt lets no VM have under AppArmor, so that it would not start (libvirt: src/security/virt-aa-helper.c).
RESTRICTED = (
    "/bin/", "/boot/", "/etc/", "/lib", "/lost+found/", "/proc/", "/sbin/", "/selinux/", "/sys/",
    "/usr/bin/", "/usr/lib", "/usr/local/bin/", "/usr/local/etc/", "/usr/local/lib",
    "/usr/local/sbin/", "/usr/sbin/", "/usr/share/",
)  # fmt: skip
_UUIDS = uuid.UUID("6d0f3c52-6a3b-4a57-9d0f-7c1b0a52d1e4")


def render_domain(spec: HostSpec, ports: Sequence[LegPort]) -> str:
    """The domain's XML (libvirt.org/formatdomain.html)."""
    vm = spec.vm
    domain = ElementTree.Element("domain", type=vm.virt_type)

    def add(
        parent: ElementTree.Element, tag: str, text: str = "", **attributes: str
    ) -> ElementTree.Element:
        element = ElementTree.SubElement(parent, tag, attributes)
        element.text = text or None
        return element

    add(domain, "name", vm.name)
    # Always the same: libvirt refuses another domain of the same name, and by it the appliance knows its journal.
    add(domain, "uuid", str(uuid.uuid5(_UUIDS, f"{spec.name}/{vm.name}")))
    add(domain, "memory", str(vm.memory_mib), unit="MiB")
    add(domain, "vcpu", str(vm.cpus))
    add(add(domain, "sysinfo", type="fwcfg"), "entry", name=CREDENTIAL, file=seed_path(spec))
    system = add(domain, "os", firmware="efi")
    add(system, "type", "hvm", arch="x86_64", machine="q35")
    firmware = add(system, "firmware")
    # Left to itself libvirt takes firmware with Microsoft's keys, which trusts nothing of the image.
    add(firmware, "feature", enabled="yes" if vm.secure_boot else "no", name="secure-boot")
    add(firmware, "feature", enabled="no", name="enrolled-keys")
    add(add(domain, "features"), "acpi")
    add(domain, "cpu", mode="host-passthrough" if vm.virt_type == "kvm" else "maximum")
    add(domain, "on_crash", "restart")
    devices = add(domain, "devices")
    disk = add(devices, "disk", type="file", device="disk")
    add(disk, "driver", name="qemu", type="qcow2" if vm.image.endswith(".qcow2") else "raw")
    add(disk, "source", file=vm.image)
    add(disk, "target", dev="vda", bus="virtio")
    management = vm.management
    kind = "bridge" if management.bridge is not None else "network"
    link = add(devices, "interface", type=kind)
    add(link, "mac", address=build_mac(spec, "management"))
    add(link, "source", **{kind: management.bridge or management.network or ""})
    add(link, "model", type="virtio")
    for port in ports:
        link = add(devices, "interface", type="ethernet")
        add(link, "mac", address=port.mac)
        kept = {"managed": "no"} if spec.taps == "kept" else {}
        add(link, "target", dev=port.interface, **kept)
        add(link, "model", type="virtio")
        add(link, "mtu", size=str(spec.vm_mtu + TAG_BYTES))
    add(add(devices, "serial", type="pty"), "target", port="0")
    add(add(devices, "console", type="pty"), "target", type="serial", port="0")
    add(add(devices, "rng", model="virtio"), "backend", "/dev/urandom", model="random")
    ElementTree.indent(domain)
    return ElementTree.tostring(domain, encoding="unicode") + "\n"


def build_seed(
    spec: HostSpec, ports: Sequence[LegPort], pki: Pki | None, token: str
) -> dict[str, Any]:
    """What the appliance is told at its first boot; devices are found by their MACs.

    Without ``pki`` the certificates are for who runs the switch's CA to add.
    """
    switch: dict[str, Any] = {
        "bridge": spec.bridge,
        "ovsdb": render_connection(spec, spec.ovsdb_port),
        "openflow": render_connection(spec, spec.openflow_port),
    }
    if pki is not None:
        switch |= {
            "ca": pki.ca.certificate,
            "certificate": pki.appliance.certificate,
            "key": pki.appliance.key,
        }
    api: dict[str, Any] = {"token": token}
    if pki is not None:
        api |= {"certificate": pki.api.certificate, "key": pki.api.key}
    lanes = []
    for lane in spec.lanes:
        legs = {
            f"leg{port.leg.upper()}": {"interface": port.interface, "mac": port.mac}
            for port in ports
            if port.profile is lane.profile
        }
        lanes.append({"profile": str(lane.profile), "vlan": lane.vlan, **legs})
    management = spec.vm.management
    network: dict[str, Any] = {"mac": build_mac(spec, "management")}
    if management.address is None:
        network["dhcp"] = True
    else:
        network["address"] = management.address
        if management.gateway is not None:
            network["gateway"] = management.gateway
        if management.dns:
            network["dns"] = list(management.dns)
    canary = next(port for port in ports if port.interface == CANARY_PORT)
    return {
        "hairpin": {
            "name": spec.name,
            "management": network,
            "api": api,
            "switch": switch,
            "lanes": lanes,
            "canary": {"interface": canary.interface, "mac": canary.mac},
        }
    }


def check_paths(spec: HostSpec) -> None:
    """Raises WrongInput for files that libvirt would refuse to the VM, under AppArmor: when it starts is late."""
    reason = "libvirt, with AppArmor, gives no file from there to a VM; choose one below /var/lib"
    told = [
        FieldError(place, reason)
        for place, path in (("vmDirectory", seed_path(spec)), ("vm.image", spec.vm.image))
        if path.startswith(RESTRICTED)
    ]
    if told:
        raise WrongInput(told)


def check_seed(spec: HostSpec, ports: Sequence[LegPort]) -> None:
    """Raises WrongInput for what the first boot would refuse: then, in the VM, is late to learn of it.

    Token and certificates are not looked at: they are issued, or added by hand, later.
    """
    faults = read_seed(build_seed(spec, ports, None, "")["hairpin"]).faults
    told = [
        FieldError(_find_place(fault.path), f"the appliance would refuse it: {fault.reason}")
        for fault in faults
        if fault.path not in _LATER
    ]
    if told:
        raise WrongInput(told)


def _find_place(path: str) -> str:
    return f"vm.{path}" if path.startswith("management") else path


_LATER = ("api.token", "switch.ca", "switch.certificate", "switch.key")


def render_seed(spec: HostSpec, ports: Sequence[LegPort], pki: Pki | None, token: str) -> str:
    """The seed as the first boot reads it (YAML).

    The switch stands last, and its key at its end: a file that is cut off anywhere lacks what must be given,
    and is never taken for one with a lane less or without a canary.
    """
    seed = build_seed(spec, ports, pki, token)["hairpin"]
    seed["switch"] = seed.pop("switch")
    return yaml.dump({"hairpin": seed}, Dumper=_Dumper, sort_keys=False)


class _Dumper(yaml.SafeDumper):
    """Writes what has several lines (PEM) as it is."""


def _write_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    style = "|" if "\n" in text else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _write_text)
