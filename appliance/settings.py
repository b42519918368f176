"""Every setting of the management service, declared once; `docs/settings.md` is generated from here.

One YAML file, read by every process of the appliance (serve, inspect, observe). Unknown keys and
wrong values are refused, all at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from steering.errors import FieldError, WrongInput
from steering.model import Lane, Leg, Profile

Vlan = Annotated[int, Field(ge=1, le=4094)]
QueueNumber = Annotated[int, Field(ge=0, le=65535)]
PortNumber = Annotated[int, Field(ge=1, le=65535)]
InterfaceName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}$")]


class Document(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SwitchSettings(Document):
    """The bridge that is steered, reached by connection strings as OVS writes them."""

    ovsdb: str = Field(
        default="unix:/run/openvswitch/db.sock",
        pattern=r"^(unix:/|ssl:|tcp:(127\.|\[::1\]))",
        description="OVSDB server: `unix:PATH`, or `ssl:HOST:PORT`; `tcp:` to loopback only.",
    )
    bridge: str = Field(default="br-int", pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,14}$")
    openflow: str = Field(
        default="unix:/run/openvswitch/br-int.mgmt",
        pattern=r"^(unix:/|ssl:|tcp:(127\.|\[::1\]))",
        description="The bridge's OpenFlow management connection.",
    )
    vswitchd: Path | None = Field(
        default=None,
        description="ovs-vswitchd's control socket, for `ofproto/trace`; none over the network.",
    )


class LegSettings(Document):
    interface: InterfaceName = Field(description="The OVS port.")
    device: InterfaceName = Field(description="Its other end, in the service host.")


class LaneSettings(Document):
    """One lane: an inspection profile with its VLAN, its queues and its two legs."""

    profile: Profile
    vlan: Vlan
    queues: tuple[QueueNumber, ...] = Field(min_length=1, max_length=64)
    leg_a: LegSettings = Field(alias="legA")
    leg_b: LegSettings = Field(alias="legB")

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class InspectionSettings(Document):
    """The engines: who they run as, what they are built on, how long they may take."""

    user: str = Field(default="hairpin-engine", description="The user each engine runs as.")
    suricata: Path = Path("/usr/bin/suricata")
    netns: str | None = Field(
        default=None,
        description="Network namespace of the service host (the lab's); none in the service VM.",
    )
    dialect: Literal["auto", "iptables", "nftables"] = Field(
        default="auto", description="How packets are queued; `auto` probes the kernel."
    )
    require_hyperscan: bool = Field(default=True, alias="requireHyperscan")
    eve_limit_bytes: int = Field(
        default=256 * 2**20,
        alias="eveLimitBytes",
        ge=2**20,
        description="EVE files are rotated at this size.",
    )

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class RuleSource(Document):
    """Where rules come from beside the starter rules: a `file://` or `https://` URL, or an index name."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9./_-]{0,63}$")
    url: str | None = Field(default=None, pattern=r"^(file:///|https://)")


class RulesSettings(Document):
    starter: bool = Field(default=True, description="Take the starter rules in `suricata/rules`.")
    sources: tuple[RuleSource, ...] = ()
    floor: int = Field(
        default=1, ge=1, description="A ruleset with fewer rules than this is refused."
    )


class ApiSettings(Document):
    listen: str = Field(
        default="127.0.0.1", description="Address to listen on; loopback unless changed."
    )
    port: PortNumber = 8470
    body_limit_bytes: int = Field(default=4 * 2**20, alias="bodyLimitBytes", ge=1024)

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class SyslogExport(Document):
    """A SIEM that takes RFC 5424 syslog with octet counting (RFC 6587, RFC 5425)."""

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,31}$")
    transport: Literal["tcp", "tls"] = "tls"
    host: str
    port: PortNumber = 6514
    ca_file: Path | None = Field(default=None, alias="caFile")
    cert_file: Path | None = Field(default=None, alias="certFile")
    key_file: Path | None = Field(default=None, alias="keyFile")

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class VisibilitySettings(Document):
    """Flow records of a mirror port by nfstream, in a process of its own."""

    device: InterfaceName | None = Field(
        default=None, description="The mirror port's device; none: no records."
    )
    netns: str | None = None
    idle_seconds: int = Field(default=15, alias="idleSeconds", ge=1)
    active_seconds: int = Field(default=60, alias="activeSeconds", ge=1)

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Settings(Document):
    api_version: Literal["hairpin/v1"] = Field(default="hairpin/v1", alias="apiVersion")
    kind: Literal["Settings"] = "Settings"
    name: str = Field(default="hairpin", pattern=r"^[a-z0-9][a-z0-9-]{0,31}$")
    state_dir: Path = Field(default=Path("/var/lib/hairpin"), alias="stateDir")
    run_dir: Path = Field(default=Path("/run/hairpin"), alias="runDir")
    switch: SwitchSettings = Field(default_factory=SwitchSettings)
    lanes: tuple[LaneSettings, ...] = Field(min_length=1, max_length=8)
    inspection: InspectionSettings = Field(default_factory=InspectionSettings)
    rules: RulesSettings = Field(default_factory=RulesSettings)
    api: ApiSettings = Field(default_factory=ApiSettings)
    export: tuple[SyslogExport, ...] = ()
    visibility: VisibilitySettings = Field(default_factory=VisibilitySettings)

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    @model_validator(mode="after")
    def _lanes_do_not_share(self) -> Settings:
        shared: dict[str, list[str]] = {
            "profile": [str(lane.profile) for lane in self.lanes],
            "vlan": [str(lane.vlan) for lane in self.lanes],
            "queue": [str(queue) for lane in self.lanes for queue in lane.queues],
            "leg": [leg.interface for lane in self.lanes for leg in (lane.leg_a, lane.leg_b)],
            "device": [leg.device for lane in self.lanes for leg in (lane.leg_a, lane.leg_b)],
        }
        for what, values in shared.items():
            if len(set(values)) != len(values):
                raise ValueError(f"two lanes share a {what}: {', '.join(values)}")
        return self

    # Where things are, relative to the two directories: declared here and nowhere else.

    @property
    def token_file(self) -> Path:
        """The API's bearer token, mode 0600."""
        return self.state_dir / "token"

    @property
    def database(self) -> Path:
        return self.state_dir / "hairpin.db"

    @property
    def rules_dir(self) -> Path:
        return self.state_dir / "rules"

    @property
    def inspection_state(self) -> Path:
        """What `hairpin inspect` last published: engines, dialect, faults (JSON, replaced atomically)."""
        return self.run_dir / "inspection.json"

    def lane_dir(self, lane: Lane) -> Path:
        """The engine's directory: suricata.yaml, command socket, eve.json, log."""
        return self.run_dir / "lanes" / lane.name

    def eve_file(self, lane: Lane) -> Path:
        return self.lane_dir(lane) / "eve.json"

    def engine_socket(self, lane: Lane) -> Path:
        return self.lane_dir(lane) / "command.socket"

    def ruleset(self, lane: Lane) -> Path:
        """The rule file in force for a lane; always a complete, tested file."""
        return self.rules_dir / lane.name / "current" / "suricata.rules"

    @property
    def flow_spool(self) -> Path:
        """Flow records written by `hairpin observe`, one JSON object a line."""
        return self.run_dir / "observe" / "flows.json"

    def build_lanes(self) -> tuple[Lane, ...]:
        """The lanes as values, numbered from 1 in the order of the file; ofports not yet known."""
        return tuple(
            Lane(
                number=number,
                profile=lane.profile,
                vlan=lane.vlan,
                queues=lane.queues,
                leg_a=Leg(lane.leg_a.interface, lane.leg_a.device),
                leg_b=Leg(lane.leg_b.interface, lane.leg_b.device),
            )
            for number, lane in enumerate(self.lanes, start=1)
        )


def parse_settings(text: str) -> Settings:
    """Settings from YAML text. Raises WrongInput with every fault and its path."""
    try:
        return Settings.model_validate(yaml.safe_load(text) or {})
    except yaml.YAMLError as fault:
        raise WrongInput([FieldError("(file)", f"not YAML: {fault}")]) from fault
    except ValidationError as fault:
        raise WrongInput(
            [
                FieldError(".".join(map(str, error["loc"])) or "(file)", error["msg"])
                for error in fault.errors()
            ]
        ) from fault


def read_settings(path: Path) -> Settings:
    """As `parse_settings`, from a file."""
    try:
        text = path.read_text()
    except OSError as fault:
        raise WrongInput([FieldError(str(path), fault.strerror or str(fault))]) from fault
    return parse_settings(text)
