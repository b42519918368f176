"""What a hypervisor is to be prepared for: one YAML file, `host.yaml`; all else is derived from it.

Names are OVS's and libvirt's. Nothing here does I/O.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_interface
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from appliance.settings import build_faults, find_repeated
from appliance.settings_values import Name, PortNumber, Vlan
from steering.documents import parse_text
from steering.errors import FieldError, WrongInput
from steering.model import Profile

TAG_BYTES = 4  # of the lane's VLAN: so much longer than a VM's frame is a leg's
SHORT = {Profile.PREVENT: "prev", Profile.DETECT: "det"}
CANARY_PORT = "hp-canary"
LAST_OFPORT = 65279  # ovs-vswitchd.conf.db(5), Interface, ofport_request
# OVS itself never gives a port a number from here on: no VM that comes later can be taken for a leg.
FIRST_OFPORT = 65000

Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9]([A-Za-z0-9.-]{0,61}[A-Za-z0-9])?$")]
BridgeName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}$")]
# Goes into shell scripts and XML (quoted there all the same): nothing but what paths are made of.
HostPath = Annotated[str, Field(pattern=r"^(/[A-Za-z0-9_][A-Za-z0-9_.+-]*)+$", max_length=200)]


def _check_address(value: str) -> str:
    address = ip_address(value)
    # A zone (`%`) may be any text, and what is made from this goes into scripts.
    odd = getattr(address, "scope_id", None) or getattr(address, "ipv4_mapped", None)
    if odd or address.is_unspecified or address.is_multicast or address == _BROADCAST:
        raise ValueError("one address of a host, without a zone")
    return str(address)


def _check_host_address(value: str) -> str:
    value = _check_address(value)
    if value.startswith("fe80:"):
        raise ValueError("a link-local address: the appliance can't connect to it")
    return value


def _check_interface(value: str) -> str:
    if "/" not in value or "%" in value:
        raise ValueError("must be ADDRESS/PREFIX")
    return str(ip_interface(value))


_BROADCAST = IPv4Address("255.255.255.255")
Address = Annotated[str, AfterValidator(_check_address)]
HostAddress = Annotated[str, AfterValidator(_check_host_address)]


class Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class HostLane(Part):
    """One lane; its legs are named after its profile."""

    profile: Profile
    vlan: Vlan
    shortcut: bool = True


class ManagementNetwork(Part):
    """Where the appliance's own address is: never on the bridge that is steered."""

    bridge: BridgeName | None = None
    network: Word | None = None
    address: Annotated[str, AfterValidator(_check_interface)] | None = None
    gateway: Address | None = None
    dns: tuple[Address, ...] = ()

    @model_validator(mode="after")
    def _one_place(self) -> ManagementNetwork:
        if (self.bridge is None) == (self.network is None):
            raise ValueError("give bridge (a Linux bridge) or network (one of libvirt's)")
        if self.address is None and (self.gateway or self.dns):
            raise ValueError("gateway and dns come with an address; without one DHCP tells them")
        return self


class ServiceVm(Part):
    """The service VM, as libvirt is told.

    ``virt_type`` `qemu`: emulated, where guests have no KVM. ``secure_boot`` False: for hosts without firmware that
    enforces it and has no keys yet.
    """

    name: Word = "hairpin"
    image: HostPath = "/var/lib/libvirt/images/hairpin.qcow2"
    memory_mib: int = Field(default=4096, alias="memoryMiB", ge=1024, le=1 << 20)
    cpus: int = Field(default=2, ge=1, le=64)
    virt_type: Literal["kvm", "qemu"] = Field(default="kvm", alias="virtType")
    secure_boot: bool = Field(default=True, alias="secureBoot")
    qemu_group: Word = Field(default="libvirt-qemu", alias="qemuGroup")
    management: ManagementNetwork


class HostSpec(Part):
    """`host.yaml`. ``tls`` `existing`: the switch has certificates already, which are left as they are.

    ``taps``: `vm`, they come and go with it; `kept`, they are made beforehand, and must be again after a
    restart of the host (Open vSwitch's userspace datapath never takes a device of the same name again).
    ``ovs_database``: its owner is whom Open vSwitch runs as, and gets the certificates.
    """

    api_version: Literal["hairpin/v1"] = Field(default="hairpin/v1", alias="apiVersion")
    kind: Literal["Host"] = "Host"
    name: Name
    address: HostAddress
    names: tuple[Word, ...] = ()
    bridge: BridgeName = "br-int"
    ovsdb_port: PortNumber = Field(default=6640, alias="ovsdbPort")
    openflow_port: PortNumber = Field(default=6653, alias="openflowPort")
    directory: HostPath = "/etc/openvswitch/hairpin"
    ovs_database: HostPath = Field(default="/etc/openvswitch/conf.db", alias="ovsDatabase")
    vm_directory: HostPath = Field(default="/var/lib/hairpin-host", alias="vmDirectory")
    tls: Literal["issue", "existing"] = "issue"
    taps: Literal["vm", "kept"] = "vm"
    vm_mtu: int = Field(default=1500, alias="vmMtu", ge=576, le=65000)
    bfd_milliseconds: int = Field(default=50, alias="bfdMilliseconds", ge=10, le=1000)
    first_ofport: int = Field(
        default=FIRST_OFPORT, alias="firstOfport", ge=32768, le=LAST_OFPORT - 64
    )
    lanes: tuple[HostLane, ...] = Field(min_length=1, max_length=8)
    vm: ServiceVm

    @model_validator(mode="after")
    def _nothing_twice(self) -> HostSpec:
        for what, values in (
            ("profile", [str(lane.profile) for lane in self.lanes]),
            ("vlan", [str(lane.vlan) for lane in self.lanes]),
        ):
            if len(set(values)) != len(values):
                raise ValueError(f"two lanes have the same {what}")
        if self.ovsdb_port == self.openflow_port:
            raise ValueError("ovsdbPort and openflowPort are the same")
        own = self.vm.management.address
        if own is not None and own.partition("/")[0] == self.address:
            raise ValueError(
                f"vm.management.address is {self.address}, the host's own address: the appliance needs another"
            )
        if self.vm.management.bridge == self.bridge:
            raise ValueError(
                f"vm.management.bridge is {self.bridge}, the bridge that is steered: after a restart of "
                "the host the appliance could not reach the switch"
            )
        return self


@dataclass(frozen=True, slots=True)
class LegPort:
    """A port of the bridge, which is a tap of the service VM. ``leg``: a, b, c; or "canary"."""

    interface: str
    leg: str
    vlan: int
    ofport: int
    mac: str
    profile: Profile | None = None
    bfd_mac: str = ""


def parse_spec(text: str) -> HostSpec:
    """Raises WrongInput with every fault and its path."""
    documents = parse_text(text)
    if len(documents) != 1:
        raise WrongInput([FieldError("(file)", f"{len(documents)} documents; one is read")])
    faults = [
        FieldError(path, "stands here more than once") for path in find_repeated(documents[0])
    ]
    try:
        # As JSON, so that strictness is JSON's: lists for tuples and text for words, nothing else.
        text = json.dumps(documents[0])
        spec = HostSpec.model_validate_json(text, strict=True, by_alias=True, by_name=False)
    except ValidationError as fault:
        raise WrongInput([*faults, *build_faults(fault)]) from fault
    if faults:
        raise WrongInput(faults)
    return spec


def build_ports(spec: HostSpec, secret: bytes) -> tuple[LegPort, ...]:
    """Legs of all lanes, then the canary's port.

    ``secret`` (32 random bytes) makes the lanes' BFD addresses, so that no VM can make up BFD frames. The
    VM's MACs are made from names: they are no secret, and the same each time.
    """
    ports = []
    for index, lane in enumerate(spec.lanes):
        mark = hmac.new(secret, f"bfd {lane.profile}".encode(), hashlib.sha256).digest()
        for place, leg in enumerate("abc" if lane.shortcut else "ab"):
            interface = f"hp-{SHORT[lane.profile]}-{leg}"
            ports.append(
                LegPort(
                    interface,
                    leg,
                    lane.vlan,
                    spec.first_ofport + 4 * index + place,
                    build_mac(spec, interface),
                    lane.profile,
                    "" if leg == "c" else _render_mac(mark),
                )
            )
    canary = spec.first_ofport + 4 * len(spec.lanes)
    mac = build_mac(spec, CANARY_PORT)
    return (*ports, LegPort(CANARY_PORT, "canary", spec.lanes[0].vlan, canary, mac))


def build_mac(spec: HostSpec, what: str) -> str:
    """A locally administered address for one device of the service VM."""
    return _render_mac(hashlib.sha256(f"{spec.name}/{spec.vm.name}/{what}".encode()).digest())


def _render_mac(random: bytes) -> str:
    return ":".join(f"{byte:02x}" for byte in (0x02, *random[:5]))


def seed_path(spec: HostSpec) -> str:
    """On the host: what the VM is told at its first boot."""
    return f"{spec.vm_directory}/{spec.vm.name}-seed.yaml"


def domain_path(spec: HostSpec) -> str:
    """On the host: what libvirt is told of the VM."""
    return f"{spec.vm_directory}/{spec.vm.name}.xml"


def render_listener(spec: HostSpec, port: int) -> str:
    """As OVS writes where it listens: ``pssl:PORT:ADDRESS``."""
    return f"pssl:{port}:{_bracket(spec.address)}"


def render_connection(spec: HostSpec, port: int) -> str:
    """As the settings write where the appliance connects to."""
    return f"ssl:{_bracket(spec.address)}:{port}"


def _bracket(address: str) -> str:
    parsed: IPv4Address | IPv6Address = ip_address(address)
    return f"[{parsed}]" if parsed.version == 6 else str(parsed)


def build_digest(spec: HostSpec, authority: str = "") -> str:
    """Tells one plan from another. What the VM is like does not matter to the switch, but its name does: by it
    files are called, of which those of an earlier one would stay.

    ``authority``: the CA's certificate, so that keys of another folder don't silently take the place of those that
    the appliance knows.
    """
    shown: dict[str, Any] = spec.model_dump(mode="json", by_alias=True, exclude={"vm"})
    shown |= {"vm": spec.vm.name, "authority": authority.strip()}
    return hashlib.sha256(repr(sorted(shown.items())).encode()).hexdigest()[:12]
