"""What a lab consists of, as values: names, addresses, ports, lanes and the settings file.

Everything is derived from the lab's name and the number of VMs, so a lab whose state file was lost
can still be found and taken down. Nothing here does I/O.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from appliance.settings import Settings, parse_settings
from steering.errors import FieldError, WrongInput

ROOT = Path("/run/hairpin-lab")
TIERS = ("web", "app", "db")
DEFAULT_VMS = 6
MAX_VMS = 64
BRIDGE = "br-int"
VM_MTU = 1500
# A lane's frame is a VM's frame and a VLAN tag; 1600 leaves room for both.
SWITCH_MTU = 1600
# Exactly that where the switch cuts super-packets to the MTU of the port they leave by (docs/mtu.md).
LEG_MTU = VM_MTU + 4
MIRROR_PORT = "hp-mirror"
MIRROR_DEVICE = "mir0"
MIRROR_OFPORT = 290
CANARY_PORT = "hp-canary"
CANARY_DEVICE = "canary"
CANARY_OFPORT = 291
FIRST_LEG_OFPORT = 200
FIRST_THIRD_LEG_OFPORT = 210
MOVED_OFPORT = 300
# Of the management network, where the service host is a VM.
HOST_ADDRESS, APPLIANCE_ADDRESS, MANAGER_ADDRESS = "10.78.0.1", "10.78.0.2", "10.78.0.9"
# The lab is made by the administrator of the switch, not by Hairpin: its flow has no cookie.
PLAIN_FLOW = "priority=0,actions=NORMAL"

_NAMESPACE = uuid.UUID("0b0d37b5-5d6b-5a35-9a33-6f6c3a1c7f10")
# No "-": a namespace `hp-LAB-THING` then belongs to one lab only.
_LAB_NAME = re.compile(r"[a-z0-9]{1,15}")
_VM_NAME = re.compile(r"[a-z][a-z0-9-]{0,31}")
_RESERVED = ("hv", "svc", "obs", "adm")


@dataclass(frozen=True, slots=True)
class LabVm:
    """A VM of the lab: a namespace with `eth0`, and a port on the switch as libvirt writes it."""

    name: str
    number: int
    zone: str
    netns: str
    interface: str
    ofport: int
    mac: str
    address4: str
    address6: str
    vm_id: str
    iface_id: str
    device: str = "eth0"


@dataclass(frozen=True, slots=True)
class LabLane:
    """A lane's veth pairs; ``bfd_mac`` is random, so that no VM can make up its BFD frames.

    The third, leg C, is for frames whose connection may take a shortcut; a lab of before has none.
    """

    profile: str
    vlan: int
    queues: tuple[int, ...]
    leg_a: str
    leg_b: str
    device_a: str
    device_b: str
    ofport_a: int
    ofport_b: int
    bfd_mac: str
    leg_c: str = ""
    device_c: str = ""
    ofport_c: int = 0

    @property
    def legs(self) -> tuple[tuple[str, str, int], ...]:
        """(OVS port, device in the service host, ofport) of the two legs that packets are steered by."""
        return (
            (self.leg_a, self.device_a, self.ofport_a),
            (self.leg_b, self.device_b, self.ofport_b),
        )

    @property
    def all_legs(self) -> tuple[tuple[str, str, int], ...]:
        """As `legs`, and leg C where there is one."""
        third = ((self.leg_c, self.device_c, self.ofport_c),) if self.leg_c else ()
        return (*self.legs, *third)


@dataclass(frozen=True, slots=True)
class ProcessRecord:
    """A long-lived process of the lab. ``started`` tells it from a later one with the same pid.

    ``pid`` is 0 from the moment before it is started until it is known.
    """

    role: str
    pid: int = 0
    started: str = ""
    log: str = ""


@dataclass(frozen=True, slots=True)
class LabState:
    """One lab, as its state file says. A value: functions that change a lab return a new one.

    ``service_vm``: the service host is a VM of the image (appliance/lab/vm_lab.py), not a namespace.
    """

    name: str
    phase: str
    directory: Path
    vms: tuple[LabVm, ...]
    lanes: tuple[LabLane, ...]
    api_port: int
    serve: bool
    created: float
    processes: tuple[ProcessRecord, ...] = ()
    overrides: Mapping[str, Any] = field(default_factory=dict)
    super_packets: bool = True
    service_vm: bool = False

    @property
    def leg_mtu(self) -> int:
        """MTU of the legs and of their devices in the service host."""
        return LEG_MTU if self.super_packets else SWITCH_MTU

    @property
    def prefix(self) -> str:
        return f"hp-{self.name}-"

    @property
    def hypervisor(self) -> str:
        """Name of the hypervisor's network namespace."""
        return f"{self.prefix}hv"

    @property
    def service_host(self) -> str:
        """Name of the service host's network namespace."""
        return f"{self.prefix}svc"

    @property
    def observer(self) -> str:
        """Name of the network namespace at the mirror port."""
        return f"{self.prefix}obs"

    @property
    def manager(self) -> str:
        """Name of the network namespace that manages an appliance which is a VM."""
        return f"{self.prefix}adm"

    @property
    def namespaces(self) -> tuple[str, ...]:
        own = (self.manager,) if self.service_vm else (self.service_host, self.observer)
        return (self.hypervisor, *own, *(vm.netns for vm in self.vms))

    @property
    def ovs_dir(self) -> Path:
        return self.directory / "ovs"

    @property
    def log_dir(self) -> Path:
        return self.directory / "log"

    @property
    def ovsdb(self) -> str:
        """Connection string of the lab's OVSDB server."""
        return f"unix:{self.ovs_dir}/db.sock"

    @property
    def openflow(self) -> str:
        """Connection string of the bridge's OpenFlow management socket."""
        return f"unix:{self.ovs_dir}/{BRIDGE}.mgmt"

    @property
    def vswitchd(self) -> Path:
        """ovs-vswitchd's control socket."""
        return self.ovs_dir / "vswitchd.ctl"

    @property
    def settings_file(self) -> Path:
        return self.directory / "hairpin.yaml"

    @property
    def client_file(self) -> Path:
        return self.directory / "client.json"

    @property
    def state_dir(self) -> Path:
        return self.directory / "state"

    @property
    def run_dir(self) -> Path:
        return self.directory / "run"

    @property
    def keys_dir(self) -> Path:
        """What `hairpin host prepare` issued for an appliance that is a VM."""
        return self.directory / "keys"

    @property
    def token_file(self) -> Path:
        return (self.keys_dir if self.service_vm else self.state_dir) / "token"

    @property
    def api_certificate(self) -> Path:
        """The API's certificate, of an appliance that is a VM."""
        return self.directory / "api.pem"

    @property
    def url(self) -> str:
        """The API's base URL, without a path."""
        if self.service_vm:
            return f"https://{APPLIANCE_ADDRESS}:{self.api_port}"
        return f"http://127.0.0.1:{self.api_port}"

    @property
    def client_env(self) -> dict[str, str]:
        """How the command line is told where the service is."""
        env = {"HAIRPIN_URL": self.url, "HAIRPIN_TOKEN_FILE": str(self.token_file)}
        return {**env, "HAIRPIN_CA_FILE": str(self.api_certificate)} if self.service_vm else env

    @property
    def client_argv(self) -> tuple[str, ...]:
        """What goes before a command that speaks to the service."""
        return ("ip", "netns", "exec", self.manager) if self.service_vm else ()

    @property
    def settings(self) -> Settings:
        return parse_settings(render_settings(self))

    def vm(self, name: str) -> LabVm:
        """The VM of that name. Raises WrongInput when there is none."""
        for vm in self.vms:
            if vm.name == name:
                return vm
        known = ", ".join(vm.name for vm in self.vms)
        raise WrongInput([FieldError("vm", f"the lab has no VM {name!r}")], f"it has {known}")

    def process(self, role: str) -> ProcessRecord | None:
        return next((record for record in self.processes if record.role == role), None)

    def netns_argv(self, vm: str, argv: Sequence[str]) -> list[str]:
        """The command that runs ``argv`` inside a VM."""
        return ["ip", "netns", "exec", self.vm(vm).netns, *argv]

    def vsctl_argv(self, argv: Sequence[str]) -> list[str]:
        """The command that runs ovs-vsctl against the lab's switch."""
        return ["ovs-vsctl", f"--db={self.ovsdb}", "--timeout=15", *argv]

    def ofctl_argv(self, argv: Sequence[str]) -> list[str]:
        """The ovs-ofctl command ``argv[0]`` on the lab's bridge, with the rest of ``argv``."""
        return ["ovs-ofctl", "-O", "OpenFlow14", "--timeout=15", argv[0], self.openflow, *argv[1:]]

    def with_vm(self, vm: LabVm) -> LabState:
        """This lab with ``vm`` added, or put in the place of the one with its name."""
        if any(have.name == vm.name for have in self.vms):
            return replace(
                self, vms=tuple(vm if have.name == vm.name else have for have in self.vms)
            )
        return replace(self, vms=(*self.vms, vm))

    def with_process(self, record: ProcessRecord) -> LabState:
        kept = tuple(have for have in self.processes if have.role != record.role)
        return replace(self, processes=(*kept, record))


def check_lab_name(name: str) -> None:
    """Raises WrongInput unless ``name`` is one to 15 of a-z and 0-9."""
    if not _LAB_NAME.fullmatch(name):
        raise WrongInput([FieldError("name", f"{name!r} is not 1 to 15 letters a-z or digits")])


def build_vm(lab: str, name: str, number: int) -> LabVm:
    """VM ``number`` (1 to 99). The number is the last part of its MAC and addresses, in decimal."""
    faults = []
    if not _VM_NAME.fullmatch(name) or name in _RESERVED:
        faults.append(
            FieldError("vm", f"{name!r} is reserved or not a letter and up to 31 of a-z, 0-9 and -")
        )
    if not 1 <= number <= 99:
        faults.append(FieldError("number", f"{number} is not between 1 and 99"))
    if faults:
        raise WrongInput(faults)
    return LabVm(
        name=name,
        number=number,
        zone=name.partition("-")[0],
        netns=f"hp-{lab}-{name}",
        interface=f"vnet{number:02d}",
        ofport=number,
        mac=f"02:48:50:00:00:{number:02d}",
        address4=f"10.77.0.{number}",
        address6=f"fd77::{number}",
        vm_id=str(uuid.uuid5(_NAMESPACE, f"{lab}/{name}")),
        iface_id=str(uuid.uuid5(_NAMESPACE, f"{lab}/{name}/eth0")),
    )


def build_vms(lab: str, count: int) -> tuple[LabVm, ...]:
    """``count`` VMs, tier after tier: web-1, app-1, db-1, web-2, and so on."""
    if not 2 <= count <= MAX_VMS:
        raise WrongInput([FieldError("vms", f"{count} is not between 2 and {MAX_VMS}")])
    return tuple(
        build_vm(lab, f"{TIERS[index % len(TIERS)]}-{index // len(TIERS) + 1}", index + 1)
        for index in range(count)
    )


def build_lanes(random: bytes) -> tuple[LabLane, ...]:
    """The two lanes, with three legs each; ``random`` (10 bytes) makes their BFD addresses, locally administered."""
    return tuple(
        LabLane(
            profile=profile,
            vlan=3901 + index,
            queues=(index,),
            leg_a=f"hp-{short}-a",
            leg_b=f"hp-{short}-b",
            device_a=f"{short}-a",
            device_b=f"{short}-b",
            ofport_a=FIRST_LEG_OFPORT + 2 * index,
            ofport_b=FIRST_LEG_OFPORT + 2 * index + 1,
            leg_c=f"hp-{short}-c",
            device_c=f"{short}-c",
            ofport_c=FIRST_THIRD_LEG_OFPORT + index,
            bfd_mac=":".join(f"{byte:02x}" for byte in (2, *random[5 * index : 5 * index + 5])),
        )
        for index, (profile, short) in enumerate((("prevent", "prev"), ("detect", "det")))
    )


def build_state(
    name: str,
    vms: int,
    *,
    serve: bool,
    overrides: Mapping[str, Any],
    random: bytes,
    api_port: int,
    now: float,
    super_packets: bool = True,
) -> LabState:
    """The whole of a new lab. Raises WrongInput for a wrong name, number of VMs or settings."""
    check_lab_name(name)
    state = LabState(
        name=name,
        phase="starting",
        directory=ROOT / name,
        vms=build_vms(name, vms),
        lanes=build_lanes(random),
        api_port=api_port,
        serve=serve,
        created=now,
        overrides=dict(overrides),
        super_packets=super_packets,
    )
    parse_settings(render_settings(state))
    return state


def _merge(document: dict[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(document)
    for key, value in overrides.items():
        have = merged.get(key)
        both = isinstance(have, dict) and isinstance(value, Mapping)
        merged[key] = _merge(have, value) if both and have is not None else value
    return merged


def render_settings(state: LabState) -> str:
    """The settings file of this lab's appliance, as YAML.

    `inspect` is started inside its network namespace; `observe` enters its own.
    """
    document: dict[str, Any] = {
        "apiVersion": "hairpin/v1",
        "kind": "Settings",
        "name": state.name,
        "stateDir": str(state.state_dir),
        "runDir": str(state.run_dir),
        "switch": {
            "ovsdb": state.ovsdb,
            "bridge": BRIDGE,
            "openflow": state.openflow,
            "vswitchd": str(state.vswitchd),
        },
        "lanes": [
            {
                "profile": lane.profile,
                "vlan": lane.vlan,
                "queues": list(lane.queues),
                "legA": {"interface": lane.leg_a, "device": lane.device_a},
                "legB": {"interface": lane.leg_b, "device": lane.device_b},
                **(
                    {"legC": {"interface": lane.leg_c, "device": lane.device_c}}
                    if lane.leg_c
                    else {}
                ),
            }
            for lane in state.lanes
        ],
        "canary": {"interface": CANARY_PORT, "device": CANARY_DEVICE},
        "api": {"listen": "127.0.0.1", "port": state.api_port},
        "visibility": {"device": MIRROR_DEVICE, "netns": state.observer},
    }
    return yaml.safe_dump(_merge(document, state.overrides), sort_keys=False)


def build_port_args(vm: LabVm) -> list[str]:
    """ovs-vsctl arguments that add a VM's port, with the external_ids that libvirt writes."""
    return [
        "--",
        "add-port",
        BRIDGE,
        vm.interface,
        "--",
        "set",
        "Interface",
        vm.interface,
        f"ofport_request={vm.ofport}",
        f'external_ids:iface-id="{vm.iface_id}"',
        f'external_ids:attached-mac="{vm.mac}"',
        f'external_ids:vm-id="{vm.vm_id}"',
        "external_ids:iface-status=active",
    ]


def build_leg_args(lane: LabLane) -> list[str]:
    """ovs-vsctl arguments that add a lane's legs, with BFD between A and B; nothing is steered into C.

    ``tag`` keeps NORMAL from flooding a VM's frame into a leg, ``protected`` from passing a frame
    from one leg to the other; neither touches what a flow outputs. The keys of the column `bfd` are
    those of ovs-vswitchd.conf.db(5); intervals in milliseconds.
    """
    args: list[str] = []
    for interface, _device, ofport in lane.all_legs:
        args += ["--", "add-port", BRIDGE, interface, f"tag={lane.vlan}"]
        args += ["--", "set", "Port", interface, "protected=true"]
        args += ["--", "set", "Interface", interface, f"ofport_request={ofport}"]
        args += [f"external_ids:hairpin-lane={lane.profile}"]
        if interface == lane.leg_c:
            continue
        args += ["bfd:enable=true", "bfd:min_rx=50", "bfd:min_tx=50"]
        args += [f'bfd:bfd_local_dst_mac="{lane.bfd_mac}"']
        args += [f'bfd:bfd_remote_dst_mac="{lane.bfd_mac}"']
    return args


def build_canary_args(lane: LabLane) -> list[str]:
    """ovs-vsctl arguments that add Hairpin's own port, kept out of NORMAL as a leg is.

    Not ``protected``: between two such ports OVS skips what a flow outputs, too.
    """
    args = ["--", "add-port", BRIDGE, CANARY_PORT, f"tag={lane.vlan}"]
    return [*args, "--", "set", "Interface", CANARY_PORT, f"ofport_request={CANARY_OFPORT}"]


def build_mirror_args(vms: Sequence[LabVm]) -> list[str]:
    """ovs-vsctl arguments that make the mirror: each frame once, where a VM sends it."""
    args = ["--", "add-port", BRIDGE, MIRROR_PORT]
    args += ["--", "set", "Interface", MIRROR_PORT, f"ofport_request={MIRROR_OFPORT}"]
    args += ["--", "--id=@out", "get", "Port", MIRROR_PORT]
    names = []
    for vm in vms:
        args += ["--", f"--id=@{vm.interface}", "get", "Port", vm.interface]
        names.append(f"@{vm.interface}")
    args += ["--", "--id=@mirror", "create", "Mirror", "name=hairpin-observe", "output_port=@out"]
    args += [f"select_src_port={','.join(names)}"]
    return [*args, "--", "set", "Bridge", BRIDGE, "mirrors=@mirror"]
